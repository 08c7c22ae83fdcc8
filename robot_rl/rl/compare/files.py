"""What a comparison reads of its runs: checkpoints, tests, and how far a run under way has come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from robot_rl.core.errors import DataError
from robot_rl.rl.compare.results import Test


def fingerprint(checkpoint: Path) -> str:
    """Name the contents of a checkpoint.

    Raises:
        DataError: there is none.
    """
    try:
        contents = [(checkpoint / name).read_bytes() for name in ("policy.json", "model.safetensors")]
    except OSError as error:
        raise DataError(f"no checkpoint in {checkpoint}: {error.strerror}: {error.filename}") from error
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def read_test(path: Path) -> Test:
    """Return the outcome that ``robot-rl eval --json`` left at ``path``."""
    success = json.loads(path.read_text(encoding="utf-8"))["per_episode"]["success"]
    return Test(sum(success), len(success))


def watch(run: Path, unit: str) -> Callable[[], tuple[int, Mapping[str, Any]]]:
    """Return a function that says how far the run has come, in seconds or steps, by what it has logged."""

    def look() -> tuple[int, Mapping[str, Any]]:
        rows = last_rows(run / "metrics.jsonl")
        if not rows:
            return 0, {}
        done = max(row["seconds" if unit == "second" else "step"] for row in rows)
        shown: dict[str, Any] = {"steps": max(row["step"] for row in rows)}
        validated = [row["success"] for row in rows if row["stage"] == "eval"]
        return int(done), shown | ({"validated": validated[-1]} if validated else {})

    return look


def last_rows(file: Path, size: int = 65_536) -> list[dict[str, Any]]:
    """Return the logged rows in the last ``size`` bytes; rows that are cut at either end are left out."""
    if not file.exists():
        return []
    with file.open("rb") as stream:
        start = max(0, file.stat().st_size - size)
        stream.seek(start)
        whole = stream.read().split(b"\n")[1 if start else 0 : -1]
    return [json.loads(line) for line in whole]
