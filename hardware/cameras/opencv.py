"""Cameras that OpenCV opens: USB cameras by number, network streams by address, and video files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hardware.cameras.base import CameraConfig, ThreadedCamera
from robot_rl.core.clock import Rate
from robot_rl.core.errors import HardwareError


@dataclass(frozen=True)
class OpenCVCameraConfig(CameraConfig):
    """Settings of a camera that OpenCV opens."""

    source: int | str = 0
    """Number of the device, its path, an address (rtsp://...), or a video file, which is played over and over."""
    rate_hz: float = 30.0
    """Images per second that the device is asked for; a video file is played at this rate."""
    fourcc: str = ""
    """Format that the device is asked for, for example MJPG, with which USB 2 carries 640x480 at 30 Hz; empty leaves
    it as it is."""


class OpenCVCamera(ThreadedCamera):
    """USB camera, network stream or video file, by OpenCV."""

    Config = OpenCVCameraConfig

    def __init__(self, config: OpenCVCameraConfig) -> None:
        super().__init__(config)
        self.config: OpenCVCameraConfig = config
        self._capture: Any = None
        self._rate: Rate | None = None

    @property
    def name(self) -> str:
        """What the camera is called in messages."""
        return f"the camera '{self.config.source}'"

    def _open(self) -> None:
        import cv2

        config = self.config
        self._capture = capture = cv2.VideoCapture(config.source)
        if not capture.isOpened():
            raise HardwareError(f"{self.name} cannot be opened: no such device, address or file, or it is in use")
        # A file knows how many frames it has, a device does not; the file alone must be slowed to its rate.
        self._rate = Rate(config.rate_hz) if capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0 else None
        if self._rate is None:
            if config.fourcc:
                capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*config.fourcc))
            capture.set(cv2.CAP_PROP_FRAME_WIDTH, config.width)
            capture.set(cv2.CAP_PROP_FRAME_HEIGHT, config.height)
            capture.set(cv2.CAP_PROP_FPS, config.rate_hz)
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # or images wait for their turn, and their stamps are too late

    def _grab(self) -> np.ndarray:
        import cv2

        if self._rate is not None:
            self._rate.wait()
        good, image = self._capture.read()
        if not good and self._rate is not None:
            self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
            good, image = self._capture.read()
        if not good:
            raise HardwareError("it gave no image")
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def _close(self) -> None:
        if self._capture is not None:
            self._capture.release()
            self._capture = None
