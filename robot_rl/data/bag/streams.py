"""The messages of one topic in time, and what is wrong with them: frozen sensors, clock jumps, dropped messages.

Two clocks tell the time of a message: the sender's, in its header, and the recorder's, when it was received. A message
can be late, so that received minus sent is never less than the distance of the clocks; that least distance is compared
before and after a suspicious instant. It tells a clock that jumped from messages that were lost or delayed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

JUMP_SECONDS = 0.1
"""A clock that moves by more than this against the recorder's has jumped."""
FROZEN_SECONDS = 0.5
"""A sensor that says the same with fresh stamps for longer is frozen."""
_WINDOW = 1.0
"""Seconds of received messages whose least delay tells the distance of two clocks."""
_SMALLEST = 8
"""Messages that a topic needs before a rhythm can be told."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with a topic."""

    kind: str
    """``frozen``, ``clock_jump``, ``clock_offset``, ``repeated_stamp``, ``dropped``, ``paused``, ``not_finite`` or
    ``not_decodable``."""
    topic: str
    """The topic."""
    start: float
    """When it began, in seconds since the recording's first message was received."""
    end: float
    """When it was over."""
    text: str
    """What happened, for people."""

    def __str__(self) -> str:
        return f"{self.start:9.3f} s  {self.kind:<14} {self.topic}: {self.text}"


@dataclass
class Stream:
    """What the first pass over a recording keeps of a topic; one entry per message."""

    topic: str
    """Its name."""
    stamps: list[int] = field(default_factory=list)
    """Time in the header (ns), or of receipt where there is none."""
    received: list[int] = field(default_factory=list)
    """When each was received (ns)."""
    sequences: list[int] = field(default_factory=list)
    """The publisher's number for each; 0 where unknown."""
    same: list[bool] = field(default_factory=list)
    """Whether each says the same as the one before it."""
    order: list[int] = field(default_factory=list)
    """Number of each among all messages of the recording."""
    has_header: bool = True
    """Whether ``stamps`` are those of headers."""

    def add(self, order: int, stamp: int | None, received: int, sequence: int, same: bool) -> None:
        """Add a message."""
        self.has_header = stamp is not None
        self.stamps.append(received if stamp is None else stamp)
        self.received.append(received)
        self.sequences.append(sequence)
        self.same.append(same)
        self.order.append(order)

    def __len__(self) -> int:
        return len(self.stamps)


def seconds(times: list[int], zero: int) -> np.ndarray:
    """Return times in ns as seconds (n,) since ``zero``."""
    return (np.asarray(times, np.int64) - zero) * 1e-9


def clock_offset(stamps: np.ndarray, received: np.ndarray) -> float:
    """Return the distance of two clocks (s): the least of received minus stamp."""
    return float((received - stamps).min())


@dataclass
class Events:
    """Where a stream is not even: indices of the messages after the event."""

    jumps: list[tuple[int, float]] = field(default_factory=list)
    """(index, seconds by which the sender's clock moved)."""
    gaps: list[tuple[int, int]] = field(default_factory=list)
    """(index, messages that are missing before it; 0 where the publisher sent none)."""
    repeats: list[int] = field(default_factory=list)
    """Messages whose stamp is that of the one before."""


def find_events(stream: Stream) -> Events:
    """Find jumps of the clock, missing messages and repeated stamps."""
    events = Events()
    if len(stream) < 2:
        return events
    zero = stream.received[0]
    stamps, received = seconds(stream.stamps, zero), seconds(stream.received, zero)
    sequences = np.asarray(stream.sequences, np.int64)
    steps = np.diff(stamps)
    period, limit = _rhythm(steps)
    numbered = _numbered(sequences)
    lost = np.where(numbered, np.diff(sequences) - 1, 0)
    # A recorder's own clock can be set back, too; it shows in topics whose stamps go on.
    back = np.flatnonzero((steps < 0) | (np.diff(received) < -JUMP_SECONDS))
    for i in sorted({*back.tolist(), *np.flatnonzero(steps > limit).tolist(), *np.flatnonzero(lost > 0).tolist()}):
        moved = _shift(stamps, received, i + 1)
        if abs(moved) > JUMP_SECONDS and (steps[i] > limit or i in back):
            events.jumps.append((i + 1, moved))
        elif steps[i] < 0:
            events.jumps.append((i + 1, float(steps[i])))
        elif lost[i] > 0:
            events.gaps.append((i + 1, int(lost[i])))
        elif period > 0:
            missing = 0 if numbered[i] else max(1, round(float(steps[i]) / period) - 1)
            events.gaps.append((i + 1, missing))
    if stream.has_header:
        events.repeats = (np.flatnonzero(steps == 0) + 1).tolist()
    return events


