"""Adam over parameters that are views of one buffer: a step costs three operations, however many parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam


class FlatAdam:
    """Adam (arXiv 1412.6980) with clipping by the joint norm, for networks so small that each call counts.

    The parameters keep their identity and shape but move into one buffer, and so do their gradients: use `zero`
    instead of setting them to None.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], max_norm: float, eps: float = 1e-5) -> None:
        """Take over ``parameters``, which must live on one device.

        Args:
            parameters: what to train.
            max_norm: gradients are scaled down to this joint norm.
            eps: Adam's epsilon.
        """
        self.parameters, self.max_norm, self.eps = list(parameters), max_norm, eps
        self._sizes = [parameter.numel() for parameter in self.parameters]
        with torch.no_grad():
            self._flat = torch.cat([parameter.flatten() for parameter in self.parameters])
        self._gradient = torch.zeros_like(self._flat)
        self._moments = [torch.zeros_like(self._flat), torch.zeros_like(self._flat)]
        self._steps = torch.zeros((), device=self._flat.device)
        for parameter, values in zip(self.parameters, self._split(self._flat), strict=True):
            parameter.data = values
        self._gradients = self._split(self._gradient)
        self._bind()

    def zero(self) -> None:
        """Set the gradients to zero."""
        self._gradient.zero_()

    def step(self, learning_rate: float) -> None:
        """Clip the gradients and descend by them."""
        if any(p.grad is not g for p, g in zip(self.parameters, self._gradients, strict=True)):
            self._gather()
        norm = torch.linalg.vector_norm(self._gradient)
        self._gradient.mul_((self.max_norm / (norm + 1e-6)).clamp_(max=1.0))
        adam(
            [self._flat],
            [self._gradient],
            [self._moments[0]],
            [self._moments[1]],
            max_exp_avg_sqs=[],
            state_steps=[self._steps],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate,
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        """Return the moments ``<parameter>.<moment>``, named as those of `torch.optim.Adam`."""
        if not self._steps:
            return {}
        result: dict[str, Tensor] = {}
        parts = [self._split(moment) for moment in self._moments]
        for i, (first, second) in enumerate(zip(*parts, strict=True)):
            result |= {f"{i}.exp_avg": first, f"{i}.exp_avg_sq": second, f"{i}.step": self._steps}
        return result

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue with the moments that `state` returned."""
        for name, moment in zip(("exp_avg", "exp_avg_sq"), self._moments, strict=True):
            for i, part in enumerate(self._split(moment)):
                if f"{i}.{name}" in tensors:
                    part.copy_(tensors[f"{i}.{name}"])
        if "0.step" in tensors:
            self._steps.copy_(tensors["0.step"])

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [v.view_as(p) for v, p in zip(flat.split(self._sizes), self.parameters, strict=True)]

    def _bind(self) -> None:
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _gather(self) -> None:
        """Take in gradients that something else has put into tensors of their own."""
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            if parameter.grad is None:
                gradient.zero_()
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
        self._bind()
