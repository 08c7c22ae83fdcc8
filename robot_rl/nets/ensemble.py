"""Ensembles of multi-layer perceptrons with one product per layer, and a hand-written backward pass.

Off-policy learning makes many small updates, where the time goes into overhead around the products. All weights of an
ensemble lie in one tensor, so that a cast, a step of the optimiser or of a moving average is one operation; the whole
network is one autograd node, and gradients are computed only for what is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_EPSILON = 1e-5


class Layers(NamedTuple):
    """Views of an ensemble's weights, by layer: (E, in, out), then (E, 1, out)."""

    weights: list[Tensor]
    biases: list[Tensor]
    gains: list[Tensor]
    shifts: list[Tensor]


class EnsembleMLP(nn.Module):
    """E perceptrons of equal shape: linear, LayerNorm (optional), ReLU; the last layer is linear.

    Checkpoints hold the weights by layer (``weights.0``, …), not the one tensor that is trained.

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
        pairs = list(pairwise(self.sizes))
        weights = [_uniform((members, n, m), n) for n, m in pairs]
        biases = [_uniform((members, 1, m), n) for n, m in pairs]
        hidden = self.sizes[1:-1] if layer_norm else ()
        gains, shifts = ([make(members, 1, m) for m in hidden] for make in (torch.ones, torch.zeros))
        parts = [*weights, *biases, *gains, *shifts]
        self._shapes = [part.shape for part in parts]
        self._lengths = [part.numel() for part in parts]
        names = [("weights", weights), ("biases", biases), ("gains", gains), ("shifts", shifts)]
        self._names = [f"{name}.{i}" for name, group in names for i in range(len(group))]
        self.flat = nn.Parameter(torch.cat([part.flatten() for part in parts]))
        self._known: dict[str, tuple[Tensor, Layers]] = {}
        self._held = False

    def hold(self) -> None:
        """Take the weights as they are now: until the next `hold` or `release`, nobody changes them."""
        self._held = True
        self._known.pop("low", None)

    def release(self) -> None:
        """End what `hold` began: each pass reads the weights again."""
        self._held = False

    def _exact(self) -> Layers:
        """Return the weights by layer, without gradients."""
        known = self._known.get("exact")
        if known is None or known[0].data_ptr() != self.flat.data_ptr():
            flat = self.flat.detach()
            known = self._known["exact"] = flat, self.layers(flat)
        return known[1]

    def _low(self) -> Layers:
        """Return the weights by layer in the dtype of the products."""
        if self.dtype == self.flat.dtype:
            return self._exact()
        known = self._known.get("low")
        if known is None or not self._held or known[0].dtype != self.dtype:
            flat = self.flat.detach().to(self.dtype)
            known = self._known["low"] = flat, self.layers(flat)
        return known[1]

    def _gradients(self, like: Tensor) -> tuple[Tensor, Layers]:
        """Return room for a gradient of ``flat`` in the dtype of ``like``, kept between calls, and its views."""
        known = self._known.get("gradient")
        if known is None or known[0].dtype != like.dtype or known[0].device != like.device:
            flat = like.new_empty(sum(self._lengths))
            known = self._known["gradient"] = flat, self.layers(flat)
        return known

    def layers(self, flat: Tensor) -> Layers:
        """Return views by layer of a tensor laid out as ``flat``."""
        views = [part.view(shape) for part, shape in zip(flat.split(self._lengths), self._shapes, strict=True)]
        n = len(self.sizes) - 1
        middle = n + (len(views) - 2 * n) // 2 + n
        return Layers(views[:n], views[n : 2 * n], views[2 * n : middle], views[middle:])

    @property
    def weights(self) -> list[Tensor]:
        """Matrices (E, in, out), views of ``flat``."""
        return self.layers(self.flat).weights

    @property
    def biases(self) -> list[Tensor]:
        """Biases (E, 1, out), views of ``flat``."""
        return self.layers(self.flat).biases

    @property
    def gains(self) -> list[Tensor]:
        """LayerNorm's factors (E, 1, width), views of ``flat``."""
        return self.layers(self.flat).gains

    @property
    def shifts(self) -> list[Tensor]:
        """LayerNorm's summands (E, 1, width), views of ``flat``."""
        return self.layers(self.flat).shifts

    def forward(self, x: Tensor | tuple[Tensor, ...], members: Tensor | None = None, frozen: bool = False) -> Tensor:
        """Return outputs (E, B, out) in float32 for inputs (B, in), the same for every member.

        Args:
            x: (B, in), or its parts (B, n), (B, m), … side by side; gradients are computed for those that need one.
            members: indices (M,) of the members to evaluate; the result is then (M, B, out).
            frozen: whether gradients stop at the weights (they still reach the input).
        """
        parts = x if isinstance(x, tuple) else (x,)
        train = self.flat.requires_grad and not frozen
        if not torch.is_grad_enabled() or not (train or any(part.requires_grad for part in parts)):
            return self._run(parts, members)
        if train and members is not None:
            return self(x).index_select(0, members)
        output: Tensor = _Function.apply(self, members, self.flat if train else self.flat.detach(), *parts)
        return output

    def _run(
        self,
        parts: tuple[Tensor, ...],
        members: Tensor | None,
        tape: list[Tensor] | None = None,
        train: bool = False,
    ) -> Tensor:
        """Return the outputs; ``tape`` takes what the gradient needs: activations, then weights, then gains."""
        if members is None:
            low, exact = self._low(), self._exact()
        else:
            exact = Layers(*([part.index_select(0, members) for part in group] for group in self._exact()))
            low = Layers(*([part.to(self.dtype) for part in group] for group in exact))
        h = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(self.dtype).expand(len(low.weights[0]), -1, -1)
        if train:
            h = h.contiguous()  # the product of the weights' gradient is faster by what the copy costs, and more
        for i, (weight, bias) in enumerate(zip(low.weights[:-1], low.biases, strict=False)):
            kept = [h]
            h = torch.baddbmm(bias, h, weight)
            if self.layer_norm:
                normal, mean, deviation = torch.native_layer_norm(h, h.shape[-1:], None, None, _EPSILON)
                kept += [h, normal, mean, deviation]
                h = torch.addcmul(low.shifts[i], normal, low.gains[i])
            _relu_(h)
            if tape is not None:
                tape += kept
        if tape is not None:
            tape += [h, *low.weights, *low.gains]
        if self.sizes[-1] > 1:
            return torch.baddbmm(low.biases[-1], h, low.weights[-1]).float()
        # A product with a single column is slower than a sum, and this one stays in float32.
        last = exact.weights[-1].mT
        products = h * last if self.dtype == torch.float32 else h.float().mul_(last)
        return products.sum(-1, keepdim=True).add_(exact.biases[-1])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        flat = self.flat if keep_vars else self.flat.detach()
        parts = [part for group in self.layers(flat) for part in group]
        destination.update({prefix + name: part for name, part in zip(self._names, parts, strict=True)})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        parts = [part for group in self.layers(self.flat.detach()) for part in group]
        known = {prefix + name: part for name, part in zip(self._names, parts, strict=True)}
        missing_keys += [key for key in known if key not in state_dict]
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known and strict]
        for key, part in known.items():
            if key in state_dict and state_dict[key].shape != part.shape:
                error_msgs.append(f"{key} is {tuple(state_dict[key].shape)}, expected {tuple(part.shape)}")
            elif key in state_dict:
                part.copy_(state_dict[key])


