"""A perfect robot without physics, and faults that can be injected into any robot; for tests and dry runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from robot_rl.core.errors import HardwareError
from robot_rl.core.robot import Limits, Robot, RobotState, StampedObservation, StopKind
from robot_rl.core.spec import ArraySpec, Spec


class FakeRobot:
    """A robot that is where its last command was, at once.

    Its observations are ``state`` (A,), the present position, and, with ``camera``, an image ``images.front``.
    """

    accepts_replacement = True
    """A second command within a tick takes effect at once."""

    def __init__(
        self,
        size: int = 3,
        *,
        rate_hz: float = 20.0,
        camera: bool = False,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        one = np.ones(size)
        self.limits = limits or Limits(-one, one, one, 10 * one)
        observation = {"state": ArraySpec((size,), unit="m")}
        if camera:
            observation["images.front"] = ArraySpec((48, 64, 3), "uint8")
        low, high = tuple(map(float, self.limits.low)), tuple(map(float, self.limits.high))
        self.spec = Spec(observation, ArraySpec((size,), unit="m", low=low, high=high), rate_hz)
        self.commands: list[np.ndarray] = []
        """Every command received."""
        self.commanded_after: list[int] = []
        """The number of the observation that each command followed: those of one tick share it."""
        self.stops: list[StopKind] = []
        """Every stop received."""
        self._position = np.zeros(size)
        self._now, self._seq = clock, -1
        self._state = RobotState.DISCONNECTED

    def connect(self) -> None:
        """Become ready."""
        self._state = RobotState.READY

    def observe(self) -> StampedObservation:
        """Return the present position, stamped now."""
        self._require()
        self._seq += 1
        now = self._now()
        values = {"state": self._position.astype(np.float32)}
        stamps = {}
        if "images.front" in self.spec.observation:
            values["images.front"] = np.full((48, 64, 3), self._seq % 256, np.uint8)
            stamps["images.front"] = now
        return StampedObservation(values, self._seq, now, stamps)

    def hold_command(self) -> np.ndarray:
        """Return the present position (A,)."""
        self._require()
        return self._position.copy()

    def command(self, action: np.ndarray) -> np.ndarray:
        """Go to ``action`` (A,) at once."""
        self._require()
        self._position = np.clip(np.asarray(action, float), self.limits.low, self.limits.high)
        self.commands.append(self._position.copy())
        self.commanded_after.append(self._seq)
        return self._position

    def effective_commands(self) -> np.ndarray:
        """Return the last command (T, A) after each observation: what counts where a command was replaced."""
        after = np.array(self.commanded_after)
        return np.array(self.commands)[np.flatnonzero(np.diff(after, append=after[-1] + 1))]

    def stop(self, kind: StopKind = StopKind.CONTROLLED) -> bool:
        """Note the stop; False if not connected."""
        self.stops.append(kind)
        return self._state is not RobotState.DISCONNECTED

    def state(self) -> RobotState:
        """Return the life-cycle state."""
        return self._state

    def disconnect(self) -> None:
        """Stop and become disconnected."""
        if self._state is not RobotState.DISCONNECTED:
            self.stop()
        self._state = RobotState.DISCONNECTED

    def _require(self) -> None:
        if self._state is RobotState.DISCONNECTED:
            raise HardwareError("the fake robot is not connected")


@dataclass
class Faults:
    """What `FaultyRobot` does wrong now; change it while the robot runs."""

    delay: int = 0
    """Observations by which measurements lag."""
    drop_commands: bool = False
    """Commands are accepted and lost."""
    freeze: bool = False
    """Observations stand still, stamps included."""
    freeze_cameras: bool = False
    """Only the cameras and their stamps stand still."""
    not_a_number: bool = False
    """Measurements are NaN."""
    disconnected: bool = False
    """Every call raises `HardwareError`."""
    stuck: bool = False
    """The robot reports that it stays where it was when it got stuck."""
    deaf: bool = False
    """Stops are not confirmed."""


class FaultyRobot:
    """Wraps any robot and injects `faults`."""

    def __init__(self, robot: Robot) -> None:
        self.robot, self.spec, self.limits = robot, robot.spec, robot.limits
        self.accepts_replacement = getattr(robot, "accepts_replacement", False)
        self.faults = Faults()
        self._last: StampedObservation | None = None
        self._queue: deque[StampedObservation] = deque(maxlen=100)
        self._place: np.ndarray | None = None

    def connect(self) -> None:
        """Connect the robot behind."""
        self.robot.connect()

    def observe(self) -> StampedObservation:
        """Return the measurement, or what the faults make of it."""
        self._fail()
        if self.faults.freeze and self._last is not None:
            return self._last
        found = self.robot.observe()
        self._queue.append(found)
        if self.faults.delay:
            found = self._queue[max(0, len(self._queue) - 1 - self.faults.delay)]
        if self.faults.freeze_cameras and self._last is not None:
            old = self._last
            found = replace(found, stamps=old.stamps, values={**found.values, **{k: old.values[k] for k in old.stamps}})
        if self.faults.not_a_number:
            wrong = {k: v if v.dtype.kind != "f" else np.full_like(v, np.nan) for k, v in found.values.items()}
            found = replace(found, values=wrong)
        self._last = found
        return found

    def hold_command(self) -> np.ndarray:
        """Return where the robot says that it is (A,)."""
        self._fail()
        place = self.robot.hold_command()
        if not self.faults.stuck:
            self._place = place
        assert self._place is not None
        return np.full_like(place, np.nan) if self.faults.not_a_number else self._place.copy()

    def command(self, action: np.ndarray) -> np.ndarray:
        """Pass the command on, unless it is lost."""
        self._fail()
        return action if self.faults.drop_commands else self.robot.command(action)

    def stop(self, kind: StopKind = StopKind.CONTROLLED) -> bool:
        """Pass the stop on, unless the robot is deaf."""
        self._fail()
        return self.robot.stop(kind) and not self.faults.deaf

    def state(self) -> RobotState:
        """Return the life-cycle state of the robot behind."""
        return self.robot.state()

    def disconnect(self) -> None:
        """Disconnect the robot behind."""
        self.robot.disconnect()

    def _fail(self) -> None:
        if self.faults.disconnected:
            raise HardwareError("the robot does not answer (injected fault)")
