"""Learner state on disk: tensors and numbers, replaced as a whole so that a kill leaves the old or the new."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from robot_rl.core.errors import DataError


def optimizer_tensors(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's moments as tensors ``name.<parameter>.<moment>``."""
    state = optimizer.state_dict()["state"]
    return {f"{name}.{i}.{key}": torch.as_tensor(v) for i, part in state.items() for key, v in part.items()}


def restore_optimizer(name: str, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give ``optimizer`` the moments that `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{name}."):
            index, moment = key[len(name) + 1 :].split(".", 1)
            state.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def generators(*owners: Any) -> list[torch.Generator]:
    """Return the random generators that are attributes of ``owners``, or of their parts where they are modules."""
    parts = [part for owner in owners for part in (owner.modules() if isinstance(owner, nn.Module) else [owner])]
    return [value for part in parts for value in vars(part).values() if isinstance(value, torch.Generator)]


@contextmanager
def keeping_generators(*owners: Any) -> Iterator[None]:
    """Let the random generators of ``owners`` go on afterwards as if they had not been used or seeded meanwhile."""
    kept = [(generator, generator.get_state()) for generator in generators(*owners)]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)


def reseed(seed: int, *owners: Any) -> None:
    """Give each random generator of ``owners`` a seed of its own that follows from ``seed``."""
    for number, generator in enumerate(generators(*owners)):
        generator.manual_seed(seed + 1_000_000_007 * number)  # of a seed only the lower 32 bits count


def save_state(path: Path, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
    """Write ``tensors`` and ``numbers`` to one safetensors file at ``path``, atomically.

    Raises:
        DataError: nothing can be written there, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.part")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(plain, temporary, metadata={"numbers": json.dumps(numbers)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)  # a part would keep a full disk full
        raise DataError(f"cannot write the learner's state {path}: {error}") from error


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Read what `save_state` wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), json.loads(metadata["numbers"])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise DataError(f"cannot read the learner's state {path}: {error}") from error


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
