"""Robots by name, with their settings and their cameras."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hardware.options import fill, read_settings
from robot_rl.core.errors import ConfigError
from robot_rl.core.registry import load
from robot_rl.core.robot import Robot


def build_robot(name: str, options: Mapping[str, Any] | None = None, config: str | Path | None = None) -> Robot:
    """Return the registered robot ``name``, not connected.

    Args:
        name: as in ``robot-rl list robots``.
        options: settings by name; they win over the file's.
        config: YAML file of settings. Beside the robot's own it may hold ``cameras``, a mapping from a camera's name,
            which becomes the observation ``images.<name>``, to its ``kind`` and settings.

    Raises:
        UnknownNameError: no such robot, camera or setting; the nearest is suggested.
        ConfigError: a setting of the wrong kind.
    """
    settings = {**({} if not config else read_settings(Path(config))), **(options or {})}
    cameras = settings.pop("cameras", None)
    factory = load("robots", name)
    if hasattr(factory, "Config"):
        robot: Robot = factory(fill(factory.Config, settings, f"robot '{name}'"))
    else:
        try:
            robot = factory(**settings)
        except TypeError as error:
            if "argument" in str(error):
                raise ConfigError(f"robot '{name}': {error}") from error
            raise
    if not cameras:
        return robot
    from hardware.cameras.rig import with_cameras

    return with_cameras(robot, cameras)
