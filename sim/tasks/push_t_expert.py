"""A scripted expert for Push-T: greedy pushes that bring the block's corners nearer to the goal's.

The block is braked in proportion to its mass and inertia and contacts have no friction, so a push at the point r (from
the centre of mass) along the inward normal n moves the block with the twist proportional to (n, m/I (r x n)). Of the
points on the block's edge the expert takes the one whose twist reduces the corners' squared distance to the goal most,
goes round the block to it and pushes as far as pays.

With noise 1 it succeeded in 128 of 128 episodes (seeds 1000 to 1127, 94 steps on average, mean best coverage 0.96);
uniformly random targets reach a mean best coverage of 0.10 and never succeed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sim.tasks import tee

if TYPE_CHECKING:
    from sim.tasks.push_t import PushT

PUSHER_RADIUS = 15.0
_GYRATION = 3000.0
"""Inertia over mass of the block in square pixels."""
_CLEARANCE = 4.0
"""Gap between pusher and block on the way to a contact, in pixels."""
_ORBIT = 105.0
"""Radius around the centre of mass on which the pusher goes round the block."""
_LOOK_AHEAD = 70.0
"""Farthest target in front of the pusher, in pixels; sets its speed."""
_SPACING = 5.0


def _edge_points() -> tuple[np.ndarray, np.ndarray]:
    """Return points (K, 2) on the edge that a pusher can touch, from the centre of mass, and inward normals (K, 2)."""
    outline = np.array([[-60, 0], [60, 0], [60, 30], [15, 30], [15, 120], [-15, 120], [-15, 30], [-60, 30]], float)
    points, normals = [], []
    for start, end in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        length = np.linalg.norm(end - start)
        along = (end - start) / length
        steps = np.arange(_SPACING / 2, length, _SPACING)[:, None]
        points.append(start + steps * along)
        normals.append(np.broadcast_to([-along[1], along[0]], (len(steps), 2)))
    point, normal = np.concatenate(points), np.concatenate(normals)
    free = _distance(point - (PUSHER_RADIUS + 1.0) * normal) > PUSHER_RADIUS
    return (point - tee.CENTER_OF_MASS)[free], normal[free]


def _distance(points: np.ndarray) -> np.ndarray:
    """Return the distance (…) from points (…, 2) in the block's frame to the block; 0 inside."""
    low, high = tee.RECTANGLES[:, :2], tee.RECTANGLES[:, 2:]
    outside = np.maximum(np.maximum(low - points[..., None, :], points[..., None, :] - high), 0.0)
    return np.sqrt((outside**2).sum(axis=-1)).min(axis=-1)


