"""Policy-gradient methods whose decision is a whole planned chunk: the part that they share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robot_rl.core.env import Observation
from robot_rl.core.errors import CapabilityError
from robot_rl.core.spec import Spec
from robot_rl.nets.device import device_of
from robot_rl.rl.on_policy.ratios import OnPolicyActor, Trace
from robot_rl.rollout.player import PolicyRunner


class ChunkActor(OnPolicyActor):
    """One decision per planned chunk: plays a chunked policy in the chunk player and traces what a method needs.

    A method writes `decide`, `score` and `parameters`. It stands in for its policy in the one chunk player, so that
    lanes plan when they are due, each at its own time.
    """

    clamp = 5.0
    """Normalised observations are clamped to this for the critic."""

    def __init__(self, policy: Any, num_lanes: int, seed: int = 0) -> None:
        """Create an actor for ``policy``.

        Args:
            policy: a chunked policy (`encode`, `unnormalize_action`, spec, obs_steps, horizon, execute_steps).
            num_lanes: environments stepped at once.
            seed: seed of exploration.

        Raises:
            CapabilityError: the policy is none that plans chunks from a condition.
        """
        missing = [name for name in ("encode", "unnormalize_action") if not hasattr(policy, name)]
        if missing or policy.closed_loop:
            raise CapabilityError(
                f"{type(self).__name__} needs a chunked policy without a closed-loop correction (kind 'chunked'), "
                f"got {type(policy).__name__}"
            )
        self.policy: Any = policy
        self.spec: Spec = policy.spec
        self.obs_steps, self.horizon, self.execute_steps = policy.obs_steps, policy.horizon, policy.execute_steps
        self.decision_steps = policy.execute_steps
        self.closed_loop = True  # so that `refine` sees the history of every step
        self.trace: Trace = {}
        self.generator = torch.Generator().manual_seed(seed)
        """Source of exploration, on the CPU."""
        self._runner = PolicyRunner(self, num_lanes)
        self._history: Observation = {}
        self._device = device_of(policy)

    @abstractmethod
    def decide(self, cond: Tensor) -> tuple[Tensor, Trace]:
        """Return exploring, normalised chunks (n, H, A) for conditions (n, C), and what `score` needs, each (n, …)."""

    @property
    def decided(self) -> np.ndarray:  # type: ignore[override]
        """(N,) bool: lanes that planned in the latest `act`."""
        return self._runner.planned

    @property
    def due(self) -> np.ndarray:
        """(N,) bool: lanes that will plan in the next `act`."""
        return self._runner.player.due

    def seed(self, seed: int) -> None:
        """Make exploration reproducible."""
        self.generator.manual_seed(seed)

    @torch.no_grad()
    def plan(self, history: Observation) -> np.ndarray:
        """Return exploring chunks (n, H, A) in the units of the spec and set `trace`."""
        cond = self._encode(history)
        chunks, rows = self.decide(cond)
        self.trace = {"cond": cond, **rows}
        executable: Tensor = self.policy.unnormalize_action(chunks)
        return executable.cpu().numpy()

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return ``actions`` unchanged."""
        self._history = history
        return actions

    def act(self, observation: Observation) -> np.ndarray:
        """Return exploring actions (N, A) in the units of the spec and set `trace`."""
        return self._runner.step(observation)

    def reset(self, lanes: np.ndarray) -> None:
        """Start new episodes in ``lanes`` (bool (N,))."""
        self._runner.reset(lanes)

    @torch.no_grad()
    def look_ahead(self, observation: Observation) -> Tensor:
        """Return critic inputs (N, C) for the observation that follows, at the end of the present history."""
        newest = {k: np.concatenate([v[:, 1:], observation[k][:, None]], axis=1) for k, v in self._history.items()}
        return self.critic_input({"cond": self._encode(newest)})

    def critic_input(self, trace: Trace) -> Tensor:
        """Return the clamped condition (B, C)."""
        return trace["cond"].clamp(-self.clamp, self.clamp)

    def _encode(self, history: Observation) -> Tensor:
        tensors = {k: torch.as_tensor(history[k], device=self._device) for k in self.spec.observation}
        cond: Tensor = self.policy.encode(tensors)
        return cond
