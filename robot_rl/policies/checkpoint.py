"""Policies on disk: ``model.safetensors`` and ``policy.json``; loading one never runs code from it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import robot_rl
from robot_rl.core import registry
from robot_rl.core.errors import DataError
from robot_rl.core.spec import Spec

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
    """
    import safetensors.torch

    directory = Path(directory)
    temporary = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        tensors = {name: value.contiguous() for name, value in policy.state_dict().items()}
        safetensors.torch.save_file(tensors, temporary / "model.safetensors")
        description = {"format": FORMAT, "robot_rl": robot_rl.__version__, "policy": _describe(policy)}
        description["metadata"] = metadata or {}
        (temporary / "policy.json").write_text(json.dumps(description, indent=2))
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DataError(f"cannot write the checkpoint {directory}: {error.strerror or error}") from error
    previous = directory.with_name(f".{directory.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if directory.exists():
        os.replace(directory, previous)
    os.replace(temporary, directory)
    shutil.rmtree(previous, ignore_errors=True)
    return directory


def load_policy(directory: str | Path, device: str = "cpu", threads: int | None = None) -> Any:
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
        return registry.load("policies", "exported").open(directory, description["policy"], device, threads)

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