class PushTExpert:
    """Acts for every lane of a `PushT` environment; ``noise`` 1 adds errors of 3 px to its targets."""

    def __init__(self, env: PushT, noise: float = 1.0, seed: int = 0) -> None:
        self._env, self._noise = env, noise
        self._rng = np.random.default_rng(seed)
        self._points, self._normals = _edge_points()
        self._choice = np.full(env.num_envs, -1)
        self._episode = np.full(env.num_envs, -1, np.int64)
        goal = np.array([tee.GOAL_POSE])
        self._goal = tee.keypoints(goal)[0]

    def act(self) -> np.ndarray:
        """Return pusher targets (N, 2) in pixels."""
        env = self._env
        pose, pusher = env.block_pose(), env.pusher_position()
        started = self._episode != env.episode_seed
        self._choice[started] = -1
        self._episode[:] = env.episode_seed
        center = pose[:, :2] + tee.rotate(tee.CENTER_OF_MASS[None], pose[:, 2])[:, 0]
        arms = tee.rotate(self._points, pose[:, 2])
        inward = tee.rotate(self._normals, pose[:, 2])
        gain, reach = self._push_value(pose, center, arms, inward)
        self._choose(gain, center, arms, inward, pusher)
        lane = np.arange(env.num_envs)
        contact = center + arms[lane, self._choice]
        normal = inward[lane, self._choice]
        target = self._route(pose, center, contact, normal, pusher, reach[lane, self._choice])
        target += self._noise * 3.0 * self._rng.standard_normal(target.shape)
        return np.clip(target, 0.0, tee.ARENA).astype(np.float32)

    def _push_value(
        self, pose: np.ndarray, center: np.ndarray, arms: np.ndarray, inward: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return, per candidate (N, K), the decrease of the squared corner distance and the push length in pixels."""
        corners = tee.keypoints(pose)
        miss = corners - self._goal
        offset = corners - center[:, None]
        total = miss.sum(axis=1)
        torque = (offset[..., 0] * miss[..., 1] - offset[..., 1] * miss[..., 0]).sum(axis=1)
        lever = arms[..., 0] * inward[..., 1] - arms[..., 1] * inward[..., 0]
        scale = 1.0 / (1.0 + lever**2 / _GYRATION)
        move, turn = inward * scale[..., None], lever * scale / _GYRATION
        slope = -(total[:, None] * move).sum(axis=-1) - torque[:, None] * turn
        spread = offset.sum(axis=1)
        cross = move[..., 1] * spread[:, None, 0] - move[..., 0] * spread[:, None, 1]
        curvature = 8.0 * (move**2).sum(axis=-1) + 2.0 * turn * cross
        curvature += turn**2 * (offset**2).sum(axis=(1, 2))[:, None]
        reach = np.clip(slope / curvature, 0.0, 60.0)
        return slope * reach - 0.5 * curvature * reach**2, reach

    def _choose(
        self, gain: np.ndarray, center: np.ndarray, arms: np.ndarray, inward: np.ndarray, pusher: np.ndarray
    ) -> None:
        """Keep the present contact while it pays, else take the best one, less what the way to it costs."""
        start = center[:, None] + arms - (PUSHER_RADIUS + _CLEARANCE) * inward
        reachable = ((start > 0.0) & (start < tee.ARENA)).all(axis=-1)
        way = np.linalg.norm(start - pusher[:, None], axis=-1)
        value = np.where(reachable, gain / (1.0 + way / 300.0), -1.0)
        best = value.argmax(axis=1)
        lane = np.arange(len(best))
        keep = (self._choice >= 0) & (value[lane, self._choice] > 0.5 * value[lane, best])
        self._choice = np.where(keep, self._choice, best)

    def _route(
        self,
        pose: np.ndarray,
        center: np.ndarray,
        contact: np.ndarray,
        normal: np.ndarray,
        pusher: np.ndarray,
        reach: np.ndarray,
    ) -> np.ndarray:
        """Return the next target (N, 2): along the push, to its start, or round the block."""
        start = contact - (PUSHER_RADIUS + _CLEARANCE) * normal
        from_contact = pusher - contact
        depth = -(from_contact * normal).sum(axis=1)
        sideways = np.abs(from_contact[:, 0] * normal[:, 1] - from_contact[:, 1] * normal[:, 0])
        behind = (depth > 0.5 * PUSHER_RADIUS) & (depth < PUSHER_RADIUS + 2 * _CLEARANCE) & (sideways < 6.0)
        push = contact + normal * (np.maximum(reach, 1.0) - PUSHER_RADIUS)[:, None]
        clear = self._clear(pose, pusher, start)
        outer = contact - normal * _ORBIT
        around = self._orbit(center, pusher, outer)
        target = np.where(behind[:, None], push, np.where(clear[:, None], start, around))
        step = target - pusher
        length = np.linalg.norm(step, axis=1, keepdims=True)
        return pusher + step * np.minimum(1.0, _LOOK_AHEAD / np.maximum(length, 1e-9))

    @staticmethod
    def _clear(pose: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Return (N,) whether the pusher can go straight from ``start`` to ``end`` without touching the block."""
        share = np.linspace(0.0, 1.0, 17)[:, None]
        path = start[:, None] + share * (end - start)[:, None] - pose[:, None, :2]
        cos, sin = np.cos(pose[:, 2])[:, None], np.sin(pose[:, 2])[:, None]
        local = np.stack([cos * path[..., 0] + sin * path[..., 1], cos * path[..., 1] - sin * path[..., 0]], axis=-1)
        distance = _distance(local)
        # Leaving a contact is allowed: only what comes nearer than the present distance counts.
        return (distance >= np.minimum(PUSHER_RADIUS + 1.0, distance[:, :1] - 0.01)).all(axis=1)

    @staticmethod
    def _orbit(center: np.ndarray, pusher: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Return the next point (N, 2) of a way round the block, on a circle about its centre of mass."""
        here, there = pusher - center, goal - center
        angle = np.arctan2(here[:, 1], here[:, 0])
        turn = (np.arctan2(there[:, 1], there[:, 0]) - angle + np.pi) % (2 * np.pi) - np.pi
        radius = np.linalg.norm(here, axis=1)
        # Go out first, then round: nearer than the circle, only as much turn as the radius allows.
        ahead = np.clip(turn, -0.6, 0.6) * np.clip((radius - 60.0) / (_ORBIT - 60.0), 0.0, 1.0)
        angle = angle + ahead
        return center + _ORBIT * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
