"""Embeddings of scalars."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time in [0, 1] with log-spaced periods, then a two-layer MLP.

    Periods run from 4e-3 to 4.0 as in openpi's pi0, so that neighbouring times stay distinguishable; the integer-step
    sinusoid of image diffusion would map all of [0, 1] to nearly the same vector.
    """

    def __init__(self, size: int, shortest: float = 4e-3, longest: float = 4.0) -> None:
        super().__init__()
        if size % 2:
            raise ValueError(f"embedding size must be even, got {size}")
        periods = shortest * (longest / shortest) ** torch.linspace(0, 1, size // 2)
        self.register_buffer("frequencies", 2 * math.pi / periods, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size))

    def forward(self, t: Tensor) -> Tensor:
        """Embed times (B,) as (B, size)."""
        angles = t[:, None].float() * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))
