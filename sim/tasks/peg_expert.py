"""A scripted operator for peg insertion, imperfect on purpose.

It moves over the hole while it turns the peg into line, lowers it when it looks aligned, and searches in a growing
spiral when the peg gets stuck on the rim. With ``noise`` above zero it misjudges where the hole is (by habit, and anew
in each episode), its hand drifts (correlated noise), and in its haste it lowers the peg before it is aligned.

Competent (``noise = 0``) it succeeds in every one of 200 episodes; at ``noise = 1`` in about half, and a
flow policy that imitates 50 of its successes does about as well, which leaves reinforcement learning something to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sim.tasks.peg_insert import PegInsert


@dataclass(frozen=True)
class ExpertErrors:
    """Size of the expert's errors at ``noise = 1``; positions in m, angles in rad."""

    habit: float = 0.0018
    """Distance by which this operator always aims beside the hole, in a direction that its seed decides."""
    position_bias: float = 0.0008
    """Standard deviation of the error of the believed hole along each axis, constant in an episode."""
    yaw_bias: float = 0.008
    """Standard deviation of the error of the believed yaw, constant in an episode."""
    position_drift: float = 0.003
    """Standard deviation of the drift of the commanded position."""
    angle_drift: float = 0.028
    """Standard deviation of the drift of the commanded rotation."""
    correlation_time: float = 0.3
    """Time constant of the drift, s."""
    patience: int = 3
    """Control steps of pressing on the rim after which the search starts."""
    haste: float = 3.0
    """How much more misalignment is accepted before the peg is lowered, as a multiple of the competent tolerance."""


class PegExpert:
    """Acts for every lane of a `PegInsert` from its true state; see the module's docstring."""

    hover = 0.005
    """Height of the tip above the rim while aligning, m."""
    press = 0.003
    """How far below the tool the command lies while lowering, m: sets speed and force."""
    tolerance = 0.0005
    """Lateral error at which the peg is lowered, m."""
    yaw_tolerance = 0.015
    """Yaw error at which the peg is lowered, rad."""

    def __init__(self, env: PegInsert, noise: float = 1.0, seed: int = 0, errors: ExpertErrors | None = None) -> None:
        self.env, self.noise, self.seed = env, noise, seed
        self.errors = errors or ExpertErrors()
        count = env.num_envs
        self._rngs = [np.random.default_rng(seed)] * count
        self._episode = np.full(count, -1, np.int64)
        self._bias = np.zeros((count, 3))
        self._drift = np.zeros((count, 6))
        direction = np.random.default_rng([seed, 3]).uniform(-np.pi, np.pi)
        self._habit = noise * self.errors.habit * np.array([np.cos(direction), np.sin(direction), 0.0])
        self._lowering = np.zeros(count, bool)
        self._stuck = np.zeros(count)

    def act(self) -> np.ndarray:
        """Return actions (N, 6) float32 for the environment's present state."""
        self._begin_episodes()
        env = self.env
        offset, misalignment = env.alignment()
        pose = env.tool_pose()
        error = offset[:, :2] - self._bias[:, :2]
        yaw_error = misalignment[:, 2] - self._bias[:, 2]
        inserted = offset[:, 2] < -0.002
        lateral = np.linalg.norm(error, axis=-1)
        haste = 1.0 + self.noise * self.errors.haste
        aligned = (lateral < self.tolerance * haste) & (np.abs(yaw_error) < self.yaw_tolerance * haste)
        self._lowering = (self._lowering | aligned) & ((lateral < 0.006) | inserted)
        blocked = self._lowering & ~inserted & (offset[:, 2] < 0.003) & (env.wrench()[:, 2] < -4.0)
        self._stuck = np.where(inserted | ~self._lowering, 0.0, self._stuck + blocked)
        correction = np.concatenate([-(error + self._search()), np.zeros((env.num_envs, 1))], axis=-1)
        action = pose.copy()
        action[:, :2] += self._to_base(correction)[:, :2]
        height = np.maximum(self.hover, 1.0 * lateral - 0.01)
        action[:, 2] += np.where(self._lowering, -self.press * (1 + inserted), np.minimum(height, 0.03) - offset[:, 2])
        rotation = np.concatenate([-misalignment[:, :2], -yaw_error[:, None]], axis=-1)
        action[:, 3:] += self._to_base(rotation)
        action += self._hand_drift()
        low, high = env.spec.action.bounds()
        return np.clip(action, low, high).astype(np.float32)

    def _begin_episodes(self) -> None:
        """Draw the errors of lanes whose episode is new, from generators named by (seed, episode seed)."""
        new = np.flatnonzero((self.env.elapsed == 0) | (self._episode != self.env.episode_seed))
        for lane in new:
            rng = self._rngs[lane] = np.random.default_rng([self.seed, int(self.env.episode_seed[lane]), 7])
            scale = np.array([self.errors.position_bias] * 2 + [self.errors.yaw_bias])
            self._bias[lane] = self._habit + self.noise * scale * rng.standard_normal(3)
            self._drift[lane] = rng.standard_normal(6)
        self._episode[new] = self.env.episode_seed[new]
        self._lowering[new] = False
        self._stuck[new] = 0.0

    def _search(self) -> np.ndarray:
        """Return a spiral's offset (N, 2) in m in the hole's frame, growing with the time that the peg is stuck."""
        waited = np.maximum(self._stuck - self.errors.patience, 0.0)
        radius = np.minimum(1.2e-4 * waited, 0.0025)
        return radius[:, None] * np.stack([np.cos(0.7 * waited), np.sin(0.7 * waited)], axis=-1)

    def _to_base(self, vector: np.ndarray) -> np.ndarray:
        """Turn vectors (N, 3) from the hole's frame into the base frame."""
        cosine, sine = np.cos(self.env.hole_yaw), np.sin(self.env.hole_yaw)
        x, y = vector[:, 0], vector[:, 1]
        return np.stack([cosine * x - sine * y, sine * x + cosine * y, vector[:, 2]], axis=-1)

    def _hand_drift(self) -> np.ndarray:
        """Advance the Ornstein-Uhlenbeck drift by one control step and return it (N, 6)."""
        keep = np.exp(-1.0 / (self.env.spec.rate_hz * self.errors.correlation_time))
        fresh = np.stack([rng.standard_normal(6) for rng in self._rngs])
        self._drift = keep * self._drift + np.sqrt(1 - keep**2) * fresh
        scale = np.repeat([self.errors.position_drift, self.errors.angle_drift], 3)
        return self.noise * scale * self._drift
