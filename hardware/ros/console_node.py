"""The browser console as a process of its own: an operator's process with a page instead of a terminal."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from hardware.console.gate import Gate
from hardware.console.server import TOKEN_VARIABLE, Console, ConsoleConfig
from hardware.ros.endpoint import Endpoint
from hardware.ros.link import RosOperatorLink
from hardware.ros.node import run_node, wait_for_robot
from hardware.ros.watch import remote_feed
from robot_rl.core.clock import Rate
from robot_rl.core.errors import ConfigError


@dataclass(frozen=True)
class ConsoleNodeConfig:
    """Settings of the console's process."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs a token (ROBOT_RL_CONSOLE_TOKEN)."""
    port: int = 8080
    """Port of the page; the next free one is taken where it is in use."""
    model: str = ""
    """MuJoCo model of a robot that is commanded by joint positions, for a handle on its end effector."""
    site: str = ""
    """Site of the model that is the end effector; by default its last one."""
    joints: tuple[str, ...] = ()
    """Joints of the model in the order of the action; by default those named like its elements."""
    rate: float = 50.0
    """How often tabs are listened to (Hz)."""
    robot_timeout: float = 60.0
    """Seconds to wait for an executor to announce its robot."""

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ConfigError(f"rate is {self.rate:g} Hz, expected more than 0")


def serve(settings: ConsoleConfig, endpoint: Endpoint, stop: threading.Event, rate: float, timeout: float) -> None:
    """Serve the page and send what its tabs ask for until ``stop`` is set.

    Args:
        settings: of the page.
        endpoint: ROS 2 node to use.
        stop: ends the serving.
        rate: how often tabs are listened to (Hz).
        timeout: seconds to wait for an executor to announce its robot.

    Raises:
        ConfigError: an address beyond this machine without a token.
        HardwareError: the address cannot be listened on, or no executor announced itself in time.
    """
    Gate(settings.host, os.environ.get(TOKEN_VARIABLE, ""))  # said at once, and not when the robot is there
    link = RosOperatorLink(endpoint)
    robot = wait_for_robot(link, timeout, stop)
    if robot is None:
        return
    console = Console(robot, settings)
    console.watch(remote_feed(link))
    with console:
        beat = Rate(rate)
        while not stop.is_set():
            beat.wait()
            link.send_operator(console.poll())


def run(config: ConsoleNodeConfig, endpoint: Endpoint, stop: threading.Event) -> None:
    """Serve the page with the node's settings; see `serve`."""
    model = Path(config.model) if config.model else None
    settings = ConsoleConfig(config.host, config.port, model, config.site, config.joints)
    serve(settings, endpoint, stop, config.rate, config.robot_timeout)


def main(argv: list[str] | None = None) -> int:
    """Run the console's process and return its exit code."""
    return run_node("console", ConsoleNodeConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
