"""The contract of simulated environments: many lanes stepped at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from robot_rl.core.spec import Spec

Observation = dict[str, np.ndarray]
"""Observation arrays by key; in a `VecEnv` each has a leading axis of lanes (N)."""


@dataclass
class Step:
    """What one control step of N lanes returns.

    A lane that ends is reset within the same step: ``observation`` is then the first of its next episode and
    ``final_observation`` the last of the one that ended.
    """

    observation: Observation
    """Observations to act on next, each (N, …)."""
    reward: np.ndarray
    """(N,) float32."""
    terminated: np.ndarray
    """(N,) bool: the task ended here (success or failure); the value of what follows is zero."""
    truncated: np.ndarray
    """(N,) bool: the time limit cut the episode; the value of what follows is not zero. Never set with terminated."""
    final_observation: Observation
    """Observations after this step and before any reset, each (N, …); equals ``observation`` where nothing ended."""
    info: dict[str, np.ndarray] = field(default_factory=dict)
    """Per-lane extras, each (N, …). Always: ``success`` (bool, the episode has succeeded by this step) and
    ``episode_seed`` (int64, the seed of the episode that this step belongs to)."""

    @property
    def done(self) -> np.ndarray:
        """(N,) bool: the episode ended, by either cause."""
        return self.terminated | self.truncated


@runtime_checkable
class VecEnv(Protocol):
    """N independent lanes of one task.

    Seeds name episodes: after ``reset(seed)`` with an integer, episode k of lane i has the seed ``seed + i + k * N``,
    so that a run of whole rounds covers one contiguous block of seeds whatever N is.
    """

    num_envs: int
    spec: Spec
    max_episode_steps: int

    def reset(self, seed: int | Sequence[int] | None = None) -> Observation:
        """Start a new episode in every lane; ``seed`` as above, or one seed per lane, or None to continue counting."""

    def step(self, actions: np.ndarray) -> Step:
        """Apply ``actions`` (N, A), in the units of ``spec.action``, for one control step."""

    def render(self, lane: int = 0) -> np.ndarray:
        """Return an RGB frame (height, width, 3) uint8 of one lane."""

    def close(self) -> None:
        """Release threads, windows and files."""


class Expert(Protocol):
    """A scripted or planning expert that may read the simulator's own state."""

    def act(self) -> np.ndarray:
        """Return actions (N, A) for the environment's present state."""


TaskFactory = Callable[..., VecEnv]
"""``make(num_envs, *, seed=0, threads=0, reward="sparse"|"shaped", **options) -> VecEnv``; an environment with an
expert has ``make_expert(noise=1.0, seed=0) -> Expert``, one that can tell how far a lane has got has
``progress() -> (N,)`` in [0, 1], and one whose lanes can be put out of step has ``stagger(seed)``, which lets the
episodes under way reach their time limits at different times."""
