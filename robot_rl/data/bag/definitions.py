"""Where the definition of a message type comes from: the installed message packages, else what is shipped here.

``standard_messages.txt`` holds the fields of the common standard packages, without comments and constants. It serves
where ROS 2 is not installed, and for recordings that carry no definitions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from robot_rl.core.errors import DataError
from robot_rl.data.bag.mcap_format import Schema
from robot_rl.data.bag.messages import SEPARATOR, Types, full_name, parse_definitions

_SHIPPED = Path(__file__).with_name("standard_messages.txt")
_FULL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*/msg/[A-Za-z][A-Za-z0-9_]*")


@lru_cache(maxsize=1)
def shipped_texts() -> dict[str, str]:
    """Return the definition of every standard type that is shipped, by full name."""
    found = {}
    for block in _SHIPPED.read_text(encoding="utf-8").split(SEPARATOR)[1:]:
        head, _, body = block.strip().partition("\n")
        found[full_name(head.removeprefix("MSG: "))] = body + "\n"
    return found


def share_file(name: str, suffix: str) -> Path | None:
    """Return the file of a type in the ``share`` folder of its installed package, or None."""
    if not _FULL_NAME.fullmatch(name):
        return None
    for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        path = Path(prefix, "share", f"{name}{suffix}")
        if prefix and path.is_file():
            return path
    return None


def installed_text(name: str) -> str | None:
    """Return the definition of one type from its installed package, else the shipped one, or None."""
    path = share_file(name, ".msg")
    return shipped_texts().get(name) if path is None else path.read_text(encoding="utf-8")


def shipped_text(name: str) -> str | None:
    """Return the shipped definition of one type, or None."""
    return shipped_texts().get(name)


def gather(name: str, find: Callable[[str], str | None] = installed_text) -> str:
    """Return the definition of ``name`` followed by those of all types that it uses, as MCAP wants it.

    Raises:
        DataError: a definition is missing.
    """
    name = full_name(name)
    wanted, blocks = [name], []
    for one in wanted:
        text = find(one)
        if text is None:
            raise DataError(f"there is no definition of the message type '{one}': its package is not installed")
        blocks.append(text if one == name else f"{SEPARATOR}\nMSG: {one.replace('/msg/', '/')}\n{text}")
        for field in parse_definitions(one, text)[one]:
            if "/" in field.base and field.base not in wanted:
                wanted.append(field.base)
    return "\n".join(blocks)


def schema_of(name: str) -> Schema:
    """Return the schema of a type for a recording; `DataError` where its definition is missing."""
    return Schema(full_name(name), "ros2msg", gather(name).encode())


def standard_types(name: str) -> Types:
    """Return a standard type for a recording that brings no definition; `DataError` if it is not shipped."""
    return parse_definitions(name, gather(name, shipped_text))


def type_hash(name: str) -> str:
    """Return the hash of an installed type (``RIHS01_…``), or an empty text where it is not known."""
    path = share_file(full_name(name), ".json")
    if path is None:
        return ""
    hashes = json.loads(path.read_text(encoding="utf-8")).get("type_hashes", [])
    return next((one["hash_string"] for one in hashes if one["type_name"] == full_name(name)), "")
