"""Live progress: one bar per activity with its rate, the time left and the values worth watching.

Bars nest: a bar opened while another is open appears below it. Where the output is not a terminal, plain lines appear
every few seconds instead. Progress goes to standard error; what a command has found goes to standard output by `say`.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

LINE_INTERVAL = 5.0
"""Seconds between plain lines."""
_DRAW_INTERVAL = 0.1
_SECONDS = "s"
_RATE_WINDOW = 20.0


class Activity:
    """Counts what is done of ``total`` and knows its rate; `progress` makes and shows it."""

    def __init__(self, stage: str, total: int, unit: str, done: int, now: Callable[[], float] = time.monotonic) -> None:
        self.stage, self.total, self.done = stage, total, done
        self.unit = _SECONDS if unit == "second" else unit
        self.shown: dict[str, Any] = {}
        self._now = now
        self._start = now()
        self._first = done
        self._marks: deque[tuple[float, int]] = deque([(self._start, done)])
        self._draw: Callable[[], None] = lambda: None
        self._next_draw = 0.0

    def advance(self, n: int = 1, **shown_values: Any) -> None:
        """Count ``n`` more as done and show ``shown_values`` beside the bar; cheap enough for an inner loop."""
        self.done += n
        self.shown.update(shown_values)
        now = self._now()
        if now >= self._next_draw:
            self._next_draw = now + _DRAW_INTERVAL
            self._marks.append((now, self.done))
            while now - self._marks[0][0] > _RATE_WINDOW and len(self._marks) > 2:
                self._marks.popleft()
            self._draw()

    @property
    def elapsed(self) -> float:
        """Seconds since the activity began."""
        return self._now() - self._start

    @property
    def rate(self) -> float:
        """Units per second over the last seconds; 0 before anything was done."""
        start, before = self._marks[0]
        seconds = self._now() - start
        return (self.done - before) / seconds if seconds > 0 else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds left at the present rate; None while unknown."""
        rate = self.rate
        return max(0, self.total - self.done) / rate if rate > 0 else None

    def values(self) -> str:
        """The shown values as ``"loss 0.012 · success 0.93"``."""
        return " · ".join(f"{key} {_number(value)}" for key, value in self.shown.items())

    def line(self) -> str:
        """The state as one plain line."""
        left = "?" if self.remaining is None else duration(self.remaining)
        share = f"{100 * self.done / max(self.total, 1):3.0f}%"
        parts = [f"{self.stage}: {share} {self._count()}", _rate(self.rate, self.unit), f"{left} left", self.values()]
        return ", ".join(part for part in parts if part)

    def summary(self) -> str:
        """The finished activity as one plain line, with its mean rate."""
        rate = (self.done - self._first) / max(self.elapsed, 1e-9)
        took = f"{self.stage}: {self._count()} in {duration(self.elapsed)}"
        return ", ".join(part for part in (took, _rate(rate, self.unit), self.values()) if part)

    def _count(self) -> str:
        return f"{self.done}/{self.total} {self.unit if self.unit == _SECONDS else self.unit + 's'}"


@contextmanager
def progress(stage: str, total: int, unit: str = "step", done: int = 0) -> Iterator[Activity]:
    """Show the progress of ``stage`` while the block runs; call ``advance`` on what it yields.

    Args:
        stage: What is going on, in a word or two.
        total: Units in all.
        unit: Name of one unit, in the singular; ``"s"`` for an activity that is measured in time.
        done: Units finished earlier, by the run that is being resumed.
    """
    activity = Activity(stage, total, unit, done)
    if _screen.console.is_terminal:
        with _screen.bar(activity):
            yield activity
    else:
        with _lines(activity):
            yield activity


def say(text: str = "", *, style: str | None = None) -> None:
    """Print one line of a command's result: to standard output, and above the bars where some are live."""
    if _screen.live is not None:
        _screen.live.console.print(text, style=style, markup=False, highlight=False)
    else:
        Console(file=sys.stdout, soft_wrap=True).print(text, style=style, markup=False, highlight=False)


def duration(seconds: float) -> str:
    """Return ``"45s"``, ``"3:20"`` or ``"1:02:00"``."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minute:02d}:{second:02d}"
    return f"{minute}:{second:02d}" if minutes else f"{whole}s"


class _Screen:
    """The one live block of this process: rich allows a single one, so nested bars share it."""

    def __init__(self) -> None:
        self.live: RichProgress | None = None
        self._open = 0

    @property
    def console(self) -> Console:
        return Console(stderr=True)

    @contextmanager
    def bar(self, activity: Activity) -> Iterator[None]:
        if self.live is None:
            self.live = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=16),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[rate]}", style="cyan"),
                TextColumn("{task.fields[left]}", style="green"),
                # On a narrow terminal these give way, and nothing else.
                TextColumn("{task.fields[values]}", style="dim", table_column=Column(ratio=1, no_wrap=True)),
                console=self.console,
                expand=True,
                refresh_per_second=8,
            )
            self.live.start()
        live = self.live
        task = live.add_task(activity.stage, total=activity.total, rate="", left="", values="")
        self._open += 1

        def draw() -> None:
            left = activity.remaining
            live.update(
                task,
                completed=activity.done,
                rate=_rate(activity.rate, activity.unit),
                left="" if left is None else f"{duration(left)} left",
                values=activity.values(),
            )

        activity._draw = draw
        try:
            yield
            ending = Text.assemble(("✓ ", "green"), activity.summary())
        except BaseException:
            ending = Text.assemble(("stopped ", "yellow"), activity.line())
            raise
        finally:
            self._open -= 1
            live.remove_task(task)
            if self._open == 0:
                live.stop()
                self.live = None
            (self.live or self).console.print(ending)


@contextmanager
def _lines(activity: Activity) -> Iterator[None]:
    next_line = activity._now() + LINE_INTERVAL

    def draw() -> None:
        nonlocal next_line
        if activity._now() >= next_line:
            next_line = activity._now() + LINE_INTERVAL
            _write_line(activity.line())

    activity._draw = draw
    try:
        yield
    except BaseException:
        _write_line(f"stopped {activity.line()}")
        raise
    _write_line(activity.summary())


def _write_line(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _rate(rate: float, unit: str) -> str:
    if unit == _SECONDS:
        return ""  # seconds per second say nothing
    if rate >= 1000:
        return f"{rate / 1000:.1f}k {unit}/s"
    if rate >= 1 or rate == 0:
        return f"{rate:.{1 if rate < 10 else 0}f} {unit}/s"
    return f"{1 / rate:.1f} s/{unit}"


_screen = _Screen()
