"""When an executor's ticks happen: absolute deadlines in real time, and chunks that come between two of them."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from hardware.control.realtime import control_thread
from robot_rl.core.clock import Rate

if TYPE_CHECKING:
    from hardware.control.executor import Executor

logger = logging.getLogger(__name__)
_RESERVE = 5e-4
"""Seconds before a tick in which no command is replaced any more: the next one is due."""
_SETTLE_SECONDS = 2.0


class ControlLoop:
    """Calls the ticks of one executor."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def run(self, stop: threading.Event, seconds: float, patience: float) -> None:
        """Tick as `Executor.run` says, then brake to a standstill."""
        executor = self.executor
        config, now = executor.config, executor.now
        with executor.operator.reading_apart(), control_thread(config.realtime_priority, config.pin):
            rate = Rate(config.tick_rate_hz, now, self.idle)
            deadline = now() + patience if seconds > 0 else np.inf
            waiting, executor.times.begun = True, now()
            while not stop.is_set() and now() < deadline:
                executor.lateness.add(rate.wait())
                executor.missed_ticks = rate.missed
                started = now()
                executor.tick()
                executor.work.add(now() - started)
                if waiting and seconds > 0 and executor.ready.is_set():
                    waiting, deadline = False, now() + seconds
            if waiting and seconds > 0:
                logger.error("the policy never answered")
            executor.times.ended = now()
            self._settle(rate)

    def idle(self, seconds: float) -> None:
        """Sleep until the next tick; a chunk that comes in time for it replaces the present tick's command.

        So does the brake of an emergency stop, whoever drives.
        """
        executor = self.executor
        until = executor.now() + seconds
        while (left := until - _RESERVE - executor.now()) > 0:
            if executor.link.poll_estop():
                executor.stop_between_ticks()
                break
            if executor.replaceable and executor.link.wait_chunk(left):
                executor.replace_command()
            elif not executor.link.wait_estop(0.0 if executor.replaceable else left):
                break
        executor.operator.ask()  # what the devices say is there when the tick begins
        remaining = until - executor.now()
        if remaining > 0:
            time.sleep(remaining)

    def _settle(self, rate: Rate) -> None:
        """Brake to a standstill with nobody writing, for at most two seconds."""
        executor = self.executor
        executor.arbiter.hold(executor.now(), "shutdown")
        executor.arbiter.plan_requested = False
        for _ in range(int(_SETTLE_SECONDS * executor.config.tick_rate_hz)):
            rate.wait()
            executor.tick(closing=True)
            if not executor.safety.moving:
                break
