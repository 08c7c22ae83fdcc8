"""A perfect robot without physics, and faults that can be injected into any robot; for tests and dry runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

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
        self.spec.action.validate(np.asarray(action), "command")
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
    delay_seconds: float = 0.0
    """Seconds by which measurements lag."""
    drop: float = 0.0
    """Share of the measurements that are lost; the one before stands in."""
    drop_commands: bool = False
    """Commands are accepted and lost."""
    freeze: bool = False
    """Observations stand still, stamps included."""
    freeze_cameras: bool = False
    """Only the cameras and their stamps stand still."""
    not_a_number: bool = False
    """Measurements are NaN."""
    jump: float = 0.0
    """Added to whatever is measured, in its own unit, from one measurement to the next."""
    disconnected: bool = False
    """Every call raises `HardwareError`."""
    stuck: bool = False
    """The robot reports that it stays where it was when it got stuck."""
    stuck_joint: int | None = None
    """Index of the element of the command that is blocked: it stays where it was, and the others move."""
    deaf: bool = False
    """Stops are not confirmed."""


class FaultyRobot:
    """Wraps any robot and injects `faults`; what a robot has beyond the contract is the wrapped one's."""

    def __init__(self, robot: Robot, *, seed: int = 0) -> None:
        """Wrap ``robot``; ``seed`` decides which measurements `Faults.drop` loses."""
        self.robot, self.spec, self.limits = robot, robot.spec, robot.limits
        self.accepts_replacement = getattr(robot, "accepts_replacement", False)
        self.faults = Faults()
        self._random = np.random.default_rng(seed)
        self._last: StampedObservation | None = None
        self._queue: deque[StampedObservation] = deque(maxlen=1000)
        self._place: np.ndarray | None = None
        self._blocked: float | None = None

    def __getattr__(self, name: str) -> Any:
        """Return what only the robot behind has (``epoch``, ``outcomes``)."""
        if name.startswith("__") or name == "robot":
            raise AttributeError(name)
        return getattr(self.robot, name)

    def connect(self) -> None:
        """Connect the robot behind."""
        self.robot.connect()

    def observe(self) -> StampedObservation:
        """Return the measurement, or what the faults make of it."""
        self._fail()
        if self._last is not None and (self.faults.freeze or self._random.random() < self.faults.drop):
            return self._last
        found = self._delayed(self.robot.observe())
        if self.faults.freeze_cameras and self._last is not None:
            old = self._last
            found = replace(found, stamps=old.stamps, values={**found.values, **{k: old.values[k] for k in old.stamps}})
        if self.faults.not_a_number or self.faults.jump:
            wrong = np.nan if self.faults.not_a_number else self.faults.jump
            values = {k: v + v.dtype.type(wrong) if v.dtype.kind == "f" else v for k, v in found.values.items()}
            found = replace(found, values=values)
        self._last = found
        return found

    def hold_command(self) -> np.ndarray:
        """Return where the robot says that it is (A,)."""
        self._fail()
        place = self.robot.hold_command()
        if not self.faults.stuck:
            self._place = place
        assert self._place is not None
        return self._place + (np.nan if self.faults.not_a_number else self.faults.jump)

    def command(self, action: np.ndarray) -> np.ndarray:
        """Pass the command on, unless it or an element of it is lost."""
        self._fail()
        if self.faults.drop_commands:
            return action
        joint = self.faults.stuck_joint
        if joint is None:
            self._blocked = None
            return self.robot.command(action)
        if self._blocked is None:
            self._blocked = float(self.robot.hold_command()[joint])
        blocked = np.array(action, float)
        blocked[joint] = self._blocked
        self.robot.command(blocked)
        return action

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

    def _delayed(self, newest: StampedObservation) -> StampedObservation:
        """Return the measurement that is old enough for the present delay, or the oldest there is."""
        self._queue.append(newest)
        lag = min(self.faults.delay, len(self._queue) - 1)
        if self.faults.delay_seconds:
            due = newest.stamp - self.faults.delay_seconds
            return next((one for one in reversed(self._queue) if one.stamp <= due), self._queue[0])
        return self._queue[len(self._queue) - 1 - lag]

    def _fail(self) -> None:
        if self.faults.disconnected:
            raise HardwareError("the robot does not answer (injected fault)")
