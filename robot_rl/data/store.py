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
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq

from robot_rl.core.errors import DataError, UnknownNameError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data import lerobot_schema as schema
from robot_rl.data import statistics
from robot_rl.data.durable import publish, take_lock
from robot_rl.data.store_meta import ACTORS, SCRATCH, StoreMeta
from robot_rl.data.video import WRITE_ERRORS, VideoWriter

__all__ = ["ACTORS", "SCRATCH", "EpisodeWriter", "actor_code", "standard_extras"]


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
        self.root, self.task = Path(root), task
        self._flags = ("done", "success") if with_success else ("done",)
        declared = None if extras is None else _completed(extras, self._flags)
        self._meta = StoreMeta(self.root, spec, declared, robot_type)
        self._lock = self._take_lock(append)
        try:
            if self._meta.exists:
                self._meta.take_over()
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
        if self._meta.extras is None:
            self._meta.extras = self._infer_extras(extras)
        self._same_names(observation, extras)
        frame = {"action": _cast(action, self.spec.action, "action")}
        for key, array in self.spec.observation.items():
            frame[f"observation.{key}"] = _cast(observation[key], array, f"observation '{key}'")
        for name, array in self._meta.extras.items():
            value = extras.get(name, False) if name in ("success", "done") else extras[name]
            if name == "actor" and isinstance(value, str):
                value = actor_code(value)
            frame[schema.column_of(name)] = _cast(np.reshape(value, array.shape), array, f"extra '{name}'")
        try:
            for name in self._meta.cameras:
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
                self._meta.remove_unlisted()
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
        shutil.rmtree(self._meta.scratch, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def spec(self) -> Spec:
        """What is recorded."""
        return self._meta.spec

    @property
    def num_episodes(self) -> int:
        """Episodes in the data set, those of earlier recordings included."""
        return self._meta.num_episodes

    @property
    def num_frames(self) -> int:
        """Frames of these episodes."""
        return self._meta.num_frames

    def _take_lock(self, append: bool) -> IO[str]:
        """Make the directory ours."""
        if self.root.exists() and not self.root.is_dir():
            raise DataError(f"{self.root}: is a file; a data set is a directory")
        if self._meta.exists and not append:
            raise DataError(f"{self.root}: already holds a data set; append to it or choose another directory")
        if (
            not self._meta.exists
            and self.root.exists()
            and {entry.name for entry in self.root.iterdir()} - {SCRATCH, "meta"}
        ):
            raise DataError(f"{self.root}: exists and is no data set; choose an empty directory")
        return take_lock(self._meta.scratch, "record")

    def _reset(self) -> None:
        self._length = 0
        self._buffer: dict[str, list[np.ndarray]] = {}
        self._writers: dict[str, VideoWriter] = {}
        self._image_statistics = {name: statistics.ImageStatistics() for name in self._meta.cameras}

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
        declared = set(self._meta.extras or ())
        lacking, unknown = declared - set(extras) - {"success", "done"}, set(extras) - declared
        if lacking or unknown:
            wrong = f"'{sorted(lacking)[0]}' is missing" if lacking else f"'{sorted(unknown)[0]}' was not declared"
            raise DataError(f"extra {wrong}; this recording has: {', '.join(sorted(declared))}")

    def _camera(self, name: str) -> VideoWriter:
        if name not in self._writers:
            height, width, _ = self.spec.observation[name.removeprefix("observation.")].shape
            self._writers[name] = VideoWriter(self._meta.scratch / f"{name}.mp4", self.spec.rate_hz, height, width)
        return self._writers[name]

    def _save(self, task: str, success: bool | None) -> None:
        """Write everything aside, then put it into place in the order that keeps readers from half an episode."""
        meta, features = self._meta, self._meta.features
        for writer in self._writers.values():
            writer.close()
        meta.begin()
        columns = self._finished_columns(meta.task_index(task), success)
        data, listed = meta.scratch / "data.parquet", meta.scratch / "episodes.parquet"
        pq.write_table(schema.data_table(features, columns), data)
        found = {
            name: self._image_statistics[name].result() if name in self._writers else statistics.measure(columns[name])
            for name in features
        }
        row = schema.episode_row(
            number=meta.num_episodes,
            length=self._length,
            first_index=meta.num_frames,
            task=task,
            place=meta.place,
            videos=dict.fromkeys(self._writers, (*meta.place, 0.0, self._length / meta.spec.rate_hz)),
            statistics=found,
        )
        pq.write_table(schema.episodes_table([row]), listed)
        for name, writer in self._writers.items():
            publish(writer.path, meta.file(schema.VIDEO_PATH, name))
        publish(data, meta.file(schema.DATA_PATH))
        publish(listed, meta.file(schema.EPISODES_PATH))  # from here on the episode exists
        meta.count_episode(self._length, found)
        meta.write_totals()

    def _finished_columns(self, task_index: int, success: bool | None) -> dict[str, np.ndarray]:
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
            "task_index": np.full(self._length, task_index, np.int64),
        }


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
