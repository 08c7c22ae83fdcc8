"""A robot with cameras: their images become observations with stamps of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hardware.options import fill
from robot_rl.core.camera import Camera
from robot_rl.core.errors import ConfigError
from robot_rl.core.registry import load
from robot_rl.core.robot import Robot, RobotState, StampedObservation, StopKind
from robot_rl.core.spec import Spec


class RobotWithCameras:
    """A robot whose observations hold ``images.<name>`` of every camera; what else it has is the robot's own.

    An image is the newest there is; its stamp is in `StampedObservation.stamps`. A camera that is lost does not stop
    the observations: its stamp stays where it was, and the safety chain, which judges every camera's age, names it.
    """

    def __init__(self, robot: Robot, cameras: Mapping[str, Camera]) -> None:
        """Put ``cameras``, by name, on ``robot``; raises `ConfigError` where the robot has such an image already."""
        self.robot, self.limits = robot, robot.limits
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
        """Return the robot's newest measurement with the newest images."""
        seen = self.robot.observe()
        frames = {key: camera.frame() for key, camera in self.cameras.items()}
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

    def _close_cameras(self) -> None:
        for camera in self.cameras.values():
            camera.disconnect()


def with_cameras(robot: Robot, settings: Mapping[str, Mapping[str, Any]]) -> RobotWithCameras:
    """Return ``robot`` with cameras made from their settings.

    Args:
        robot: not connected.
        settings: by the camera's name: its ``kind`` (as in ``robot-rl list cameras``) and its other settings.

    Raises:
        UnknownNameError: no such kind of camera, or no such setting.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"cameras are {settings!r}, expected a mapping from a name to kind and settings")
    return RobotWithCameras(robot, {name: build_camera(name, one) for name, one in settings.items()})


def build_camera(name: str, settings: Mapping[str, Any]) -> Camera:
    """Return the camera ``name``, not connected, of the ``kind`` that its settings say."""
    if not isinstance(settings, Mapping) or "kind" not in settings:
        raise ConfigError(f"camera '{name}' needs a 'kind' (robot-rl list cameras) and its settings")
    given = dict(settings)
    factory = load("cameras", str(given.pop("kind")))
    camera: Camera = factory(fill(factory.Config, given, f"camera '{name}'"))
    return camera
