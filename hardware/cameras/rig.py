"""A robot with cameras: their images become observations with stamps of their own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from hardware.options import fill
from robot_rl.core.camera import Camera, Frame
from robot_rl.core.errors import ConfigError
from robot_rl.core.registry import load
from robot_rl.core.robot import Robot, RobotState, StampedObservation, StopKind
from robot_rl.core.spec import Spec

logger = logging.getLogger(__name__)
MAX_SKEW = 0.2
"""Seconds by which the images of one observation may lie apart: less than the age at which a camera counts as lost."""
_QUIET = 10.0
"""Seconds for which images that lie apart are not named again."""


class RobotWithCameras:
    """A robot whose observations hold ``images.<name>`` of every camera; what else it has is the robot's own.

    The images of one observation were taken as nearly at one time as the cameras allow: at that of the newest image of
    the camera whose newest is oldest, or of the robot's measurement where that is older still. Each one's stamp is in
    `StampedObservation.stamps`. A camera that is lost stops neither the observations nor, beyond ``max_skew``, the
    images of the others: its stamp stays where it was, and the safety chain judges every camera's age.
    """

    def __init__(self, robot: Robot, cameras: Mapping[str, Camera], max_skew: float = MAX_SKEW) -> None:
        """Put cameras on a robot.

        Args:
            robot: not connected.
            cameras: by name.
            max_skew: seconds by which the images of one observation may lie apart. What is older than this is not
                waited for, and images further apart are named in the log. The cameras must keep images for as long.

        Raises:
            ConfigError: the robot has such an image already, or ``max_skew`` is not positive.
        """
        if not max_skew > 0:
            raise ConfigError(f"max_skew is {max_skew:g}, expected more than 0")
        self.robot, self.limits, self.max_skew = robot, robot.limits, max_skew
        self.skew = 0.0
        """Seconds by which the images of the newest observation lie apart."""
        self._named = -np.inf
        self.cameras = {f"images.{name}": camera for name, camera in cameras.items()}
        twice = set(self.cameras) & set(robot.spec.observation)
        if twice:
            raise ConfigError(f"the robot has {', '.join(sorted(twice))} already: call the camera something else")
        images = {key: camera.spec for key, camera in self.cameras.items()}
        self.spec = Spec({**robot.spec.observation, **images}, robot.spec.action, robot.spec.rate_hz)

    def __getattr__(self, name: str) -> Any:
        """Return what only the robot behind has."""
        if name.startswith("__") or name == "robot":
            raise AttributeError(name)
        return getattr(self.robot, name)

    def connect(self) -> None:
        """Connect the cameras, then the robot, so that none is connected if one fails."""
        try:
            for camera in self.cameras.values():
                camera.connect()
            self.robot.connect()
        except BaseException:
            self._close_cameras()
            raise

    def observe(self) -> StampedObservation:
        """Return the robot's newest measurement with the newest images that belong together."""
        seen = self.robot.observe()
        frames = self._together(seen.stamp)
        values = {**seen.values, **{key: frame.image for key, frame in frames.items()}}
        stamps = {**seen.stamps, **{key: frame.stamp for key, frame in frames.items()}}
        return StampedObservation(values, seen.seq, seen.stamp, stamps)

    def hold_command(self) -> np.ndarray:
        """Return the command (A,) that keeps the robot where it is now."""
        return self.robot.hold_command()

    def command(self, action: np.ndarray) -> np.ndarray:
        """Send a command (A,) and return what was really sent."""
        return self.robot.command(action)

    def stop(self, kind: StopKind = StopKind.CONTROLLED) -> bool:
        """Stop; return whether the robot confirmed it."""
        return self.robot.stop(kind)

    def state(self) -> RobotState:
        """Return the robot's life-cycle state."""
        return self.robot.state()

    def disconnect(self) -> None:
        """Disconnect the robot, then the cameras."""
        self.robot.disconnect()
        self._close_cameras()

    def _together(self, measured: float) -> dict[str, Frame]:
        """Return one image of each camera, taken near to one time, where the robot was measured at ``measured``."""
        newest = [camera.frame().stamp for camera in self.cameras.values()]
        if not newest:
            return {}
        oldest = max(newest) - self.max_skew
        common = min(stamp for stamp in (*newest, measured) if stamp >= oldest)
        frames = {key: camera.near(common) for key, camera in self.cameras.items()}
        stamps = {key: frame.stamp for key, frame in frames.items()}
        first, last = min(stamps, key=stamps.__getitem__), max(stamps, key=stamps.__getitem__)
        self.skew = stamps[last] - stamps[first]
        if self.skew > self.max_skew and stamps[last] - self._named > _QUIET:
            self._named = stamps[last]
            logger.error("%s is %.3f s older than %s: they do not show the same time", first, self.skew, last)
        return frames

    def _close_cameras(self) -> None:
        for camera in self.cameras.values():
            camera.disconnect()


def with_cameras(robot: Robot, settings: Mapping[str, Mapping[str, Any]]) -> RobotWithCameras:
    """Return ``robot`` with cameras made from their settings.

    Args:
        robot: not connected.
        settings: by the camera's name: its ``kind`` (as in ``robot-rl list cameras``) and its other settings. Beside
            them there may be ``max_skew``, as in `RobotWithCameras`.

    Raises:
        UnknownNameError: no such kind of camera, or no such setting.
        ConfigError: a setting of the wrong kind.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"cameras are {settings!r}, expected a mapping from a name to kind and settings")
    given = dict(settings)
    skew = given.pop("max_skew", MAX_SKEW)
    if not isinstance(skew, int | float):
        raise ConfigError(f"max_skew is {skew!r}, expected seconds; a camera must be called something else")
    return RobotWithCameras(robot, {name: build_camera(name, one) for name, one in given.items()}, skew)


def build_camera(name: str, settings: Mapping[str, Any]) -> Camera:
    """Return the camera ``name``, not connected, of the ``kind`` that its settings say."""
    if not isinstance(settings, Mapping) or "kind" not in settings:
        raise ConfigError(f"camera '{name}' needs a 'kind' (robot-rl list cameras) and its settings")
    given = dict(settings)
    factory = load("cameras", str(given.pop("kind")))
    camera: Camera = factory(fill(factory.Config, given, f"camera '{name}'"))
    return camera
