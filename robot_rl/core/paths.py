"""Where the project's data files are, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from robot_rl.core.errors import DataError

_PACKAGE = Path(__file__).resolve().parents[1]


def data_file(kind: str, *parts: str) -> Path:
    """Return the path of ``assets`` or ``launch`` (``kind``) files; raises `DataError` if it does not exist."""
    for root in (_PACKAGE / "_data", _PACKAGE.parent):
        path = root.joinpath(kind, *parts)
        if path.exists():
            return path
    raise DataError(f"{kind} file '{'/'.join(parts)}' is not part of this installation")
