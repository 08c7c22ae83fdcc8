"""The contract of cameras: the newest images and when they were taken, without waiting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from robot_rl.core.spec import ArraySpec


@dataclass(frozen=True)
class Frame:
    """One image."""

    image: np.ndarray
    """(height, width, 3) uint8, RGB; never written again."""
    seq: int
    """Counts the camera's images."""
    stamp: float
    """Monotonic time of the exposure in seconds, as well as it is known."""


@runtime_checkable
class Camera(Protocol):
    """A camera; ``spec`` is known before connecting."""

    spec: ArraySpec

    def connect(self) -> None:
        """Open the camera and wait for a first image; raises `HardwareError` naming what failed."""

    def frame(self) -> Frame:
        """Return the newest image. One that gets no newer ones says so by its stamp, and the safety chain by name."""

    def near(self, stamp: float) -> Frame:
        """Return, of the newest few images, the one taken nearest to the monotonic time ``stamp``."""

    def disconnect(self) -> None:
        """Close the camera; safe to call twice."""
