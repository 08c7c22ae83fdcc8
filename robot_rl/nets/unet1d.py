"""The 1-D convolutional U-Net of Diffusion Policy (arXiv 2303.04137)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robot_rl.core.errors import ConfigError
from robot_rl.nets.embed import TimeEmbedding


class _ConvBlock(nn.Sequential):
    def __init__(self, n_in: int, n_out: int, kernel: int, groups: int) -> None:
        super().__init__(nn.Conv1d(n_in, n_out, kernel, padding=kernel // 2), nn.GroupNorm(groups, n_out), nn.Mish())


class _ResidualBlock(nn.Module):
    """Two convolutions with FiLM between them: ``h = scale * h + bias`` from the condition."""

    def __init__(self, n_in: int, n_out: int, cond_size: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.first = _ConvBlock(n_in, n_out, kernel, groups)
        self.second = _ConvBlock(n_out, n_out, kernel, groups)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(cond_size, 2 * n_out))
        self.skip = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, bias = self.film(cond)[..., None].chunk(2, dim=1)
        return self.second(scale * self.first(x) + bias) + self.skip(x)


class UNet1D(nn.Module):
    """Backbone that convolves over time; the choice for long chunks and multimodal data.

    The horizon must be divisible by ``2 ** (len(widths) - 1)``. Only the skips of the deeper levels are used, as in
    the published network, whose first skip never reaches the output.
    """

    def __init__(
        self,
        horizon: int,
        action_size: int,
        cond_size: int,
        width: int = 128,
        depth: int = 3,
        kernel: int = 5,
        groups: int = 8,
    ) -> None:
        super().__init__()
        if horizon % 2 ** (depth - 1):
            raise ConfigError(
                f"a U-Net of {depth} levels needs a horizon divisible by {2 ** (depth - 1)}, not {horizon}"
            )
        widths: Sequence[int] = [action_size, *(width * 2**i for i in range(depth))]
        self.time = TimeEmbedding(128)
        cond = cond_size + 128

        def block(n_in: int, n_out: int) -> _ResidualBlock:
            return _ResidualBlock(n_in, n_out, cond, kernel, groups)

        levels = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(
            nn.ModuleList([block(a, b), block(b, b), nn.Conv1d(b, b, 3, 2, 1) if i < depth - 1 else nn.Identity()])
            for i, (a, b) in enumerate(levels)
        )
        self.middle = nn.ModuleList([block(widths[-1], widths[-1]) for _ in range(2)])
        self.up = nn.ModuleList(
            nn.ModuleList([block(2 * b, a), block(a, a), nn.ConvTranspose1d(a, a, 4, 2, 1)])
            for a, b in reversed(levels[1:])
        )
        self.leave = nn.Sequential(_ConvBlock(width, width, kernel, groups), nn.Conv1d(width, action_size, 1))
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Map noisy chunks x (B, H, A), times t (B,) and conditions (B, C) to an output (B, H, A)."""
        cond = torch.cat([cond, self.time(t)], dim=-1)
        h, skips = x.transpose(1, 2), []
        for first, second, shrink in self.down:
            h = second(first(h, cond), cond)
            skips.append(h)
            h = shrink(h)
        for block in self.middle:
            h = block(h, cond)
        for first, second, grow in self.up:
            h = grow(second(first(torch.cat([h, skips.pop()], dim=1), cond), cond))
        return self.leave(h).transpose(1, 2)
