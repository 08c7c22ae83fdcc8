"""Settings from files and command lines into the dataclasses that drivers are made with."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from robot_rl.core.errors import ConfigError, DataError, UnknownNameError

Config = TypeVar("Config")


def fill(config_class: type[Config], given: Mapping[str, Any], what: str) -> Config:
    """Return a dataclass of settings with the fields ``given``.

    Whole numbers become floats, texts paths and lists tuples where the field is one.

    Args:
        config_class: dataclass of the settings.
        given: values by field name.
        what: whose settings they are, for messages, for example ``robot 'so101'``.

    Raises:
        UnknownNameError: no such setting; the nearest is suggested.
        ConfigError: a value of the wrong kind, or one that the settings refuse.
    """
    hints = get_type_hints(config_class)
    fields = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    values = {}
    for name, value in given.items():
        if name not in fields:
            raise UnknownNameError(f"setting of {what}", name, fields)
        try:
            values[name] = _as(hints[name], value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"setting '{name}' of {what} is {value!r}, expected {_name(hints[name])}") from error
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from error


def parse_options(texts: Sequence[str], what: str) -> dict[str, Any]:
    """Return the values of texts of the form ``name=value``, as numbers and booleans where they read as such.

    Raises:
        ConfigError: a text of another form; ``what`` names it in the message.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not mark or not name:
            raise ConfigError(f"{what} '{text}' is not of the form name=value")
        try:
            found[name] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raises `DataError` where it holds none."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"settings '{path}' cannot be read: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise DataError(f"settings '{path}' hold no mapping of names to values")
    return content


def _as(kind: Any, value: Any) -> Any:
    """Return ``value`` as ``kind``; raises TypeError or ValueError if it is none."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [one for one in arguments if one is not type(None)]
        return _as(next((one for one in kinds if one is type(value)), kinds[0]), value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise TypeError
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_as(arguments[0], one) for one in value)
        return tuple(_as(one, part) for one, part in zip(arguments, value, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise TypeError
        return {_as(arguments[0], key): _as(arguments[1], one) for key, one in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value).expanduser()
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    return value


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind).replace("typing.", "")
