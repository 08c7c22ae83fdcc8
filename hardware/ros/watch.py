"""What a console sees over ROS 2: the newest picture of every camera of the robot, and the executor's status."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from hardware.console.feed import RemoteFeed
from hardware.ros import convert
from hardware.ros.endpoint import Endpoint, quality
from hardware.ros.link import RosOperatorLink
from robot_rl.core.robot import StampedObservation
from robot_rl.core.spec import Spec
from robot_rl.data.bag.names import ROBOT_SPEC, image_topic


class CameraWatch:
    """Keeps the newest image of each camera that the robot announces; nothing is assembled, nothing waits."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Subscribe on a node whose I/O thread runs, or will."""
        from std_msgs.msg import String

        self._endpoint = endpoint
        self._images: dict[str, tuple[np.ndarray, float]] = {}
        self._watched: set[str] = set()
        self._seq = 0
        endpoint.subscribe(String, ROBOT_SPEC, self._on_spec, quality(1, latched=True))

    def observation(self) -> StampedObservation | None:
        """Return the newest images with their stamps, None before the first."""
        images = self._images.copy()
        if not images:
            return None
        stamps = {key: stamp for key, (_, stamp) in images.items()}
        values = {key: image for key, (image, _) in images.items()}
        return StampedObservation(values, self._seq, max(stamps.values()), stamps)

    def _on_spec(self, message: Any) -> None:
        from sensor_msgs.msg import Image

        for key, one in Spec.from_json(convert.from_json_string(message)).observation.items():
            if one.is_image and key not in self._watched:
                self._watched.add(key)
                # Best effort and the newest only: a slow browser must not hold up a camera.
                profile = quality(1, reliable=False)
                self._endpoint.subscribe(Image, image_topic(key), partial(self._on_image, key), profile)

    def _on_image(self, key: str, message: Any) -> None:
        stamp, self._seq = convert.from_header(message.header)
        self._images[key] = (convert.from_image(message), stamp)


def remote_feed(link: RosOperatorLink) -> RemoteFeed:
    """Return a feed for a console on an operator's link."""
    cameras = CameraWatch(link.endpoint)
    return RemoteFeed(lambda: (link.status, link.status_received), cameras.observation)
