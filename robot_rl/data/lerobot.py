"""LeRobotDataset v2.0, v2.1 and v3.0, read in place; v3.0 is also the native store (see `store`).

Layout of v3.0: https://huggingface.co/docs/lerobot/lerobot-dataset-v3. Columns become keys without their prefix:
``observation.state`` is ``state``, ``next.reward`` is the extra ``reward``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from robot_rl.core.errors import DataError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.dataset import EpisodeReader, reading, recognises
from robot_rl.data.frames import Frames
from robot_rl.data.lerobot_meta import EpisodeFiles, feature_names, find_episodes, inspect_info, read_info
from robot_rl.data.video import VideoReader

BOOKKEEPING = ("index", "episode_index", "frame_index")
"""Columns that only number the rows."""


@recognises(lambda path: path.is_dir() and (path / "meta" / "info.json").exists())
def open_lerobot(path: Path) -> LeRobotDataset:
    """Open a LeRobot directory; what is irregular in it goes to `LeRobotDataset.warnings`."""
    return LeRobotDataset(path)


class LeRobotDataset(EpisodeReader):
    """A LeRobot data set of any version, or our own recordings; columns and videos are read on demand."""

    format = "lerobot"

    def __init__(self, root: Path) -> None:
        self.info = info = read_info(root)
        self.version = str(info["codebase_version"])
        warnings: list[str] = []
        self.files: list[EpisodeFiles] = find_episodes(root, info, warnings)
        features = _usable_features(root, info["features"], self.files, warnings)
        self._columns = {key_of(name): name for name in features}
        self._features = {key_of(name): feature for name, feature in features.items()}
        super().__init__(root, _spec(info, features, warnings), [entry.length for entry in self.files])
        self.extras = tuple(
            key for key, name in self._columns.items() if key not in self.spec.observation and name != "action"
        )
        self.tasks = [entry.tasks[0] if entry.tasks else "" for entry in self.files]
        self.actor_names: tuple[str, ...] = tuple(info.get("robot_rl", {}).get("actors", ()))
        """Names of the codes in the extra ``actor``; empty where the data set has none."""
        self.splits = inspect_info(root, info, self.files, self.num_frames, warnings)
        self.warnings = warnings
        self._tables: dict[Path, pa.Table] = {}
        self._videos: dict[Path, VideoReader] = {}

    def load(self, keys: Sequence[str] | None = None, episodes: Sequence[int] | None = None) -> Frames:
        """Read into memory; see `EpisodeReader.load`."""
        try:
            return super().load(keys, episodes)
        finally:
            # One file stays for whoever reads episode by episode: it may hold many of them.
            for path in list(self._tables)[: None if episodes is None else -1]:
                del self._tables[path]

    def image(self, key: str, episode: int, index: int) -> np.ndarray:
        """Return image ``index`` of an episode, (H, W, 3) uint8, RGB."""
        self._image_key(key)
        self._frame(episode, index)
        if self._features[key]["dtype"] != "video":
            return self.images(key, episode)[index]
        length = int(self.episode_lengths[self._episode(episode)])
        return self._video_frames(key, episode, index % length, 1)[0]

    def images(self, key: str, episode: int) -> np.ndarray:
        """Return the images (T, H, W, 3) uint8, RGB, of one episode."""
        self._image_key(key)
        if self._features[key]["dtype"] != "video":
            return _decode_images(self._rows(self._columns[key], self._episode(episode)), self.files[episode].data)
        return self._video_frames(key, episode, 0, int(self.episode_lengths[self._episode(episode)]))

    def inspect_videos(self) -> list[tuple[str, str]]:
        """Return ``("error" or "warning", what)`` for video files that are missing, damaged, too short or too long."""
        found: list[tuple[str, str]] = []
        needed: dict[Path, tuple[int, str]] = {}
        for entry in self.files:
            for column, (path, start) in entry.videos.items():
                if key_of(column) not in self.spec.observation:
                    continue
                if not path.is_file():
                    found.append(("error", f"episode {entry.number}: no video file for {key_of(column)}"))
                    continue
                last = round(start * self.spec.rate_hz) + entry.length
                needed[path] = max(needed.get(path, (0, "")), (last, f"{key_of(column)}, episode {entry.number}"))
        for path, (frames, where) in needed.items():
            try:
                stored = VideoReader(path)
            except DataError as error:
                found.append(("error", str(error)))
                continue
            if not np.isclose(stored.fps, self.spec.rate_hz, rtol=1e-3):
                found.append(("error", f"{path}: {stored.fps:g} frames/s, the data set says {self.spec.rate_hz:g}"))
            if stored.num_frames != frames:
                level = "error" if stored.num_frames < frames else "warning"
                found.append((level, f"{path}: holds {stored.num_frames} frames, {frames} are referred to ({where})"))
            stored.close()
        return found

    def _video_frames(self, key: str, episode: int, start: int, count: int) -> np.ndarray:
        entry = self.files[self._episode(episode)]
        path, from_timestamp = entry.videos[self._columns[key]]
        if path not in self._videos:
            while len(self._videos) >= 8:  # an open video holds a decoder and its threads
                self._videos.pop(next(iter(self._videos))).close()
            self._videos[path] = VideoReader(path)
        reader = self._videos[path]
        images = reader.frames(round(from_timestamp * reader.fps) + start, count)
        expected = self.spec.observation[key].shape
        if images.shape[1:] != expected:
            raise DataError(f"{path}: frames are {images.shape[1:]}, meta/info.json says {expected}")
        return images

    def _column(self, name: str, episodes: Sequence[int]) -> np.ndarray:
        shape = tuple(self._features[name].get("shape") or ())
        shape = () if name in self.extras and shape == (1,) else shape
        parts = [
            column_array(self._rows(self._columns[name], i), shape, self.files[i].data, self._columns[name])
            for i in episodes
        ]
        return np.concatenate(parts) if parts else np.zeros((0, *shape), np.float32)

    def _rows(self, column: str, episode: int) -> pa.ChunkedArray:
        """Return one column of one episode."""
        entry = self.files[episode]
        with reading(entry.data):
            table = self._tables.get(entry.data)
            if table is None or column not in table.column_names:
                table = self._read_table(entry.data, column)
            if entry.shared:
                numbers = table.column("episode_index").to_numpy()
                first, last = np.searchsorted(numbers, [entry.number, entry.number + 1])
                if last - first != np.count_nonzero(numbers == entry.number):
                    raise DataError(f"{entry.data}: rows are not in the order of episodes")
                table = table.slice(first, last - first)
        if len(table) != entry.length:
            raise DataError(f"{entry.data}: episode {entry.number} has {len(table)} rows, meta says {entry.length}")
        return table.column(column)

    def _read_table(self, path: Path, column: str) -> pa.Table:
        """Read all small columns of a file, or one column of encoded images, and keep them until `load` is done."""
        present = set(pq.read_schema(path).names)
        small = {name for key, name in self._columns.items() if not self._is_image(key)} | {"episode_index"}
        table = pq.read_table(path, columns=sorted(present & (small | {column})), partitioning=None)
        if column not in table.column_names:
            raise DataError(f"{path}: has no column '{column}'; found {', '.join(sorted(present))}")
        if len(self._tables) > 4096:
            self._tables.clear()
        self._tables[path] = table
        return table

    def _is_image(self, key: str) -> bool:
        return key in self.spec.observation and self.spec.observation[key].is_image


def key_of(column: str) -> str:
    """Return the key of a column: its name without ``observation.`` or ``next.``."""
    for prefix in ("observation.", "next."):
        if column.startswith(prefix):
            return column.removeprefix(prefix)
    return column


def column_array(column: pa.ChunkedArray, shape: tuple[int, ...], path: Path, name: str) -> np.ndarray:
    """Return a parquet column of numbers or (nested) lists of numbers as an array (F, *shape)."""
    values = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # zero chunks
        return np.zeros((0, *shape), np.float32)
    while isinstance(values.type, pa.BaseExtensionType):
        values = values.storage
    while pa.types.is_nested(values.type):
        values = values.flatten()
    flat = values.to_numpy(zero_copy_only=False)
    if flat.dtype == object and flat.size:
        raise DataError(f"{path}: column '{name}' holds text or missing values, not numbers")
    try:
        return flat.reshape(len(column), *shape)
    except ValueError:
        raise DataError(
            f"{path}: column '{name}' holds {flat.size} numbers in {len(column)} rows; meta/info.json says {shape} each"
        ) from None


def _usable_features(
    root: Path, features: dict[str, Any], files: list[EpisodeFiles], warnings: list[str]
) -> dict[str, Any]:
    """Return the features that have data, without bookkeeping, and report those that have none."""
    stored: set[str] = set()
    for entry in files:
        if entry.data.exists():
            with reading(entry.data):
                stored = set(pq.read_schema(entry.data).names)
            break
    usable = {}
    for name, feature in features.items():
        if name in BOOKKEEPING:
            continue
        if feature.get("dtype") == "video":
            absent = [entry.number for entry in files if not entry.videos[name][0].exists()]
            if files and len(absent) == len(files):
                warnings.append(f"camera '{name}' is declared in meta/info.json but has no video file: left out")
                continue
            if absent:
                warnings.append(f"camera '{name}': no video file for episodes {_short(absent)}")
        elif files and stored and name not in stored:
            warnings.append(f"feature '{name}' is declared in meta/info.json but is no column of the data: left out")
            continue
        elif feature.get("dtype") == "string":
            warnings.append(f"feature '{name}' is text: left out")
            continue
        usable[name] = feature
    undeclared = sorted(stored - set(features) - set(BOOKKEEPING))
    if undeclared:
        warnings.append(f"columns not declared in meta/info.json are left out: {', '.join(undeclared)}")
    if "action" not in usable:
        raise DataError(f"{root}: there is no 'action'; found {', '.join(sorted(usable)) or 'no feature with data'}")
    return usable


def _spec(info: dict[str, Any], features: dict[str, Any], warnings: list[str]) -> Spec:
    """Return the spec saved by our own writer, or one made from the features."""
    own = info.get("robot_rl", {}).get("spec")
    if own is not None:
        return Spec.from_json(own)
    observation, action = {}, ArraySpec((0,))
    for name, feature in features.items():
        if name == "action":
            action = _array_spec(name, feature, warnings)
        elif name.startswith("observation"):
            observation[key_of(name)] = _array_spec(name, feature, warnings)
    return Spec(observation, action, float(info.get("fps") or 0))


def _array_spec(name: str, feature: dict[str, Any], warnings: list[str]) -> ArraySpec:
    shape = tuple(int(n) for n in feature["shape"])
    dtype = feature["dtype"]
    if dtype in ("video", "image"):
        channel_first = str((feature.get("names") or [""])[0]).startswith("channel") or shape[0] == 3
        return ArraySpec((*shape[1:], shape[0]) if channel_first else shape, "uint8")
    return ArraySpec(shape, "float32" if dtype.startswith("float") else dtype, feature_names(name, feature, warnings))


def _decode_images(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    """Decode PNG or JPEG bytes kept inside parquet, as LeRobot does for data sets without video."""
    import cv2

    images = []
    for number, value in enumerate(column.to_pylist()):
        data = value.get("bytes") if isinstance(value, dict) else value
        image = cv2.imdecode(np.frombuffer(data or b"\0", np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise DataError(f"{path}: image {number} cannot be decoded")
        images.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    return np.stack(images)


def _short(numbers: list[int]) -> str:
    """Return at most five of ``numbers`` as text."""
    text = ", ".join(str(n) for n in numbers[:5])
    return text if len(numbers) <= 5 else f"{text}, … ({len(numbers)} in all)"
