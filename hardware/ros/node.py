"""What every node process shares: settings from flags or ROS parameters, signals, logging, exit codes."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from hardware.control.logs import start_log
from hardware.control.realtime import prepare_process
from hardware.ros.endpoint import Endpoint
from hardware.ros.link import RosOperatorLink, RosPolicyLink
from hardware.ros.parameters import parse_flags, read_config
from hardware.ros.processes import end_with_supervisor
from robot_rl.core.errors import HardwareError, RobotRLError
from robot_rl.core.spec import Spec

logger = logging.getLogger(__name__)
Config = TypeVar("Config")

EXIT_OK, EXIT_ERROR, EXIT_USAGE = 0, 1, 2
"""Exit codes: ended as asked (also by SIGINT or SIGTERM); failed with one line on stderr; unknown flag or value."""

__all__ = ["open_process", "parse_flags", "read_config", "run_node", "wait_for_robot"]


def wait_for_robot(link: RosPolicyLink | RosOperatorLink, timeout: float, stop: threading.Event) -> Spec | None:
    """Return the spec of the robot, or None where ``stop`` was set meanwhile; `HardwareError` after ``timeout`` s."""
    deadline = time.monotonic() + timeout
    while link.robot_spec is None and not stop.wait(0.02):
        if time.monotonic() > deadline:
            raise HardwareError(f"no executor announced its robot within {timeout:g} s")
    return link.robot_spec


def open_process(on_signal: Callable[[], None]) -> None:
    """Prepare this process for a node: logging, quick answers, an end with its launcher; signals call ``on_signal``.

    SIGINT and SIGTERM do nothing else, so that the node can still publish and send a last command; rclpy's own handlers
    would have closed the context by then.
    """
    end_with_supervisor()
    prepare_process()
    start_log(logging.INFO, "%(asctime)s %(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: on_signal())


def run_node(
    name: str,
    config_class: type[Config],
    body: Callable[[Config, Endpoint, threading.Event], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a node process: read its settings, call ``body`` until it returns, and leave the graph.

    SIGINT and SIGTERM set the event that ``body`` gets and nothing else (`open_process`). A `RobotRLError` becomes one
    line on stderr. See `hardware.ros.lifecycle` for a node that others configure and activate.

    Args:
        name: default name of the node.
        config_class: frozen dataclass of the settings.
        body: the node's work; returns soon after the event is set.
        argv: command line without the program, or None for this process's own.

    Returns:
        Exit code.
    """
    given, ros_arguments = parse_flags(
        config_class, sys.argv[1:] if argv is None else argv, f"hardware.ros.{name}_node"
    )
    stop = threading.Event()
    open_process(stop.set)
    endpoint = None
    try:
        endpoint = Endpoint(name, arguments=ros_arguments)
        body(read_config(config_class, endpoint.node, given), endpoint, stop)
    except RobotRLError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_ERROR
    finally:
        if endpoint is not None:
            endpoint.close()
    return EXIT_OK
