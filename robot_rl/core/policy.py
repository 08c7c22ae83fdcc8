"""The contract of policies: a history of observations in, a chunk of actions out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from robot_rl.core.env import Observation
from robot_rl.core.spec import Spec


@dataclass
class ActionChunk:
    """Actions for consecutive control steps, the first of which belongs to the observation they were planned from."""

    actions: np.ndarray
    """(H, A) in the units of the policy's ``spec.action``."""
    observation_seq: int = 0
    """Sequence number (control step) of the newest observation used: ``actions[j]`` is meant for step ``seq + j``."""
    observation_stamp: float = 0.0
    """Monotonic time of that observation in seconds."""
    policy_actions: np.ndarray | None = None
    """What the base policy alone would have done (H, A), where a correction was added; for the record."""


@runtime_checkable
class Policy(Protocol):
    """Plans chunks for B independent histories at once; knows its own normalisation.

    A history maps each observation key to an array (B, T, …) of the last ``obs_steps`` observations, oldest first.
    """

    spec: Spec
    obs_steps: int
    """Length T of the history."""
    horizon: int
    """Length H of a planned chunk."""
    execute_steps: int
    """Actions of a chunk that are executed before the next plan."""
    closed_loop: bool
    """Whether `refine` changes actions, and so must run at every control step."""

    def seed(self, seed: int) -> None:
        """Make all sampling from here on reproducible."""

    def plan(self, history: Observation) -> np.ndarray:
        """Return chunks (B, H, A) in the units of ``spec.action``; index 0 belongs to the newest observation."""

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Correct the actions (B, A) about to be executed, given the newest history; the identity for most policies."""
