"""The operator's process: reads a device in this terminal and sends it, with the e-stop, to the executor."""

from __future__ import annotations

import logging
import sys
import threading
import time
from dataclasses import dataclass
from typing import Annotated

from hardware.options import parse_options
from hardware.ros.endpoint import Endpoint
from hardware.ros.lifecycle import ManagedConfig, run_managed_node
from hardware.ros.link import RosOperatorLink
from hardware.ros.node import wait_for_robot
from hardware.ros.parameters import Range
from hardware.teleop.build import build_teleop
from hardware.teleop.keyboard import key_map
from hardware.transport import ExecutorStatus
from robot_rl.core.clock import Rate
from robot_rl.core.registry import load

logger = logging.getLogger(__name__)
_STATUS_TIMEOUT = 1.0


@dataclass(frozen=True)
class TeleopNodeConfig(ManagedConfig):
    """Settings of the operator's process."""

    teleop: str = "keyboard"
    """Name of the operator device in the registry."""
    teleop_options: tuple[str, ...] = ()
    """Options of the device, each ``name=value``; they win over the file's."""
    teleop_config: str = ""
    """YAML file of the device's settings; empty for none."""
    rate: Annotated[float, Range(1.0, 1000.0)] = 50.0
    """Readings per second (Hz): the operator's heartbeat."""
    robot_timeout: Annotated[float, Range(0.0)] = 60.0
    """Seconds to wait for an executor to announce its robot."""


class StatusLog:
    """Tells the operator, in the log, each change of mode and a silent executor."""

    def __init__(self) -> None:
        self._shown = ("", "")
        self._silent = False

    def show(self, status: ExecutorStatus | None, age: float) -> None:
        """Log ``status`` if its mode or reason is new, and once that it is older than a second (``age`` in s)."""
        if status is None:
            return
        if age > _STATUS_TIMEOUT and not self._silent:
            logger.error("the executor has been silent for %.1f s", age)
        self._silent = age > _STATUS_TIMEOUT
        if (status.mode, status.reason) != self._shown:
            self._shown = (status.mode, status.reason)
            logger.info("%s (%s), %s writes", status.mode, status.reason, status.writer)


class TeleopWork:
    """One operator device; its readings are the operator's heartbeat while the node is active."""

    def __init__(self, config: TeleopNodeConfig, endpoint: Endpoint) -> None:
        """Open the topics; `UnknownNameError` where there is no such device, with the nearest name."""
        load("teleop", config.teleop)  # a wrong name is said at once, and not when the robot is there
        self.config = config
        self.link = RosOperatorLink(endpoint)

    def start(self) -> None:
        """Nothing to get ready: the device opens when the robot is known."""

    def run(self, stop: threading.Event) -> None:
        """Send readings of the device until ``stop`` is set; then it is silent, which holds a robot that it drove.

        Raises:
            HardwareError: the device does not open, or no executor announced itself in time.
        """
        config, link = self.config, self.link
        robot = wait_for_robot(link, config.robot_timeout, stop)
        if robot is None:
            return
        given = parse_options(config.teleop_options, "option")
        device = build_teleop(config.teleop, robot.action.size, given, config.teleop_config or None)
        device.connect()
        if config.teleop == "keyboard":
            logger.info("%s", key_map(robot.action.size, robot.action.names))
        shown = StatusLog()
        try:
            rate = Rate(config.rate)
            while not stop.is_set():
                rate.wait()
                link.send_operator(device.poll())
                shown.show(link.status, time.monotonic() - link.status_received)
        finally:
            device.disconnect()

    def close(self) -> None:
        """Nothing to release: the device is closed when the work ends."""


def main(argv: list[str] | None = None) -> int:
    """Run the operator's process and return its exit code."""
    return run_managed_node("teleop", TeleopNodeConfig, TeleopWork, argv)


if __name__ == "__main__":
    sys.exit(main())
