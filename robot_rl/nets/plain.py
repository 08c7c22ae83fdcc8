"""A plain perceptron as backbone of small generative policies that learn from scratch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robot_rl.nets.mlp import mlp

TIME_FREQUENCIES = 4
"""Octaves of the time features: sines and cosines of pi/2 * 2^i * t."""


class PlainMLP(nn.Module):
    """Backbone on chunk, condition and time together: ``depth`` hidden layers of ``width``, ReLU between them.

    Reinforcement learning from scratch evaluates the network for many noise and time pairs of every action, so a few
    thousand multiplications per evaluation is what it can afford. The output layer starts at zero: a velocity head then
    returns its start noise, and an untrained policy is N(0, I) in normalised actions.
    """

    def __init__(self, horizon: int, action_size: int, cond_size: int, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.shape = (horizon, action_size)
        flat = horizon * action_size
        self.net = mlp((flat + cond_size + 2 * TIME_FREQUENCIES, *([width] * depth), flat), nn.ReLU)
        last = self.net[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.arange(TIME_FREQUENCIES), persistent=False)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Map noisy chunks x (B, H, A), times t (B,) and conditions (B, C) to an output (B, H, A)."""
        angles = t[:, None] * self.frequencies
        inputs = torch.cat([x.flatten(1), cond, angles.sin(), angles.cos()], dim=-1)
        return self.net(inputs).unflatten(-1, self.shape)
