"""A camera behind a ROS 2 image topic."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hardware.cameras.base import BaseCamera, CameraConfig
from hardware.ros.convert import from_time
from hardware.ros.driver import unique_name
from hardware.ros.endpoint import Endpoint, quality
from robot_rl.core.errors import DataError

if TYPE_CHECKING:
    from sensor_msgs.msg import Image

_CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1, "8UC3": 3}


@dataclass(frozen=True)
class RosCameraConfig(CameraConfig):
    """Settings of a camera behind a topic."""

    topic: str = "/camera/image_raw"
    """Topic of ``sensor_msgs/Image``: rgb8, bgr8, rgba8, bgra8 or mono8."""
    clock: Literal["receive", "system", "monotonic"] = "receive"
    """Clock of the headers: receive ignores them and takes the time of arrival, which is right for publishers on other
    machines; system and monotonic are this machine's clocks."""
    max_identical: int = 0
    """Images in a row that may be equal to the byte; 0 for any number, as of a simulated camera in a scene at rest. One
    with the header of the image before it is never new."""


class RosCamera(BaseCamera):
    """Camera behind a ROS 2 image topic."""

    Config = RosCameraConfig
    requires = (("rclpy", "ros"), ("sensor_msgs", "ros"))

    def __init__(self, config: RosCameraConfig) -> None:
        super().__init__(config)
        self.config: RosCameraConfig = config
        self._endpoint: Endpoint | None = None
        self._header = (0, 0)

    @property
    def name(self) -> str:
        """What the camera is called in messages."""
        return f"the camera on '{self.config.topic}'"

    def disconnect(self) -> None:
        """Leave the topic; safe to call twice."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        self._recent = ()

    def _start(self) -> None:
        from sensor_msgs.msg import Image

        self._endpoint = Endpoint(unique_name("camera"), namespace="")
        # Best effort is compatible with publishers of both kinds, and depth 1 drops what is old.
        self._endpoint.subscribe(Image, self.config.topic, self._receive, quality(1, reliable=False))
        self._endpoint.start()

    def _receive(self, message: Image) -> None:
        header = (message.header.stamp.sec, message.header.stamp.nanosec)
        if header == self._header and header != (0, 0):
            return  # a publisher that repeats itself
        self._header = header
        self._take(to_rgb(message), self._arrived(message))

    def _arrived(self, message: Image) -> float:
        now = self._now()
        if self.config.clock == "receive":
            return now
        ahead = time.time() - now if self.config.clock == "system" else 0.0
        return min(now, from_time(message.header.stamp) - ahead)


def to_rgb(message: Image) -> np.ndarray:
    """Return an image message as RGB (height, width, 3) uint8; `DataError` for another encoding or a wrong length."""
    channels = _CHANNELS.get(message.encoding)
    if channels is None:
        raise DataError(f"image of encoding '{message.encoding}', expected one of {', '.join(_CHANNELS)}")
    if message.step < channels * message.width or len(message.data) != message.height * message.step:
        raise DataError(f"image of {len(message.data)} bytes, expected {message.height} rows of {message.step}")
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    image = rows[:, : channels * message.width].reshape(message.height, message.width, channels)
    if channels == 1:
        return np.repeat(image, 3, axis=2)
    return image[..., 2::-1] if message.encoding.startswith(("bgr", "8UC3")) else image[..., :3]
