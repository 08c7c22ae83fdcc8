"""What differs between on-policy methods: what an actor traces while acting, and the ratio made from it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation
from robot_rl.core.errors import CapabilityError
from robot_rl.core.policy import Policy

Trace = dict[str, Tensor]
"""What a method stores per decision, each (B, …): its own business, the core only gathers rows of it."""


class OnPolicyActor(ABC):
    """Acts in N lanes, traces what its ratio needs, and scores traces with the present parameters.

    A decision is one control step, or one planned chunk of `decision_steps` of them. The update's item is (decision,
    inner index): `score` returns (B, M), for M parts of one decision (1 for a Gaussian, the number of trained denoising
    steps for a diffusion chain). ``exp(score_new - score_old)`` is the ratio, so a score is a log-density or whatever
    stands for one (a negative flow-matching loss, say). How it is reduced over the action is part of the method, for
    clip range and KL limit refer to it.
    """

    policy: Policy
    """The policy being improved, as evaluated and saved."""
    trace: Trace
    """Rows of the lanes that decided in the latest `act`, each (n, …), in the order of lanes."""
    decided: np.ndarray
    """(N,) bool: lanes that made a decision in the latest `act`; all of them where decisions last one step."""
    decision_steps: int = 1
    """Control steps of a decision that no episode's end cuts short."""
    log_ratio_limit: float = math.inf
    """Largest magnitude of a log-ratio; beyond it an item has no say in the update, and the loss stays finite."""

    @property
    def due(self) -> np.ndarray:
        """(N,) bool: lanes that will decide in the next `act`; the others are inside a decision."""
        return np.ones(len(self.decided), bool)

    @abstractmethod
    def act(self, observation: Observation) -> np.ndarray:
        """Return exploring actions (N, A) in the units of the spec and set `trace` and `decided`."""

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

    def snapshot(self, trace: Trace) -> Trace:
        """Return what `divergence_from` needs of the present distribution, each (B, …); nothing if there is no such."""
        return {}

    def divergence_from(self, snapshot: Trace, trace: Trace) -> Tensor:
        """Return KL(distribution of `snapshot` || present distribution) per item (B,), in closed form."""
        raise NotImplementedError

    def divergence_to_base(self, trace: Trace) -> Tensor:
        """Return KL(policy || base), or what stands for it, per item (B,), differentiable.

        Raises:
            CapabilityError: the method has no base, or no such divergence.
        """
        raise CapabilityError(
            f"{type(self).__name__} has no divergence to its base, so core.anchor.weight must be 0; methods that have: "
            "residual, dppo, reinflow, fpo, gorl, and ppo on a Gaussian policy"
        )

    def end_iteration(self, trace: Trace, fraction: float) -> dict[str, float]:
        """Do what a method does between iterations and return metrics.

        Between roll-outs is the one time when a normaliser or a decoder may change without falsifying ratios.

        Args:
            trace: rows of the roll-out just learned from, each (B, …).
            fraction: share of the budget that is spent.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs beyond `parameters`, by name."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027
        """Continue from what `state` returned."""


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, weight: Tensor, clip: Tensor) -> Tensor:
    """Return PPO's clipped loss (arXiv 1707.06347), averaged over decisions and summed over inner indices.

    Args:
        log_ratio: (B, M).
        advantage: (B,) of the decision, the same for its inner indices.
        weight: (M,) of the inner indices.
        clip: (M,) of the inner indices.
    """
    loss: Tensor = _ClippedSurrogate.apply(log_ratio, advantage, weight, clip)
    return loss


class _ClippedSurrogate(torch.autograd.Function):
    """The loss and its gradient in one node: an update makes many small steps, where each node costs."""

    @staticmethod
    def forward(ctx: Any, log_ratio: Tensor, advantage: Tensor, weight: Tensor, clip: Tensor) -> Tensor:
        advantage = advantage.unsqueeze(-1)
        gain = log_ratio.exp().mul_(advantage)
        # min(A r, A clamp(r)) = min(A r, A (1 + c)) for A > 0 and min(A r, A (1 - c)) for A < 0.
        bound = torch.where(advantage > 0, 1 + clip, 1 - clip).mul_(advantage)
        share = weight / -len(log_ratio)
        ctx.save_for_backward((gain * (gain <= bound)).mul_(share))
        return torch.minimum(gain, bound).mul_(share).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient * ctx.saved_tensors[0], None, None, None


def asymmetric_surrogate(log_ratio: Tensor, advantage: Tensor, weight: Tensor, clip: Tensor) -> Tensor:
    """Return the loss that clips good decisions as PPO does and holds bad ones in a trust region (arXiv 2602.02481).

    For a negative advantage the gain is ``A r - |A| (r - 1)^2 / (2 clip)`` (SPO, arXiv 2401.16025), which is best at
    ``1 - clip``: where PPO only stops pushing, this pulls back. That matters for ratios from flow-matching losses, for
    nothing else bounds how much worse a flow can be made at explaining an action.

    Args:
        log_ratio: (B, M).
        advantage: (B,) of the decision, the same for its inner indices.
        weight: (M,) of the inner indices.
        clip: (M,) of the inner indices.
    """
    advantage, ratio = advantage.unsqueeze(-1), log_ratio.exp()
    good = torch.minimum(ratio, 1 + clip)
    bad = ratio + (ratio - 1).square() / (2 * clip)
    return -(weight * advantage * torch.where(advantage > 0, good, bad)).sum(-1).mean()


def bounded_ratio_loss(log_ratio: Tensor, advantage: Tensor, optimum: Tensor, weight: Tensor, clip: Tensor) -> Tensor:
    """Return BPO's loss (arXiv 2604.18578): ``|A| |ratio - ratio*|`` with ``ratio* = 1 + clip * optimum``.

    It has the slope of PPO's loss inside the clip range, and pulls ratios back that are outside.

    Args:
        log_ratio: (B, M).
        advantage: (B,) of the decision; only its magnitude counts.
        optimum: (B,) in [-1, 1]: the sign of the action value less its median over actions, softened near zero.
        weight: (M,) of the inner indices.
        clip: (M,) of the inner indices.
    """
    target = 1 + clip * optimum[:, None]
    return (weight * advantage.abs()[:, None] * (log_ratio.exp() - target).abs()).sum(-1).mean()


def divergence(log_ratio: Tensor) -> Tensor:
    """Estimate KL(old || new) from log-ratios (B, M): mean of ``ratio - 1 - log ratio``, which is never negative."""
    return (log_ratio.exp() - 1 - log_ratio).mean()


def gaussian_log_prob(mean: Tensor, log_std: Tensor, value: Tensor) -> Tensor:
    """Return log-densities (B,) of ``value`` (B, A) under N(mean (B, A), diag(exp(log_std (A,)) ** 2))."""
    log_prob: Tensor = _GaussianLogProb.apply(mean, log_std, value)
    return log_prob


class _GaussianLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_std: Tensor, value: Tensor) -> Tensor:
        precision = (-log_std).exp()
        eps = (value - mean).mul_(precision)
        ctx.save_for_backward(eps, precision)
        density = torch.addcmul(-log_std, eps, eps, value=-0.5).sum(-1)
        return density.sub_(0.5 * math.log(2 * math.pi) * eps.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        eps, precision = ctx.saved_tensors
        gradient = gradient.unsqueeze(-1)
        along = gradient * eps
        return along * precision, torch.addcmul(-gradient, along, eps).sum(0), None


def gaussian_divergence(mean: Tensor, log_std: Tensor, other_mean: Tensor, other_log_std: Tensor) -> Tensor:
    """Return KL(N(mean, std) || N(other_mean, other_std)) (B,) of diagonal Gaussians (B, A), summed over A."""
    precision = (-2 * other_log_std).exp()
    squares = ((2 * log_std).exp() + (mean - other_mean).square()) * precision
    return (other_log_std - log_std + 0.5 * squares - 0.5).sum(-1)
