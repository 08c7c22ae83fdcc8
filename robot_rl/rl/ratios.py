"""What differs between on-policy methods: what an actor traces while acting, and the ratio made from it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation
from robot_rl.core.policy import Policy

Trace = dict[str, Tensor]
"""What a method stores per transition, each (B, …): its own business, the core only gathers rows of it."""


class OnPolicyActor(ABC):
    """Acts in N lanes, traces what its ratio needs, and scores traces with the present parameters.

    The update's item is (transition, inner index): `score` returns (B, M), for M parts of one decision (1 for a
    Gaussian, the number of trained denoising steps for a diffusion chain). ``exp(score_new - score_old)`` is the
    ratio, so a score is a log-density or whatever stands for one (a negative flow-matching loss, say). How it is
    reduced over the action is part of the method, for clip range and KL limit refer to it.
    """

    policy: Policy
    """The policy being improved, as evaluated and saved."""
    trace: Trace
    """Rows of the latest `act`, each (N, …)."""

    @abstractmethod
    def act(self, observation: Observation) -> np.ndarray:
        """Return exploring actions (N, A) in the units of the spec and set `trace`."""

    @abstractmethod
    def reset(self, lanes: np.ndarray) -> None:
        """Start new episodes in ``lanes`` (bool (N,))."""

    @abstractmethod
    def look_ahead(self, observation: Observation) -> Tensor:
        """Return critic inputs (N, F) for the observation that follows the latest `act`, without side effects.

        Used to value the state after a time limit and after the last step of a roll-out.
        """

    @abstractmethod
    def critic_input(self, trace: Trace) -> Tensor:
        """Return critic inputs (B, F)."""

    @abstractmethod
    def score(self, trace: Trace) -> Tensor:
        """Return scores (B, M) under the present parameters, differentiable."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Return what the actor's optimiser trains."""

    def entropy(self, trace: Trace) -> Tensor:
        """Return the mean entropy, a scalar; zero where it is not known."""
        return torch.zeros(())

    def inner_weight(self) -> Tensor:
        """Return the weight (M,) of each inner index (a denoising discount, say); a scalar one for M = 1."""
        return torch.ones(1)

    def inner_clip(self, clip: float) -> Tensor:
        """Return the clip range (M,) of each inner index."""
        return torch.full((1,), clip)


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, weight: Tensor, clip: Tensor) -> Tensor:
    """Return PPO's clipped loss (arXiv 1707.06347), averaged over transitions and summed over inner indices.

    Args:
        log_ratio: (B, M).
        advantage: (B,) of the transition, the same for its inner indices.
        weight: (M,) of the inner indices.
        clip: (M,) of the inner indices.
    """
    ratio = log_ratio.exp()
    advantage = advantage[:, None]
    clipped = torch.minimum(torch.maximum(ratio, 1 - clip), 1 + clip)
    return -(weight * torch.minimum(advantage * ratio, advantage * clipped)).sum(-1).mean()


def divergence(log_ratio: Tensor) -> Tensor:
    """Estimate KL(old || new) from log-ratios (B, M): mean of ``ratio - 1 - log ratio``, which is never negative."""
    return (log_ratio.exp() - 1 - log_ratio).mean()
