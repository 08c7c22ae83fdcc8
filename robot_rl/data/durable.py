"""Files that exist completely or not at all, whatever kills the process or fills the disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Ask the system to bring a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary: Path, target: Path) -> None:
    """Move a finished file of the same file system to its place, in one step and durably."""
    sync(temporary)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, target)
    sync(target.parent)


def write_json(target: Path, value: Any, scratch: Path) -> None:
    """Replace ``target`` by ``value`` as JSON; ``scratch`` is a directory on the same file system."""
    temporary = scratch / f"{target.name}.new"
    temporary.write_text(json.dumps(value, indent=4), encoding="utf-8")
    publish(temporary, target)
