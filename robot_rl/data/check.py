"""Checks of a data set before it is trained on: what is missing, damaged, frozen, mistimed or out of bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robot_rl.core.errors import DataError
from robot_rl.core.spec import Spec
from robot_rl.data.dataset import Dataset
from robot_rl.data.frames import Frames, concatenate

FROZEN_SECONDS = 1.0
"""A sensor that repeats itself bit for bit for longer, while actions change, is reported."""
FROZEN_FRAMES = 20
"""The same where the control rate is not known."""
GAP = 1.5
"""Steps of time longer than this many control periods are gaps."""
RATE_TOLERANCE = 0.02
IMAGE_SAMPLES = 4
"""Images looked at per episode and camera, spread evenly, unless all are asked for."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check found."""

    level: str
    """``error``: data cannot be used as they are; ``warning``: they may mislead; ``note``: worth knowing."""
    check: str
    """Name of the check."""
    text: str
    """One sentence."""


def check_dataset(
    dataset: Dataset, images: str = "sample", advance: Callable[[int], None] = lambda _: None
) -> list[Finding]:
    """Run every check.

    Args:
        dataset: the data set.
        images: ``"none"``, ``"sample"`` (a few per episode) or ``"all"``.
        advance: called with the number of episodes done.

    Returns:
        The findings, errors first.
    """
    findings = [Finding("warning", "format", text) for text in dataset.warnings]
    inspect = getattr(dataset, "inspect_videos", None)
    if inspect is not None:
        findings += [Finding(level, "video", text) for level, text in inspect()]
    frames, numbers, damaged = _load(dataset)
    findings += damaged
    for position, episode in enumerate(numbers):
        if images != "none":
            findings += check_images(dataset, episode, int(frames.episode_lengths[position]), images == "all")
        advance(1)
    advance(dataset.num_episodes - len(numbers))
    if numbers:
        findings += check_frames(frames, numbers)
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(dict.fromkeys(findings), key=lambda finding: order[finding.level])


def _load(dataset: Dataset) -> tuple[Frames, list[int], list[Finding]]:
    """Return what can be read, the numbers of those episodes, and a finding for each of the others."""
    tried = _try(dataset, range(dataset.num_episodes))
    if isinstance(tried, Frames):
        return tried, list(range(dataset.num_episodes)), []
    parts = {episode: _try(dataset, [episode]) for episode in range(dataset.num_episodes)}
    sound = {episode: part for episode, part in parts.items() if isinstance(part, Frames)}
    damaged = [part for part in parts.values() if isinstance(part, Finding)]
    empty = Frames({}, np.zeros((0, 0), np.float32), np.zeros(0, np.int64), Spec())
    return concatenate(list(sound.values())) if sound else empty, list(sound), damaged


def _try(dataset: Dataset, episodes: Sequence[int]) -> Frames | Finding:
    try:
        return dataset.load(episodes=episodes)
    except DataError as error:
        return Finding("error", "file", str(error))


def check_frames(frames: Frames, numbers: Sequence[int] | None = None) -> list[Finding]:
    """Run the checks that need no files.

    Args:
        frames: the data.
        numbers: how the episodes are called in messages; 0, 1, … by default.
    """
    numbers = range(frames.num_episodes) if numbers is None else numbers
    checks = (_finite, _bounds, _constant, _lengths, _times, _endings, _frozen, _repeated)
    return [finding for check in checks for finding in check(frames, numbers)]


def _arrays(frames: Frames) -> dict[str, tuple[np.ndarray, Any]]:
    """Return the low-dimensional arrays (F, n), flattened, with their specs."""
    found = {key: (value, frames.spec.observation[key]) for key, value in frames.observation.items()}
    found = {key: pair for key, pair in found.items() if not pair[1].is_image}
    found["action"] = (frames.action, frames.spec.action)
    return {key: (value.reshape(len(value), -1), array) for key, (value, array) in found.items()}


def _finite(frames: Frames, numbers: Sequence[int]) -> Iterator[Finding]:
    values = {f"'{key}'": value for key, (value, _) in _arrays(frames).items()}
    values |= {f"extra '{key}'": value for key, value in frames.extras.items() if value.dtype.kind == "f"}
    for name, value in values.items():
        bad = ~np.isfinite(value.reshape(len(value), -1)).all(axis=1)
        if bad.any():
            where = _where(frames, int(np.argmax(bad)), numbers)
            yield Finding("error", "finite", f"{name} is not finite in {bad.sum()} frames, first in {where}")


