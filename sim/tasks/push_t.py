"""Task ``push_t``: push a T-shaped block onto its goal with a round pusher, in the plane.

The arena, block, goal, controller, initial states, observations and success of Diffusion Policy's Push-T
(arXiv 2303.04137, as published in gym_pusht) with MuJoCo as the physics: policies and human demonstrations of one fit
the other. Played back open loop here, the 206 published human demonstrations reach a mean best coverage of 0.89; in
gym_pusht it is 0.90.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from robot_rl.core.env import Observation
from robot_rl.core.paths import data_file
from robot_rl.core.spec import ArraySpec, Spec
from sim.engine import ALL, BatchEnv, Lanes
from sim.tasks import tee
from sim.tasks.push_t_expert import PushTExpert

SUCCESS_COVERAGE = 0.95
"""Share of the goal that must be covered (more than this)."""
MAX_EPISODE_STEPS = 300
"""Time limit in control steps."""

_PIXELS = 1.0 / tee.PIXEL
_XY = ("x", "y")
SPEC = Spec(
    observation={
        "agent_pos": ArraySpec((2,), names=_XY, unit="px", frame="arena"),
        "environment_state": ArraySpec(
            (16,), names=tuple(f"corner{i}_{axis}" for i in range(8) for axis in _XY), unit="px", frame="arena"
        ),
        "state": ArraySpec(
            (5,),
            names=("agent_x", "agent_y", "block_x", "block_y", "block_angle"),
            unit="px,px,px,px,rad",
            frame="arena",
        ),
    },
    action=ArraySpec((2,), names=_XY, unit="px", frame="arena", low=(0.0, 0.0), high=(tee.ARENA, tee.ARENA)),
    rate_hz=10.0,
)
"""Pusher position, the block's eight corners, and both poses; the action is the pusher's target position."""


class PushT(BatchEnv):
    """Push-T lanes. ``info["coverage"]`` (N,) is the share of the goal covered after the step.

    Rewards: ``"sparse"`` is 1 on the step of the first success, ``"shaped"`` is ``min(coverage / 0.95, 1)`` as in
    gym_pusht. The episode ends with success. The episode with seed s starts from the same poses as gym_pusht's
    ``reset(seed=s)``.
    """

    name: ClassVar[str] = "push_t"
    camera: ClassVar[str | int] = "top"
    render_size: ClassVar[tuple[int, int]] = (256, 256)

    def __init__(self, num_envs: int, **options: Any) -> None:
        super().__init__(
            data_file("assets", "push_t", "push_t.xml"),
            num_envs,
            spec=SPEC,
            substeps=10,
            max_episode_steps=MAX_EPISODE_STEPS,
            **options,
        )
        self._qpos = self.batch.bind("qpos")
        self._ctrl = self.batch.bind("ctrl")
        self.coverage = np.zeros(num_envs)
        """(N,) share of the goal covered, in [0, 1]."""
        self._pose, self._corners = np.full((num_envs, 3), np.nan), np.zeros((num_envs, 8, 2))

    def reset_lanes(self, lanes: np.ndarray, rngs: list[np.random.Generator]) -> None:
        """Draw pusher and block poses as gym_pusht's reset does."""
        draws = np.array([_draw_poses(rng) for rng in rngs])
        # gym_pusht sets the position while the angle is zero and then turns the block about its centre of mass.
        self._qpos[lanes, 0:2] = (draws[:, 2:4] + tee.CENTER_OF_MASS) * tee.PIXEL
        self._qpos[lanes, 2] = draws[:, 4]
        self._qpos[lanes, 3:5] = draws[:, 0:2] * tee.PIXEL
        self._ctrl[lanes] = self._qpos[lanes, 3:5]

    def apply(self, actions: np.ndarray) -> None:
        """Set the pusher's target position in pixels."""
        np.multiply(actions, tee.PIXEL, out=self._ctrl)

    def block_pose(self, lanes: Lanes = ALL) -> np.ndarray:
        """Return the block's poses (K, 3): x, y of its origin in pixels, angle in radians."""
        qpos = self._qpos[lanes]
        angle = qpos[:, 2]
        pose = np.empty((len(angle), 3))
        # Joints move the centre of mass; the origin is 45 px from it.
        pose[:, 0] = qpos[:, 0] * _PIXELS + tee.CENTER_OF_MASS[1] * np.sin(angle)
        pose[:, 1] = qpos[:, 1] * _PIXELS - tee.CENTER_OF_MASS[1] * np.cos(angle)
        pose[:, 2] = angle
        return pose

    def pusher_position(self, lanes: Lanes = ALL) -> np.ndarray:
        """Return the pusher's positions (K, 2) in pixels."""
        return self._qpos[lanes, 3:5] * _PIXELS

    def hold_action(self) -> np.ndarray:
        """Return the actions (N, 2) that keep the pushers where they are."""
        return np.clip(self.pusher_position(), 0.0, tee.ARENA)

    def observe(self, lanes: Lanes = ALL) -> Observation:
        """Return ``agent_pos`` (K, 2), ``environment_state`` (K, 16) and ``state`` (K, 5)."""
        pose, corners = (self._pose, self._corners) if self.measured else self._geometry(lanes)
        state = np.empty((len(pose), 5), np.float32)
        state[:, :2] = self.pusher_position(lanes)
        state[:, 2:] = pose
        state[:, 4] %= 2 * np.pi
        flat = corners.reshape(len(pose), 16).astype(np.float32)
        return {"agent_pos": state[:, :2].copy(), "environment_state": flat, "state": state}

    def measure(self) -> None:
        """Compute the block's geometry and the coverage of the goal, where the block has moved."""
        pose = self.block_pose()
        moved = np.flatnonzero((pose != self._pose).any(axis=1))
        self._pose = pose
        if len(moved):
            self._corners[moved] = corners = tee.keypoints(pose[moved])
            self.coverage[moved] = tee.coverage(corners)

    def _geometry(self, lanes: Lanes) -> tuple[np.ndarray, np.ndarray]:
        pose = self.block_pose(lanes)
        return pose, tee.keypoints(pose)

    def success(self) -> np.ndarray:
        """Return (N,) whether more than 95 % of the goal is covered."""
        return self.coverage > SUCCESS_COVERAGE

    def reward(self, first_success: np.ndarray) -> np.ndarray:
        """Return (N,) sparse or shaped rewards."""
        if self.reward_kind == "shaped":
            return np.clip(self.coverage / SUCCESS_COVERAGE, 0.0, 1.0)
        return super().reward(first_success)

    def episode_info(self) -> dict[str, np.ndarray]:
        """Return the coverage (N,)."""
        return {"coverage": self.coverage.copy()}

    def make_expert(self, noise: float = 1.0, seed: int = 0) -> PushTExpert:
        """Return the greedy pusher of `sim.tasks.push_t_expert`."""
        return PushTExpert(self, noise=noise, seed=seed)


def _draw_poses(rng: np.random.Generator) -> list[float]:
    pusher, block = rng.integers(50, 450, 2), rng.integers(100, 400, 2)
    return [*pusher, *block, rng.uniform(-np.pi, np.pi)]


def make(
    num_envs: int, *, seed: int = 0, threads: int = 0, reward: str = "sparse", on_unstable: str = "truncate"
) -> PushT:
    """Build ``num_envs`` lanes of Push-T; the factory registered as ``push_t``."""
    return PushT(num_envs, seed=seed, threads=threads, reward=reward, on_unstable=on_unstable)
