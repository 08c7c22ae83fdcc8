"""Files that exist completely or not at all, whatever kills the process or fills the disk."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from robot_rl.core.errors import DataError


def sync(path: Path) -> None:
    """Ask the system to bring a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Create a directory and those above it, durably."""
    if not path.exists():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def publish(temporary: Path, target: Path) -> None:
    """Move a finished file of the same file system to its place, in one step and durably."""
    sync(temporary)
    make_directory(target.parent)
    os.replace(temporary, target)
    sync(target.parent)


def write_json(target: Path, value: Any, scratch: Path, durable: bool = True) -> None:
    """Replace ``target`` by ``value`` as JSON, in one step.

    Args:
        target: the file.
        value: its new content.
        scratch: a directory on the same file system.
        durable: whether to wait for the disk; what can be computed again need not.
    """
    temporary = scratch / f"{target.name}.new"
    temporary.write_text(json.dumps(value, indent=4), encoding="utf-8")
    if durable:
        publish(temporary, target)
    else:
        make_directory(target.parent)
        os.replace(temporary, target)


def take_lock(directory: Path, purpose: str) -> IO[str]:
    """Create ``directory`` and lock it for this process; the lock of a process that died is void.

    Returns:
        The lock, which holds until it is closed.

    Raises:
        DataError: another process holds it, or nothing can be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("w")
    except OSError as error:
        raise DataError(f"{directory.parent}: cannot be written ({error})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise DataError(f"{directory.parent}: another process is recording into it; cannot {purpose}") from error
    return lock
