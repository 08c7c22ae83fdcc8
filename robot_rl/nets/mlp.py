"""Multi-layer perceptrons: a plain one and the residual backbone of small generative heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robot_rl.nets.embed import TimeEmbedding


def mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.ReLU, layer_norm: bool = False) -> nn.Sequential:
    """Build Linear layers of the given ``sizes`` with an activation (and LayerNorm before it) between them."""
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(n_in, n_out))
        if i < len(sizes) - 2:
            if layer_norm:
                layers.append(nn.LayerNorm(n_out))
            layers.append(activation())
    return nn.Sequential(*layers)


class _Block(nn.Module):
    """Pre-norm residual block with a shift and scale from the condition (FiLM)."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        scale, shift = film.chunk(2, dim=-1)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x) * (1 + scale) + shift), approximate="tanh"))


class ResidualMLP(nn.Module):
    """Backbone on the flattened chunk: residual blocks, each modulated by the condition and the time.

    The fastest backbone on a processor for chunks of a few hundred numbers. The output layer starts at zero.
    """

    def __init__(
        self, horizon: int, action_size: int, cond_size: int, width: int = 512, depth: int = 3, expansion: int = 2
    ) -> None:
        super().__init__()
        self.shape = (horizon, action_size)
        flat = horizon * action_size
        self.time = TimeEmbedding(128)
        self.enter = nn.Linear(flat + cond_size, width)
        self.condition = nn.Sequential(nn.Linear(cond_size + 128, width // 2), nn.SiLU())
        self.film = nn.Linear(width // 2, depth * 2 * width)
        self.blocks = nn.ModuleList(_Block(width, expansion) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, flat)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Map noisy chunks x (B, H, A), times t (B,) and conditions (B, C) to an output (B, H, A)."""
        film = self.film(self.condition(torch.cat([cond, self.time(t)], dim=-1)))
        h = self.enter(torch.cat([x.flatten(1), cond], dim=-1))
        for block, modulation in zip(self.blocks, film.chunk(len(self.blocks), dim=-1), strict=True):
            h = block(h, modulation)
        return self.leave(self.norm(h)).unflatten(-1, self.shape)
