"""Exponential moving average of weights."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class EMA:
    """Keeps a slowly following copy of a module; evaluation and export use the copy.

    The decay after n updates is ``min(maximum, 1 - (1 + n) ** -power)`` as in Diffusion Policy, so that early weights
    are forgotten quickly.
    """

    def __init__(self, module: nn.Module, maximum: float = 0.999, power: float = 0.75) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.maximum, self.power = maximum, power
        pairs = list(zip(self.module.parameters(), module.parameters(), strict=True))
        self._copies = [copied for copied, _ in pairs]
        self._sources = [source for _, source in pairs]

    def decay(self, updates: int) -> float:
        """Return the decay after ``updates`` optimiser steps."""
        return min(self.maximum, 1 - (1 + updates) ** -self.power)

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move the copy towards the module's present weights; ``updates`` counts optimiser steps so far."""
        torch._foreach_lerp_(self._copies, self._sources, 1 - self.decay(updates))