def _numbered(sequences: np.ndarray) -> np.ndarray:
    """Return which steps (n - 1,) go from one publisher's number to another; none if most of them are not 1."""
    known = (sequences[1:] > 0) & (sequences[:-1] > 0)
    steps = np.diff(sequences)[known]
    return known if len(steps) and np.mean(steps == 1) > 0.5 else np.zeros_like(known)


def _rhythm(steps: np.ndarray) -> tuple[float, float]:
    """Return the period and the longest step that is no gap; (0, inf) where there is no rhythm to speak of."""
    forward = steps[steps > 0]
    if len(forward) < _SMALLEST:
        return 0.0, np.inf
    low, period, high = np.percentile(forward, [10, 50, 90])
    if high - low > 1.5 * period:
        return 0.0, np.inf
    return float(period), float(1.5 * period + 2 * (high - period))


def _shift(stamps: np.ndarray, received: np.ndarray, index: int) -> float:
    """Return by how much the sender's clock moved against the recorder's at ``index`` (s, forward is positive)."""
    delay = received - stamps
    after = delay[index:][received[index:] <= received[index] + _WINDOW]
    before = delay[:index][received[:index] >= received[index - 1] - _WINDOW]
    return float(before.min() - after.min())


def frozen_spans(stream: Stream, longest: float = FROZEN_SECONDS) -> list[tuple[int, int]]:
    """Return (first, last) message of each span in which a topic says the same for longer than ``longest`` (s).

    The stamps must go on meanwhile: messages that repeat their stamp are another fault. A topic that never changes is
    no sensor that froze.
    """
    same = np.asarray(stream.same, bool)
    if len(same) < 3 or same[1:].all():
        return []
    stamps = seconds(stream.stamps, stream.stamps[0])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    found = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        first, last = int(start) - 1, int(stop) - 1
        if first >= 0 and stamps[last] - stamps[first] > longest:
            found.append((first, last))
    return found


def describe(stream: Stream, zero: int, frozen: list[tuple[int, int]], events: Events) -> list[Fault]:
    """Return the faults of a stream in order of time.

    Args:
        stream: the topic.
        zero: receive time of the recording's first message (ns).
        frozen: spans to report as frozen.
        events: of `find_events`.
    """
    received = seconds(stream.received, zero)
    stamps = seconds(stream.stamps, zero)

    def fault(kind: str, first: int, last: int, text: str) -> Fault:
        return Fault(kind, stream.topic, float(received[first]), float(received[last]), text)

    found = [
        fault("frozen", a, b, f"{b - a + 1} messages say the same for {stamps[b] - stamps[a]:.2f} s, with fresh stamps")
        for a, b in frozen
    ]
    for index, moved in events.jumps:
        how = "forward" if moved > 0 else "back"
        found.append(fault("clock_jump", index - 1, index, f"the clock goes {how} by {abs(moved):.3f} s"))
    for index, count in events.gaps:
        gap = stamps[index] - stamps[index - 1]
        text = f"{count} messages are missing in {gap:.3f} s" if count else f"nothing was sent for {gap:.3f} s"
        found.append(fault("dropped" if count else "paused", index - 1, index, text))
    for first, last in _runs(events.repeats):
        text = f"{last - first + 1} messages repeat the stamp before them"
        found.append(fault("repeated_stamp", first - 1, last, text))
    return sorted(found, key=lambda one: one.start)


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Return (first, last) of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs
