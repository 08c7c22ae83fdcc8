"""Where the console gets what it shows, in one process with the executor or from afar."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hardware.transport import ExecutorStatus, InProcessTransport
from robot_rl.core.robot import StampedObservation

if TYPE_CHECKING:
    from hardware.control.executor import Executor


class Feed(Protocol):
    """What a console looks at; nothing in it waits."""

    def status(self) -> tuple[ExecutorStatus | None, float]:
        """Return the executor's newest status and its age in seconds."""

    def observation(self) -> StampedObservation | None:
        """Return the robot's newest measurement."""

    def command(self) -> np.ndarray | None:
        """Return the newest command (A,), None where there is none that is recent enough to steer by."""


class ExecutorFeed:
    """Looks at an executor of the same process."""

    def __init__(
        self, executor: Executor, transport: InProcessTransport, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._executor, self._transport, self._now = executor, transport, clock

    def status(self) -> tuple[ExecutorStatus | None, float]:
        """Return the status published last and its age in seconds."""
        found = self._transport.status
        return found, np.inf if found is None else self._now() - found.stamp

    def observation(self) -> StampedObservation | None:
        """Return the robot's newest measurement."""
        found = self._executor.port.observation
        return found if found.values else None

    def command(self) -> np.ndarray | None:
        """Return the command (A,) of the present tick."""
        return self._executor.safety.command


class RemoteFeed:
    """Keeps what came from an executor elsewhere."""

    def __init__(
        self,
        status: Callable[[], tuple[ExecutorStatus | None, float]],
        observation: Callable[[], StampedObservation | None] = lambda: None,
        patience: float = 0.5,
    ) -> None:
        """Look at what two callables return.

        Args:
            status: returns the newest status and when it arrived, on this process's monotonic clock in seconds.
            observation: returns the newest measurement.
            patience: age of the status in seconds from which nothing is steered by it.
        """
        self._status, self._observation, self._patience = status, observation, patience

    def status(self) -> tuple[ExecutorStatus | None, float]:
        """Return the newest status and its age in seconds."""
        found, received = self._status()
        return found, np.inf if found is None else time.monotonic() - received

    def observation(self) -> StampedObservation | None:
        """Return the newest measurement that arrived."""
        return self._observation()

    def command(self) -> np.ndarray | None:
        """Return the command (A,) of the newest status."""
        found, age = self.status()
        return np.array(found.command) if found is not None and found.command and age <= self._patience else None
