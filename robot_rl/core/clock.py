"""Time: one monotonic clock and a rate with absolute deadlines."""

from __future__ import annotations

import time
from collections.abc import Callable


class Rate:
    """Wakes up at absolute deadlines ``start + k * period``, so that lateness never accumulates.

    A loop that overruns by whole periods skips the missed ticks and counts them in ``missed``; it never bunches them.
    """

    def __init__(
        self,
        rate_hz: float,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if rate_hz <= 0:
            raise ValueError(f"rate must be positive, got {rate_hz} Hz")
        self.period = 1.0 / rate_hz
        self.missed = 0
        self.tick = 0
        self._now, self._sleep = now, sleep
        self._start = now()

    def wait(self) -> float:
        """Sleep until the next deadline and return the lateness of the wake-up in seconds."""
        self.tick += 1
        deadline = self._start + self.tick * self.period
        behind = self._now() - deadline
        if behind >= self.period:
            skipped = int(behind / self.period)
            self.missed += skipped
            self.tick += skipped
            deadline += skipped * self.period
        remaining = deadline - self._now()
        if remaining > 0:
            self._sleep(remaining)
        return max(0.0, self._now() - deadline)
