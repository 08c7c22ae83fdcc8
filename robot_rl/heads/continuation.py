"""How heads go on from a chunk that is being executed: guidance for any head, a known prefix where trained for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robot_rl.heads.path import Path


class ContinuationGuide:
    """Draws the denoised estimate towards a target, as pseudo-inverse guidance does (arXiv 2506.07339, eq. 2 to 4).

    ``x0' = x0 + min(b sigma, (alpha^2 + sigma^2) / alpha) J^T W (target - x0)`` with ``J = dx0 / dx``: on the straight
    path this is the published correction of the velocity, ``min(b, t / ((1 - t) r^2)) J^T W (target - x0)``.

    Args:
        path: of the head that is guided.
        target: (B, H, A) normalised actions.
        weights: (B, H) in [0, 1], the diagonal of W.
        full: whether J is the network's; else it is the identity.
        max_weight: b.
    """

    def __init__(self, path: Path, target: Tensor, weights: Tensor, full: bool, max_weight: float | Tensor) -> None:
        self.path, self.target, self.weights = path, target, weights[..., None]
        self.needs_gradient, self.max_weight = full, max_weight

    def __call__(self, sample: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the guided estimate (B, H, A) for the estimate ``sample`` at ``x`` (B, H, A), ``t`` (B,)."""
        alpha, sigma = self.path.alpha_sigma(t)
        weight = torch.minimum(self.max_weight * sigma, (alpha**2 + sigma**2) / alpha)
        error = self.weights * (self.target - sample)
        if self.needs_gradient:
            (error,) = torch.autograd.grad(sample, x, error.detach(), retain_graph=True)
        return sample + weight * error


class PrefixBackbone(nn.Module):
    """Gives a backbone a time per action, as one more channel of its input: 0 where an action is known already.

    Known actions are given clean, so that the others are denoised as their continuation (arXiv 2512.05964).

    Args:
        inner: backbone of actions with one number more than ``action_size``.
        action_size: A.
        prefix_steps: most actions that are known in training.
    """

    def __init__(self, inner: nn.Module, action_size: int, prefix_steps: int) -> None:
        super().__init__()
        self.inner, self.action_size, self.prefix_steps = inner, action_size, prefix_steps

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, known: Tensor | None = None) -> Tensor:
        """Map x (B, H, A), times t (B,), conditions (B, C) and ``known`` (B, H) bool to an output (B, H, A)."""
        times = t[:, None].expand(x.shape[:2])
        if known is not None:
            times = times.masked_fill(known, 0.0)
        output: Tensor = self.inner(torch.cat([x, times[..., None]], dim=-1), t, cond)
        return output[..., : self.action_size]


class Prefix:
    """Actions at the beginning of chunks that are known: imposed on every iterate of a sampler.

    Args:
        actions: (B, H, A) normalised; only the known ones matter.
        known: (B, H) bool.
    """

    def __init__(self, actions: Tensor, known: Tensor) -> None:
        self.actions, self.known = actions, known

    def impose(self, x: Tensor) -> Tensor:
        """Return ``x`` (B, H, A) with the known actions in their places."""
        return torch.where(self.known[..., None], self.actions, x)
