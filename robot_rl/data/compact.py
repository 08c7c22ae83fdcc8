"""Merging the many small files of a recording into few large ones, as LeRobot's own data sets have them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from robot_rl.core.errors import DataError
from robot_rl.data import lerobot_schema as schema
from robot_rl.data.dataset import open_dataset, reading
from robot_rl.data.durable import sync, take_lock
from robot_rl.data.lerobot import LeRobotDataset
from robot_rl.data.store import SCRATCH
from robot_rl.data.video import join_videos, video_signature

Item = TypeVar("Item")


@dataclass(frozen=True)
class Compaction:
    """What `compact` did."""

    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int


def compact(
    root: str | Path,
    data_megabytes: float = 100,
    video_megabytes: float = 500,
    advance: Callable[[int], None] = lambda _: None,
) -> Compaction:
    """Merge the files of a LeRobot v3.0 data set; videos are joined without being encoded again.

    Whatever else lies in the directory (a README, ``.git``, videos that the data set does not list) is carried over.
    The merged copy is written beside the data set, verified, and then takes its place; being killed before that
    changes nothing. Killed between the two renames, the original is ``<name>.before-compact`` beside it.

    Args:
        root: the data set; no recording may be going on.
        data_megabytes: size from which on a new parquet file is begun.
        video_megabytes: size from which on a new video file is begun.
        advance: called with the number of source files done.

    Raises:
        DataError: the data set is of another version, damaged, or being recorded into, or a file that it does not list
            stands where a merged one goes.
    """
    root = Path(root)
    dataset = open_dataset(root, "lerobot")
    if not isinstance(dataset, LeRobotDataset) or dataset.version != "v3.0":
        raise DataError(f"{root}: only LeRobot v3.0 data sets can be compacted; import it first")
    lock = take_lock(root / SCRATCH, "compact")
    try:
        before = _sizes(root)
        merged = root.with_name(f".{root.name}.compacting")
        shutil.rmtree(merged, ignore_errors=True)
        _merge(dataset, merged, data_megabytes * 1e6, video_megabytes * 1e6, advance)
        _verify(dataset, merged)
        after = _sizes(merged)
        _swap(root, merged)
    finally:
        lock.close()
    return Compaction(len(before), len(after), sum(before), sum(after))


def count_files(dataset: LeRobotDataset) -> int:
    """Return how many files `compact` will read, for a progress bar."""
    return len(
        {entry.data for entry in dataset.files} | {v[0] for entry in dataset.files for v in entry.videos.values()}
    )


def _sizes(root: Path) -> list[int]:
    return [path.stat().st_size for path in root.rglob("*") if path.is_file() and SCRATCH not in path.parts]


def _merge(
    dataset: LeRobotDataset, target: Path, data_bytes: float, video_bytes: float, advance: Callable[[int], None]
) -> None:
    """Write the merged copy of ``dataset`` to ``target``."""
    _carry_over(dataset, target)
    rows = _episode_rows(dataset.root)
    _merge_data(dataset, target, rows, data_bytes, advance)
    for key in dict.fromkeys(key for entry in dataset.files for key in entry.videos):
        _merge_videos(dataset, target, key, rows, video_bytes, advance)
    for row in rows:
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
    listed = _place(target, schema.EPISODES_PATH, 0)
    pq.write_table(schema.episodes_table(rows), listed)
    for path in target.rglob("*"):
        if not path.is_symlink():
            sync(path)


def _carry_over(dataset: LeRobotDataset, target: Path) -> None:
    """Copy everything that is not merged."""
    root = os.path.normpath(dataset.root)
    merged = {os.path.join(root, SCRATCH), os.path.join(root, "meta", "episodes")}
    for entry in dataset.files:
        merged |= {str(entry.data), *(str(path) for path, _ in entry.videos.values() if path.is_file())}

    def left_out(directory: str, names: list[str]) -> set[str]:
        return {name for name in names if os.path.join(directory, name) in merged}

    shutil.copytree(root, target, symlinks=True, ignore=left_out)


def _episode_rows(root: Path) -> list[dict[str, Any]]:
    """Return the rows of ``meta/episodes`` with their statistics, in order."""
    rows: list[dict[str, Any]] = []
    for path in sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet")):
        with reading(path):
            rows += pq.read_table(path, partitioning=None).to_pylist()
    if not rows:
        raise DataError(f"{root}: holds no episode")
    return sorted(rows, key=lambda row: row["episode_index"])


def _merge_data(
    dataset: LeRobotDataset, target: Path, rows: list[dict[str, Any]], limit: float, advance: Callable[[int], None]
) -> None:
    sources = list(dict.fromkeys(entry.data for entry in dataset.files))
    number_of: dict[Path, int] = {}
    for number, group in enumerate(_groups(sources, [path.stat().st_size for path in sources], limit)):
        path = _place(target, schema.DATA_PATH, number)
        with reading(group[0]):
            kind = pq.read_schema(group[0])
        with pq.ParquetWriter(path, kind) as writer:
            for source in group:
                with reading(source):
                    table = pq.read_table(source, partitioning=None)
                if table.schema != kind:
                    raise DataError(f"{source}: its columns differ from those of {group[0]}")
                writer.write_table(pa.table(table.columns, schema=kind))
                number_of[source] = number
                advance(1)
    for row, entry in zip(rows, dataset.files, strict=True):
        chunk, file = divmod(number_of[entry.data], schema.CHUNK_SIZE)
        row |= {"data/chunk_index": chunk, "data/file_index": file}


def _merge_videos(
    dataset: LeRobotDataset,
    target: Path,
    key: str,
    rows: list[dict[str, Any]],
    limit: float,
    advance: Callable[[int], None],
) -> None:
    sources = list(dict.fromkeys(entry.videos[key][0] for entry in dataset.files if entry.videos[key][0].is_file()))
    place_of: dict[Path, tuple[int, float]] = {}
    number = 0
    for alike in _alike(sources):
        for group in _groups(alike, [path.stat().st_size for path in alike], limit):
            path = _place(target, schema.VIDEO_PATH, number, key)
            if len(group) == 1:
                shutil.copy2(group[0], path)
                place_of[group[0]] = (number, 0.0)
            else:
                counts = join_videos(group, path)
                for i, source in enumerate(group):
                    place_of[source] = (number, sum(counts[:i]) / dataset.spec.rate_hz)
            number += 1
            advance(len(group))
    for row, entry in zip(rows, dataset.files, strict=True):
        source = entry.videos[key][0]
        if source not in place_of:
            continue
        file_number, shift = place_of[source]
        chunk, file = divmod(file_number, schema.CHUNK_SIZE)
        row |= {f"videos/{key}/chunk_index": chunk, f"videos/{key}/file_index": file}
        for part in ("from_timestamp", "to_timestamp"):
            row[f"videos/{key}/{part}"] += shift


def _place(target: Path, template: str, number: int, key: str = "") -> Path:
    chunk, file = divmod(number, schema.CHUNK_SIZE)
    path = target / template.format(chunk_index=chunk, file_index=file, video_key=key)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() or not path.parent.resolve().is_relative_to(target.resolve()):
        part = path.relative_to(target)
        raise DataError(f"'{part}' goes where there is a file or link that the data set does not list: move that away")
    return path


def _groups(items: Sequence[Item], sizes: Sequence[float], limit: float) -> Iterator[list[Item]]:
    """Split ``items`` into runs of at most ``limit`` bytes, each of at least one item."""
    group: list[Item] = []
    total = 0.0
    for item, size in zip(items, sizes, strict=True):
        if group and total + size > limit:
            yield group
            group, total = [], 0.0
        group.append(item)
        total += size
    if group:
        yield group


def _alike(sources: Sequence[Path]) -> Iterator[list[Path]]:
    """Split ``sources`` into runs that can be joined by packets; one that cannot be joined at all stays alone."""
    run: list[Path] = []
    previous: Any = None
    for source in sources:
        signature = video_signature(source)
        if run and (signature is None or signature != previous):
            yield run
            run = []
        run.append(source)
        previous = signature
    if run:
        yield run


def _verify(dataset: LeRobotDataset, merged: Path) -> None:
    """Raise unless the copy holds the same numbers and as many images."""
    copy = LeRobotDataset(merged)
    if not np.array_equal(copy.load([]).action, dataset.load([]).action, equal_nan=True):
        raise DataError(f"{dataset.root}: the actions differ in the merged copy; nothing was changed")
    problems = [text for level, text in copy.inspect_videos() if level == "error"]
    known = {text for _, text in dataset.inspect_videos()}
    if any(text not in known for text in problems):
        raise DataError(f"{dataset.root}: the merged copy is incomplete ({problems[0]}); nothing was changed")


def _swap(root: Path, merged: Path) -> None:
    """Put ``merged`` in the place of ``root``."""
    aside = root.with_name(f"{root.name}.before-compact")
    os.replace(root, aside)
    os.replace(merged, root)
    sync(root.parent)
    shutil.rmtree(aside)
