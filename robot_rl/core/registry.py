"""Names for everything that can be plugged in, read from entry points.

A third party's task, robot, head or command takes the same road as ours: a line under
``[project.entry-points."robot_rl.<group>"]`` of its own package.
"""

from __future__ import annotations

import ast
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from robot_rl.core.errors import ConfigError, MissingDependencyError, RobotRLError, UnknownNameError

GROUPS = {
    "tasks": "task",
    "robots": "robot",
    "teleop": "operator device",
    "cameras": "camera",
    "policies": "policy",
    "heads": "head",
    "backbones": "backbone",
    "finetuners": "fine-tuning method",
    "datasets": "dataset format",
    "commands": "command",
}
"""Registry groups and what one entry is called in messages."""

_overrides: dict[tuple[str, str], Any] = {}


def names(group: str) -> list[str]:
    """Return the sorted names registered in ``group``."""
    found = {entry.name for entry in entry_points(group=f"robot_rl.{group}")}
    return sorted(found | {name for g, name in _overrides if g == group})


def register(group: str, name: str, value: Any) -> None:
    """Register ``value`` in this process only; for tests and notebooks."""
    _overrides[group, name] = value


def load(group: str, name: str) -> Any:
    """Return what is registered as ``name`` in ``group``.

    Raises:
        UnknownNameError: no such name; the message suggests the nearest.
        MissingDependencyError: the plug-in needs a package that is not installed.
        RobotRLError: another distribution's plug-in cannot be imported.
    """
    kind = GROUPS.get(group, group)
    if (group, name) in _overrides:
        return _overrides[group, name]
    for entry in entry_points(group=f"robot_rl.{group}"):
        if entry.name == name:
            return _load(entry, f"The {kind} '{name}'")
    raise UnknownNameError(kind, name, names(group))


def _load(entry: EntryPoint, what: str) -> Any:
    """Import what ``entry`` names; a foreign plug-in that cannot be imported is an error that names who made it."""
    owner = entry.dist.name if entry.dist is not None else ""
    foreign = owner not in ("", "robot-rl", "robot_rl")
    try:
        return entry.load()
    except ModuleNotFoundError as error:
        if not foreign and error.name and error.name.split(".")[0] in ("robot_rl", "sim", "hardware"):
            raise
        raise MissingDependencyError(str(error.name), "all", what, owner if foreign else "") from error
    except (SyntaxError, ImportError, AttributeError) as error:
        if not foreign:
            raise
        reason = f"{type(error).__name__}: {error}"
        raise RobotRLError(f"{what} of the distribution '{owner}' cannot be loaded: {reason}.") from error


def make_env(name: str, num_envs: int = 1, **options: Any) -> Any:
    """Build the task ``name`` with ``num_envs`` lanes.

    ``"family:argument"`` passes the part after the first colon on, so that ``"gym:gym_pusht/PushT-v0"`` reaches any
    Gymnasium environment. Options may follow, ``"gym:AdroitHandDoor-v1,hold=5,workers=2"``, wherever a task is named.
    Options that the task does not know are an error that names them.

    Raises:
        UnknownNameError: no such task.
        ConfigError: an option is not written as ``name=value``, or given twice.
    """
    name, *written = name.split(",")
    for one in written:
        key, separator, text = one.partition("=")
        if not (key.isidentifier() and separator):
            raise ConfigError(f"task '{name}': '{one}' is no option: expected name=value")
        if key in options or key == "num_envs":
            raise ConfigError(f"task '{name}': the option '{key}' is given in another way already")
        options[key] = _value(text)
    family, _, argument = name.partition(":")
    factory = load("tasks", family)
    arguments = (argument,) if argument else ()
    try:
        return factory(*arguments, num_envs=num_envs, **options)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise RobotRLError(f"Task '{name}': {error}.") from error
        raise


def task_family(name: str) -> str:
    """Return the registered name that ``name``, as `make_env` takes it, begins with."""
    return name.partition(",")[0].partition(":")[0]


def _value(text: str) -> Any:
    """Return the number, truth value or word that ``text`` stands for."""
    if text in ("true", "false", "yes", "no"):
        return text in ("true", "yes")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
