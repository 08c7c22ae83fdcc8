"""Which messages make which frames: one rhythm, every value by its time, bad spans left out for a stated reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from robot_rl.core.errors import DataError
from robot_rl.data.bag import streams
from robot_rl.data.bag.first_pass import FirstPass, Track
from robot_rl.data.bag.streams import Events, Fault, Stream, clock_offset, find_events, frozen_spans, seconds
from robot_rl.data.bag.topic_map import TopicMap

Choice = Literal["drop", "keep"]
_MAX_FRAMES = 10_000_000


@dataclass(frozen=True)
class Handling:
    """What becomes of frames in spans that are flagged."""

    frozen: Choice = "drop"
    """Frames from a sensor that says the same while the robot acts."""
    dropped: Choice = "drop"
    """Frames whose message is older than the tolerance; ``keep`` takes the nearest there is."""
    jumps: Choice = "drop"
    """A clock that jumps: ``drop`` cuts the recording there, ``keep`` takes the times of receipt for that topic."""
    frozen_seconds: float = streams.FROZEN_SECONDS
    """How long (s) a sensor must say the same to be called frozen."""


@dataclass
class Conversion:
    """What came of a conversion."""

    root: str
    """Directory of the data set."""
    episodes: int = 0
    """Episodes written."""
    frames: int = 0
    """Frames written."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Frames that were left out, by reason."""
    faults: list[Fault] = field(default_factory=list)
    """Everything that was found wrong."""

    def to_json(self) -> dict[str, Any]:
        """Return what came of it, JSON-ready."""
        found = [fault.__dict__ for fault in self.faults]
        return {"episodes": self.episodes, "frames": self.frames, "left_out": dict(self.left_out), "faults": found}


@dataclass
class Piece:
    """Frames of one episode."""

    times: np.ndarray
    """(T,) times in seconds."""
    rows: dict[int, np.ndarray]
    """(T,) message of each frame, by number of the track."""


def plan_frames(reader: FirstPass, topic_map: TopicMap, handling: Handling, conversion: Conversion) -> list[Piece]:
    """Decide which messages make which frames of which episodes, and note all faults."""
    events = {name: find_events(stream) for name, stream in reader.streams.items()}
    acts = reader.groups["action"]
    observed = {track.source.topic for name in topic_map.observation for track in reader.groups[name]}
    frozen = {
        name: _frozen_while_acting(stream, acts, handling.frozen_seconds) if name in observed else []
        for name, stream in reader.streams.items()
    }
    for name, stream in reader.streams.items():
        conversion.faults += streams.describe(stream, reader.zero, frozen[name], events[name])
    for track in reader.tracks:
        conversion.faults += _not_finite(track, reader.zero)
    cuts = sorted(set(_cuts(reader, events, handling)))
    total = max(stream.order[-1] for stream in reader.streams.values()) + 1
    pieces = []
    for first, last in zip([0, *cuts], [*cuts, total], strict=True):
        pieces += _segment(reader, topic_map, handling, conversion, events, frozen, first, last)
    conversion.faults.sort(key=lambda fault: fault.start)
    return pieces


def _cuts(reader: FirstPass, events: Mapping[str, Events], handling: Handling) -> Iterator[int]:
    """Yield the numbers of the messages at which a clock has jumped."""
    if handling.jumps == "keep":
        return
    for name, found in events.items():
        if reader.streams[name].has_header or len(reader.streams) == 1:
            yield from (reader.streams[name].order[index] for index, _ in found.jumps)


def _frozen_while_acting(stream: Stream, actions: list[Track], longest: float) -> list[tuple[int, int]]:
    """Return the frozen spans during which the action changes: a robot at rest is not frozen."""

    def changes(track: Track, first: int, last: int) -> bool:
        received = np.asarray(track.stream.received)
        inside = track.values[(received >= stream.received[first]) & (received <= stream.received[last])]
        return len(inside) > 0 and bool(np.ptp(inside, axis=0).any())

    return [span for span in frozen_spans(stream, longest) if any(changes(track, *span) for track in actions)]


