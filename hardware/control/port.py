"""The executor's calls to its robot: none raises, and what fails is named, counted, and logged once per failure."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import numpy as np

from hardware.safety.flags import SafetyFlag
from robot_rl.core.robot import Robot, RobotState, StampedObservation, StopKind

logger = logging.getLogger(__name__)


class RobotPort:
    """One robot, called by one thread."""

    def __init__(self, robot: Robot, counters: Counter[str], stop_kind: StopKind = StopKind.CONTROLLED) -> None:
        self.robot, self.counters, self.stop_kind = robot, counters, stop_kind
        self.observation = StampedObservation({}, -1, -np.inf)
        """The newest measurement."""
        self.confirmed_stop: bool | None = None
        """Whether the robot confirmed the last stop that it was asked for."""
        self.powerless = False
        """Whether the drives were switched off: the robot is sent nothing until this is withdrawn."""
        self._epoch = 0
        self._blind, self._deaf = False, False

    def connect(self) -> None:
        """Connect and observe for the first time; failures are raised here, before anything moves."""
        self.robot.connect()
        self.observation = self.robot.observe()
        self._epoch = getattr(self.robot, "epoch", 0)

    def observe(self, on_new_scene: Callable[[], None]) -> int:
        """Take the newest measurement and return the flags of what failed.

        A robot that was put elsewhere by its scene is taken up where it is, by ``on_new_scene``.
        """
        try:
            self.observation = self.robot.observe()
            epoch = getattr(self.robot, "epoch", 0)
            if epoch != self._epoch:
                self._epoch = epoch
                on_new_scene()
            fault = self.robot.state() is RobotState.FAULT
        except Exception as error:
            if not self._blind:
                logger.exception("the robot cannot be observed: %s", error)
            self._blind = True
            self.counters["observe_failures"] += 1
            return SafetyFlag.ROBOT_FAULT
        self._blind = False
        return SafetyFlag.ROBOT_FAULT if fault else 0

    def measured(self) -> np.ndarray | None:
        """Return where the robot is (A,), in the units of its command; None if it does not say."""
        try:
            return self.robot.hold_command()
        except Exception as error:
            logger.debug("no measured command: %s", error)  # the failure itself was flagged by `observe`
            return None

    def send(self, command: np.ndarray) -> int:
        """Send ``command`` (A,) and return the flags of what failed; the first of several asks the robot to stop."""
        if self.powerless:
            return 0
        try:
            self.robot.command(command)
        except Exception as error:
            self.counters["command_failures"] += 1
            if not self._deaf:
                self._deaf = True
                logger.exception("the robot did not take a command: %s", error)
                self.stop()
            return SafetyFlag.ROBOT_FAULT
        self._deaf = False
        return 0

    def stop(self) -> None:
        """Ask the robot itself to stop, and say so loudly if it did not confirm."""
        try:
            self.powerless = self.stop_kind is StopKind.DRIVES_OFF
            self.confirmed_stop = self.robot.stop(self.stop_kind)
        except Exception:
            logger.exception("the robot did not take the stop")
            self.confirmed_stop = False
        if not self.confirmed_stop:
            logger.error("STOP NOT CONFIRMED by the robot: treat it as live")
