"""Arms of Universal Robots, by the library ur_rtde: joint angles out by servoj, joint angles and safety state in.

The controller's own safety system stays in charge: a protective or an emergency stop is a fault here, which names it,
and is left at the teach pendant. The controller stops the arm by itself when this process ends (its watchdog).
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hardware.robots.driver import DriverConfig, PolledDriver, library_call
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.robot import Limits, StopKind
from robot_rl.core.spec import ArraySpec, Spec

logger = logging.getLogger(__name__)

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3")
VARIABLES = ["timestamp", "actual_q", "actual_qd", "robot_mode", "safety_mode", "safety_status_bits"]
"""What the controller is asked to send."""
RUNNING = 7
"""Robot mode in which the arm is powered and its brakes are released."""
_WATCHDOG_HZ = 10.0


@dataclass(frozen=True)
class URConfig(DriverConfig):
    """Settings of an arm of Universal Robots. Angles are in rad."""

    host: str = "192.168.1.10"
    """Address of the controller."""
    low: tuple[float, ...] = (-2 * math.pi,) * 6
    """Lowest angle of each joint."""
    high: tuple[float, ...] = (2 * math.pi,) * 6
    """Highest angle of each joint."""
    max_velocity: float = 1.0
    """Largest speed of the command of a joint, in rad/s."""
    max_acceleration: float = 5.0
    """Largest change of that speed, in rad/s^2."""
    poll_rate_hz: float = 125.0
    """Measurements per second: 125 for CB3, up to 500 for e-Series."""
    lookahead_time: float = 0.1
    """Smoothing of servoj in s, 0.03 to 0.2: larger is smoother and later."""
    gain: float = 300.0
    """Stiffness of servoj, 100 to 2000."""
    command_timeout: float = 0.5
    """Age in seconds of the last command at which servoing ends and the arm holds."""
    still: float = 0.003
    """How much a joint may move within 0.1 s in an arm that stands."""


class UR(PolledDriver):
    """Arm of Universal Robots; observes ``state`` and ``velocity``: joint angles (6,) in rad, speeds (6,) in rad/s."""

    Config = URConfig
    requires = (("rtde_control", "ur"), ("rtde_receive", "ur"))

    def __init__(self, config: URConfig) -> None:
        """Derive spec and limits; `ConfigError` for limits that are not six."""
        if len(config.low) != 6 or len(config.high) != 6:
            raise ConfigError(
                f"an arm of six joints needs six numbers in 'low' and 'high': {config.low}, {config.high}"
            )
        observation = {
            "state": ArraySpec((6,), names=JOINTS, unit="rad"),
            "velocity": ArraySpec((6,), names=JOINTS, unit="rad/s"),
        }
        action = ArraySpec((6,), names=JOINTS, unit="rad", low=config.low, high=config.high)
        limits = Limits(
            np.array(config.low),
            np.array(config.high),
            np.full(6, config.max_velocity),
            np.full(6, config.max_acceleration),
        )
        super().__init__(Spec(observation, action, config.rate_hz), limits, config, config.poll_rate_hz)
        self.config: URConfig = config
        self._receive: Any = None
        self._control: Any = None
        self._timestamp, self._commanded, self._servoing = -1.0, -np.inf, False

    def _open(self) -> None:
        receive = importlib.import_module("rtde_receive")
        self._timestamp, self._servoing = -1.0, False
        self._receive = self._library(
            lambda: receive.RTDEReceiveInterface(self.config.host, self.config.poll_rate_hz, VARIABLES)
        )
        mode = self._receive.getRobotMode()
        if mode != RUNNING:
            raise HardwareError(f"{self.name} is in mode {mode}, not running (7): switch it on at its teach pendant")
        self._start()

    def _ready(self) -> None:
        def begin() -> None:
            control = importlib.import_module("rtde_control")
            self._control = self._library(
                lambda: control.RTDEControlInterface(self.config.host, self.config.poll_rate_hz)
            )
            self._library(lambda: self._control.setWatchdog(_WATCHDOG_HZ))

        self._in_thread(begin, self.config.connect_timeout)

    def _read(self) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
        receive = self._receive
        deadline = time.monotonic() + 5 * self._period
        while (timestamp := receive.getTimestamp()) == self._timestamp:
            if time.monotonic() > deadline:
                raise HardwareError("the controller's clock stands still")
            time.sleep(0.2 * self._period)
        self._timestamp = timestamp
        for stopped, what in (
            (receive.isEmergencyStopped, "an emergency"),
            (receive.isProtectiveStopped, "a protective"),
        ):
            if stopped():
                self._give_up(f"the controller is in {what} stop: look why, and release it at the teach pendant")
        if self._control is not None:
            if not self._control.isProgramRunning():
                self._give_up("its program was stopped at the teach pendant")
            self._library(self._control.kickWatchdog)
            if self._servoing and self._now() - self._commanded > self.config.command_timeout:
                logger.warning("%s got no command for %.1f s and holds", self.name, self.config.command_timeout)
                self._servo_stop()
        place = np.array(receive.getActualQ())
        speed = np.array(receive.getActualQd())
        return {"state": place.astype(np.float32), "velocity": speed.astype(np.float32)}, place

    def _write(self, action: np.ndarray) -> None:
        config = self.config
        taken = self._library(
            lambda: self._control.servoJ(action.tolist(), 0.0, 0.0, self._period, config.lookahead_time, config.gain)
        )
        if not taken:
            raise HardwareError("the controller did not take a command")
        self._servoing, self._commanded = True, self._now()

    def _halt(self, kind: StopKind) -> bool:
        path = [] if kind is StopKind.HOLD else self._to_standstill(kind, self._period)
        self._in_thread(lambda: self._brake(path), self.config.stop_timeout)
        stands = self._stands(self.config.still, self.config.stop_timeout)
        if kind is StopKind.DRIVES_OFF:
            raise HardwareError("it holds; its drives are switched off at its teach pendant")
        return stands

    def _brake(self, path: list[np.ndarray]) -> None:
        if self._control is None:
            raise HardwareError("it has no program to stop")
        for command in path:
            self._write(command)
            time.sleep(self._period)
        self._servo_stop()
        self._sent.clear()

    def _servo_stop(self) -> None:
        self._servoing = False
        if not self._library(self._control.servoStop):
            raise HardwareError("the controller did not confirm the end of servoing")

    def _close(self) -> None:
        self._finish()
        if self._control is not None:
            self._control.stopScript()
            self._control.disconnect()
            self._control = None
        if self._receive is not None:
            self._receive.disconnect()
            self._receive = None

    def _library(self, call: Callable[[], Any]) -> Any:
        return library_call(self.config.host, call)
