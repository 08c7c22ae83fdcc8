"""Collects what the operator wants, from local devices and from the link, into one reading per tick."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from hardware.transport import ExecutorLink
from robot_rl.core.teleop import OperatorEvent, OperatorInput, Teleop

logger = logging.getLogger(__name__)


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

    def poll(self) -> tuple[tuple[OperatorEvent, ...], bool]:
        """Read everything that came in; return the events, oldest first, and whether an e-stop is pressed remotely."""
        readings = []
        while (reading := self._link.poll_operator()) is not None:
            readings.append(reading)
        for device in self._devices:
            if device in self.failed:
                continue
            try:
                readings.append(device.poll())
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
