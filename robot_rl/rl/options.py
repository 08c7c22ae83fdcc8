"""Settings of a method by name: ``lanes=128 scale=0.2 core.epochs=5`` onto nested frozen dataclasses."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from typing import Any, get_type_hints

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
        UnknownNameError: no such setting; the message suggests the nearest.
        ConfigError: the name is ambiguous, or the value is of another kind than the default.
    """
    known = {name: value for name, value, _ in describe(config)}
    for option in options:
        name, separator, text = option.partition("=")
        if not separator:
            raise ConfigError(f"'{option}' is no option: expected name=value")
        matches = [path for path in known if path == name] or [p for p in known if p.rsplit(".", 1)[-1] == name]
        if not matches:
            raise UnknownNameError("option", name, known)
        if len(matches) > 1:
            raise ConfigError(f"'{name}' is ambiguous: {', '.join(matches)}")
        config = _replace(config, matches[0].split("."), _parse(matches[0], text, known[matches[0]]))
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


def _parse(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() in ("true", "yes", "1", "false", "no", "0"):
            return text.lower() in ("true", "yes", "1")
        raise ConfigError(f"option '{name}' expects true or false, got '{text}'")
    if isinstance(default, tuple):
        items = [item for item in text.strip("()[] ").split(",") if item.strip()]
        return tuple(_literal(name, item, default[0] if default else None) for item in items)
    return _literal(name, text, default)


def _literal(name: str, text: str, default: Any) -> Any:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        if default is None or isinstance(default, str):
            return text.strip()
        raise ConfigError(f"option '{name}' expects a {type(default).__name__}, got '{text}'") from None
    if isinstance(default, int) and not isinstance(value, int):
        if isinstance(value, float) and value.is_integer():
            return int(value)
        raise ConfigError(f"option '{name}' expects a whole number, got '{text}'")
    if isinstance(default, float) and not isinstance(value, (int, float)):
        raise ConfigError(f"option '{name}' expects a number, got '{text}'")
    return float(value) if isinstance(default, float) else value
