"""The operator's process: reads a device in this terminal and sends it, with the e-stop, to the executor."""

from __future__ import annotations

import logging
import sys
import threading
import time
from dataclasses import dataclass

from hardware.ros.endpoint import Endpoint
from hardware.ros.link import RosOperatorLink
from hardware.ros.node import options, run_node, wait_for_robot
from hardware.teleop.keyboard import key_map
from hardware.transport import ExecutorStatus
from robot_rl.core.clock import Rate
from robot_rl.core.errors import ConfigError
from robot_rl.core.registry import load

logger = logging.getLogger(__name__)
_STATUS_TIMEOUT = 1.0


@dataclass(frozen=True)
class TeleopNodeConfig:
    """Settings of the operator's process."""

    teleop: str = "keyboard"
    """Name of the operator device in the registry."""
    teleop_options: tuple[str, ...] = ()
    """Options of the device, each ``name=value``."""
    rate: float = 50.0
    """Readings per second (Hz): the operator's heartbeat."""
    robot_timeout: float = 60.0
    """Seconds to wait for an executor to announce its robot."""

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ConfigError(f"rate is {self.rate:g} Hz, expected more than 0")


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


def run(config: TeleopNodeConfig, endpoint: Endpoint, stop: threading.Event) -> None:
    """Send readings of the device until ``stop`` is set.

    Raises:
        UnknownNameError: no such device; the message suggests the nearest.
        HardwareError: the device does not open, or no executor announced itself in time.
    """
    factory = load("teleop", config.teleop)
    link = RosOperatorLink(endpoint)
    robot = wait_for_robot(link, config.robot_timeout, stop)
    if robot is None:
        return
    device = factory(robot.action.size, **options(config.teleop_options))
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


def main(argv: list[str] | None = None) -> int:
    """Run the operator's process and return its exit code."""
    return run_node("teleop", TeleopNodeConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
