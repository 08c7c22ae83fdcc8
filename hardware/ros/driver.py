"""What drivers of robots behind ROS 2 topics share: the node, and who is missing on the graph."""

from __future__ import annotations

import itertools
import os
import time
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from hardware.robots.driver import Driver, DriverConfig
from hardware.ros.endpoint import UNNAMED, Endpoint
from robot_rl.core.errors import HardwareError

_numbers = itertools.count()
_DISCOVERY_SECONDS = 0.4
"""Time in which other writers are found: they announce themselves every 0.2 s."""


def unique_name(kind: str) -> str:
    """Return a node name that no other node of ours has, for example ``arm_4711_0``."""
    return f"{kind}_{os.getpid()}_{next(_numbers)}"


@dataclass(frozen=True)
class RosDriverConfig(DriverConfig):
    """Settings of every robot behind topics; ROS_DOMAIN_ID says where."""

    alone: bool = True
    """Refuse to connect while other nodes publish commands for the robot."""


class RosDriver(Driver):
    """A robot that is measured and commanded over topics, by a node with its own I/O thread."""

    requires: ClassVar[tuple[tuple[str, str], ...]] = (("rclpy", "ros"),)
    accepts_replacement = True
    kind: ClassVar[str] = "robot"
    """First part of the node's name."""

    config: RosDriverConfig

    def _open(self) -> None:
        self._endpoint = endpoint = Endpoint(unique_name(self.kind), namespace="")
        self._join(endpoint)
        endpoint.start()

    @abstractmethod
    def _join(self, endpoint: Endpoint) -> None:
        """Make publishers and subscriptions."""

    def _close(self) -> None:
        endpoint: Endpoint | None = getattr(self, "_endpoint", None)
        if endpoint is not None:
            endpoint.close()

    def _require_reader(self, topic: str, message: str, who: str) -> None:
        """Wait until somebody subscribes to ``topic`` for this kind of ``message``, and see whether others write it.

        Raises:
            HardwareError: nobody listens, with the hint ``who``; another kind is read; or others write, named.
        """
        node = self._endpoint.node
        deadline = time.monotonic() + self.config.connect_timeout
        while message not in (kinds := {info.topic_type for info in node.get_subscriptions_info_by_topic(topic)}):
            if time.monotonic() > deadline:
                found = f"'{topic}' is read as {', '.join(sorted(kinds))}, not {message}"
                raise HardwareError(f"{found}: {who}" if kinds else f"nobody listens to '{topic}': {who}")
            time.sleep(0.02)
        if not self.config.alone:
            return
        deadline = time.monotonic() + _DISCOVERY_SECONDS
        names: set[str] = set()
        while (waiting := time.monotonic() < deadline) or names:
            names = {info.node_name for info in node.get_publishers_info_by_topic(topic)} - {node.get_name()}
            if names and not (waiting and UNNAMED in names):  # a topic is discovered before the name of its node
                raise HardwareError(f"'{topic}' is written by {', '.join(sorted(names))}: there is one writer or none")
            time.sleep(0.02)

    def _silent_topic(self, topic: str) -> str:
        """Say why no message came on ``topic``."""
        endpoint = getattr(self, "_endpoint", None)
        if endpoint is None or endpoint.node.count_publishers(topic) == 0:
            return f"nobody publishes '{topic}' in ROS domain {os.environ.get('ROS_DOMAIN_ID', '0')}"
        return f"'{topic}' is published, and no message that can be used came"
