"""What cameras share: settings, the newest frames with their stamps, and a thread that opens a lost camera again."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import numpy as np

from hardware.control.realtime import MessengerThread
from robot_rl.core.camera import Frame
from robot_rl.core.errors import ConfigError, HardwareError, MissingDependencyError
from robot_rl.core.spec import ArraySpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CameraConfig:
    """Settings of every camera."""

    width: int = 640
    """Width of the observation in pixels; images of another size are scaled."""
    height: int = 480
    """Height of the observation in pixels."""
    latency: float = 0.0
    """Seconds from the exposure to the arrival of an image; its stamp is earlier by this."""
    connect_timeout: float = 5.0
    """Seconds to wait for the first image."""
    max_identical: int = 30
    """Images in a row that may be equal to the byte; further ones are those of a frozen camera and count as none. 0
    permits any number, as for a simulated camera in a scene at rest."""
    history: float = 0.3
    """Seconds for which images are kept, so that one can be had that was taken when a slower or later camera took its
    own; the last but one is kept in any case."""


class BaseCamera(ABC):
    """Keeps the newest frames. A subclass calls `_take` with every image."""

    Config: ClassVar[type] = CameraConfig
    """Dataclass of the settings."""
    requires: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(package, extra) of the optional packages that are imported on connecting."""

    def __init__(self, config: CameraConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        if config.width < 1 or config.height < 1:
            raise ConfigError(f"a camera of {config.width}x{config.height} pixels has no image")
        self.config = config
        self.spec = ArraySpec((config.height, config.width, 3), "uint8")
        self._now = clock
        self._recent: tuple[Frame, ...] = ()
        """Oldest first; replaced as a whole, so that another thread may read it at any time."""
        self._identical = 0
        self._first = threading.Event()

    @property
    def name(self) -> str:
        """What the camera is called in messages."""
        return f"the camera '{type(self).__name__}'"

    def connect(self) -> None:
        """Open the camera and wait for a first image.

        Raises:
            MissingDependencyError: an optional package is not installed.
            HardwareError: there is no such camera, or it gives no image.
        """
        for package, extra in self.requires:
            if find_spec(package) is None:
                raise MissingDependencyError(package, extra, self.name.capitalize())
        self._recent, self._identical = (), 0
        self._first.clear()
        try:
            self._start()
            if not self._first.wait(self.config.connect_timeout):
                raise HardwareError(f"{self.name} gave no image within {self.config.connect_timeout:g} s")
        except BaseException:
            self.disconnect()
            raise

    def frame(self) -> Frame:
        """Return the newest image; `HardwareError` if there never was one."""
        return self._kept()[-1]

    def near(self, stamp: float) -> Frame:
        """Return the kept image whose exposure is nearest to the monotonic time ``stamp``; `HardwareError` as above."""
        return min(self._kept(), key=lambda frame: abs(frame.stamp - stamp))

    def _kept(self) -> tuple[Frame, ...]:
        recent = self._recent
        if not recent:
            raise HardwareError(f"{self.name} is not connected")
        return recent

    @abstractmethod
    def disconnect(self) -> None:
        """Close the camera; safe to call twice."""

    @abstractmethod
    def _start(self) -> None:
        """Open the camera; images come from now on."""

    def _take(self, image: np.ndarray, arrived: float | None = None) -> None:
        """Take an RGB image (any height, any width, 3) uint8 that arrived at a monotonic time, by default now."""
        arrived = self._now() if arrived is None else arrived
        if image.shape != self.spec.shape:
            import cv2

            image = cv2.resize(image, (self.config.width, self.config.height), interpolation=cv2.INTER_AREA)
        recent = self._recent
        before = recent[-1] if recent else None
        if before is not None and self.config.max_identical and np.array_equal(image, before.image):
            self._identical += 1
            if self._identical == self.config.max_identical:
                logger.error("%s gives the same image over and over: it is frozen", self.name)
            if self._identical >= self.config.max_identical:
                return
        else:
            self._identical = 0
        seq = 0 if before is None else before.seq + 1
        frame = Frame(np.ascontiguousarray(image), seq, arrived - self.config.latency)
        oldest = frame.stamp - self.config.history
        self._recent = (*(one for one in recent[:-1] if one.stamp >= oldest), *recent[-1:], frame)
        self._first.set()


class ThreadedCamera(BaseCamera):
    """A camera that must be asked, by a thread of its own.

    ``_open``, ``_grab`` and ``_close`` run in that thread. If grabbing fails, the camera is closed and opened again
    until it works: meanwhile the stamp of the newest frame stays, and the safety chain brakes.
    """

    reopen_seconds = 1.0
    """Pause between attempts to open a lost camera."""

    def __init__(self, config: CameraConfig) -> None:
        super().__init__(config)
        self.failures = 0
        """Images that could not be had."""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._refusal: HardwareError | None = None

    @abstractmethod
    def _open(self) -> None:
        """Open the camera; raises `HardwareError`."""

    @abstractmethod
    def _grab(self) -> np.ndarray:
        """Wait for the next RGB image (height, width, 3) uint8 and return it; raises `HardwareError`."""

    @abstractmethod
    def _close(self) -> None:
        """Close what `_open` opened, as far as it came."""

    def disconnect(self) -> None:
        """End the thread and close the camera; safe to call twice."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(2.0)
            if self._thread.is_alive():
                logger.error("%s: its thread did not end; the device may stay in use", self.name)
            self._thread = None
        self._recent = ()

    def _start(self) -> None:
        self._ended.clear()
        self._refusal = None
        opened = threading.Event()
        self._thread = MessengerThread(target=self._run, args=(opened,), name=f"camera-{self.name}", daemon=True)
        self._thread.start()
        if not opened.wait(self.config.connect_timeout):
            raise HardwareError(f"{self.name} did not open within {self.config.connect_timeout:g} s")
        if self._refusal is not None:
            raise self._refusal

    def _run(self, opened: threading.Event) -> None:
        lost = False
        while not self._ended.is_set():
            try:
                self._open()
                opened.set()
                while not self._ended.is_set():
                    image = self._grab()
                    if lost:
                        logger.warning("%s gives images again", self.name)
                    lost = False
                    self._take(image)
            except HardwareError as error:
                if not opened.is_set():
                    self._refusal = error
                    self._ended.set()
                    opened.set()
                self.failures += 1
                if not lost:
                    logger.error("%s is lost: %s", self.name, error)
                lost = True
            except Exception:
                logger.exception("%s: exception in its thread; there will be no more images", self.name)
                self._ended.set()
            finally:
                self._close()
            if not opened.is_set():
                opened.set()
            self._ended.wait(self.reopen_seconds)
