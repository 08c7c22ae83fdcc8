"""Arms of bus servos: SO-101 (Feetech) and Koch (Dynamixel), and any other with a calibration file.

Positions are joint angles in rad. The driver reads all servos in one exchange and writes all goals in one packet; the
calibration says which servo is which joint, so that limits are known before the arm is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from hardware.robots.driver import DriverConfig, PolledDriver
from hardware.servo.bus import ServoAlarmError, ServoBus
from hardware.servo.calibration import RADIANS, Calibration
from robot_rl.core.errors import ConfigError
from robot_rl.core.robot import Limits, StopKind
from robot_rl.core.spec import ArraySpec, Spec

SIX_JOINTS = {
    "shoulder_pan": 1,
    "shoulder_lift": 2,
    "elbow_flex": 3,
    "wrist_flex": 4,
    "wrist_roll": 5,
    "gripper": 6,
}
"""Joints of the SO-101 and the Koch arm, with the addresses that their assembly guides give the servos."""
_STILL = 6 * RADIANS
"""Movement in rad within 0.1 s below which a joint stands: three positions of noise each way."""


@dataclass(frozen=True)
class ServoArmConfig(DriverConfig):
    """Settings of an arm of bus servos."""

    port: str = "/dev/ttyACM0"
    """Serial device."""
    calibration: Path = Path("calibration.yaml")
    """File that ``robot-rl robot calibrate`` made of this arm."""
    baud: int = 0
    """Bits per second; 0 takes 1,000,000."""
    poll_rate_hz: float = 100.0
    """Measurements per second."""
    max_velocity: float = 3.0
    """Largest speed of the command of a joint, in rad/s."""
    max_acceleration: float = 20.0
    """Largest change of that speed, in rad/s^2."""
    watchdog_seconds: float = 0.5
    """Time without a word after which a Dynamixel servo stops by itself, up to 2.5 s; 0 for never. Feetech servos have
    no such thing."""


class ServoArm(PolledDriver):
    """Any arm of Feetech or Dynamixel servos that has a calibration; observes ``state``: joint angles (A,) in rad."""

    Config = ServoArmConfig
    requires = (("serial", "servo"),)
    family: ClassVar[str] = ""
    """Kind of servo that the arm must have; empty for any."""
    joint_ids: ClassVar[Mapping[str, int]] = {}
    """Joints that the arm must have, with their usual addresses; empty for any."""

    def __init__(self, config: ServoArmConfig) -> None:
        """Read the calibration.

        Raises:
            ConfigError: there is no calibration, or it is of another kind of arm.
            DataError: the calibration is damaged.
        """
        self.calibration = calibration = Calibration.load(config.calibration)
        joints = calibration.joints
        if self.family and calibration.family.name != self.family:
            raise ConfigError(f"'{config.calibration}' is of {calibration.family.name} servos, expected {self.family}")
        if self.joint_ids and list(joints) != list(self.joint_ids):
            raise ConfigError(f"'{config.calibration}' has {', '.join(joints)}, expected {', '.join(self.joint_ids)}")
        low, high = np.array([j.low for j in joints.values()]), np.array([j.high for j in joints.values()])
        one = np.ones(len(joints))
        state = ArraySpec((len(joints),), names=tuple(joints), unit="rad")
        action = ArraySpec((len(joints),), names=tuple(joints), unit="rad", low=tuple(low), high=tuple(high))
        limits = Limits(low, high, config.max_velocity * one, config.max_acceleration * one)
        super().__init__(Spec({"state": state}, action, config.rate_hz), limits, config, config.poll_rate_hz)
        self.config: ServoArmConfig = config
        self.bus = ServoBus(config.port, calibration.family, config.baud)
        self._ids = [joint.id for joint in joints.values()]
        self._positions: dict[int, int] = {}

    def _open(self) -> None:
        self.bus.open()
        self.calibration.require(self.bus)
        self._start()

    def _ready(self) -> None:
        self._in_thread(self._power_on, self.config.connect_timeout)

    def _power_on(self) -> None:
        """Let every joint hold where it is: goals first, then torque, so that nothing jumps."""
        mode = self.calibration.family.position_mode
        for servo in self._ids:
            if self.bus.read(servo, "mode") != mode:  # changing it needs the torque off, and may let the arm sink
                self.bus.set(servo, "torque", 0)
                self.bus.set(servo, "mode", mode)
            self._watch(servo, 0.0)  # one that has tripped refuses goals; the old one holds for a packet's time
            self.bus.write(servo, "goal_position", self.bus.read(servo, "present_position"))
            self.bus.set(servo, "torque", 1)
            self._watch(servo, self.config.watchdog_seconds)

    def _watch(self, servo: int, seconds: float) -> None:
        if "watchdog" in self.calibration.family.registers:
            self.bus.write(servo, "watchdog", max(0, min(127, round(seconds / 0.02))))

    def _read(self) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
        try:
            self._positions = self.bus.sync_read(self._ids, "present_position")
        except ServoAlarmError as alarm:
            self._give_up(str(alarm))
            raise
        joints = self.calibration.joints.values()
        angles = np.array([joint.angle(self._positions[joint.id]) for joint in joints])
        return {"state": angles.astype(np.float32)}, angles

    def _write(self, action: np.ndarray) -> None:
        joints = self.calibration.joints.values()
        goals = {j.id: j.position(angle, self._positions[j.id]) for j, angle in zip(joints, action, strict=True)}
        self.bus.sync_write("goal_position", goals)

    def _halt(self, kind: StopKind) -> bool:
        if kind is StopKind.DRIVES_OFF:
            self._in_thread(self._power_off, self.config.stop_timeout)
            return True
        path = self._to_standstill(kind, self._period)
        self._in_thread(lambda: self._follow(path), self.config.stop_timeout)
        return self._stands(_STILL, self.config.stop_timeout)

    def _power_off(self) -> None:
        for servo in self._ids:
            self._watch(servo, 0.0)
            self.bus.set(servo, "torque", 0)

    def _follow(self, path: list[np.ndarray]) -> None:
        """Send the goals of ``path`` one after the other, and the last one with every servo's acknowledgement."""
        for goal in path[:-1]:
            self._write(goal)
            time.sleep(self._period)
        for joint, angle in zip(self.calibration.joints.values(), path[-1], strict=True):
            self.bus.write(joint.id, "goal_position", joint.position(angle, self._positions[joint.id]))
        self._sent.clear()

    def _close(self) -> None:
        self._finish()
        self.bus.close()

    def _silent(self) -> str:
        return f"look at power and cables of the bus on '{self.config.port}'"


class SO101(ServoArm):
    """SO-101 arm: six Feetech STS3215 servos; observes ``state``: joint angles (6,) in rad."""

    family = "feetech"
    joint_ids = SIX_JOINTS


class Koch(ServoArm):
    """Koch v1.1 arm: six Dynamixel servos (XL430, XL330); observes ``state``: joint angles (6,) in rad."""

    family = "dynamixel"
    joint_ids = SIX_JOINTS
