"""Look at, check, import and compact data sets: demonstrations, recordings, in any known format.

Formats: LeRobot v2.0, v2.1 and v3.0, Diffusion Policy's zarr replay buffers, HDF5 of robomimic and robosuite, the
Adroit pickles, and whatever a plug-in adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from robot_rl.core.errors import ConfigError
from robot_rl.core.spec import ArraySpec
from robot_rl.data.dataset import Dataset, open_dataset
from robot_rl.train.progress import progress, say


@dataclass(frozen=True)
class Info:
    """Show what a data set holds: episodes, rate, arrays with shape, names, unit and range."""

    path: Annotated[Path, tyro.conf.Positional]
    """Directory or file of the data set."""
    format: str | None = None
    """Name of the format; found out from the path by default."""


@dataclass(frozen=True)
class Check:
    """Look for what spoils training: gaps, wrong rates, NaN, bounds, frozen sensors, missing video.

    The exit status is 1 if there are errors.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """Directory or file of the data set."""
    format: str | None = None
    """Name of the format; found out from the path by default."""
    images: Literal["none", "sample", "all"] = "sample"
    """Which images to decode: none, a few per episode, or all."""


@dataclass(frozen=True)
class Import:
    """Convert any readable data set to the native store (LeRobot v3.0)."""

    source: Annotated[Path, tyro.conf.Positional]
    """Data set to read."""
    target: Annotated[Path, tyro.conf.Positional]
    """Directory to write."""
    format: str | None = None
    """Name of the source's format; found out from the path by default."""
    keys: tuple[str, ...] = ()
    """Observations to keep under their own names; by default all that are not renamed."""
    rename: tuple[str, ...] = ()
    """Pairs old=new; old may be sliced along its last axis: keypoint=environment_state state[0:2]=agent_pos."""
    flatten: bool = False
    """Turn observations of several axes (images excepted) into vectors."""
    rate_hz: float | None = None
    """Control rate in Hz; needed where the source states none."""
    task: str | None = None
    """Instruction of every episode; by default the source's."""
    episodes: tuple[int, ...] = ()
    """Numbers of the episodes to import; all by default."""
    append: bool = False
    """Add to a data set that exists and has the same spec."""
    compact: bool = True
    """Merge the files afterwards."""


@dataclass(frozen=True)
class Compact:
    """Merge the small files of a recording into few large ones, without encoding videos again."""

    path: Annotated[Path, tyro.conf.Positional]
    """Directory of the data set."""
    data_megabytes: float = 100
    """Size from which on a new parquet file is begun."""
    video_megabytes: float = 500
    """Size from which on a new video file is begun."""


Config = (
    Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Compact, tyro.conf.subcommand("compact")]
)


def run(config: Info | Check | Import | Compact) -> int:
    """Run one of the sub-commands and return its exit status."""
    actions: dict[type, Any] = {Info: _info, Check: _check, Import: _import, Compact: _compact}
    return int(actions[type(config)](config))


def _info(config: Info) -> int:
    dataset = open_dataset(config.path, config.format)
    _describe(dataset)
    for warning in dataset.warnings:
        say(f"warning: {warning}", style="yellow")
    return 0


def _describe(dataset: Dataset) -> None:
    if dataset.num_episodes == 0:
        say(f"{dataset.root}: no episode yet")
        return
    frames = dataset.load()
    lengths, rate = frames.episode_lengths, dataset.spec.rate_hz
    version = getattr(dataset, "version", "")
    say(f"{dataset.root}", style="bold")
    say(f"format      {dataset.format} {version}".rstrip())
    spread = f"{lengths.min()} to {lengths.max()} frames, median {np.median(lengths):g}"
    say(f"episodes    {dataset.num_episodes} of {spread}")
    duration = f", {dataset.num_frames / rate / 60:.1f} min at {rate:g} Hz" if rate else ", rate not known"
    say(f"frames      {dataset.num_frames}{duration}")
    tasks = list(dict.fromkeys(getattr(dataset, "tasks", ())))
    if any(tasks):
        say(f"tasks       {'; '.join(tasks[:5])}{f' … ({len(tasks)} in all)' if len(tasks) > 5 else ''}")
    for key, array in dataset.spec.observation.items():
        say(f"observation {_line(key, array, frames.observation.get(key))}")
    say(f"action      {_line('', dataset.spec.action, frames.action)}")
    for name, value in frames.extras.items():
        say(f"extra       {name} {tuple(value.shape[1:])} {value.dtype}{_range(value)}")
    success = frames.extras.get("success")
    if success is not None and np.any(success):
        reached = sum(bool(np.any(success[frames.episode(i)])) for i in range(frames.num_episodes))
        say(f"success     {reached} of {frames.num_episodes} episodes")


def _line(key: str, array: ArraySpec, values: np.ndarray | None) -> str:
    unit = f" {array.unit}" if array.unit else ""
    frame = f" in {array.frame}" if array.frame else ""
    names = f" [{', '.join(array.names[:6])}{', …' if len(array.names) > 6 else ''}]" if array.names else ""
    kind = " image" if array.is_image else f" {array.dtype}"
    return f"{key} {array.shape}{kind}{unit}{frame}{_range(values)}{names}".strip()


def _range(values: np.ndarray | None) -> str:
    if values is None or values.size == 0:
        return ""
    return f", {float(np.min(values)):.4g} to {float(np.max(values)):.4g}"


def _check(config: Check) -> int:
    from robot_rl.data.check import check_dataset

    dataset = open_dataset(config.path, config.format)
    with progress("check", dataset.num_episodes, "episode") as bar:
        findings = check_dataset(dataset, config.images, bar.advance)
    colours = {"error": "red", "warning": "yellow", "note": "dim"}
    for finding in findings:
        say(f"{finding.level:<8} {finding.check:<9} {finding.text}", style=colours[finding.level])
    counts = {level: sum(finding.level == level for finding in findings) for level in colours}
    summary = ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items())
    say(f"{dataset.num_episodes} episodes, {dataset.num_frames} frames: {summary}")
    return 1 if counts["error"] else 0


def _import(config: Import) -> int:
    from robot_rl.data.convert import import_dataset

    source = open_dataset(config.source, config.format)
    for warning in source.warnings:
        say(f"warning: {warning}", style="yellow")
    total = len(config.episodes) or source.num_episodes
    with progress("import", total, "episode") as bar:
        import_dataset(
            source,
            config.target,
            keys=config.keys or None,
            rename=_pairs(config.rename),
            flatten=config.flatten,
            rate_hz=config.rate_hz,
            task=config.task,
            episodes=config.episodes or None,
            append=config.append,
            advance=bar.advance,
        )
    if config.compact:
        _compact(Compact(config.target))
    _describe(open_dataset(config.target))
    return 0


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            raise ConfigError(f"--rename '{text}' is not of the form old=new")
        if old in pairs:
            raise ConfigError(f"--rename names '{old}' twice")
        pairs[old] = new
    return pairs


def _compact(config: Compact) -> int:
    from robot_rl.data.compact import compact, count_files

    dataset: Any = open_dataset(config.path, "lerobot")
    with progress("compact", count_files(dataset), "file") as bar:
        done = compact(config.path, config.data_megabytes, config.video_megabytes, bar.advance)
    megabytes = f"{done.bytes_before / 1e6:.1f} to {done.bytes_after / 1e6:.1f} MB"
    say(f"{config.path}: {done.files_before} files became {done.files_after}, {megabytes}")
    return 0
