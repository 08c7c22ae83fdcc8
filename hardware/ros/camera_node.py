"""The camera process: publishes the images of one camera, whatever kind it is, with the time of their exposure."""

from __future__ import annotations

import logging
import sys
import threading
import time
from dataclasses import dataclass
from typing import Annotated

from hardware.cameras.rig import build_camera
from hardware.options import parse_options
from hardware.ros.convert import to_image
from hardware.ros.endpoint import Endpoint, quality
from hardware.ros.lifecycle import ManagedConfig, run_managed_node
from hardware.ros.parameters import Range
from robot_rl.core.clock import Rate
from robot_rl.core.errors import HardwareError

logger = logging.getLogger(__name__)

IMAGE = "~/image_raw"
"""Topic of the images, below the node's own name."""


@dataclass(frozen=True)
class CameraNodeConfig(ManagedConfig):
    """Settings of the camera process."""

    camera: str = "opencv"
    """Kind of the camera in the registry (robot-rl list cameras)."""
    camera_options: tuple[str, ...] = ()
    """Settings of the camera, each ``name=value``: source=0, source=film.mp4, width=640, task=push_t, ..."""
    frame: str = "camera"
    """Coordinate frame of the images."""
    poll_rate: Annotated[float, Range(1.0, 1000.0)] = 200.0
    """How often a new image is looked for (Hz)."""
    stale_seconds: Annotated[float, Range(0.0)] = 1.0
    """Age (s) of the newest image from which on the camera is called stale in the log."""


class CameraWork:
    """One camera; images are published while the node is active."""

    def __init__(self, config: CameraNodeConfig, endpoint: Endpoint) -> None:
        """Make the camera, not connected; `UnknownNameError` where there is no such kind or setting."""
        from sensor_msgs.msg import Image

        self.config = config
        given = {"kind": config.camera, **parse_options(config.camera_options, "option")}
        self.camera = build_camera(endpoint.node.get_name(), given)
        # Reliable: over the default profile an image is many datagrams, and best effort loses it with any of them. A
        # reader may still ask for best effort, and one that hangs only misses images.
        self.publish = endpoint.publisher(Image, IMAGE, quality(2))

    def start(self) -> None:
        """Open the camera and wait for a first image; `HardwareError` where there is none."""
        self.camera.connect()

    def run(self, stop: threading.Event) -> None:
        """Publish every new image until ``stop`` is set; a camera that is lost is waited for, and named."""
        rate, last, published, stale = Rate(self.config.poll_rate), None, 0, False
        try:
            while not stop.is_set():
                rate.wait()
                frame = self.camera.frame()
                age = time.monotonic() - frame.stamp
                if age > self.config.stale_seconds and not stale:
                    logger.error("the camera's newest image is %.1f s old", age)
                stale = age > self.config.stale_seconds
                if frame.seq != last:
                    last, published = frame.seq, published + 1
                    self.publish(to_image(frame.image, frame.stamp, frame.seq, self.config.frame))
        except HardwareError as error:
            raise HardwareError(f"after {published} images: {error}") from error
        finally:
            self.camera.disconnect()
        logger.info("published %d images", published)

    def close(self) -> None:
        """Close the camera."""
        self.camera.disconnect()


def main(argv: list[str] | None = None) -> int:
    """Run the camera process and return its exit code."""
    return run_managed_node("camera", CameraNodeConfig, CameraWork, argv)


if __name__ == "__main__":
    sys.exit(main())
