"""What drivers of real robots share: life cycle, the newest measurement, a counted budget of failures, and stops.

A driver says how its robot is opened, how a command reaches it, how it halts and how it is let go. `Driver` is for
robots that send by themselves (topics, datagrams); `PolledDriver` adds the thread for those that must be asked (buses).
Both give the newest measurement without waiting, so that a slow or silent robot never holds up the control loop.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from hardware.control.realtime import MessengerThread
from hardware.control.settings import rate_elements
from robot_rl.core.errors import HardwareError, MissingDependencyError
from robot_rl.core.robot import Limits, RobotState, StampedObservation, StopKind
from robot_rl.core.spec import Spec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DriverConfig:
    """Settings of every driver."""

    rate_hz: float = 20.0
    """Control steps per second of the policies that this robot is for; the executor's tick rate is a whole multiple
    (``--executor.tick-rate-hz 90`` for 30)."""
    connect_timeout: float = 5.0
    """Seconds to wait for the first measurement."""
    max_failures: int = 5
    """Exchanges that may fail in a row; with the next one the driver gives up (state fault) until it is connected
    anew."""
    max_silence: float = 1.0
    """Seconds without a measurement after which the driver gives up as well."""
    stop_timeout: float = 1.0
    """Seconds in which the robot must confirm a stop."""


class Driver(ABC):
    """A robot by way of its hooks ``_open``, ``_send``, ``_halt`` and ``_close``.

    The hooks raise `HardwareError` where something fails. A subclass calls `_measured` with every measurement, from
    whatever thread, and `_failed` where one did not come.
    """

    Config: ClassVar[type] = DriverConfig
    """Dataclass of the settings, whose fields are the robot's options."""
    requires: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(package, extra) of the optional packages that the driver imports when it connects."""
    accepts_replacement = False
    """Whether a second command within a tick takes effect at once."""

    def __init__(
        self, spec: Spec, limits: Limits, config: DriverConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.spec, self.limits, self.config = spec, limits, config
        self.failures = 0
        """Exchanges that failed since the connection was made."""
        self._now = clock
        self._state = RobotState.DISCONNECTED
        self._in_a_row, self._reason = 0, ""
        self._connected_at = -np.inf
        self._latest: tuple[StampedObservation, np.ndarray] | None = None
        self._sent: deque[tuple[float, np.ndarray]] = deque(maxlen=2)
        self._rates = rate_elements(self)
        self._first = threading.Event()

    # ---- the contract -----------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Open the connection and wait for the first measurement; asks nobody anything.

        Raises:
            MissingDependencyError: an optional package is not installed.
            HardwareError: the robot does not answer, or is not the one of the settings.
        """
        if self._state is not RobotState.DISCONNECTED:
            raise HardwareError(f"{self.name} is connected already")
        for package, extra in self.requires:
            if find_spec(package) is None:
                raise MissingDependencyError(package, extra, self.name.capitalize())
        self.failures = self._in_a_row = 0
        self._reason, self._latest = "", None
        self._first.clear()
        self._sent.clear()
        self._connected_at = self._now()
        try:
            self._open()
            if not self._first.wait(self.config.connect_timeout):
                why = self._reason or self._silent()
                raise HardwareError(f"{self.name} gave no measurement within {self.config.connect_timeout:g} s: {why}")
            self._state = RobotState.READY
            self._ready()
        except BaseException:
            self._state = RobotState.DISCONNECTED
            self._close()
            raise

    def observe(self) -> StampedObservation:
        """Return the newest measurement; its arrays are never written again."""
        return self._newest()[0]

    def hold_command(self) -> np.ndarray:
        """Return the command (A,) that keeps the robot where it was measured last."""
        return self._newest()[1].copy()

    def command(self, action: np.ndarray) -> np.ndarray:
        """Send a command (A,); returns it clipped to the limits.

        Raises:
            DataError: it has another shape, or is not finite.
            HardwareError: the robot has failed, or its drives are off.
        """
        self._newest()
        if self._state is RobotState.STOPPED:
            raise HardwareError(f"the drives of {self.name} are off: connect it anew")
        self.spec.action.validate(np.asarray(action), "command")
        sent = np.clip(np.asarray(action, float), self.limits.low, self.limits.high)
        self._send(sent)
        self._sent.append((self._now(), sent))
        return sent

    def stop(self, kind: StopKind = StopKind.CONTROLLED) -> bool:
        """Stop and return whether the robot confirmed it, within ``stop_timeout``.

        After `StopKind.HOLD` and `StopKind.CONTROLLED` the robot takes commands again; after `StopKind.DRIVES_OFF` it
        must be connected anew.
        """
        if self._state is RobotState.DISCONNECTED:
            return False
        try:
            confirmed = self._halt(kind)
        except HardwareError as error:
            logger.error("%s: the stop failed: %s", self.name, error)
            return False
        if confirmed and kind is StopKind.DRIVES_OFF and self._state is RobotState.READY:
            self._state = RobotState.STOPPED
        return confirmed

    def state(self) -> RobotState:
        """Return the life-cycle state; a robot that was silent for too long is a fault."""
        if self._state is RobotState.READY and self._first.is_set():
            silence = self._now() - self._last_stamp()
            if silence > self.config.max_silence:
                self._give_up(f"no measurement for {silence:.2f} s ({self._silent()})")
        return self._state

    def disconnect(self) -> None:
        """Stop in a controlled way and close the connection; drives stay on, so that nothing falls."""
        if self._state is RobotState.DISCONNECTED:
            return
        if self._state is not RobotState.STOPPED and not self.stop():
            logger.error("%s did not confirm the last stop: treat it as live", self.name)
        self._state = RobotState.DISCONNECTED
        self._close()

    # ---- for subclasses ---------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What the robot is called in messages."""
        return f"the robot '{type(self).__name__}'"

    @abstractmethod
    def _open(self) -> None:
        """Open the connection; measurements come from now on."""

    def _ready(self) -> None:  # noqa: B027 - most robots need nothing
        """Make ready for commands, after the first measurement and from where it is: modes, power."""

    @abstractmethod
    def _send(self, action: np.ndarray) -> None:
        """Send a command (A,) that is inside the limits, without waiting for the robot."""

    @abstractmethod
    def _halt(self, kind: StopKind) -> bool:
        """Stop; return whether the robot confirmed it."""

    @abstractmethod
    def _close(self) -> None:
        """Close what `_open` opened, as far as it came."""

    def _silent(self) -> str:
        """Say what is likely if no measurement comes."""
        return "it does not answer"

    def _measured(
        self,
        values: Mapping[str, np.ndarray],
        place: np.ndarray,
        stamp: float | None = None,
        stamps: Mapping[str, float] | None = None,
    ) -> None:
        """Take a measurement: its arrays, the command ``place`` (A,) that holds it, and its monotonic time."""
        seq = 0 if self._latest is None else self._latest[0].seq + 1
        stamp = self._now() if stamp is None else stamp
        # One assignment, so that a reader in another thread never sees parts of two measurements.
        self._latest = (StampedObservation(dict(values), seq, stamp, dict(stamps or {})), place)
        self._in_a_row = 0
        self._first.set()

    def _failed(self, error: Exception | str) -> None:
        """Count an exchange that failed; beyond the budget the driver gives up."""
        self.failures += 1
        self._in_a_row += 1
        self._reason = str(error)
        if self._state is RobotState.READY and self._in_a_row > self.config.max_failures:
            self._give_up(f"{self._in_a_row} exchanges in a row failed, the last one: {error}")

    def _give_up(self, reason: str) -> None:
        if self._state in (RobotState.READY, RobotState.STOPPED):
            self._reason, self._state = reason, RobotState.FAULT
            logger.error("%s failed: %s", self.name, reason)

    def _newest(self) -> tuple[StampedObservation, np.ndarray]:
        state = self.state()
        if state is RobotState.DISCONNECTED or self._latest is None:
            raise HardwareError(f"{self.name} is not connected")
        if state is RobotState.FAULT:
            raise HardwareError(f"{self.name} failed: {self._reason}")
        return self._latest

    def _last_stamp(self) -> float:
        return self._connected_at if self._latest is None else self._latest[0].stamp

    def _to_standstill(self, kind: StopKind, period: float) -> list[np.ndarray]:
        """Return the commands (A,), every ``period`` s, that stop the robot.

        A hold is one command: where the robot was measured last, and zero for rates, however fast it moves. A
        controlled stop brakes from the last two commands within the limits of velocity and acceleration, and stays
        where that ends.
        """
        if kind is StopKind.HOLD or not self._sent:
            return [self.hold_command()]
        last = self._sent[-1][1]
        speed = np.zeros(last.shape)
        if len(self._sent) == 2 and self._now() - self._sent[1][0] <= 0.2:
            (before, first), (after, second) = self._sent
            speed = (second - first) / max(after - before, 1e-3)
        return braking(last, speed, self.limits, period, self._rates)

    def _stands(
        self,
        still: np.ndarray | float,
        seconds: float,
        measure: Callable[[StampedObservation, np.ndarray], np.ndarray] = lambda seen, place: place,
        since: float = 0.1,
    ) -> bool:
        """Return whether new measurements show a standstill of ``since`` s before ``seconds`` are over.

        Args:
            still: (A,) how much what is measured may change meanwhile.
            seconds: patience.
            measure: what is looked at, from the observation and the holding command; by default the latter.
            since: length of the standstill in seconds.
        """
        deadline = self._now() + seconds
        last = self._newest()[0].seq
        seen: deque[tuple[float, np.ndarray]] = deque()
        while self._now() <= deadline:
            observation, place = self._newest()
            if observation.seq == last:
                time.sleep(0.002)
                continue
            last, value = observation.seq, measure(observation, place)
            if any((np.abs(one - value) > still).any() for _, one in seen):
                seen.clear()
            seen.append((observation.stamp, value))
            if observation.stamp - seen[0][0] >= since:
                return True
        return False


