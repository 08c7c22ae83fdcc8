"""The ``meta`` directory of a store that is being written: numbering, tasks, columns, totals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from robot_rl.core.errors import DataError, SpecMismatchError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data import lerobot_schema as schema
from robot_rl.data import statistics
from robot_rl.data.dataset import reading
from robot_rl.data.durable import publish, sync, write_json
from robot_rl.data.lerobot import LeRobotDataset

ACTORS = ("policy", "human", "expert")
"""Who acted: the names of the codes in the extra ``actor``."""
SCRATCH = ".recording"
"""Directory inside the data set for what is not finished; no reader looks there."""


class StoreMeta:
    """What is known about a store between two episodes, and on disk after each of them."""

    def __init__(self, root: Path, spec: Spec, extras: dict[str, ArraySpec] | None, robot_type: str) -> None:
        self.root, self.spec, self.extras, self.robot_type = root, spec, extras, robot_type
        self.scratch = root / SCRATCH
        self.num_episodes, self.num_frames = 0, 0
        self._tasks: list[str] = []
        self._totals: dict[str, statistics.Statistics] = {}
        self._next_file = 0

    @property
    def exists(self) -> bool:
        """Whether the data set was begun."""
        return self._info.exists()

    @property
    def _info(self) -> Path:
        return self.root / "meta" / "info.json"

    @property
    def cameras(self) -> list[str]:
        """Columns that are videos."""
        return [f"observation.{key}" for key, array in self.spec.observation.items() if array.is_image]

    @property
    def features(self) -> dict[str, Any]:
        """The features of ``info.json``."""
        return schema.features_of(self.spec, self.extras or {})

    @property
    def place(self) -> tuple[int, int]:
        """Chunk and file number of the next episode."""
        return divmod(self._next_file, schema.CHUNK_SIZE)

    def file(self, template: str, key: str = "") -> Path:
        """Return the next episode's file for one of the path templates of `lerobot_schema`."""
        chunk, file = self.place
        return self.root / template.format(chunk_index=chunk, file_index=file, video_key=key)

    def take_over(self) -> None:
        """Continue the data set that exists: check that it is ours and alike, and read where it ends.

        Raises:
            DataError: it was not recorded by this package, or is damaged.
            SpecMismatchError: its spec or its extras differ; the message lists the differences.
        """
        existing = LeRobotDataset(self.root)
        own = existing.info.get("robot_rl")
        if own is None:
            raise DataError(f"{self.root}: was not recorded by robot_rl; import it first, then append to the copy")
        extras = {name: ArraySpec.from_json(array) for name, array in own["extras"].items()}
        differences = existing.spec.differences(self.spec) or self.spec.differences(existing.spec)
        differences += _extra_differences(extras, self.extras)
        if differences:
            raise SpecMismatchError(f"data set {self.root}", "the recording", differences)
        self.spec, self.extras = existing.spec, extras
        self.robot_type = existing.info.get("robot_type", self.robot_type)
        self.num_episodes, self.num_frames = existing.num_episodes, existing.num_frames
        tasks = self.root / "meta" / "tasks.parquet"
        if tasks.exists():
            with reading(tasks):
                self._tasks = pq.read_table(tasks).column("__index_level_0__").to_pylist()
        features = list(self.features)
        for path in sorted((self.root / "meta" / "episodes").glob("chunk-*/file-*.parquet")):
            with reading(path):
                for row in pq.read_table(path, partitioning=None).to_pylist():
                    self._count(row, features)
        self.remove_unlisted()

    def _count(self, row: dict[str, Any], features: list[str]) -> None:
        """Add one listed episode to the totals, and step over its files."""
        for name, found in statistics.from_row(row, features).items():
            self._totals[name] = statistics.merge(self._totals.get(name), found)
        for place in ("data", "meta/episodes", *(f"videos/{key}" for key in self.cameras)):
            file = row[f"{place}/chunk_index"] * schema.CHUNK_SIZE + row[f"{place}/file_index"]
            self._next_file = max(self._next_file, file + 1)

    def begin(self) -> None:
        """Write ``info.json`` if there is none, so that the data set can be opened from the first episode on."""
        if not self.exists:
            self._write_info()

    def task_index(self, task: str) -> int:
        """Return the number of ``task``; a new one is published before any episode refers to it."""
        if task not in self._tasks:
            temporary = self.scratch / "tasks.parquet"
            pq.write_table(schema.tasks_table([*self._tasks, task]), temporary)
            publish(temporary, self.root / "meta" / "tasks.parquet")
            self._tasks.append(task)
        return self._tasks.index(task)

    def count_episode(self, length: int, found: Mapping[str, statistics.Statistics]) -> None:
        """Count an episode that has just been listed; from here on its file numbers are taken."""
        self.num_episodes, self.num_frames = self.num_episodes + 1, self.num_frames + length
        self._next_file += 1
        for name, part in found.items():
            self._totals[name] = statistics.merge(self._totals.get(name), part)

    def write_totals(self) -> None:
        """Bring ``stats.json`` and ``info.json`` up to date."""
        # The statistics can be computed again from the episodes, so they need not wait for the disk.
        totals = statistics.to_json(self._totals)
        write_json(self.root / "meta" / "stats.json", totals, self.scratch, durable=False)
        self._write_info()

    def _write_info(self) -> None:
        rate = self.spec.rate_hz
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": self.num_episodes,
            "total_frames": self.num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": schema.CHUNK_SIZE,
            "fps": int(rate) if float(rate).is_integer() else rate,
            "splits": {"train": f"0:{self.num_episodes}"},
            "data_path": schema.DATA_PATH,
            "video_path": schema.VIDEO_PATH if self.cameras else None,
            "features": self.features,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 500,
            "robot_rl": {
                "format": 1,
                "spec": self.spec.to_json(),
                "extras": {name: array.to_json() for name, array in (self.extras or {}).items()},
                "actors": list(ACTORS),
            },
        }
        write_json(self._info, info, self.scratch)

    def remove_unlisted(self) -> None:
        """Delete files of an episode that was put into place but never listed; nothing refers to them."""
        paths = [self.file(schema.DATA_PATH), *(self.file(schema.VIDEO_PATH, name) for name in self.cameras)]
        for path in paths:
            if path.exists():
                path.unlink()
                sync(path.parent)


def _extra_differences(existing: Mapping[str, ArraySpec], declared: Mapping[str, ArraySpec] | None) -> list[str]:
    """List how the extras differ; ``None`` accepts whatever exists."""
    if declared is None:
        return []
    if set(existing) != set(declared):
        return [f"extras {', '.join(existing)} against {', '.join(declared)}"]
    return [text for name, array in existing.items() for text in array.differences(declared[name], f"extra '{name}'")]
