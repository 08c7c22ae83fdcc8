"""The native store: LeRobotDataset v3.0 on disk, one complete and durable set of files per recorded episode.

An episode's video and rows are put into place first and its line in ``meta/episodes`` last; only what is listed there
exists. Killing the process or filling the disk at any time therefore leaves every finished episode readable and no
unfinished one visible. `compact.compact` merges the small files later.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from robot_rl.core.errors import DataError, SpecMismatchError, UnknownNameError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data import lerobot_schema as schema
from robot_rl.data import statistics
from robot_rl.data.dataset import reading
from robot_rl.data.durable import publish, sync, take_lock, write_json
from robot_rl.data.lerobot import LeRobotDataset
from robot_rl.data.video import WRITE_ERRORS, VideoWriter

ACTORS = ("policy", "human", "expert")
"""Who acted: the names of the codes in the extra ``actor``."""
SCRATCH = ".recording"
"""Directory inside the data set for what is not finished; no reader looks there."""


def standard_extras(spec: Spec) -> dict[str, ArraySpec]:
    """Return the extras that recordings of this project use, by name."""
    return {
        "reward": ArraySpec((1,), "float32"),
        "actor": ArraySpec((1,), "int8"),
        "policy_action": ArraySpec(spec.action.shape, "float32", spec.action.names, spec.action.unit),
        "intervention": ArraySpec((1,), "bool"),
        "safety_flags": ArraySpec((1,), "int32"),
        "stamp": ArraySpec((1,), "float64", unit="s"),
    }


class EpisodeWriter:
    """Records episodes frame by frame; each is durable when `save_episode` returns.

    ``success`` and ``done`` are written for every episode. Other extras are declared, or are those of the standard
    ones (`standard_extras`) that come with the first frame; every frame must then bring the same.
    """

    def __init__(
        self,
        root: str | Path,
        spec: Spec,
        *,
        task: str = "",
        extras: Mapping[str, ArraySpec] | None = None,
        append: bool = False,
        robot_type: str = "robot_rl",
        with_success: bool = True,
    ) -> None:
        """Create the data set, or open one of ours to add to it.

        Args:
            root: directory of the data set.
            spec: what is recorded; ``rate_hz`` must be known.
            task: instruction of the episodes, for people and for language-conditioned policies.
            extras: further columns by name; see above for the default.
            append: whether a data set that exists is continued; it must have the same spec.
            robot_type: name of the robot, for LeRobot.
            with_success: whether there is a column ``success``; False for episodes that nobody judged.

        Raises:
            DataError: the directory holds something else, or is being recorded into by another process.
            SpecMismatchError: the data set to append to has another spec; the message lists the differences.
        """
        if spec.rate_hz <= 0:
            raise DataError(f"{root}: a recording needs the control rate, got rate_hz {spec.rate_hz:g}")
        if spec.action.size == 0:
            raise DataError(f"{root}: a recording needs an action, and the spec has none")
        self.root, self.spec, self.task = Path(root), spec, task
        self.num_episodes, self.num_frames = 0, 0
        self._flags = ("done", "success") if with_success else ("done",)
        self._extras = None if extras is None else _completed(extras, self._flags)
        self._robot_type = robot_type
        self._tasks: list[str] = []
        self._totals: dict[str, statistics.Statistics] = {}
        self._next_file = 0
        self._lock = self._take_lock(append)
        try:
            if (self.root / "meta" / "info.json").exists():
                self._continue(append)
        except BaseException:
            self._lock.close()
            raise
        self._reset()

    def add(self, observation: Mapping[str, np.ndarray], action: np.ndarray, **extras: Any) -> None:
        """Add one frame to the present episode.

        Args:
            observation: array of every observation key of the spec, images (H, W, 3) uint8.
            action: (A,) commanded at this observation.
            **extras: the extra columns; ``actor`` may be a name of `ACTORS`, ``success`` and ``done`` are optional.

        Raises:
            DataError: a shape differs from the spec, an extra or observation is missing or unknown, or the disk is
                full and the present episode therefore lost.
        """
        if self._extras is None:
            self._extras = self._infer_extras(extras)
        self._same_names(observation, extras)
        frame = {"action": _cast(action, self.spec.action, "action")}
        for key, array in self.spec.observation.items():
            frame[f"observation.{key}"] = _cast(observation[key], array, f"observation '{key}'")
        for name, array in self._extras.items():
            value = extras.get(name, False) if name in ("success", "done") else extras[name]
            if name == "actor" and isinstance(value, str):
                value = actor_code(value)
            frame[schema.column_of(name)] = _cast(np.reshape(value, array.shape), array, f"extra '{name}'")
        try:
            for name in self._cameras:
                value = frame.pop(name)
                self._camera(name).add(value)
                self._image_statistics[name].add(value)
        except WRITE_ERRORS as error:
            self.discard_episode()
            raise DataError(
                f"{self.root}: the present episode is lost; the earlier ones are complete ({error})"
            ) from error
        for name, value in frame.items():
            self._buffer.setdefault(name, []).append(value)
        self._length += 1

    def save_episode(self, success: bool | None = None, task: str | None = None) -> int:
        """Finish the present episode and return its number; it survives anything from then on.

        Args:
            success: verdict on the episode, written to ``success`` of its last frame; ``None`` leaves the frames as
                they were added, which is False where nothing else was given.
            task: instruction, if it differs from the writer's.

        Raises:
            DataError: there is no frame, or the disk is full; then the episode is dropped and the earlier ones are
                complete.
        """
        if self._length == 0:
            raise DataError(f"{self.root}: there is no frame to save")
        number = self.num_episodes
        try:
            self._save(self.task if task is None else task, success)
        except WRITE_ERRORS as error:
            saved = self.num_episodes > number
            state = (
                "is saved, but the totals in meta are not" if saved else "is not saved; the earlier ones are complete"
            )
            raise DataError(f"{self.root}: episode {number} {state} ({error})") from error
        finally:
            if self.num_episodes == number:
                self._remove_unlisted()
            self.discard_episode()
        return number

    def discard_episode(self) -> None:
        """Forget the present episode."""
        for writer in self._writers.values():
            writer.abandon()
        self._reset()

    def close(self) -> None:
        """End recording; an episode that was not saved is discarded."""
        if self._lock.closed:
            return
        self.discard_episode()
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _scratch(self) -> Path:
        return self.root / SCRATCH

    @property
    def _cameras(self) -> list[str]:
        return [f"observation.{key}" for key, array in self.spec.observation.items() if array.is_image]

    def _take_lock(self, append: bool) -> Any:
        """Make the directory ours."""
        exists = self.root.exists() and any(entry.name != SCRATCH for entry in self.root.iterdir())
        if exists and not (self.root / "meta" / "info.json").exists():
            raise DataError(f"{self.root}: exists and is no data set; choose an empty directory")
        if exists and not append:
            raise DataError(f"{self.root}: already holds a data set; append to it or choose another directory")
        return take_lock(self._scratch, "record")

    def _continue(self, append: bool) -> None:
        """Take over numbers, tasks, columns and statistics of the data set that exists."""
        existing = LeRobotDataset(self.root)
        own = existing.info.get("robot_rl")
        if own is None:
            raise DataError(f"{self.root}: was not recorded by robot_rl; import it first, then append to the copy")
        differences = existing.spec.differences(self.spec) or self.spec.differences(existing.spec)
        if differences:
            raise SpecMismatchError(f"data set {self.root}", "the recording", differences)
        extras = {name: ArraySpec.from_json(array) for name, array in own["extras"].items()}
        if self._extras is not None and set(self._extras) != set(extras):
            raise SpecMismatchError(
                f"data set {self.root}",
                "the recording",
                [f"extras {', '.join(extras)} against {', '.join(self._extras)}"],
            )
        self.spec, self._extras = existing.spec, extras
        self._robot_type = existing.info.get("robot_type", self._robot_type)
        self.num_episodes, self.num_frames = existing.num_episodes, existing.num_frames
        tasks = self.root / "meta" / "tasks.parquet"
        if tasks.exists():
            with reading(tasks):
                self._tasks = pq.read_table(tasks).column("__index_level_0__").to_pylist()
        features = list(schema.features_of(self.spec, extras))
        for path in sorted((self.root / "meta" / "episodes").glob("chunk-*/file-*.parquet")):
            with reading(path):
                for row in pq.read_table(path, partitioning=None).to_pylist():
                    self._count(row, features)
        self._remove_unlisted()

    def _count(self, row: dict[str, Any], features: list[str]) -> None:
        """Add one listed episode to the totals, and step over its files."""
        for name, found in statistics.from_row(row, features).items():
            self._totals[name] = statistics.merge(self._totals.get(name), found)
        for place in ("data", "meta/episodes", *(f"videos/{key}" for key in self._cameras)):
            file = row[f"{place}/chunk_index"] * schema.CHUNK_SIZE + row[f"{place}/file_index"]
            self._next_file = max(self._next_file, file + 1)

    def _reset(self) -> None:
        self._length = 0
        self._buffer: dict[str, list[np.ndarray]] = {}
        self._writers: dict[str, VideoWriter] = {}
        self._image_statistics = {name: statistics.ImageStatistics() for name in self._cameras}

    def _infer_extras(self, given: Mapping[str, Any]) -> dict[str, ArraySpec]:
        known = standard_extras(self.spec)
        for name in given:
            if name not in known and name not in self._flags:
                raise UnknownNameError("standard extra", name, [*known, *self._flags])
        return _completed({name: known[name] for name in given if name in known}, self._flags)

    def _same_names(self, observation: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        """Raise unless a frame brings every observation and every declared extra, and no other extra."""
        missing = [key for key in self.spec.observation if key not in observation]
        if missing:
            raise DataError(f"observation '{missing[0]}' is missing; given: {', '.join(observation)}")
        declared = set(self._extras or ())
        lacking, unknown = declared - set(extras) - {"success", "done"}, set(extras) - declared
        if lacking or unknown:
            wrong = f"'{sorted(lacking)[0]}' is missing" if lacking else f"'{sorted(unknown)[0]}' was not declared"
            raise DataError(f"extra {wrong}; this recording has: {', '.join(sorted(declared))}")

    def _camera(self, name: str) -> VideoWriter:
        if name not in self._writers:
            height, width, _ = self.spec.observation[name.removeprefix("observation.")].shape
            self._writers[name] = VideoWriter(self._scratch / f"{name}.mp4", self.spec.rate_hz, height, width)
        return self._writers[name]

    def _save(self, task: str, success: bool | None) -> None:
        features = schema.features_of(self.spec, self._extras or {})
        for writer in self._writers.values():
            writer.close()
        if task not in self._tasks:
            self._publish_tasks([*self._tasks, task])
        columns = self._finished_columns(task, success)
        data = self._scratch / "data.parquet"
        pq.write_table(schema.data_table(features, columns), data)
        found = {
            name: self._image_statistics[name].result() if name in self._writers else statistics.measure(columns[name])
            for name in features
        }
        place = divmod(self._next_file, schema.CHUNK_SIZE)
        end = self._length / self.spec.rate_hz
        row = schema.episode_row(
            number=self.num_episodes,
            length=self._length,
            first_index=self.num_frames,
            task=task,
            place=place,
            videos=dict.fromkeys(self._writers, (*place, 0.0, end)),
            statistics=found,
        )
        listed = self._scratch / "episodes.parquet"
        pq.write_table(schema.episodes_table([row]), listed)
        if not (self.root / "meta" / "info.json").exists():
            self._write_info(features)
        for name, writer in self._writers.items():
            publish(writer.path, self._file(schema.VIDEO_PATH, place, name))
        publish(data, self._file(schema.DATA_PATH, place))
        publish(listed, self._file(schema.EPISODES_PATH, place))  # from here on the episode exists
        self.num_episodes, self.num_frames = self.num_episodes + 1, self.num_frames + self._length
        self._next_file += 1
        for name, part in found.items():
            self._totals[name] = statistics.merge(self._totals.get(name), part)
        write_json(self.root / "meta" / "stats.json", statistics.to_json(self._totals), self._scratch, False)
        self._write_info(features)

    def _finished_columns(self, task: str, success: bool | None) -> dict[str, np.ndarray]:
        """Return all columns of the episode (T, …), with the verdict and LeRobot's numbering."""
        frames = np.arange(self._length, dtype=np.int64)
        columns = {name: np.stack(values) for name, values in self._buffer.items()}
        if success is not None and "next.success" in columns:
            columns["next.success"][-1] = success
        columns["next.done"][-1] = True
        return columns | {
            "episode_index": np.full(self._length, self.num_episodes, np.int64),
            "frame_index": frames,
            "timestamp": (frames / self.spec.rate_hz).astype(np.float32),
            "index": frames + self.num_frames,
            "task_index": np.full(self._length, self._tasks.index(task), np.int64),
        }

    def _publish_tasks(self, tasks: list[str]) -> None:
        temporary = self._scratch / "tasks.parquet"
        pq.write_table(schema.tasks_table(tasks), temporary)
        publish(temporary, self.root / "meta" / "tasks.parquet")
        self._tasks = tasks

    def _write_info(self, features: dict[str, Any]) -> None:
        rate = self.spec.rate_hz
        info = {
            "codebase_version": "v3.0",
            "robot_type": self._robot_type,
            "total_episodes": self.num_episodes,
            "total_frames": self.num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": schema.CHUNK_SIZE,
            "fps": int(rate) if float(rate).is_integer() else rate,
            "splits": {"train": f"0:{self.num_episodes}"},
            "data_path": schema.DATA_PATH,
            "video_path": schema.VIDEO_PATH if self._cameras else None,
            "features": features,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 500,
            "robot_rl": {
                "format": 1,
                "spec": self.spec.to_json(),
                "extras": {name: array.to_json() for name, array in (self._extras or {}).items()},
                "actors": list(ACTORS),
            },
        }
        write_json(self.root / "meta" / "info.json", info, self._scratch)

    def _file(self, template: str, place: tuple[int, int], key: str = "") -> Path:
        return self.root / template.format(chunk_index=place[0], file_index=place[1], video_key=key)

    def _remove_unlisted(self) -> None:
        """Delete files of an episode that was put into place but never listed; nothing refers to them."""
        place = divmod(self._next_file, schema.CHUNK_SIZE)
        paths = [self._file(schema.DATA_PATH, place)]
        paths += [self._file(schema.VIDEO_PATH, place, name) for name in self._cameras]
        for path in paths:
            if path.exists():
                path.unlink()
                sync(path.parent)


def actor_code(name: str) -> int:
    """Return the code of an actor's name; raises `UnknownNameError` if it is not one of `ACTORS`."""
    if name not in ACTORS:
        raise UnknownNameError("actor", name, ACTORS)
    return ACTORS.index(name)


def _completed(extras: Mapping[str, ArraySpec], flags: Sequence[str]) -> dict[str, ArraySpec]:
    """Add the flags that every recording has, in LeRobot's order: reward, done, success, the rest."""
    first = {name: array for name, array in extras.items() if name == "reward"}
    return {**first, **{name: ArraySpec((1,), "bool") for name in flags}, **extras}


def _cast(value: Any, array: ArraySpec, name: str) -> np.ndarray:
    """Return ``value`` in the shape and element type of ``array``; shapes are checked, values are taken as they are."""
    result = np.asarray(value)
    if result.shape != array.shape:
        raise DataError(f"{name} has shape {result.shape}, expected {array.shape}")
    if array.is_image and result.dtype != np.uint8:
        raise DataError(f"{name} is an image of {result.dtype}, expected uint8")
    return result.astype(array.dtype)
