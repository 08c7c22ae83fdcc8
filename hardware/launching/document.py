"""Reads a launch file in YAML into entities, and refuses what is not in the stated subset, with file and line.

The tables below are the subset. Whatever they do not name is an error: a launch file that is read differently here and
by ``ros2 launch`` would start another robot than its author thinks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hardware.launching.substitution import Text, parse
from robot_rl.core.errors import ConfigError, DataError, RobotRLError, UnknownNameError

REQUIRED = "!"
"""Mark of an attribute that must be there."""
PAIR = {"name": "text!", "value": "text!"}
PROCESS = {
    "args": "text",
    "cwd": "text",
    "env": PAIR,
    "on_exit": "plain",
    "output": "text",
    "respawn": "flag",
    "respawn_delay": "number",
    "respawn_max_retries": "integer",
    "sigkill_timeout": "number",
    "sigterm_timeout": "number",
}
PARAMETER = {"from": "text", "name": "text", "value": "value", "type": "plain"}
TAGS: dict[str, dict[str, Any]] = {
    "arg": {"name": "plain!", "default": "text", "description": "plain", "choice": {"value": "plain!"}},
    "let": PAIR,
    "set_env": PAIR,
    "unset_env": {"name": "text!"},
    "group": {"scoped": "boolean", "children": "entities!"},
    "push_ros_namespace": {"namespace": "text!"},
    "node": {
        "pkg": "text!",
        "exec": "text!",
        "name": "text",
        "namespace": "text",
        "ros_args": "text",
        "param": PARAMETER,
        "remap": {"from": "text!", "to": "text!"},
        **PROCESS,
    },
    "executable": {"cmd": "text!", "name": "text", **PROCESS},
    "include": {"file": "text!", "arg": PAIR},
    "timer": {"period": "seconds!", "children": "entities!"},
    "log": {"message": "text!", "level": "plain"},
    "shutdown": {"reason": "text"},
    "set_parameter": {"name": "text!", "value": "value!"},
    "set_remap": {"from": "text!", "to": "text!"},
    "set_use_sim_time": {"value": "flag!"},
}
"""The tags that are read, and their attributes; every one may also have ``if`` or ``unless``."""
ALIASES = {"push-ros-namespace": "push_ros_namespace"}
_CONDITIONS = {"if": "text", "unless": "text"}
_CHOICES = {"on_exit": ("shutdown",), "type": ("str",), "level": ("DEBUG", "INFO", "WARNING", "ERROR")}


@dataclass(frozen=True)
class Entity:
    """One action of a launch file."""

    tag: str
    """What it is, a key of `TAGS`."""
    attributes: Mapping[str, Any]
    """Its attributes: `Text` where substitutions are allowed, else plain values; nested ones are tuples of mappings."""
    children: tuple[Entity, ...]
    """Actions inside it (``group``, ``timer``)."""
    file: Path
    """File that it stands in."""
    line: int
    """Line of the file, from 1."""

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.file}:{self.line}"


class _Mapping(dict[Any, Any]):
    line = 0


class _Loader(yaml.SafeLoader):
    """Reads YAML so that mappings know their line, and a key that comes twice is an error."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> _Mapping:
    found = _Mapping(loader.construct_mapping(node, deep=True))
    found.line = node.start_mark.line + 1
    keys = [key.value for key, _ in node.value]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"'{twice[0]}' is given twice", node.start_mark)
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def load(path: Path) -> tuple[Entity, ...]:
    """Return the entities of the launch file at ``path``.

    Raises:
        DataError: there is no such file, or it is no YAML.
        ConfigError: it holds something outside the subset, or misses something; the message says file and line.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise DataError(f"launch file {path} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DataError(f"{path}:{line}: this is no launch file in YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: this is no launch file in YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, _Mapping) or list(document) != ["launch"]:
        raise ConfigError(f"{path}:1: a launch file is a mapping with the one key 'launch'")
    return _entities(document["launch"], path, document.line)


def walk(entities: tuple[Entity, ...]) -> Iterator[Entity]:
    """Yield all entities, those inside others included."""
    for entity in entities:
        yield entity
        yield from walk(entity.children)


def _entities(found: Any, path: Path, line: int) -> tuple[Entity, ...]:
    if not isinstance(found, list):
        raise ConfigError(f"{path}:{line}: expected a list of actions, found {_kind(found)}")
    return tuple(_entity(one, path, line) for one in found)


def _entity(found: Any, path: Path, line: int) -> Entity:
    if not isinstance(found, _Mapping) or len(found) != 1:
        raise ConfigError(f"{path}:{getattr(found, 'line', line)}: an action is a mapping with one key, its tag")
    ((tag, content),) = found.items()
    tag = ALIASES.get(tag, tag)
    try:
        if tag not in TAGS:
            raise UnknownNameError("launch action", tag, TAGS)
        if isinstance(content, list) and "children" in TAGS[tag] and tag == "group":
            content = _Mapping(children=content)
        attributes = _attributes(content or _Mapping(), {**TAGS[tag], **_CONDITIONS}, f"'{tag}'")
    except RobotRLError as error:
        raise ConfigError(f"{path}:{found.line}: {error}") from error
    children = _entities(attributes.pop("children", []), path, found.line)
    return Entity(tag, attributes, children, path, found.line)


def _attributes(content: Any, known: Mapping[str, Any], what: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{what} has {_kind(content)}, expected its attributes")
    for name in content:
        if name not in known:
            raise UnknownNameError(f"attribute of {what}", str(name), known)
    for name, kind in known.items():
        if str(kind).endswith(REQUIRED) and name not in content:
            raise ConfigError(f"{what} has no '{name}'")
    return {name: _read(value, known[name], f"'{name}' of {what}", name) for name, value in content.items()}


def _read(value: Any, kind: Any, what: str, name: str) -> Any:
    """Return an attribute's value as its kind asks for; errors say ``what`` it is."""
    if isinstance(kind, dict):
        if not isinstance(value, list):
            raise ConfigError(f"{what} is {_kind(value)}, expected a list")
        found = tuple(_attributes(one, kind, what) for one in value)
        if kind is PARAMETER:
            _check_parameters(found)
        return found
    match kind.rstrip(REQUIRED), value:
        case "entities", _:
            return value
        case "text", str():
            return parse(value)
        case "plain", str():
            if name in _CHOICES and value not in _CHOICES[name]:
                raise ConfigError(f"{what} is '{value}', expected {' or '.join(_CHOICES[name])}")
            return value
        case "boolean" | "flag", bool():
            return value
        case "flag", str():
            return parse(value)
        case "number" | "seconds", float() if value >= 0:
            return value
        case "seconds", str():
            return parse(value)
        case "integer", int() if not isinstance(value, bool):
            return value
        case "value", bool() | int() | float():
            return value
        case "value", str():
            return parse(value)
        case "value", list():
            return _list(value, what)
    expected = {
        "text": "text (quote it)",
        "plain": "text (quote it)",
        "boolean": "true or false",
        "flag": "true, false or text",
        "number": "seconds with a decimal point, 0.0 or more",
        "seconds": "seconds with a decimal point, 0.0 or more",
        "integer": "a whole number",
        "value": "a number, true, false, text or a list",
    }[kind.rstrip(REQUIRED)]
    raise ConfigError(f"{what} is {_kind(value)}, expected {expected}")


def _list(values: list[Any], what: str) -> list[Any]:
    kinds = {type(one) for one in values}
    if len(kinds) != 1 or not kinds <= {bool, int, float, str}:
        raise ConfigError(f"{what} is a list that is empty or mixes kinds, expected numbers, truth values or texts")
    return [parse(one) if isinstance(one, str) else one for one in values]


def _check_parameters(parameters: tuple[dict[str, Any], ...]) -> None:
    for one in parameters:
        if set(one) != {"from"} and not {"name", "value"} <= set(one) <= {"name", "value", "type"}:
            raise ConfigError(f"'param' has {', '.join(map(repr, one))}, expected either 'from', or 'name' and 'value'")
        if "type" in one and not isinstance(one["value"], Text):
            raise ConfigError("'param' of type str has a value that is no text (quote it)")


def _kind(value: Any) -> str:
    names = {dict: "a mapping", _Mapping: "a mapping", list: "a list", type(None): "nothing"}
    return names.get(type(value), f"{value!r}")
