"""Ensembles of multi-layer perceptrons with one product per layer, and a hand-written backward pass.

Off-policy learning makes many small updates, where the time goes into overhead around the products. One autograd node
per network, casts only where they are needed and gradients only for what is trained make an update several times as
fast as the same network of `torch.nn.Linear`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

_EPSILON = 1e-5


class EnsembleMLP(nn.Module):
    """E perceptrons of equal shape: linear, LayerNorm (optional), ReLU; the last layer is linear.

    Args:
        sizes: widths from input to output.
        members: number E of networks.
        layer_norm: LayerNorm after each hidden linear layer.
        dtype: arithmetic of the products; weights, sums and the output are float32.
    """

    def __init__(
        self, sizes: Sequence[int], members: int = 1, layer_norm: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.members, self.layer_norm, self.dtype = members, layer_norm, dtype
        self.sizes = tuple(sizes)
        self.weights = nn.ParameterList(_uniform((members, n, m), n) for n, m in pairwise(self.sizes))
        self.biases = nn.ParameterList(_uniform((members, 1, m), n) for n, m in pairwise(self.sizes))
        hidden = self.sizes[1:-1] if layer_norm else ()
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(members, 1, m)) for m in hidden)
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(members, 1, m)) for m in hidden)

    def forward(self, x: Tensor, members: Tensor | None = None, frozen: bool = False) -> Tensor:
        """Return outputs (E, B, out) in float32 for inputs (B, in), the same for every member.

        Args:
            x: (B, in).
            members: indices (M,) of the members to evaluate; the result is then (M, B, out).
            frozen: whether gradients stop at the weights (they still reach the input).
        """
        parameters = [*self.weights, *self.biases, *self.gains, *self.shifts]
        if frozen:
            parameters = [parameter.detach() for parameter in parameters]
        if members is not None:
            parameters = [parameter.index_select(0, members) for parameter in parameters]
        output: Tensor = _Function.apply(x, self.dtype, len(self.weights), *parameters)
        return output


class _Function(torch.autograd.Function):
    """The network and its gradient; parameters are all weights, then biases, then gains, then shifts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, depth: int, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:depth], parameters[depth : 2 * depth]
        gains, shifts = parameters[2 * depth : 3 * depth - 1], parameters[3 * depth - 1 :]
        weights = [weight.to(dtype) for weight in weights]
        h = x.to(dtype).expand(len(weights[0]), *x.shape)
        saved = []
        for i, weight in enumerate(weights[:-1]):
            saved.append(h)
            h = torch.baddbmm(biases[i].to(dtype), h, weight)
            if gains:
                normal, mean, deviation = torch.native_layer_norm(h, h.shape[-1:], None, None, _EPSILON)
                saved += [h, normal, mean, deviation]
                h = torch.addcmul(shifts[i].to(dtype), normal, gains[i].to(dtype))
            h = h.relu_()
        saved.append(h)
        ctx.dtype, ctx.depth, ctx.norm, ctx.x_dtype = dtype, depth, bool(gains), x.dtype
        ctx.save_for_backward(*saved, *weights, *gains)
        ctx.saved = len(saved)
        if weights[-1].shape[-1] == 1:
            # A product with a single column is slower than a sum, and this one stays in float32.
            last = parameters[depth - 1].mT
            products = h * last if dtype == torch.float32 else h.float().mul_(last)
            return products.sum(-1, keepdim=True) + biases[-1]
        return torch.baddbmm(biases[-1].to(dtype), h, weights[-1]).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        depth, tensors = ctx.depth, ctx.saved_tensors
        saved, weights = list(tensors[: ctx.saved]), tensors[ctx.saved : ctx.saved + depth]
        gains = tensors[ctx.saved + depth :]
        train = ctx.needs_input_grad[3]
        gradient, after = outputs[0].to(ctx.dtype), outputs[0]
        found: list[list[Tensor | None]] = [[None] * depth, [None] * depth, [None] * len(gains), [None] * len(gains)]
        for i in range(depth - 1, -1, -1):
            if i < depth - 1:
                gradient = torch.ops.aten.threshold_backward(gradient, after, 0)
                if ctx.norm:
                    deviation, mean, normal, before = (saved.pop() for _ in range(4))
                    if train:
                        found[2][i] = (gradient * normal).sum(1, keepdim=True, dtype=torch.float32)
                        found[3][i] = gradient.sum(1, keepdim=True, dtype=torch.float32)
                    gradient = torch.ops.aten.native_layer_norm_backward(
                        gradient * gains[i].to(ctx.dtype), before, before.shape[-1:], mean, deviation, None, None, _MASK
                    )[0]
            after = saved.pop()  # of the layer before: this one's input
            if train:
                found[0][i] = torch.bmm(after.mT, gradient).float()
                found[1][i] = gradient.sum(1, keepdim=True, dtype=torch.float32)
            if i > 0:
                if weights[i].shape[-1] == 1:
                    gradient = gradient * weights[i].mT
                else:
                    gradient = torch.bmm(gradient, weights[i].mT)
        inputs = None
        if ctx.needs_input_grad[0]:
            inputs = torch.bmm(gradient, weights[0].mT).sum(0, dtype=torch.float32).to(ctx.x_dtype)
        return inputs, None, None, *(g for group in found for g in group)


_MASK = [True, False, False]


def _uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    """Draw as `torch.nn.Linear` draws weights and biases."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
