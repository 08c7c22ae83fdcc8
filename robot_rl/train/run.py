"""Run directories: what was asked for, with which versions and seed, and what came of it.

runs/<name>/config.yaml        the configuration, checked when a run is resumed
            specs.json         the interface that the run was made for
            versions.json      package versions, commit and processor
            seed               the seed, as text
            metrics.jsonl      one line per log call: {"stage", "step", "time", <metric>: value}
            tensorboard/       the same numbers for TensorBoard
            checkpoints/<name>/
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import yaml

from robot_rl.core.errors import ConfigError, DataError
from robot_rl.core.spec import Spec

REPORTED_PACKAGES = ("robot-rl", "torch", "mujoco", "mujoco-warp", "numpy", "diffusers", "pyarrow", "av", "safetensors")
"""Distributions whose versions are written beside every run and benchmark result."""
_FREE = ("resume", "out", "threads", "device")
"""Settings that may differ whenever a run is resumed, also as those of a command: where it is and runs, how fast."""
_OWN_FILES = ("config.yaml", "specs.json", "versions.json", "seed", "metrics.jsonl")


class Run:
    """A run directory that is open for writing; use as a context manager or call `close`."""

    def __init__(self, path: Path, config: dict[str, Any], seed: int) -> None:
        self.path, self.config, self.seed = path, config, seed
        self._new = False
        with writing(path):
            self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._tensorboard: Any = None

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Any,
        *,
        spec: Spec | None = None,
        seed: int = 0,
        resume: bool = False,
        ignore: Sequence[str] = (),
    ) -> Run:
        """Make the directory ``path``, or with ``resume`` continue the run that is there.

        Args:
            path: The run's directory; parents are created.
            config: Dataclass or mapping; it is written to ``config.yaml``.
            spec: Interface that the run is made for.
            seed: Seed of the run.
            resume: Continue an existing run; a directory without a run is then started afresh.
            ignore: Dotted names of settings that may differ when a run is resumed, besides `_FREE`.

        Raises:
            ConfigError: the directory holds a run and ``resume`` is off, or its configuration or seed differs.
            DataError: the directory cannot be written, or the disk is full.
        """
        path, plain = Path(path), to_plain(config)
        new = not (path / "config.yaml").exists()
        if not new:
            if not resume:
                raise ConfigError(f"{path} already holds a run: resume it (--resume), or choose another directory")
            _require_same(path, plain, seed, ignore)
            _drop_unfinished_line(path / "metrics.jsonl")
        else:
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
            write_json(path / "specs.json", spec.to_json() if spec is not None else {})
            write_json(path / "versions.json", versions())
            write_text(path / "seed", f"{seed}\n")
            # Last, because its presence says that the directory is complete.
            write_text(path / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
        run = cls(path, plain, seed)
        run._new = new
        return run

    def log(self, metrics: Mapping[str, float], step: int, stage: str = "train") -> None:
        """Append scalar ``metrics`` of ``step`` to metrics.jsonl and TensorBoard; what is not finite becomes null."""
        values = {key: float(value) for key, value in metrics.items()}
        row: dict[str, Any] = {"stage": stage, "step": int(step), "time": round(time.time(), 3)}
        row |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        with writing(self.path):
            self._metrics.write(json.dumps(row) + "\n")
            board = self._board()
            for key, value in values.items():
                board.add_scalar(f"{stage}/{key}", value, int(step))

    def rewind(self, step: int, stage: str = "train") -> None:
        """Forget the metrics of ``stage`` after ``step``: a resumed run writes them again."""
        rows = [row for row in read_metrics(self.path) if row["stage"] != stage or row["step"] <= step]
        self._metrics.close()
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    def checkpoint_dir(self, name: str) -> Path:
        """Return ``checkpoints/<name>``, which exists."""
        directory = self.path / "checkpoints" / name
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        return directory

    def close(self) -> None:
        """Flush and close the metric files."""
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
        if kind is not None and self._new:
            self._remove_if_empty()

    def _remove_if_empty(self) -> None:
        """Remove a new run that neither logged nor saved anything: the corrected command may need its place."""
        files = [file for file in self.path.rglob("*") if not file.is_dir()]
        ours = all(file.parent == self.path and file.name in _OWN_FILES for file in files)
        if ours and not (self.path / "metrics.jsonl").stat().st_size:
            shutil.rmtree(self.path)

    def _board(self) -> Any:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))
        return self._tensorboard


def read_metrics(path: str | Path, stage: str | None = None) -> list[dict[str, Any]]:
    """Return the logged rows of the run at ``path``, of one stage or of all; an unfinished last line is left out."""
    file = Path(path) / "metrics.jsonl"
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the process was killed while writing this line
        if stage is None or row["stage"] == stage:
            rows.append(row)
    return rows


def versions() -> dict[str, Any]:
    """Return Python, package versions, commit and processor: what a result needs to be reproduced."""
    found: dict[str, Any] = {"python": platform.python_version()}
    found |= {package: _version(package) for package in REPORTED_PACKAGES}
    return found | {"commit": commit(), "processor": processor(), "cores": os.cpu_count()}


def commit() -> str:
    """Return the commit of the checkout, with ``+`` if files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        name = _git(root, "rev-parse", "--short=12", "HEAD")
        return name + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def processor() -> str:
    """Return the processor's model name."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def to_plain(value: Any) -> Any:
    """Return ``value`` as nothing but mappings, lists, numbers, text and None, ready for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item) for item in value]
    if isinstance(value, Enum):
        return to_plain(value.value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def differences(recorded: Any, given: Any, name: str = "") -> list[str]:
    """List the settings in which two plain configurations differ, by dotted name; a path may be written otherwise."""
    if isinstance(recorded, Mapping) and isinstance(given, Mapping):
        found = []
        for key in [*recorded, *(k for k in given if k not in recorded)]:
            found += differences(recorded.get(key), given.get(key), f"{name}.{key}" if name else str(key))
        return found
    same = recorded == given or _same_path(recorded, given)
    return [] if same else [f"{name} was {recorded!r}, now {given!r}"]


def _same_path(first: Any, second: Any) -> bool:
    texts = isinstance(first, str) and isinstance(second, str) and first and second
    return bool(texts) and os.path.realpath(first) == os.path.realpath(second)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn errors of the file system below ``path`` into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"no space left for {path}: free some, or choose another directory with --out") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            raise DataError(f"cannot write to {path}: {error.strerror}; choose another directory with --out") from error
        raise