def braking(
    command: np.ndarray, speed: np.ndarray, limits: Limits, dt: float, rates: np.ndarray | None = None
) -> list[np.ndarray]:
    """Return commands (A,) every ``dt`` s that bring the robot to rest within the limits, at least one.

    Args:
        command: (A,) the last command.
        speed: (A,) its change per second.
        limits: of the robot.
        dt: seconds between commands.
        rates: (A,) bool, elements that are rates: they go to zero at once as fast as the limits let them.
    """
    largest, change = np.asarray(limits.velocity, float), np.asarray(limits.acceleration, float) * dt
    rates = np.zeros(command.shape, bool) if rates is None else rates
    speed = np.where(rates, 0.0, np.clip(speed, -largest, largest))
    path: list[np.ndarray] = []
    while not path or speed.any() or command[rates].any():
        speed = np.sign(speed) * np.maximum(np.abs(speed) - change, 0.0)
        slower = np.sign(command) * np.maximum(np.abs(command) - largest * dt, 0.0)
        command = np.clip(np.where(rates, slower, command + speed * dt), limits.low, limits.high)
        path.append(command)
    return path


def library_call(address: str, call: Callable[[], Any]) -> Any:
    """Return what ``call`` returns; a RuntimeError of a maker's library becomes a `HardwareError` of one line."""
    try:
        return call()
    except RuntimeError as error:
        raise HardwareError(f"{address}: {' '.join(str(error).split())}") from error


