"""Paths from data to noise, ``x_t = alpha(t) a + sigma(t) e``, and the linear maps between what networks predict.

Time runs from 0 (data) to 1 (noise) for every head, so that steering, composition and real-time chunking are written
once, as a change of the denoised estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "velocity", "sample"]


@dataclass
class Estimate:
    """What a head knows at one point of the path, in every family's terms; all tensors are (B, H, A)."""

    sample: Tensor
    """Denoised estimate x0-hat."""
    epsilon: Tensor
    """Noise estimate."""

    @property
    def velocity(self) -> Tensor:
        """Velocity of the straight path, ``epsilon - sample`` (time 1 is noise)."""
        return self.epsilon - self.sample


@dataclass(frozen=True)
class Path:
    """A family of noise levels and the prediction that its network was trained for; saved with the checkpoint."""

    kind: Literal["flow", "cosine"] = "flow"
    """``flow``: alpha = 1 - t, sigma = t. ``cosine``: the squared-cosine schedule of DDPM with ``levels`` levels."""
    prediction: Prediction = "velocity"
    """What the network predicts: noise, velocity (flow only) or the clean sample."""
    levels: int = 100
    """Number of discrete levels of the cosine schedule."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma), each (B, 1, 1), at times t (B,)."""
        t = t[:, None, None]
        if self.kind == "flow":
            return 1 - t, t
        abar = squared_cosine(self.levels).to(t.device)[(t * (self.levels - 1)).round().long()]
        return abar.sqrt(), (1 - abar).sqrt()

    def noised(self, actions: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t (B, H, A) for clean actions and noise (B, H, A) at times t (B,)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * actions + sigma * noise

    def target(self, actions: Tensor, noise: Tensor) -> Tensor:
        """Return what the network should predict (B, H, A)."""
        if self.prediction == "velocity":
            return noise - actions
        return noise if self.prediction == "epsilon" else actions

    def estimate(self, output: Tensor, x: Tensor, t: Tensor) -> Estimate:
        """Turn a network output at x (B, H, A), t (B,) into the denoised and the noise estimate."""
        alpha, sigma = self.alpha_sigma(t)
        if self.prediction == "velocity":
            return Estimate(x - sigma * output, x + alpha * output)
        if self.prediction == "epsilon":
            return Estimate((x - sigma * output) / alpha.clamp_min(1e-4), output)
        return Estimate(output, (x - alpha * output) / sigma.clamp_min(1e-4))

    def epsilon_for(self, sample: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the noise (B, H, A) that is consistent with a changed denoised estimate at x."""
        alpha, sigma = self.alpha_sigma(t)
        return (x - alpha * sample) / sigma.clamp_min(1e-4)


@lru_cache(maxsize=16)
def squared_cosine(levels: int) -> Tensor:
    """Return abar (levels,) of the squared-cosine schedule (arXiv 2102.09672), betas capped at 0.999; read only."""
    u = torch.arange(levels + 1, dtype=torch.float64) / levels
    curve = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0).float()
