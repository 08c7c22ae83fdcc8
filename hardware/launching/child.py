"""One process of a launch file: its own session, read line by line, ended by stronger and stronger signals."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from hardware.launching.action import Process
from hardware.ros.processes import SUPERVISOR_VARIABLE
from robot_rl.core.errors import HardwareError

logger = logging.getLogger(__name__)
_BLOCK = 65536
"""Bytes that are read at once; a longer line is cut."""


@dataclass
class Stream:
    """One of the two outputs of a process."""

    file: IO[bytes]
    """The pipe."""
    error: bool
    """Whether it is standard error."""
    rest: bytes = b""
    """The beginning of a line that has not ended."""

    def read(self) -> tuple[list[str], bool]:
        """Return the lines that have come, without waiting, and whether more may follow."""
        try:
            block = os.read(self.file.fileno(), _BLOCK)
        except BlockingIOError:
            return [], True
        *lines, self.rest = (self.rest + block).split(b"\n")
        if self.rest and (not block or len(self.rest) >= _BLOCK):
            lines, self.rest = [*lines, self.rest], b""
        return [line.decode(errors="replace").rstrip("\r") for line in lines], bool(block)


@dataclass
class Child:
    """A process that was started at least once."""

    process: Process
    """What it is."""
    label: str
    """Its name in the output, which no other process has."""
    handle: subprocess.Popen[bytes] = field(init=False)
    """The running or finished process."""
    streams: list[Stream] = field(init=False, default_factory=list)
    """Its outputs."""
    starts: int = 0
    """How often it was started."""
    ended: bool = False
    """Whether its end was noticed."""
    respawn_at: float | None = None
    """Monotonic time (s) of its next start."""
    signal_at: float = float("inf")
    """Monotonic time (s) of the next signal to it, once it is to end."""
    unreachable: bool = False
    """Whether a signal to it was refused."""
    _signals: Iterator[tuple[signal.Signals, float]] = field(init=False, default_factory=lambda: iter(()))

    @property
    def waiting(self) -> bool:
        """Whether it is, or will be, running."""
        return self.respawn_at is not None or not self.ended

    def start(self, command: Sequence[str], supervisor: int) -> None:
        """Start it; nodes of ours end when the process ``supervisor`` dies.

        Raises:
            HardwareError: there is no such program, or it may not be run.
        """
        try:
            self.handle = subprocess.Popen(
                command,
                cwd=self.process.cwd,
                env={**self.process.environment, SUPERVISOR_VARIABLE: str(supervisor)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise HardwareError(f"{self.process.where}: {self.label} does not start: {error}") from error
        self.ended, self.respawn_at = False, None
        self.starts += 1
        assert self.handle.stdout is not None and self.handle.stderr is not None  # noqa: PT018
        self.streams = [Stream(self.handle.stdout, False), Stream(self.handle.stderr, True)]
        for stream in self.streams:
            os.set_blocking(stream.file.fileno(), False)

    def begin_end(self, now: float) -> None:
        """Send SIGINT, and from now on (``now``, s) stronger signals when their time has come."""
        process = self.process
        self._signals = iter(
            [
                (signal.SIGINT, process.sigterm_timeout),
                (signal.SIGTERM, process.sigkill_timeout),
                (signal.SIGKILL, float("inf")),
            ]
        )
        self.signal_next(now)

    def signal_next(self, now: float) -> signal.Signals:
        """Send the next signal and return it."""
        number, patience = next(self._signals)
        self.signal_at = now + patience
        self.send(number)
        return number

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the whole process group, if there still is one; where that is not allowed, say so once."""
        try:
            os.killpg(self.handle.pid, number)
        except ProcessLookupError:
            logger.debug("the process group of %s has ended already", self.label)
        except OSError as error:  # one that runs as another user (sudo) must not keep the others from their signals
            if not self.unreachable:
                logger.warning("%s cannot be signalled (%s): end it by hand", self.label, error.strerror)
            self.unreachable = True

    def describe_end(self) -> str:
        """Return how it ended."""
        code = self.handle.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{self.label} {how}"
