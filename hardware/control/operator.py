"""Collects what the operator wants, from local devices and from the link, into one reading per tick.

In real time each local device is polled by a thread of its own, when the loop asks for it: one whose library hangs
costs no tick, its newest reading grows old, and the watchdog of the operator's heartbeat holds the robot. Where ticks
are called by hand, on simulated time, devices are polled within the tick.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from hardware.control.realtime import MessengerThread
from hardware.transport import ExecutorLink
from robot_rl.core.teleop import OperatorEvent, OperatorInput, Teleop

logger = logging.getLogger(__name__)
_PATIENCE = 1e-3
"""Seconds for which a tick waits for a device that is about to answer."""
_JOIN_SECONDS = 0.5


class OperatorInbox:
    """Merges operator devices: events of all of them, in order; motion and heartbeat of the one that drives.

    A device begins to drive when it is enabled or asks to take over, unless the one that drives is still held and
    alive. It stays the one that counts: were another device's heartbeat good enough, then the loss of the one in the
    operator's hand would go unnoticed.
    """

    def __init__(
        self,
        link: ExecutorLink,
        teleop: Teleop | Sequence[Teleop] | None,
        action_size: int,
        now: Callable[[], float],
        timeout: float = 0.25,
    ) -> None:
        """Remember the devices; a reading that is older than ``timeout`` seconds holds the place no more."""
        devices = [] if teleop is None else list(teleop) if isinstance(teleop, Sequence) else [teleop]
        self._link, self._size, self._now, self._timeout = link, action_size, now, timeout
        self._devices: list[Teleop] = devices
        self.reading: OperatorInput | None = None
        """Newest reading of the device that drives, None before the first."""
        self.dropped = 0
        """Readings whose motion or target had the wrong size or was not finite; their events count."""
        self.failed: list[Teleop] = []
        """Local devices that raised; they are not asked again."""
        self._readers: dict[int, _Reader] = {}

    @contextmanager
    def reading_apart(self) -> Iterator[None]:
        """Poll local devices in threads of their own meanwhile; enter it before the loop's thread gets its priority."""
        self._readers = {id(device): _Reader(device) for device in self._devices}
        try:
            yield
        finally:
            readers, self._readers = self._readers, {}
            for reader in readers.values():
                reader.end()

    def ask(self) -> None:
        """Let the devices' threads poll for the tick that comes next; without such threads it does nothing."""
        for reader in self._readers.values():
            reader.ask()

    def poll(self) -> tuple[tuple[OperatorEvent, ...], bool]:
        """Read everything that came in; return the events, oldest first, and whether an e-stop is pressed remotely."""
        readings = []
        while (reading := self._link.poll_operator()) is not None:
            readings.append(reading)
        for device in self._devices:
            if device in self.failed:
                continue
            reader = self._readers.get(id(device))
            try:
                answer = device.poll() if reader is None else reader.take()
                if answer is not None:
                    readings.append(answer)
            except Exception:
                logger.exception("operator device failed; it counts as lost")
                self.failed.append(device)
        events: tuple[OperatorEvent, ...] = ()
        newest: dict[str, OperatorInput] = {}
        asking = set()
        for reading in readings:
            events += tuple(reading.events)
            if OperatorEvent.TAKE_OVER in reading.events:
                asking.add(reading.source)
            motion = np.asarray(reading.motion)
            shown = motion if reading.target is None else np.asarray(reading.target)
            if motion.shape != (self._size,) or shown.shape != motion.shape or not np.isfinite([motion, shown]).all():
                self.dropped += 1
                continue
            newest[reading.source] = reading
        for reading in newest.values():
            if self._may_drive(reading, reading.source in asking):
                self.reading = reading
        return events, self._link.poll_estop()

    def motion(self, timeout: float) -> np.ndarray:
        """Return the operator's motion wish (A,) in [-1, 1]: zeros unless the dead-man switch is held and fresh."""
        reading = self.reading
        if reading is None or not reading.enabled or self._now() - reading.stamp > timeout:
            return np.zeros(self._size)
        return np.clip(reading.motion, -1.0, 1.0)

    def target(self, timeout: float) -> np.ndarray | None:
        """Return the command (A,) that the operator shows; None unless the dead-man switch is held and fresh."""
        reading = self.reading
        if reading is None or not reading.enabled or self._now() - reading.stamp > timeout:
            return None
        return reading.target

    def _may_drive(self, reading: OperatorInput, asks: bool) -> bool:
        present = self.reading
        if present is None or present.source == reading.source:
            return True
        return not self._held(present) and (self._held(reading) or asks)

    def _held(self, reading: OperatorInput) -> bool:
        return reading.enabled and self._now() - reading.stamp <= self._timeout


class _Reader:
    """Polls one device in a thread of its own, once each time it is asked."""

    def __init__(self, device: Teleop) -> None:
        self._device = device
        self._asked, self._answered = threading.Event(), threading.Event()
        self._waiting, self._hanging, self._ended = False, False, False
        self._answer: OperatorInput | Exception | None = None
        self._thread = MessengerThread(target=self._run, name=f"operator-{type(device).__name__}", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Let the device be polled, unless it still is."""
        if not self._waiting:
            self._waiting = True
            self._answered.clear()
            self._asked.set()

    def take(self) -> OperatorInput | None:
        """Return what the device answered, or raise what it raised; None if it has not answered yet.

        A device that hangs is waited for only once.
        """
        self.ask()
        if not self._answered.wait(0.0 if self._hanging else _PATIENCE):
            self._hanging = True
            return None
        self._waiting = self._hanging = False
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def end(self) -> None:
        """End the thread; one that hangs in the device is left behind."""
        self._ended = True
        self._asked.set()
        self._thread.join(0.0 if self._hanging else _JOIN_SECONDS)

    def _run(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            if self._ended:
                return
            try:
                self._answer = self._device.poll()
            except Exception as error:
                self._answer = error
            self._answered.set()
