"""Where networks run, and random numbers that are the same wherever they do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Generator, Tensor

from robot_rl.core.errors import ConfigError


def find_device(name: str) -> torch.device:
    """Return the device called ``name``: ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        ConfigError: there is none of that name here; lists those there are.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = ["cpu", *(f"cuda:{k}" for k in range(cards))]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device is None or str(device) not in present:
        raise ConfigError(f"there is no device '{name}' for networks here; there is {', '.join(present)}")
    return device


def device_of(part: Any) -> torch.device:
    """Return where a policy or a network is; the processor for what has no weights."""
    if isinstance(part, torch.nn.Module):
        part = next(chain(part.parameters(), part.buffers()), None)
    return getattr(part, "device", torch.device("cpu"))


def draw(sampler: Callable[..., Tensor], *sizes: Any, device: torch.device, generator: Generator | None) -> Tensor:
    """Return what ``sampler`` (`torch.rand`, `torch.randn`, `torch.randint`) draws, on ``device``.

    With a generator the numbers are drawn where that is: one of the processor gives the same numbers to every device.
    """
    where = device if generator is None else generator.device
    return sampler(*sizes, device=where, generator=generator).to(device)
