"""Policy gradients whose action is a chain of Gaussian sampling steps: densities and divergences in closed form."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from robot_rl.heads.chain import normal_divergence, normal_log_prob
from robot_rl.rl.on_policy.chunk_actor import ChunkActor
from robot_rl.rl.on_policy.ratios import Trace


class ChainActor(ChunkActor):
    """Traces ``chain`` (n, M + 1, H, A), the last iterates of sampling, and knows the moments of its M steps.

    A method writes `decide`, `moments`, `base_moments`, `score` and `parameters`.
    """

    @abstractmethod
    def moments(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the steps as they are scored, each broadcast to (B, M, H, A)."""

    @abstractmethod
    def base_moments(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the base's steps from the same iterates."""

    def log_prob(self, trace: Trace) -> Tensor:
        """Return log-densities (B, M, H, A) by element; their sum is the chain's, given its first iterate."""
        return normal_log_prob(trace["chain"][:, 1:], *self.moments(trace))

    def divergence_to_base(self, trace: Trace) -> Tensor:
        """Return KL(chain || base's chain) (B,) by the chain rule, summed over all steps and elements, in nats."""
        mean, std = self.moments(trace)
        with torch.no_grad():
            base_mean, base_std = self.base_moments(trace)
        return normal_divergence(mean, std, base_mean, base_std).sum((-3, -2, -1))

    def snapshot(self, trace: Trace) -> Trace:
        """Return the present moments, each (B, M, …)."""
        mean, std = self.moments(trace)
        return {"mean": mean, "std": std}

    def divergence_from(self, snapshot: Trace, trace: Trace) -> Tensor:
        """Return KL(chain of ``snapshot`` || present chain) (B,), summed over all steps and elements, in nats."""
        return normal_divergence(snapshot["mean"], snapshot["std"], *self.moments(trace)).sum((-3, -2, -1))
