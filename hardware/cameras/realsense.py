"""The colour camera of an Intel RealSense."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from hardware.cameras.base import CameraConfig, ThreadedCamera
from robot_rl.core.errors import HardwareError


@dataclass(frozen=True)
class RealSenseCameraConfig(CameraConfig):
    """Settings of a RealSense camera."""

    serial: str = ""
    """Serial number; empty for the only one that is plugged in."""
    rate_hz: int = 30
    """Images per second."""


class RealSenseCamera(ThreadedCamera):
    """Colour stream of an Intel RealSense, by librealsense."""

    Config = RealSenseCameraConfig
    requires = (("pyrealsense2", "realsense"),)

    def __init__(self, config: RealSenseCameraConfig) -> None:
        super().__init__(config)
        self.config: RealSenseCameraConfig = config
        self._pipeline: Any = None

    @property
    def name(self) -> str:
        """What the camera is called in messages."""
        return f"the RealSense camera {self.config.serial}".rstrip()

    def _open(self) -> None:
        try:
            realsense = importlib.import_module("pyrealsense2")
        except ImportError as error:  # installed, and a library of the system is missing
            raise HardwareError(
                f"pyrealsense2 does not load ({error}); on Debian and Ubuntu: apt install libusb-1.0-0"
            ) from error
        config = self.config
        wanted = realsense.config()
        if config.serial:
            wanted.enable_device(config.serial)
        wanted.enable_stream(realsense.stream.color, config.width, config.height, realsense.format.rgb8, config.rate_hz)
        pipeline = realsense.pipeline()
        try:
            pipeline.start(wanted)
        except RuntimeError as error:
            raise HardwareError(f"{self.name} does not start: {' '.join(str(error).split())}") from error
        self._pipeline = pipeline

    def _grab(self) -> np.ndarray:
        try:
            frames = self._pipeline.wait_for_frames(int(1000 * self.config.connect_timeout))
        except RuntimeError as error:
            raise HardwareError(" ".join(str(error).split())) from error
        colour = frames.get_color_frame()
        if not colour:
            raise HardwareError("a set of frames without a colour image")
        return np.asanyarray(colour.get_data()).copy()  # the library uses the memory again

    def _close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.stop()
            self._pipeline = None
