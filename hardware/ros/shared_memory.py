"""Files in shared memory that Fast DDS leaves behind when a process is killed; enough of them fill the memory."""

from __future__ import annotations

import os
from pathlib import Path

DIRECTORY = Path("/dev/shm")
"""Where Linux keeps shared memory."""
_PREFIXES = ("fastrtps_", "fastdds_", "fast_datasharing_", "sem.fastrtps_", "sem.fastdds_")


def stale_files(directory: Path = DIRECTORY) -> list[Path]:
    """Return this user's Fast DDS files in ``directory`` that no process has mapped or opened; Linux only."""
    if not directory.is_dir():
        return []
    mine = [
        path for path in directory.iterdir() if path.name.startswith(_PREFIXES) and path.stat().st_uid == os.getuid()
    ]
    used = _used(directory) if mine else set()
    return sorted(path for path in mine if str(path) not in used)


def _used(directory: Path) -> set[str]:
    """Return the files in ``directory`` that processes hold, as far as this user may see."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        found |= _held(process, f"{directory}/")
    return found


def _held(process: Path, beginning: str) -> set[str]:
    try:
        maps = (process / "maps").read_text(errors="replace").splitlines()
        opened = list((process / "fd").iterdir())
    except OSError:  # it has ended meanwhile, or belongs to somebody else, whose files are not judged
        return set()
    names = [line.split(maxsplit=5)[5] for line in maps if beginning in line] + [_target(link) for link in opened]
    return {name for name in names if name.startswith(beginning)}


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed since it was listed, as the listing itself was
        return ""