class PolledDriver(Driver):
    """A driver with a thread of its own that asks for measurements and sends the newest command.

    A command is sent as soon as the bus is free, so that a later one takes effect within the same tick. The hooks run
    in that thread alone: ``_read`` returns (values, place) of one measurement, ``_write`` sends a command.
    """

    accepts_replacement = True

    def __init__(self, spec: Spec, limits: Limits, config: DriverConfig, poll_rate_hz: float, **options: Any) -> None:
        super().__init__(spec, limits, config, **options)
        self._period = 1.0 / poll_rate_hz
        self._wake, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._pending: np.ndarray | None = None
        self._jobs: deque[tuple[Callable[[], Any], _Answer]] = deque()

    @abstractmethod
    def _read(self) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
        """Return the observation's arrays and the command (A,) that holds the robot there."""

    @abstractmethod
    def _write(self, action: np.ndarray) -> None:
        """Send a command (A,)."""

    def _start(self) -> None:
        """Start the thread; a subclass calls it at the end of ``_open``."""
        self._wake.clear()
        self._ended.clear()
        self._pending = None
        self._thread = MessengerThread(target=self._run, name=f"driver-{type(self).__name__}", daemon=True)
        self._thread.start()

    def _finish(self) -> None:
        """End the thread; a subclass calls it at the start of ``_close``."""
        self._ended.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(2.0)
            if self._thread.is_alive():
                logger.error("%s: the thread of the driver did not end", self.name)
            self._thread = None

    def _send(self, action: np.ndarray) -> None:
        self._pending = action
        self._wake.set()

    def _in_thread(self, job: Callable[[], Any], seconds: float) -> Any:
        """Run ``job`` in the driver's thread and return its result; `HardwareError` if it takes longer."""
        answer = _Answer()
        self._jobs.append((job, answer))
        self._wake.set()
        if not answer.done.wait(seconds):
            raise HardwareError(f"no answer within {seconds:g} s")
        if answer.error is not None:
            raise answer.error
        return answer.value

    def _run(self) -> None:
        deadline = self._now()
        while not self._ended.is_set():
            if self._state is not RobotState.FAULT:
                self._guarded(lambda: self._measured(*self._read()))
            self._serve()
            deadline = max(deadline + self._period, self._now())
            while not self._ended.is_set() and (left := deadline - self._now()) > 0:
                if self._wake.wait(left):
                    self._serve()

    def _serve(self) -> None:
        """Send the newest command and do what was asked for meanwhile."""
        self._wake.clear()
        while self._jobs:
            job, answer = self._jobs.popleft()
            self._pending = None  # a command from before a stop must not follow it
            try:
                answer.value = job()
            except Exception as error:
                answer.error = error if isinstance(error, HardwareError) else HardwareError(str(error))
            answer.done.set()
        action, self._pending = self._pending, None
        if action is not None and self._state is RobotState.READY:
            self._guarded(lambda: self._write(action))

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except HardwareError as error:
            self._failed(error)
        except Exception as error:
            logger.exception("%s: exception in the driver", self.name)
            self._give_up(f"{type(error).__name__}: {error}")


class _Answer:
    """What came of a job."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.value: Any = None
        self.error: HardwareError | None = None
