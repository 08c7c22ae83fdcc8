"""Chains of Gaussian sampling steps: their densities and divergences, all steps in one call of the network."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from robot_rl.heads.base import Head


def chain_moments(head: Head, chain: Tensor, cond: Tensor, steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Return mean (B, M, H, A) and standard deviation (B, M, 1, 1) of the last M steps of sampled chains.

    Args:
        head: head whose `Head.chain_step` gives one step.
        chain: (B, M + 1, H, A) iterates, the last of which are the actions.
        cond: (B, C).
        steps: length K of the whole chain; M <= K.
        options: further options of the head's `chain_step`.
    """
    batch, count = len(chain), chain.shape[1] - 1
    index = torch.arange(steps - count, steps, device=chain.device).repeat(batch)
    rows = chain[:, :-1].flatten(0, 1)
    mean, std = head.chain_step(rows, index, cond.repeat_interleave(count, dim=0), steps, **options)
    return mean.unflatten(0, (batch, count)), std.unflatten(0, (batch, count))


def normal_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log-density of every element of ``x`` under N(mean, std^2); shapes broadcast."""
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def normal_divergence(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """Return KL(N(mean, std^2) || N(other_mean, other_std^2)) of every element; shapes broadcast."""
    ratio = std / other_std
    return 0.5 * (ratio.square() + ((mean - other_mean) / other_std).square() - 1) - ratio.log()