class _Function(torch.autograd.Function):
    """The network and its gradient."""

    @staticmethod
    def forward(ctx: Any, net: EnsembleMLP, members: Tensor | None, flat: Tensor, *parts: Tensor) -> Tensor:
        tape: list[Tensor] = []
        output = net._run(parts, members, tape, ctx.needs_input_grad[2])
        ctx.net, ctx.dtype, ctx.widths = net, net.dtype, [part.shape[-1] for part in parts]
        ctx.save_for_backward(*tape)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        net, depth = ctx.net, len(ctx.net.sizes) - 1
        gradient = outputs[0].to(ctx.dtype)
        flat, found = net._gradients(gradient) if ctx.needs_input_grad[2] else (None, None)
        tape = list(ctx.saved_tensors)
        gains = tape[len(tape) - (depth - 1) :] if net.layer_norm else []
        weights = tape[len(tape) - len(gains) - depth : len(tape) - len(gains)]
        saved = tape[: len(tape) - len(gains) - depth]
        after = gradient
        for i in range(depth - 1, -1, -1):
            if i < depth - 1:
                bits = _bits(gradient)
                torch.ops.aten.threshold_backward.grad_input(bits, _bits(after), 0, grad_input=bits)
                if net.layer_norm:
                    deviation, mean, normal, before = (saved.pop() for _ in range(4))
                    if found is not None:
                        torch.sum(gradient * normal, 1, keepdim=True, out=found.gains[i])
                        torch.sum(gradient, 1, keepdim=True, out=found.shifts[i])
                    gradient = torch.ops.aten.native_layer_norm_backward(
                        gradient * gains[i], before, before.shape[-1:], mean, deviation, None, None, _MASK
                    )[0]
            after = saved.pop()  # of the layer before: this one's input
            if found is not None:
                torch.bmm(after.mT, gradient, out=found.weights[i])
                torch.sum(gradient, 1, keepdim=True, out=found.biases[i])
            if i > 0:
                if weights[i].shape[-1] == 1:
                    gradient = gradient * weights[i].mT
                else:
                    gradient = torch.bmm(gradient, weights[i].mT)
        inputs: list[Tensor | None] = []
        for k, columns in enumerate(weights[0].split(ctx.widths, 1)):
            needed = ctx.needs_input_grad[3 + k]
            inputs.append(torch.bmm(gradient, columns.mT).sum(0, dtype=torch.float32) if needed else None)
        return None, None, None if flat is None else flat.to(outputs[0].dtype, copy=True), *inputs


_MASK = [True, False, False]


def _bits(x: Tensor) -> Tensor:
    """Return ``x``, if bfloat16 as integers: of equal sign and order above 0, but no operation has to convert them."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _relu_(x: Tensor) -> None:
    """Apply ReLU in place; NaN stays."""
    if x.dtype == torch.bfloat16:
        torch.threshold_(_bits(x), -128, 0)  # the bits of -inf: lower are the other negative numbers, higher is NaN
    else:
        x.relu_()


def _uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Draw as `torch.nn.Linear` draws weights and biases."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound)