def _bounds(frames: Frames, numbers: Sequence[int]) -> Iterator[Finding]:
    for key, (value, array) in _arrays(frames).items():
        if array.low is None and array.high is None:
            continue
        low, high = (bound.reshape(-1) for bound in array.bounds())
        margin = 1e-6 * np.maximum(1.0, np.abs(np.where(np.isfinite(high - low), high - low, 0.0)))
        outside = (value < low - margin) | (value > high + margin)
        if outside.any():
            where = _where(frames, int(np.argmax(outside.any(axis=1))), numbers)
            yield Finding(
                "warning",
                "bounds",
                f"'{key}': {100 * outside.mean():.1f} % of the entries lie outside the spec's bounds "
                f"(elements {_short(np.flatnonzero(outside.any(axis=0)))}), first in {where}",
            )


def _constant(frames: Frames, numbers: Sequence[int]) -> Iterator[Finding]:
    if frames.num_frames < 2:
        return
    for key, (value, array) in _arrays(frames).items():
        constant = np.flatnonzero(np.ptp(value, axis=0) == 0)
        if len(constant) == 0:
            continue
        names = [array.names[i] for i in constant] if len(array.names) == value.shape[1] else list(constant)
        text = f"{len(constant)} of {value.shape[1]} elements of '{key}' are constant: {_short(names)}"
        yield Finding("warning", "constant", text)


def _lengths(frames: Frames, numbers: Sequence[int]) -> Iterator[Finding]:
    lengths = frames.episode_lengths
    median = float(np.median(lengths))
    for test, level, text in (
        (lengths < max(2.0, 0.2 * median), "warning", "much shorter"),
        (lengths > 5 * median, "note", "much longer"),
    ):
        odd = np.flatnonzero(test)
        if len(odd):
            names = [f"{numbers[int(i)]} ({lengths[i]} frames)" for i in odd]
            yield Finding(level, "length", f"episodes {text} than the median of {median:g} frames: {_short(names)}")


def _times(frames: Frames, numbers: Sequence[int]) -> Iterator[Finding]:
    """Compare time stamps with the control rate: ``stamp`` is measured, ``timestamp`` is what the format states."""
    for name in ("timestamp", "stamp"):
        if name not in frames.extras:
            continue
        time = np.asarray(frames.extras[name], np.float64).reshape(-1)
        inner = np.ones(frames.num_frames, bool)
        inner[frames.episode_starts] = False
        rows = np.flatnonzero(inner)
        steps = time[rows] - time[rows - 1]
        if len(steps) == 0 or not np.isfinite(steps).all():
            continue
        back = rows[steps <= 0]
        if len(back):
            where = _where(frames, int(back[0]), numbers)
            yield Finding("error", "time", f"{name} does not grow in {len(back)} frames, first in {where}")
        rate, period = frames.spec.rate_hz, float(np.median(steps))
        if rate and period > 0 and abs(1 / period - rate) > RATE_TOLERANCE * rate:
            yield Finding("warning", "rate", f"{name} runs at {1 / period:.4g} Hz, the spec says {rate:g} Hz")
        gaps = rows[steps > GAP * period] if period > 0 else rows[:0]
        if len(gaps):
            where = _where(frames, int(gaps[0]), numbers)
            text = f"{name} has {len(gaps)} gaps, the longest {steps.max():.3g} s at a period of {period:.3g} s"
            yield Finding("warning", "gap", f"{text}, first before {where}")
        late = time[frames.episode_starts]
        if name == "timestamp" and (np.abs(late) > 1e-6).any():
            yield Finding("note", "time", f"{name} does not start at 0 but at {late[np.argmax(np.abs(late))]:.3g} s")


def _endings(frames: Frames, numbers: Sequence[int]) -> Iterator[Finding]:
    last = frames.episode_ends - 1
    if "done" in frames.extras:
        done = np.asarray(frames.extras["done"]).reshape(-1) > 0
        missing = int((~done[last]).sum())
        done[last] = False
        early = int(sum(done[frames.episode(i)].any() for i in range(frames.num_episodes)))
        if missing:
            yield Finding("warning", "done", f"done is not set at the end of {missing} of {len(last)} episodes")
        if early:
            yield Finding("warning", "done", f"done is set before the last frame in {early} of {len(last)} episodes")
    if "success" in frames.extras and not np.any(frames.extras["success"]):
        yield Finding("note", "success", f"success is False throughout all {len(last)} episodes")


