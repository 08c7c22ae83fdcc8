"""Settings of a method by name: ``lanes=128 scale=0.2 core.epochs=5`` onto nested frozen dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from robot_rl.core.errors import ConfigError, UnknownNameError


def config_class(finetune: Any) -> type:
    """Return the dataclass that a registered ``finetune`` function takes as ``config``.

    Raises:
        ConfigError: the function does not say.
    """
    kind = get_type_hints(finetune).get("config")
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ConfigError(f"{finetune.__module__}.finetune does not annotate its config with a dataclass")
    return kind


def describe(config: Any, prefix: str = "") -> list[tuple[str, Any, str]]:
    """List (dotted name, value, explanation) of every setting of a nested dataclass."""
    found = []
    texts = field_texts(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            found += describe(value, name + ".")
        else:
            found.append((name, value, texts.get(field.name, "")))
    return found


def override(config: Any, options: Sequence[str]) -> Any:
    """Return ``config`` with ``name=value`` options applied; a name without dots must be unique.

    Raises:
        UnknownNameError: no such setting, or no such value of one that has few; the message suggests the nearest.
        ConfigError: the name is ambiguous, or the value is of another kind than the setting.
    """
    known = _kinds(config)
    defaults = {name: value for name, value, _ in describe(config)}
    for option in options:
        name, separator, text = option.partition("=")
        if not separator:
            raise ConfigError(f"'{option}' is no option: expected name=value")
        matches = [path for path in known if path == name] or [p for p in known if p.rsplit(".", 1)[-1] == name]
        if not matches:
            raise UnknownNameError("option", name, known)
        if len(matches) > 1:
            raise ConfigError(f"'{name}' is ambiguous: {', '.join(matches)}")
        value = _parse(matches[0], text, known[matches[0]])
        if type(value) is int and value < 0 <= defaults[matches[0]]:
            raise ConfigError(f"option '{matches[0]}' must not be negative, got {value}")
        config = _replace(config, matches[0].split("."), value)
    return config


def field_texts(kind: type) -> dict[str, str]:
    """Return the string literal below each field of a dataclass, from its source."""
    import inspect
    import textwrap

    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, SyntaxError, IndexError):
        return {}
    texts, last = {}, None
    for node in getattr(body, "body", []):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.target.id
        elif last and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            texts[last] = " ".join(str(node.value.value).split())
            last = None
    return texts


def _replace(config: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = _replace(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: value})


def _kinds(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the annotated type of every setting that `describe` lists, by dotted name."""
    found: dict[str, Any] = {}
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        found |= _kinds(value, name + ".") if dataclasses.is_dataclass(value) else {name: hints[field.name]}
    return found


def _parse(name: str, text: str, kind: Any) -> Any:
    """Return ``text`` as a value of the annotated type ``kind``."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        known = {str(value): value for value in inner}
        if text.strip() not in known:
            raise UnknownNameError(f"value of '{name}'", text.strip(), known)
        return known[text.strip()]
    if origin in (Union, UnionType):
        if text.strip().lower() == "none" and NoneType in inner:
            return None
        return _parse(name, text, next(part for part in inner if part is not NoneType))
    if origin is tuple:
        items = [item.strip(" '\"") for item in text.strip("()[] ").split(",")]
        return tuple(_parse(name, item, inner[0]) for item in items if item)
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ("true", "yes", "1", "false", "no", "0"):
            return text.lower() in ("true", "yes", "1")
        raise ConfigError(f"option '{name}' expects true or false, got '{text}'")
    if kind not in (int, float):
        raise ConfigError(f"option '{name}' cannot be given as text: it is a {kind}")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (kind is int and not value.is_integer()):
        expected = "a whole number" if kind is int else "a number"
        raise ConfigError(f"option '{name}' expects {expected}, got '{text}'")
    return kind(value)
