"""Open the browser console on a robot whose executor runs in another process, over ROS 2.

Any number of tabs may look; the first that takes over has control. `robot-rl deploy --console` opens the same page with
a deployment of its own. Ctrl-C closes the page, which a robot that it drove takes as the loss of its operator.
"""

from __future__ import annotations

import logging
import sys
import threading
from dataclasses import dataclass

from hardware.console.server import ConsoleConfig
from hardware.control.signals import interrupted_by_signals


@dataclass(frozen=True)
class Config(ConsoleConfig):
    """Settings of ``robot-rl console``."""

    domain_id: int | None = None
    """ROS 2 domain; by default ROS_DOMAIN_ID, or 0."""
    rate: float = 50.0
    """How often tabs are listened to (Hz)."""
    robot_timeout: float = 60.0
    """Seconds to wait for an executor to announce its robot."""


def run(config: Config) -> None:
    """Serve the page until Ctrl-C."""
    from hardware.ros.context import prepare_environment, require_ros

    require_ros("The console of another process's robot")
    prepare_environment(config.domain_id)
    from hardware.ros.console_node import serve
    from hardware.ros.endpoint import Endpoint

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s")
    stop = threading.Event()
    with interrupted_by_signals(stop):
        endpoint = Endpoint("console", domain_id=config.domain_id)
        try:
            serve(config, endpoint, stop, config.rate, config.robot_timeout)
        finally:
            endpoint.close()
