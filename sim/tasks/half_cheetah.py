"""Task ``half_cheetah``: run forward with a planar two-legged body; the common yardstick of locomotion.

Observations, actions, rewards and initial states are those of Gymnasium's HalfCheetah-v5 with its default settings.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from robot_rl.core.env import Observation
from robot_rl.core.paths import data_file
from robot_rl.core.spec import ArraySpec, Spec
from sim.engine import ALL, BatchEnv, Lanes

MAX_EPISODE_STEPS = 1000
"""Time limit in control steps; nothing else ends an episode."""
CONTROL_COST = 0.1
"""Weight of the squared actions in the reward."""
RESET_NOISE = 0.1
"""Scale of the initial state's noise."""

_JOINTS = ("bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot")
_COORDINATES = ("rootx", "rootz", "rooty", *_JOINTS)
SPEC = Spec(
    observation={
        "state": ArraySpec(
            (17,),
            names=(*_COORDINATES[1:], *(f"{name}_velocity" for name in _COORDINATES)),
            unit="m," + "rad," * 7 + "m/s,m/s" + ",rad/s" * 7,
            frame="world",
        )
    },
    action=ArraySpec((6,), names=_JOINTS, low=(-1.0,) * 6, high=(1.0,) * 6),
    rate_hz=20.0,
)
"""Positions without the distance run, then velocities; actions are shares of each joint's largest torque."""


class HalfCheetah(BatchEnv):
    """HalfCheetah lanes: reward = forward velocity in m/s less 0.1 times the squared actions; success does not exist.

    ``info`` holds ``x_position`` (N,) in m and ``x_velocity`` (N,) in m/s.
    """

    name: ClassVar[str] = "half_cheetah"
    camera: ClassVar[str | int] = "side"

    def __init__(self, num_envs: int, **options: Any) -> None:
        super().__init__(
            data_file("assets", "half_cheetah", "half_cheetah.xml"),
            num_envs,
            spec=SPEC,
            substeps=5,
            max_episode_steps=MAX_EPISODE_STEPS,
            rewards=("dense", "shaped"),
            **options,
        )
        self._qpos = self.batch.bind("qpos")
        self._qvel = self.batch.bind("qvel")
        self._ctrl = self.batch.bind("ctrl")
        self._positions = np.zeros(num_envs)
        self._velocities = np.zeros(num_envs)

    def reset_lanes(self, lanes: np.ndarray, rngs: list[np.random.Generator]) -> None:
        """Draw positions and velocities about rest, as HalfCheetah-v5's reset does."""
        size = self.model.nq
        self._qpos[lanes] += [rng.uniform(-RESET_NOISE, RESET_NOISE, size) for rng in rngs]
        self._qvel[lanes] += [RESET_NOISE * rng.standard_normal(size) for rng in rngs]
        self._positions[lanes] = self._qpos[lanes, 0]

    def apply(self, actions: np.ndarray) -> None:
        """Set joint torques as shares of their maxima."""
        self._ctrl[:] = actions

    def observe(self, lanes: Lanes = ALL) -> Observation:
        """Return ``state`` (K, 17)."""
        state = np.empty((len(self._qpos[lanes]), 17), np.float32)
        state[:, :8] = self._qpos[lanes, 1:]
        state[:, 8:] = self._qvel[lanes]
        return {"state": state}

    def measure(self) -> None:
        """Compute the mean forward velocity over the control step."""
        positions = self._qpos[:, 0].copy()
        self._velocities = (positions - self._positions) * self.spec.rate_hz
        self._positions = positions

    def reward(self, first_success: np.ndarray) -> np.ndarray:
        """Return (N,) forward velocity less control cost."""
        return self._velocities - CONTROL_COST * np.einsum("na,na->n", self._ctrl, self._ctrl)

    def episode_info(self) -> dict[str, np.ndarray]:
        """Return ``x_position`` and ``x_velocity``, each (N,)."""
        return {"x_position": self._positions.copy(), "x_velocity": self._velocities}


def make(
    num_envs: int, *, seed: int = 0, threads: int = 0, reward: str = "dense", on_unstable: str = "truncate"
) -> HalfCheetah:
    """Build ``num_envs`` lanes of HalfCheetah; the factory registered as ``half_cheetah``. Its only reward is dense."""
    return HalfCheetah(num_envs, seed=seed, threads=threads, reward=reward, on_unstable=on_unstable)