def _not_finite(track: Track, zero: int) -> list[Fault]:
    """Return the fault of a source with numbers that are no numbers."""
    bad = [] if track.is_image else np.flatnonzero(~track.finite)
    if not len(bad):
        return []
    start, end = (float(one) for one in seconds([track.stream.received[bad[0]], track.stream.received[bad[-1]]], zero))
    return [Fault("not_finite", track.source.topic, start, end, f"{len(bad)} messages hold NaN or infinity")]


def _segment(
    reader: FirstPass,
    topic_map: TopicMap,
    handling: Handling,
    conversion: Conversion,
    events: Mapping[str, Events],
    frozen: Mapping[str, list[tuple[int, int]]],
    first: int,
    last: int,
) -> list[Piece]:
    """Return the episodes between the messages number ``first`` and ``last``, in which no clock jumps."""
    ranges = {}
    for name, stream in reader.streams.items():
        if topic_map.episodes is not None and name == topic_map.episodes.topic:
            ranges[name] = (0, len(stream))  # marks hold until the next one
            continue
        ranges[name] = (int(np.searchsorted(stream.order, first)), int(np.searchsorted(stream.order, last)))
        if ranges[name][0] == ranges[name][1]:
            return []
    clocks = _clocks(reader, handling, events, ranges, conversion, topic_map.instants)
    grid, good, rows = _frames(reader, topic_map, handling, conversion, clocks, frozen)
    if not len(grid):
        return []
    marks = good.astype(int)
    for number, track in enumerate(reader.tracks):
        if track.name == "episodes":
            _, kinds = np.unique(track.values[rows[number]], axis=0, return_inverse=True)
            marks *= kinds.ravel() + 1
    marks = np.concatenate([[0], marks, [0]])
    edges = np.flatnonzero(np.diff(marks))
    pieces = []
    for start, stop in pairwise(edges):
        if not marks[start + 1]:
            continue
        if (stop - start) / topic_map.rate_hz < topic_map.min_seconds:
            conversion.left_out["shorter than min_seconds"] += int(stop - start)
        else:
            pieces.append(Piece(grid[start:stop], {number: one[start:stop] for number, one in rows.items()}))
    return pieces


@dataclass
class _Clock:
    """Times of a topic's messages in one segment."""

    times: np.ndarray
    """(n,) seconds, growing."""
    rows: np.ndarray
    """(n,) number of each message in its stream."""


