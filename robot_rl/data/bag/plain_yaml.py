"""YAML from strangers: plain values only, and nothing that grows when it is read."""

from __future__ import annotations

from typing import Any

import yaml

from robot_rl.core.errors import DataError


class _PlainLoader(yaml.SafeLoader):
    """Refuses references: a few lines of them can stand for more than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references (*name) are not read")
        return super().compose_node(parent, index)


def load_plain(text: str) -> Any:
    """Return mappings, lists, texts and numbers.

    Raises:
        DataError: the text is no YAML, or wants more than that; one line.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DataError(f"is no plain YAML ({' '.join(str(error).split())[:200]})") from error


def plain_text(value: Any, what: str) -> str:
    """Return a text, or a number as one; `DataError` where ``value`` is neither."""
    if value is None:
        return ""
    if not isinstance(value, (str, int, float)):
        raise DataError(f"{what} is a {type(value).__name__}, expected a text")
    return str(value)
