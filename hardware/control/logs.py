"""A log that never holds up a control loop: its lines are written by a thread of their own.

A terminal that is paused, or a pipe that nobody reads, blocks whoever writes to it. Here that is the thread; the loop
goes on, and what finds no room in the queue is counted and said later.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
from collections.abc import Callable

from hardware.control.realtime import MessengerThread

_ROOM = 1000
"""Lines that may wait."""
_PATIENCE = 1.0
"""Seconds to write what waits when the process ends."""


class DeferredHandler(logging.Handler):
    """Hands lines to a thread that gives them to ``write``; `emit` never waits."""

    def __init__(self, write: Callable[[str], None], room: int = _ROOM) -> None:
        """Start the thread; at most ``room`` lines wait for it."""
        super().__init__()
        self.lost = 0
        """Lines that found no room since this was last said."""
        self._write = write
        self._waiting: queue.Queue[str | None] = queue.Queue(room)
        self._thread = MessengerThread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Let the record's line wait for the thread, or count it as lost."""
        try:
            self._waiting.put_nowait(self.format(record) + "\n")
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Write what waits, as far as somebody takes it."""
        try:
            self._waiting.put(None, timeout=_PATIENCE)
        except queue.Full:
            self.lost += 1
        self._thread.join(_PATIENCE)
        super().close()

    def _run(self) -> None:
        while (line := self._waiting.get()) is not None:
            lost, self.lost = self.lost, 0
            try:
                self._write(f"{lost} lines of the log were lost here: nobody took them\n{line}" if lost else line)
            except OSError:  # a terminal that was closed, a full disk: later lines may find room again
                self.lost += lost + 1


def start_log(level: int, form: str) -> None:
    """Log to standard error as `logging.basicConfig` does, but from a thread; where there is a log already, keep it.

    Args:
        level: least level that is logged.
        form: format of a line.
    """
    if not logging.getLogger().handlers:
        logging.basicConfig(level=level, format=form, handlers=[DeferredHandler(_to_standard_error)])


def _to_standard_error(text: str) -> None:
    """Write past the stream's buffer, whose lock a thread that waits for a reader would keep beyond the end."""
    left = text.encode(errors="replace")
    while left:
        left = left[os.write(sys.stderr.fileno(), left) :]
