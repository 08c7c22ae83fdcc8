"""What every vector environment of ours decides alike: the seeds of episodes, and which actions are accepted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from robot_rl.core.errors import ConfigError, DataError, RobotRLError
from robot_rl.core.spec import ArraySpec


class EpisodeSeeds:
    """Names episodes: episode k of lane i has the seed ``seed + i + k * N``, whatever happens in other lanes."""

    def __init__(self, name: str, num_envs: int, seed: int) -> None:
        """Count from ``seed``; ``name`` is the environment's, for messages."""
        self._name = name
        self._next = seed + np.arange(num_envs, dtype=np.int64)
        self.current = np.full(num_envs, -1, np.int64)
        """(N,) seeds of the present episodes; -1 before the first."""
        self.stride = num_envs
        """From one episode's seed to the lane's next: N, or more where these lanes are a part of more."""

    @property
    def next(self) -> np.ndarray:
        """(N,) seeds of the lanes' next episodes."""
        return self._next

    def restart(self, seed: int | Sequence[int] | None) -> None:
        """Name the next episodes: from an integer as above, one seed per lane, or None to continue counting.

        Raises:
            ConfigError: not one seed per lane, or a negative one.
        """
        if seed is None:
            return
        start = np.asarray(seed, np.int64)
        if start.ndim == 0:
            start = start + np.arange(len(self._next))
        if start.shape != self._next.shape or (start < 0).any():
            raise ConfigError(f"{self._name}: reset needs {len(self._next)} seeds >= 0, got {seed}")
        self._next = start.copy()

    def advance(self, lanes: np.ndarray | slice) -> None:
        """Begin the next episode in ``lanes``."""
        self.current[lanes] = self._next[lanes]
        self._next[lanes] += self.stride


class ActionGate:
    """Checks actions against a spec and clips them to its bounds."""

    def __init__(self, name: str, num_envs: int, spec: ArraySpec) -> None:
        """Accept actions (N, A) of ``spec``; ``name`` is the environment's, for messages."""
        self._name = name
        self._low, self._high = spec.bounds()
        self._shape = (num_envs, *spec.shape)

    def admit(self, actions: np.ndarray, seeds: EpisodeSeeds) -> np.ndarray:
        """Return the actions (N, A) float64, clipped to the bounds.

        Raises:
            RobotRLError: no episode has begun.
            DataError: wrong shape, or a value that is not finite.
        """
        if seeds.current[0] < 0:
            raise RobotRLError(f"{self._name}: call reset() before the first step")
        actions = np.asarray(actions, float)
        if actions.shape != self._shape:
            raise DataError(f"{self._name}: actions have shape {actions.shape}, expected {self._shape}")
        if not np.isfinite(actions).all():
            lane = int(np.argwhere(~np.isfinite(actions))[0, 0])
            raise DataError(f"{self._name}: the action of lane {lane} holds a value that is not finite")
        return np.minimum(np.maximum(actions, self._low), self._high)
