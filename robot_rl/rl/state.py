"""Learner state on disk: tensors and numbers, replaced as a whole so that a kill leaves the old or the new."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def save_state(path: Path, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
    """Write ``tensors`` and ``numbers`` to one safetensors file at ``path``, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, temporary, metadata={"numbers": json.dumps(numbers)})
    os.replace(temporary, path)


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