def _clocks(
    reader: FirstPass,
    handling: Handling,
    events: Mapping[str, Events],
    ranges: Mapping[str, tuple[int, int]],
    conversion: Conversion,
    instants: str,
) -> dict[int, _Clock]:
    """Return the times of every track's messages, all by one clock: that of most headers.

    A topic that tells the ``instants`` may do so when they are over: its delay is no other clock.
    """

    def trusted(track: Track) -> str:
        jumped = handling.jumps == "keep" and events[track.source.topic].jumps
        return "receive" if jumped or not track.stream.has_header else track.source.stamp

    offsets = {}
    for name, (start, stop) in ranges.items():
        stream = reader.streams[name]
        stamps, received = (seconds(one[start:stop], reader.zero) for one in (stream.stamps, stream.received))
        offsets[name] = clock_offset(stamps, received)
    headers = [one.source.topic for one in reader.tracks if trusted(one) == "header"]
    by_header = sorted(offsets[topic] for topic in [one for one in headers if one != instants] or headers)
    common = by_header[(len(by_header) - 1) // 2] if by_header else 0.0
    found = {}
    for number, track in enumerate(reader.tracks):
        name, stream, how = track.source.topic, track.stream, trusted(track)
        start, stop = ranges[name]
        if how == "receive":
            times = seconds(stream.received[start:stop], reader.zero) - common
        else:
            times = seconds(stream.stamps[start:stop], reader.zero)
            moved = offsets[name] - common
            if how == "aligned":
                times = times + moved
            elif name != instants and abs(moved) > max(streams.JUMP_SECONDS, track.source.tolerance):
                begin, end = (float(seconds([stream.received[one]], reader.zero)[0]) for one in (start, stop - 1))
                text = f"its clock is {moved:+.3f} s from the others'; stamp: aligned, or receive, mends that"
                fault = Fault("clock_offset", name, begin, end, text)
                conversion.faults += [fault] if fault not in conversion.faults else []
        order = np.argsort(times, kind="stable")
        found[number] = _Clock(times[order], order + start)
    return found


def _frames(
    reader: FirstPass,
    topic_map: TopicMap,
    handling: Handling,
    conversion: Conversion,
    clocks: Mapping[int, _Clock],
    frozen: Mapping[str, list[tuple[int, int]]],
) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """Return the instants (T,) of a segment, which of them are good (T,), and the message of each for every track."""
    needed = [number for number, track in enumerate(reader.tracks) if track.name != "episodes"]
    begin = max(float(clocks[number].times[0]) for number in needed)
    end = min(float(clocks[number].times[-1]) for number in needed)
    slack = 0.5 if topic_map.instants else 1e-3
    count = int(np.floor((end - begin) * topic_map.rate_hz + slack)) + 1 if end >= begin else 0
    if count > _MAX_FRAMES:
        raise DataError(f"{reader.bag.path}: {count} frames, more than the {_MAX_FRAMES} that are made at once")
    grid = begin + np.arange(count) / topic_map.rate_hz
    for number, track in enumerate(reader.tracks):
        if count and track.source.topic == topic_map.instants:
            near = clocks[number].times[_places(clocks[number].times, grid, "nearest")]
            grid = np.where(np.abs(near - grid) < 0.5 / topic_map.rate_hz, near, grid)
            break
    good, rows = np.ones(count, bool), {}
    for number, track in enumerate(reader.tracks):
        clock, source = clocks[number], track.source
        places = _places(clock.times, grid, source.hold)
        # Images are decoded in one pass, so that a frame never takes an older one than the frame before it.
        rows[number] = np.maximum.accumulate(clock.rows[places]) if track.is_image else clock.rows[places]
        far = np.abs(clock.times[places] - grid) > source.tolerance + 1e-9
        if handling.dropped == "drop" and track.name != "episodes":
            _leave_out(good, far, f"nothing from {source.topic} within {source.tolerance:g} s", conversion)
        if not track.is_image:
            _leave_out(good, ~track.finite[rows[number]], f"{source.topic} is not finite", conversion)
        if handling.frozen == "drop":
            still = np.zeros(len(track.stream), bool)
            for first, last in frozen[source.topic]:
                still[first + 1 : last + 1] = True
            _leave_out(good, still[rows[number]], f"{source.topic} is frozen", conversion)
        if track.name == "episodes":
            running = (track.values != 0).any(axis=1)[rows[number]] & (grid >= clock.times[0])
            _leave_out(good, ~running, "outside of the marked episodes", conversion)
    return grid, good, rows


def _places(times: np.ndarray, grid: np.ndarray, hold: str) -> np.ndarray:
    """Return the message (T,) that stands for each instant; the first or last one where there is none."""
    after = np.searchsorted(times, grid - 1e-9, "left").clip(0, len(times) - 1)
    before = (np.searchsorted(times, grid + 1e-9, "right") - 1).clip(0, len(times) - 1)
    if hold == "next":
        return after
    if hold == "previous":
        return before
    return np.where(np.abs(times[after] - grid) < np.abs(times[before] - grid), after, before)


def _leave_out(good: np.ndarray, bad: np.ndarray, reason: str, conversion: Conversion) -> None:
    """Leave frames out and count those that were good so far."""
    new = int((good & bad).sum())
    if new:
        conversion.left_out[reason] += new
        good &= ~bad
