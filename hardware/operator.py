"""Collects what the operator wants, from a local device and from the link, into one reading per tick."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from hardware.transport import ExecutorLink
from robot_rl.core.teleop import OperatorEvent, OperatorInput, Teleop

logger = logging.getLogger(__name__)


class OperatorInbox:
    """Merges operator devices: events of all of them, in order; motion of the newest reading that is enabled."""

    def __init__(self, link: ExecutorLink, teleop: Teleop | None, action_size: int, now: Callable[[], float]) -> None:
        self._link, self._teleop, self._size, self._now = link, teleop, action_size, now
        self.reading: OperatorInput | None = None
        """Newest reading, None before the first."""
        self.dropped = 0
        """Readings whose motion had the wrong size or was not finite; their events count."""
        self.failed = False
        """Whether the local device raised; it is not asked again."""

    def poll(self) -> tuple[tuple[OperatorEvent, ...], bool]:
        """Read everything that came in; return the events, oldest first, and whether an e-stop is pressed remotely."""
        readings = []
        while (reading := self._link.poll_operator()) is not None:
            readings.append(reading)
        if self._teleop is not None and not self.failed:
            try:
                readings.append(self._teleop.poll())
            except Exception:
                logger.exception("operator device failed; it counts as lost")
                self.failed = True
        events: tuple[OperatorEvent, ...] = ()
        newest = None
        for reading in readings:
            events += tuple(reading.events)
            motion = np.asarray(reading.motion)
            if motion.shape != (self._size,) or not np.isfinite(motion).all():
                self.dropped += 1
                continue
            if newest is None or reading.enabled or not newest.enabled:
                newest = reading
        if newest is not None:
            self.reading = newest
        return events, self._link.poll_estop()

    def motion(self, timeout: float) -> np.ndarray:
        """Return the operator's motion wish (A,) in [-1, 1]: zeros unless the dead-man switch is held and fresh."""
        reading = self.reading
        if reading is None or not reading.enabled or self._now() - reading.stamp > timeout:
            return np.zeros(self._size)
        return np.clip(reading.motion, -1.0, 1.0)
