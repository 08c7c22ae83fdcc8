"""The ``meta`` directory of LeRobot data sets: where each episode is, and what is irregular."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from robot_rl.core.errors import DataError
from robot_rl.data.dataset import reading

VERSIONS = ("v2.0", "v2.1", "v3.0")
STANDARD_PATHS = {
    "data": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "video": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}
"""Where v2 keeps its files, tried when the template in ``info.json`` leads nowhere."""
_TEMPLATE = re.compile(r"(?:[^{}]|\{[a-z_]+(?::0[0-9]{1,2}d)?\})*")


@dataclass(frozen=True)
class EpisodeFiles:
    """Where one episode is."""

    number: int
    """Its ``episode_index``."""
    length: int
    """Frames."""
    data: Path
    """The parquet file with its rows."""
    shared: bool
    """Whether the file holds other episodes too."""
    tasks: tuple[str, ...] = ()
    """Its instructions."""
    videos: dict[str, tuple[Path, float]] = field(default_factory=dict)
    """For each camera feature the file and the time in seconds at which the episode starts in it."""


def read_info(root: Path) -> dict[str, Any]:
    """Return ``meta/info.json`` after checking the parts without which nothing can be read."""
    path = root / "meta" / "info.json"
    with reading(path):
        info = json.loads(path.read_text(encoding="utf-8"))
    version = str(info.get("codebase_version", "none"))
    if version not in VERSIONS:
        raise DataError(f"{path}: codebase_version {version} is not supported; known: {', '.join(VERSIONS)}")
    if not isinstance(info.get("features"), dict):
        raise DataError(f"{path}: states no features")
    for name, feature in info["features"].items():
        if not isinstance(feature, dict) or "dtype" not in feature or "shape" not in feature:
            raise DataError(f"{path}: feature '{name}' states no dtype and shape")
    return info


def find_episodes(root: Path, info: dict[str, Any], warnings: list[str]) -> list[EpisodeFiles]:
    """Return the episodes in order of their number."""
    find = _find_v3 if info["codebase_version"].startswith("v3") else _find_v2
    files = find(root, info, warnings)
    numbers = [entry.number for entry in files]
    if numbers != list(range(len(files))):
        warnings.append(f"episode numbers are not 0 to {len(files) - 1}: episodes are taken in order of their number")
    absent = [entry.number for entry in files if not entry.data.exists()]
    warnings += [f"episode {number}: its data file is missing" for number in absent[:5]]
    if len(absent) > 5:
        warnings.append(f"{len(absent)} of {len(files)} episodes have no data file")
    return files


def _cameras(info: dict[str, Any]) -> list[str]:
    return [name for name, feature in info["features"].items() if feature["dtype"] == "video"]


def _find_v3(root: Path, info: dict[str, Any], warnings: list[str]) -> list[EpisodeFiles]:
    """Read ``meta/episodes``, which alone says what exists: an episode is complete once it is listed there."""
    directory = root / "meta" / "episodes"
    rows: list[dict[str, Any]] = []
    for path in sorted(directory.glob("chunk-*/file-*.parquet")):
        with reading(path):
            file = pq.ParquetFile(path)
            columns = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
            rows += file.read(columns=columns, use_threads=False).to_pylist()
    data_path = info.get("data_path") or "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video_path = info.get("video_path") or "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    files = []
    for row in sorted(rows, key=lambda row: row["episode_index"]):
        videos = {}
        for key in _cameras(info):
            where = {part: row.get(f"videos/{key}/{part}") for part in ("chunk_index", "file_index", "from_timestamp")}
            if where["chunk_index"] is None:
                videos[key] = (root / "videos" / key, 0.0)
                continue
            path = _fill(root, video_path, video_key=key, **{k: where[k] for k in ("chunk_index", "file_index")})
            videos[key] = (path, float(where["from_timestamp"] or 0.0))
        with reading(directory):
            data = _fill(root, data_path, chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            tasks = tuple(row.get("tasks") or ())
            files.append(EpisodeFiles(row["episode_index"], int(row["length"]), data, True, tasks, videos))
    return files


def _find_v2(root: Path, info: dict[str, Any], warnings: list[str]) -> list[EpisodeFiles]:
    """Read ``meta/episodes.jsonl`` and find each episode's files; the template may be wrong."""
    path = root / "meta" / "episodes.jsonl"
    with reading(path):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows.sort(key=lambda row: row["episode_index"])
    files = []
    misled: set[str] = set()
    mismatched = []
    for row in rows:
        number = int(row["episode_index"])
        data = _locate(root, info, "data", number, misled)
        videos = {key: (_locate(root, info, "video", number, misled, key), 0.0) for key in _cameras(info)}
        length = int(row.get("length", 0))
        if data.exists():
            with reading(data):
                stored = pq.read_metadata(data).num_rows
            if stored != length:
                mismatched.append(f"episode {number}: {stored} rows stored, meta/episodes.jsonl says {length}")
            length = stored
        files.append(EpisodeFiles(number, length, data, False, tuple(row.get("tasks") or ()), videos))
    warnings += [_misled_text(kind, info[f"{kind}_path"]) for kind in sorted(misled)]
    warnings += mismatched[:5]
    if info["codebase_version"] == "v2.0":
        warnings.append("format v2.0 stores no per-episode statistics")
    elif not (root / "meta" / "episodes_stats.jsonl").exists():
        warnings.append("meta/episodes_stats.jsonl is missing")
    return files


