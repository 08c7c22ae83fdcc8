"""Policies on disk: ``model.safetensors`` and ``policy.json``; loading one never runs code from it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import robot_rl
from robot_rl.core import registry
from robot_rl.core.errors import ConfigError, DataError
from robot_rl.core.spec import Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT = 1
"""Version of the layout; readers refuse newer ones."""
REMOTE = ("ws://", "wss://")
"""What the address of a policy on a server begins with."""


def save_policy(policy: Any, directory: str | Path, metadata: dict[str, Any] | None = None) -> Path:
    """Write ``policy`` to ``directory``, replacing what is there only once all is written.

    Args:
        policy: a policy module; one that wraps another carries it in ``base``.
        directory: where to write.
        metadata: JSON-ready facts to keep, for example task and success rate.

    Raises:
        ConfigError: the directory holds something else.
        DataError: nothing can be written there, or the disk is full.
    """
    directory = Path(directory)
    with replacing(directory, "policy.json", "checkpoint") as temporary:
        write_tensors(temporary / "model.safetensors", policy.state_dict())
        description = {"format": FORMAT, "robot_rl": robot_rl.__version__, "policy": _describe(policy)}
        description["metadata"] = metadata or {}
        (temporary / "policy.json").write_text(json.dumps(description, indent=2))
    return directory


@contextmanager
def replacing(directory: Path, marker: str, what: str) -> Iterator[Path]:
    """Give an empty directory beside ``directory``, whose place it takes in the end; it goes if something fails.

    Args:
        directory: what is replaced, if it exists.
        marker: file that says that ``directory`` is of this kind.
        what: name of the kind, for messages.

    Raises:
        ConfigError: ``directory`` holds files and no ``marker``: nobody asked to lose these.
        DataError: nothing can be written there, or the disk is full.
    """
    temporary, previous = (directory.with_name(f".{directory.name}.{end}") for end in ("writing", "previous"))
    try:
        if directory.exists() and any(directory.iterdir()) and not (directory / marker).exists():
            raise ConfigError(f"{directory} holds files and no {what} ({marker}): choose a new or an empty directory")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(previous, ignore_errors=True)
        if directory.exists():
            os.replace(directory, previous)
        os.replace(temporary, directory)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        raise DataError(f"cannot write the {what} {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; `OSError` where that fails, as with any other file (the library has its own)."""
    import safetensors
    import safetensors.torch

    try:
        plain = {name: value.contiguous() for name, value in tensors.items()}
        safetensors.torch.save_file(plain, path, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def load_policy(directory: str | Path, device: str | torch.device = "cpu", threads: int | None = None) -> Any:
    """Read a policy written by `save_policy`, or one that was exported, ready for inference.

    Args:
        directory: the checkpoint; ``ws://host:port/<path>`` is a policy on a server (`robot_rl.serving.client`).
        device: where it runs, for example ``cuda``.
        threads: processor threads of its inference, for all policies of this process; None leaves them as they are.

    Raises:
        DataError: the checkpoint is missing, truncated, of a newer format or does not fit its own description.
        UnknownNameError: it needs a policy, head or backbone that is not installed.
    """
    if str(directory).startswith(REMOTE):
        return registry.load("policies", "remote").connect(str(directory))
    directory = Path(directory)
    description = read_description(directory)
    if description["policy"].get("kind") == "exported":
        return registry.load("policies", "exported").open(directory, description["policy"], str(device), threads)

    import safetensors
    import safetensors.torch
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    policy = _build(description["policy"], directory)
    path = directory / "model.safetensors"
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"cannot read the checkpoint file {path}: {error}") from error
    try:
        policy.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).split("\n")[1].strip() if "\n" in str(error) else str(error)
        raise DataError(f"the weights in {path} do not fit the checkpoint's description: {reason}") from error
    return policy.to(device).eval().requires_grad_(False)


def read_description(directory: str | Path) -> dict[str, Any]:
    """Return the parsed ``policy.json`` of a checkpoint: ``policy`` (kind, config, spec, base) and ``metadata``."""
    if str(directory).startswith(REMOTE):
        return registry.load("policies", "remote").describe(str(directory))
    path = Path(directory) / "policy.json"
    if not path.exists():
        nearby = sorted(str(found.parent) for found in Path(directory).glob("**/policy.json"))
        hint = f"; checkpoints below it: {', '.join(nearby)}" if nearby else ""
        raise DataError(f"no checkpoint in {directory}: policy.json is missing{hint}")
    try:
        description = json.loads(path.read_text())
        newer = description["format"] > FORMAT
        description["policy"]["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if newer:
        raise DataError(f"{path} has format {description['format']}; this version reads up to {FORMAT}")
    return description


def _describe(policy: Any) -> dict[str, Any]:
    return {
        "kind": policy.kind,
        "config": policy.config_dict(),
        "spec": policy.spec.to_json(),
        "base": None if policy.base is None else _describe(policy.base),
    }


def _build(description: dict[str, Any], directory: Path) -> Any:
    try:
        kind, config, spec = description["kind"], description["config"], Spec.from_json(description["spec"])
        base = None if description["base"] is None else _build(description["base"], directory)
        return registry.load("policies", kind).from_parts(config, spec, base)
    except (KeyError, TypeError) as error:
        raise DataError(f"{directory / 'policy.json'} does not describe a policy: {error}") from error