def _frozen(frames: Frames, numbers: Sequence[int]) -> Iterator[Finding]:
    """Report observations that repeat bit for bit although actions change and the sensor moves in that episode."""
    threshold = max(3, round(FROZEN_SECONDS * frames.spec.rate_hz)) if frames.spec.rate_hz else FROZEN_FRAMES
    keys = [key for key in _arrays(frames) if key != "action"]
    arrays = {key: _arrays(frames)[key][0] for key in keys}
    groups = {f"'{key}'": arrays[key] for key in keys} if len(keys) > 1 else {}
    if keys:
        groups["every observation"] = np.concatenate([arrays[key] for key in keys], axis=1)
    for name, value in groups.items():
        runs = []
        for i in range(frames.num_episodes):
            part = frames.episode(i)
            length, start = _longest_repeat(value[part], frames.action[part])
            if length >= threshold and np.ptp(value[part], axis=0).any():
                runs.append((length, numbers[i], start))
        if runs:
            length, episode, start = max(runs)
            level = "warning" if name == "every observation" else "note"
            yield Finding(
                level,
                "frozen",
                f"{name} repeats itself while actions change in {len(runs)} episodes, "
                f"longest {length} frames in episode {episode} from frame {start}",
            )


def _repeated(frames: Frames, numbers: Sequence[int]) -> Iterator[Finding]:
    """Report episodes whose actions are those of an earlier one, bit for bit."""
    first: dict[bytes, int] = {}
    copies = []
    for i in range(frames.num_episodes):
        original = first.setdefault(frames.action[frames.episode(i)].tobytes(), numbers[i])
        if original != numbers[i]:
            copies.append(f"{numbers[i]} (as {original})")
    if copies:
        text = f"{len(copies)} of {frames.num_episodes} episodes repeat the actions of an earlier one bit for bit"
        yield Finding("warning", "repeated", f"{text}: {_short(copies)}")


def _longest_repeat(value: np.ndarray, action: np.ndarray) -> tuple[int, int]:
    """Return length and start of the longest run of equal rows (T, n) during which the actions (T, A) change."""
    same = (value[1:] == value[:-1]).all(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    best = (0, 0)
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop - start > best[0] and np.ptp(action[start : stop + 1], axis=0).any():
            best = (int(stop - start), int(start))
    return best


def check_images(dataset: Dataset, episode: int, length: int, every: bool) -> list[Finding]:
    """Decode images of one episode of ``length`` frames and report what cannot be decoded or does not change."""
    findings = []
    for key, array in dataset.spec.observation.items():
        if not array.is_image:
            continue
        try:
            if every:
                images = dataset.images(key, episode)
            else:
                rows = np.unique(np.linspace(0, length - 1, IMAGE_SAMPLES).astype(int))
                images = np.stack([dataset.image(key, episode, int(row)) for row in rows])
        except DataError as error:
            findings.append(Finding("error", "image", f"episode {episode}, '{key}': {error}"))
            continue
        findings += _still(images, key, episode, every, dataset.spec.rate_hz)
    return findings


def _still(images: np.ndarray, key: str, episode: int, every: bool, rate_hz: float) -> list[Finding]:
    """Report images (T, H, W, 3) that are black or stand still; coding noise of half a grey level is ignored."""
    if images.max() < 8:
        return [Finding("warning", "image", f"episode {episode}, '{key}': the images looked at are black")]
    changes = [float(np.abs(images[i].astype(np.int16) - images[i - 1]).max()) > 4.0 for i in range(1, len(images))]
    if changes and not any(changes):
        return [Finding("warning", "image", f"episode {episode}, '{key}': the camera shows one picture throughout")]
    if not every:
        return []
    edges = np.flatnonzero(np.concatenate([[True], changes, [True]]))
    run, start = int(np.diff(edges).max()), int(edges[np.argmax(np.diff(edges))])
    if run < (max(3.0, FROZEN_SECONDS * rate_hz) if rate_hz else FROZEN_FRAMES):
        return []
    return [Finding("note", "image", f"episode {episode}, '{key}': the same picture for {run} frames from {start}")]


def _where(frames: Frames, row: int, numbers: Sequence[int]) -> str:
    episode = int(np.searchsorted(frames.episode_ends, row, side="right"))
    return f"episode {numbers[episode]}, frame {row - int(frames.episode_starts[episode])}"


def _short(items: Sequence[Any] | np.ndarray) -> str:
    text = ", ".join(str(item) for item in items[:8])
    return text if len(items) <= 8 else f"{text}, …"
