"""Importing any readable data set into the native store, with observations chosen, renamed, sliced and flattened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from robot_rl.core.errors import ConfigError, DataError, UnknownNameError
from robot_rl.core.spec import ArraySpec
from robot_rl.data.dataset import Dataset
from robot_rl.data.frames import Frames, parse_source
from robot_rl.data.store import EpisodeWriter, standard_extras

REWRITTEN = ("timestamp", "task_index")
"""Extras that the writer makes itself."""


def observation_sources(
    dataset: Dataset, keys: Sequence[str] | None, rename: Mapping[str, str], flatten: bool
) -> dict[str, str]:
    """Return for each new observation where it comes from, for `Frames.remap`.

    Args:
        dataset: the source.
        keys: its observations to keep; all by default.
        rename: new names by source, such as ``{"state[0:2]": "agent_pos"}``; a renamed observation does not also
            keep its old name, unless ``keys`` lists it.
        flatten: whether arrays of several axes become vectors.

    Raises:
        UnknownNameError: an observation does not exist.
        ConfigError: two observations would have the same name, or none is left.
    """
    known = dataset.spec.observation
    taken = {parse_source(source)[0] for source in rename}
    for key in [*taken, *(keys or ())]:
        if key not in known:
            raise UnknownNameError("observation", key, known)
    kept = [key for key in known if key not in taken] if keys is None else list(keys)
    sources = {key: key for key in kept}
    for source, name in rename.items():
        if name in sources:
            raise ConfigError(f"two observations would be called '{name}': {sources[name]} and {source}")
        sources[name] = source
    if not sources:
        raise ConfigError(f"no observation is left; the source has: {', '.join(known)}")
    return sources


def import_dataset(
    source: Dataset,
    target: str | Path,
    *,
    keys: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    flatten: bool = False,
    rate_hz: float | None = None,
    task: str | None = None,
    episodes: Sequence[int] | None = None,
    append: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> int:
    """Write ``source`` to the native store at ``target`` and return the number of episodes written.

    Extras come along under their own names. Time stamps that do not follow the control rate are kept as the extra
    ``stamp``, for the store numbers its own ``timestamp`` evenly.

    Args:
        source: what `open_dataset` returned.
        target: directory to create, or to continue if ``append``.
        keys: observations to keep; all by default, images included.
        rename: new names by source, with slices: ``{"keypoint": "environment_state", "state[0:2]": "agent_pos"}``.
        flatten: whether arrays of several axes become vectors (images stay).
        rate_hz: control rate; needed where the source states none.
        task: instruction, where the source has none or another is wanted.
        episodes: which episodes; all by default.
        append: whether ``target`` is continued; it must have the same spec.
        advance: called with the number of episodes done.
    """
    if not (rate_hz or source.spec.rate_hz):
        raise DataError(f"{source.root}: states no control rate; give it (--rate-hz)")
    sources = observation_sources(source, keys, rename or {}, flatten)
    needed = tuple(dict.fromkeys(parse_source(part)[0] for part in sources.values()))
    chosen = list(range(source.num_episodes)) if episodes is None else list(episodes)
    if not chosen:
        raise DataError(f"{source.root}: there is no episode to import")
    rate = rate_hz or source.spec.rate_hz
    # Whether the times must be kept is decided once for all episodes, so that all have the same columns.
    keep_times = not _even(source.load([]), rate)
    tasks = list(getattr(source, "tasks", ()))
    writer: EpisodeWriter | None = None
    try:
        for number in chosen:
            frames = source.load(needed, [number]).remap(sources, flatten)
            extras = _extras(frames, keep_times)
            if writer is None:
                spec = replace(frames.spec, rate_hz=rate)
                declared = _declared(frames, extras)
                judged = "success" in extras
                writer = EpisodeWriter(target, spec, extras=declared, append=append, with_success=judged)
            for row in range(frames.num_frames):
                observation = {key: value[row] for key, value in frames.observation.items()}
                writer.add(observation, frames.action[row], **{name: value[row] for name, value in extras.items()})
            default = tasks[number] if tasks else ""
            writer.save_episode(task=default if task is None else task)
            advance(1)
    finally:
        if writer is not None:
            writer.close()
    return len(chosen)


def _even(frames: Frames, rate_hz: float) -> bool:
    """Whether the time stamps follow from the control rate; where there are none, nothing is lost."""
    if "timestamp" not in frames.extras:
        return True
    expected = np.concatenate([np.arange(length) / rate_hz for length in frames.episode_lengths])
    return bool(np.abs(np.asarray(frames.extras["timestamp"]).reshape(-1) - expected).max() < 0.01 / rate_hz)


def _extras(frames: Frames, keep_times: bool) -> dict[str, np.ndarray]:
    """Return the extras to write; flags become bool."""
    extras = {name: value for name, value in frames.extras.items() if name not in REWRITTEN}
    for name in ("done", "success"):
        if name in extras:
            extras[name] = np.asarray(extras[name]) > 0
    if keep_times and "stamp" not in extras:
        extras["stamp"] = np.asarray(frames.extras["timestamp"], np.float64)
    return extras


def _declared(frames: Frames, extras: Mapping[str, np.ndarray]) -> dict[str, ArraySpec]:
    known = standard_extras(frames.spec)
    return {
        name: known[name]
        if name in known
        else ArraySpec(tuple(value.shape[1:]) or (1,), str(value.dtype.newbyteorder("=")))
        for name, value in extras.items()
    }