def make_directories(*paths: Path) -> None:
    """Make directories before work that takes long, so that where nothing can be written is known before.

    Raises:
        DataError: one of them cannot be made.
    """
    for path in paths:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold the directory ``root`` against other processes that would work in it.

    Raises:
        ConfigError: another process is at work there.
    """
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is at work in {root}: wait for it, or choose another --out") from None
        yield


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader finds the old content or the new, never a part."""
    path = Path(path)
    with writing(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(to_plain(value), indent=2) + "\n")


def _require_same(path: Path, given: Any, seed: int, ignore: Sequence[str]) -> None:
    try:
        recorded = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        recorded_seed = int((path / "seed").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be resumed: its config.yaml or seed is unreadable ({error})") from error
    free = {*ignore, *_FREE, *(f"command.{name}" for name in _FREE)}
    found = [line for line in differences(recorded, given) if line.split(" ", 1)[0] not in free]
    if recorded_seed != seed and not any(line.startswith("seed ") for line in found):
        found.append(f"seed was {recorded_seed}, now {seed}")
    if found:
        raise ConfigError(f"{path} holds a run with another configuration: " + "; ".join(found))


def _drop_unfinished_line(file: Path) -> None:
    if file.exists():
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_text(file, whole.decode("utf-8"))


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
