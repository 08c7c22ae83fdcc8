"""A frozen copy of a policy: the reference that an anchor, a chain's untrained prefix or a decoder stands on."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def frozen(policy: Module) -> Module:
    """Return a copy of ``policy`` that nothing trains: own weights, own normaliser, evaluation mode."""
    return copy.deepcopy(policy).requires_grad_(False).eval()
