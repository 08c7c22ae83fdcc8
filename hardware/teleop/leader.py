"""A leader arm: the operator poses it, and the robot takes the same joint angles.

The arm is on the same buses as the servo arms, with its drives off. Its readings show a command
(`OperatorInput.target`), and wish for motion while it is moved, so that moving it takes over where that is permitted.
It counts as held for ``dwell`` seconds after its last movement; then the robot stays where it is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hardware.robots.servo_arm import ServoArm, ServoArmConfig
from hardware.servo.calibration import Calibration
from hardware.teleop.keyboard import KeyboardTeleop
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.robot import StopKind
from robot_rl.core.teleop import OperatorInput


@dataclass(frozen=True)
class LeaderArmConfig(ServoArmConfig):
    """Settings of a leader arm; limits of speed are those of the robot."""

    follower: Path | None = None
    """Calibration of the arm that follows, for the joints that are scaled."""
    scaled: tuple[str, ...] = ("gripper",)
    """Joints whose range is mapped onto the range of the arm that follows, instead of angle to angle."""
    moving_speed: float = 0.3
    """Speed of a joint, in rad/s, that is a full wish for motion: a fifth of it takes over."""
    dwell: float = 2.0
    """Seconds after the last movement for which the arm counts as held, and the robot goes on towards it."""
    keyboard: bool = True
    """Whether the terminal's event keys (enable, take over, hand back, emergency stop, ...) belong to the device; an
    arm has none of its own."""


class PassiveArm(ServoArm):
    """A servo arm that is only read; its drives are off."""

    def _ready(self) -> None:
        self._in_thread(self._power_off, self.config.connect_timeout)

    def _halt(self, kind: StopKind) -> bool:
        return True  # there is nothing to stop: nothing of it is driven


class LeaderArm:
    """Leader arm of Feetech or Dynamixel servos."""

    Config = LeaderArmConfig
    requires = ServoArm.requires

    def __init__(self, action_size: int, config: LeaderArmConfig) -> None:
        """Read the calibrations.

        Args:
            action_size: number of action elements A of the robot.
            config: the arm.

        Raises:
            ConfigError: the arm has not A joints, or a calibration is missing.
        """
        self.config = config
        self.arm = PassiveArm(config)
        joints = self.arm.calibration.joints
        if len(joints) != action_size:
            raise ConfigError(f"the leader arm has {len(joints)} joints, the robot's action {action_size} elements")
        self._scale, self._offset = np.ones(action_size), np.zeros(action_size)
        if config.follower is not None:
            following = Calibration.load(config.follower).joints
            for index, (name, joint) in enumerate(joints.items()):
                if name in config.scaled and name in following:
                    other = following[name]
                    self._scale[index] = (other.high - other.low) / (joint.high - joint.low)
                    self._offset[index] = other.low - self._scale[index] * joint.low
        self._keys = KeyboardTeleop(action_size) if config.keyboard else None
        self._seq = 0
        self._before: tuple[float, np.ndarray] | None = None
        self._motion, self._moved = np.zeros(action_size), -np.inf

    def connect(self) -> None:
        """Open the bus and switch the drives off, so that the arm can be moved by hand."""
        self._before, self._moved = None, -np.inf
        self.arm.connect()
        if self._keys is not None:
            try:
                self._keys.connect()
            except BaseException:
                self.arm.disconnect()
                raise

    def poll(self) -> OperatorInput:
        """Return the newest reading; an arm that answers no more gives no more signs of life."""
        self._seq += 1
        events = () if self._keys is None else self._keys.poll().events
        try:
            seen = self.arm.observe()
        except HardwareError:
            stamp = -np.inf if self._before is None else self._before[0]
            return OperatorInput(stamp, self._seq, False, np.zeros(len(self._scale)), events, "leader")
        shown = self._scale * self.arm.hold_command() + self._offset
        if self._before is None:
            self._before = (seen.stamp, shown)
        stamp, before = self._before
        # Over at least a twentieth of a second, so that the noise of single positions is no motion.
        if seen.stamp - stamp >= 0.05:
            self._motion = np.clip((shown - before) / (seen.stamp - stamp) / self.config.moving_speed, -1.0, 1.0)
            self._before = (seen.stamp, shown)
            if np.abs(self._motion).max() >= 0.1:
                self._moved = seen.stamp
        held = time.monotonic() - self._moved <= self.config.dwell
        motion = self._motion if held else np.zeros(len(self._scale))
        return OperatorInput(seen.stamp, self._seq, held, motion, events, "leader", shown if held else None)

    def disconnect(self) -> None:
        """Close the bus; the drives stay off."""
        if self._keys is not None:
            self._keys.disconnect()
        self.arm.disconnect()