def _misled_text(kind: str, template: str) -> str:
    swapped = " (the episode index stands where the chunk belongs)" if "chunk-{episode_index" in template else ""
    return f"meta/info.json: {kind}_path '{template}' leads to no file{swapped}; found under the standard path"


def _locate(root: Path, info: dict[str, Any], kind: str, number: int, misled: set[str], video_key: str = "") -> Path:
    """Return the file of an episode by the template of ``info.json``, else by the standard one."""
    values = {
        "episode_chunk": number // int(info.get("chunks_size") or 1000),
        "episode_index": number,
        "video_key": video_key,
    }
    stated = _fill(root, info.get(f"{kind}_path") or STANDARD_PATHS[kind], **values)
    if stated.exists():
        return stated
    standard = _fill(root, STANDARD_PATHS[kind], **values)
    if standard.exists():
        misled.add(kind)
        return standard
    return stated


def _fill(root: Path, template: str, **values: Any) -> Path:
    """Fill a path template; it may not lead out of the data set, and widths end at two digits."""
    try:
        if not _TEMPLATE.fullmatch(template):
            raise ValueError("expected fields like {name} or {name:03d}")
        text = template.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{root}/meta/info.json: the path template '{template}' cannot be filled ({error})") from error
    path = os.path.normpath(root / text)
    if not Path(path).is_relative_to(os.path.normpath(root)):
        raise DataError(f"{root}/meta/info.json: the path template '{template}' leads out of the data set")
    return Path(path)


def feature_names(name: str, feature: dict[str, Any], warnings: list[str]) -> tuple[str, ...]:
    """Return the element names of a feature, which are a list, a mapping to a list, or a list in a list."""
    names = feature.get("names")
    if isinstance(names, dict):
        names = next(iter(names.values()), None)
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        warnings.append(f"feature '{name}': names are a list inside a list; the inner one is taken")
        names = names[0]
    if not isinstance(names, list) or not names:
        return ()
    if len(names) != feature["shape"][-1]:
        warnings.append(f"feature '{name}': {len(names)} names for {feature['shape'][-1]} elements; names left out")
        return ()
    return tuple(str(entry) for entry in names)


def inspect_info(
    root: Path, info: dict[str, Any], files: list[EpisodeFiles], frames: int, warnings: list[str]
) -> dict[str, list[int]]:
    """Compare what ``info.json`` states with what exists, report differences, and return the splits."""
    episodes, cameras = len(files), _cameras(info)
    expected = {"total_episodes": episodes, "total_frames": frames}
    if info["codebase_version"].startswith("v2"):
        size = int(info.get("chunks_size") or 1000)
        found = sum(entry.videos[key][0].exists() for entry in files for key in cameras)
        expected |= {"total_chunks": -(-episodes // size), "total_videos": found}
    for name, value in expected.items():
        if name in info and info[name] != value:
            warnings.append(f"meta/info.json: {name} is {info[name]}, but there are {value}")
    if not info.get("fps"):
        warnings.append("meta/info.json: no fps, rate_hz is 0")
    if info.get("robot_type") in (None, "", "unknown"):
        warnings.append(f"meta/info.json: robot_type is {info.get('robot_type')!r}")
    several = [entry for entry in files if len(entry.tasks) > 1]
    if several:
        warnings.append(
            f"{len(several)} episodes list several tasks (episode {several[0].number}: "
            f"{', '.join(repr(task) for task in several[0].tasks[:3])}); the first is taken"
        )
    if info["codebase_version"] != "v2.1" and "robot_rl" not in info:  # v2.1 has episodes_stats.jsonl instead
        _inspect_success(root, warnings)
    return _splits(info, episodes, warnings)


def _inspect_success(root: Path, warnings: list[str]) -> None:
    """Report a success column that never says yes, by the statistics."""
    path = root / "meta" / "stats.json"
    if not path.exists():
        warnings.append("meta/stats.json is missing")
        return
    try:
        success = json.loads(path.read_text(encoding="utf-8")).get("next.success", {})
    except (OSError, ValueError, AttributeError) as error:  # nothing is read from it that is needed
        warnings.append(f"meta/stats.json: cannot be read ({error})")
        return
    if success.get("max") in ([False], [0.0]):
        warnings.append("next.success is False in every frame: success is not told by this column")


def _splits(info: dict[str, Any], episodes: int, warnings: list[str]) -> dict[str, list[int]]:
    splits = {}
    for name, text in (info.get("splits") or {}).items():
        start, colon, stop = str(text).partition(":")
        if not (colon and start.isdigit() and stop.isdigit()):
            warnings.append(f"meta/info.json: split '{name}' is {text!r}, expected 'start:stop'; left out")
            continue
        if int(stop) > episodes:
            warnings.append(f"meta/info.json: split '{name}' is {text}, but there are {episodes} episodes")
        splits[name] = list(range(int(start), min(int(stop), episodes)))
    return splits
