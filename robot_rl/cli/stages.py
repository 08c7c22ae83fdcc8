"""Stages of a long job: each leaves a stamp, finished ones are kept, an interrupted one goes on where it can."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robot_rl.train.progress import duration, say
from robot_rl.train.run import alone, to_plain, write_json, writing


@dataclass(frozen=True)
class Stage:
    """One step of the job."""

    name: str
    """Name of its stamp."""
    title: str
    """What it does, for the user."""
    settings: Any
    """Everything that decides its result; a change runs it again, and all that follow."""
    work: Callable[[], Mapping[str, Any]]
    """Does it and returns JSON-ready facts."""
    outputs: tuple[Path, ...]
    """Files and directories that it makes; they are removed before it starts afresh."""
    resumable: bool = False
    """Whether ``work`` continues from what an interrupted one has left in ``outputs``."""


@dataclass(frozen=True)
class Outcome:
    """What a finished stage came to."""

    title: str
    seconds: float
    """Time it took, over all attempts."""
    facts: dict[str, Any]
    """What its work returned."""


class Pipeline:
    """Runs stages in order below one directory, where their stamps are kept in ``stages/``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, stages: Sequence[Stage]) -> dict[str, Outcome]:
        """Run what is not finished and return the outcome of every stage by name.

        Raises:
            ConfigError: another process is at work in the same directory.
        """
        outcomes = {}
        with writing(self.root):
            (self.root / "stages").mkdir(parents=True, exist_ok=True)
        with alone(self.root):
            token = ""
            for number, stage in enumerate(stages, 1):
                stamp = self._run(stage, token, f"[{number}/{len(stages)}] {stage.title}")
                outcomes[stage.name] = Outcome(stage.title, stamp["seconds"], stamp["facts"])
                token = stamp["token"]
        return outcomes

    def _run(self, stage: Stage, upstream: str, heading: str) -> dict[str, Any]:
        key = _key(stage, upstream)
        stamp = self._read(stage)
        same = stamp.get("key") == key
        if same and stamp["finished"] and all(path.exists() for path in stage.outputs):
            say(f"{heading}: kept from before ({duration(stamp['seconds'])})", style="dim")
            return stamp
        go_on = same and not stamp["finished"] and stage.resumable
        if not go_on:
            self._clear(stage)
        say(f"{heading}, continued" if go_on else heading, style="bold")
        before = stamp["seconds"] if go_on else 0.0
        stamp = {"key": key, "token": uuid.uuid4().hex, "finished": False, "seconds": before, "facts": {}}
        self._write(stage, stamp)
        start = time.monotonic()
        try:
            stamp["facts"] = to_plain(stage.work())
            stamp["finished"] = True
        finally:
            stamp["seconds"] = round(before + time.monotonic() - start, 2)
            self._write(stage, stamp)
        return stamp

    def _clear(self, stage: Stage) -> None:
        for path in stage.outputs:
            if not path.resolve().is_relative_to(self.root.resolve()):
                raise ValueError(f"stage '{stage.name}' would remove {path}, which is outside {self.root}")
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _read(self, stage: Stage) -> dict[str, Any]:
        try:
            return dict(json.loads(self._stamp(stage).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}  # never run, or a stamp that says nothing: run it

    def _write(self, stage: Stage, stamp: Mapping[str, Any]) -> None:
        write_json(self._stamp(stage), stamp)

    def _stamp(self, stage: Stage) -> Path:
        return self.root / "stages" / f"{stage.name}.json"


def _key(stage: Stage, upstream: str) -> str:
    text = json.dumps([stage.name, to_plain(stage.settings), upstream], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
