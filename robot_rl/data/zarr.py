"""Replay buffers of Diffusion Policy: zarr (format 2) directories and ``.zarr.zip`` archives.

Layout: ``data/<name>`` (F, …) for every array, among them ``action``, and ``meta/episode_ends`` (E,), cumulative.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.core.errors import DataError, MissingDependencyError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.dataset import EpisodeReader, reading, recognises, rows_of

EXTRA_NAMES = {"reward": "reward", "rewards": "reward", "done": "done", "dones": "done", "success": "success"}
EXTRA_NAMES |= {"timestamp": "timestamp", "timestamps": "timestamp", "terminals": "done"}
"""Arrays that are no observations, and what they are called in `Frames.extras`."""


def _looks_like_zarr(path: Path) -> bool:
    if path.is_dir():
        return (path / ".zgroup").exists() or (path / "zarr.json").exists() or path.suffix == ".zarr"
    return path.name.endswith((".zarr.zip", ".zarr"))


@recognises(_looks_like_zarr)
def open_zarr(path: Path) -> ZarrDataset:
    """Open a replay buffer; raises `DataError` if it is damaged or lacks ``data/action`` or ``meta/episode_ends``."""
    return ZarrDataset(path)


class ZarrDataset(EpisodeReader):
    """A replay buffer, read on `load`; arrays of other rank keep their shape (``keypoint`` (8, 2))."""

    format = "zarr"

    def __init__(self, path: Path) -> None:
        self._arrays = arrays = _open_arrays(path)
        ends = _read(path, "meta/episode_ends", arrays["meta/episode_ends"]).astype(np.int64)
        lengths = np.diff(ends, prepend=0)
        if len(ends) == 0 or (lengths <= 0).any():
            raise DataError(f"{path}: meta/episode_ends must hold growing positive numbers, got {ends[:5].tolist()}…")
        self._names = {EXTRA_NAMES.get(name, name): name for name in _data_names(arrays)}
        observation, warnings = {}, []
        for key, name in self._names.items():
            array = arrays[f"data/{name}"]
            if array.shape[0] != ends[-1]:
                raise DataError(f"{path}: data/{name} has {array.shape[0]} frames, but episode_ends says {ends[-1]}")
            missing = array.nchunks - array.nchunks_initialized
            if missing:
                warnings.append(
                    f"data/{name}: {missing} of {array.nchunks} chunks are not stored and read as {array.fill_value}"
                )
            if key == "action" or key in EXTRA_NAMES.values():
                continue
            observation[key] = _array_spec(array)
            if observation[key].is_image and array.dtype != np.uint8:
                warnings.append(f"data/{name}: images are stored as {array.dtype}; read as uint8 in 0..255")
        action = ArraySpec(tuple(arrays["data/action"].shape[1:]))
        super().__init__(path, Spec(observation, action, 0.0), lengths)
        self.extras = tuple(key for key in self._names if key in EXTRA_NAMES.values())
        self.warnings = [*warnings, "the format states no control rate: rate_hz is 0"]

    def _column(self, name: str, episodes: Sequence[int]) -> np.ndarray:
        source = f"data/{self._names[name]}"
        rows = rows_of(self.episode_lengths, episodes)
        if isinstance(rows, np.ndarray) and len(rows) and len(episodes) == 1:
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
        if isinstance(rows, slice):
            values = _read(self.root, source, self._arrays[source], rows)
        else:
            values = _read(self.root, source, self._arrays[source])[rows]
        spec = self.spec.observation.get(name)
        if spec is not None and spec.is_image and values.dtype != np.uint8:
            return np.clip(np.rint(values), 0, 255).astype(np.uint8)
        return values


def _open_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays below ``data`` and ``meta`` by their path; checks that the needed ones exist."""
    try:
        import zarr
    except ModuleNotFoundError as error:
        raise MissingDependencyError("zarr", "datasets", f"Reading {path}") from error
    with reading(path):
        if path.is_dir():
            store: Any = str(path)
        else:
            with zipfile.ZipFile(path) as archive:
                _refuse_truncated(path, archive)
            store = zarr.storage.ZipStore(path, mode="r")
        root: Any = zarr.open_group(store, mode="r")
        arrays: dict[str, Any] = {}
        for group in ("data", "meta"):
            if group in root:
                arrays |= {f"{group}/{name}": array for name, array in root[group].arrays()}
    for needed in ("data/action", "meta/episode_ends"):
        if needed not in arrays:
            raise DataError(f"{path}: no array '{needed}'; found {', '.join(sorted(arrays)) or 'none'}")
    return arrays


def _refuse_truncated(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise if an entry of the archive reaches past its end, which zarr would notice only while reading."""
    size = path.stat().st_size
    for entry in archive.infolist():
        if entry.header_offset + entry.compress_size > size:
            raise DataError(f"{path}: truncated: '{entry.filename}' reaches past the end of the archive")


def _refuse_short_chunks(path: Path, name: str) -> None:
    """Raise if a chunk file of a directory store is shorter than its Blosc header says.

    Blosc itself does not notice: it decodes whatever lies in memory behind the truncated chunk.
    """
    description = path / name / ".zarray"
    if not description.exists():
        return
    if (json.loads(description.read_text(encoding="utf-8")).get("compressor") or {}).get("id") != "blosc":
        return
    for chunk in (path / name).rglob("*"):
        if not chunk.is_file() or chunk.name.startswith("."):
            continue
        with chunk.open("rb") as file:
            header = file.read(16)
        stated = int.from_bytes(header[12:16], "little")
        if len(header) < 16 or chunk.stat().st_size < stated:
            raise DataError(f"{chunk}: truncated: {chunk.stat().st_size} bytes, its header says {stated}")


def _data_names(arrays: dict[str, Any]) -> list[str]:
    return [name.removeprefix("data/") for name in arrays if name.startswith("data/")]


def _array_spec(array: Any) -> ArraySpec:
    shape = tuple(array.shape[1:])
    if len(shape) == 3 and shape[-1] == 3:
        return ArraySpec(shape, "uint8")
    dtype = "float32" if np.issubdtype(array.dtype, np.floating) else str(array.dtype)
    return ArraySpec(shape or (1,), dtype)


def _read(path: Path, name: str, array: Any, rows: slice = slice(None)) -> np.ndarray:
    with reading(f"{path}/{name}"):
        if path.is_dir():
            _refuse_short_chunks(path, name)
        values = np.asarray(array[rows])
    return values[:, None] if values.ndim == 1 and name.startswith("data/") and _is_observation(name) else values


def _is_observation(name: str) -> bool:
    return name.removeprefix("data/") not in EXTRA_NAMES
