"""A policy whose weights change while it acts."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hardware.hil.learner import LearnerClient
from robot_rl.core.env import Observation


class ActingPolicy:
    """The learner's policy, sampled to explore, with the newest weights before each plan.

    Weights are swapped in the thread that plans, between two plans: no plan mixes two versions, and the control loop,
    which is another thread or process, never waits for it.
    """

    def __init__(self, policy: Any, learner: LearnerClient, seed: int = 0) -> None:
        self.policy, self._learner = policy, learner
        self.spec, self.obs_steps = policy.spec, policy.obs_steps
        self.horizon, self.execute_steps, self.closed_loop = policy.horizon, policy.execute_steps, policy.closed_loop
        self.version = -1
        """Version of the weights that act."""
        explore(policy, True)
        policy.seed(seed)

    @classmethod
    def load(cls, checkpoint: Path, learner: LearnerClient, seed: int = 0) -> ActingPolicy:
        """Build the policy that the learner saved when it began."""
        from robot_rl.policies.checkpoint import load_policy

        return cls(load_policy(checkpoint), learner, seed)

    def seed(self, seed: int) -> None:
        """Make exploration reproducible from here on."""
        self.policy.seed(seed)

    def plan(self, history: Observation) -> np.ndarray:
        """Return chunks (B, H, A) with the newest weights."""
        self.refresh()
        chunks: np.ndarray = self.policy.plan(history)
        return chunks

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Correct the actions as the policy does."""
        corrected: np.ndarray = self.policy.refine(history, actions)
        return corrected

    def refresh(self) -> None:
        """Take in the newest weights, if they are newer than those that act."""
        import torch

        newest = self._learner.newest
        if newest is None or newest[0] == self.version:
            return
        self.version, arrays, _ = newest
        self.policy.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})

    def frozen(self) -> Any:
        """Return a copy of the policy with the newest weights that does not explore."""
        self.refresh()
        twin = copy.deepcopy(self.policy)
        explore(twin, False)
        return twin


def explore(policy: Any, exploring: bool) -> None:
    """Let a Gaussian policy sample its actions, or act by their mean; other policies act as they are."""
    if hasattr(policy.config, "deterministic"):
        policy.config = replace(policy.config, deterministic=not exploring)
