"""The browser console as a process of its own: an operator's process with a page instead of a terminal."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from hardware.console.server import Console, ConsoleConfig
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


def run(config: ConsoleNodeConfig, endpoint: Endpoint, stop: threading.Event) -> None:
    """Serve the page and send what its tabs ask for until ``stop`` is set.

    Raises:
        HardwareError: the address cannot be listened on, or no executor announced itself in time.
        ConfigError: an address beyond this machine without a token.
    """
    link = RosOperatorLink(endpoint)
    robot = wait_for_robot(link, config.robot_timeout, stop)
    if robot is None:
        return
    model = Path(config.model) if config.model else None
    console = Console(robot, ConsoleConfig(config.host, config.port, model, config.site, config.joints))
    console.watch(remote_feed(link))
    with console:
        rate = Rate(config.rate)
        while not stop.is_set():
            rate.wait()
            link.send_operator(console.poll())


def main(argv: list[str] | None = None) -> int:
    """Run the console's process and return its exit code."""
    return run_node("console", ConsoleNodeConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
