"""Operator devices by name, with their settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hardware.options import fill, read_settings
from robot_rl.core.errors import ConfigError
from robot_rl.core.registry import load
from robot_rl.core.teleop import Teleop


def build_teleop(
    name: str, action_size: int, options: Mapping[str, Any] | None = None, config: str | Path | None = None
) -> Teleop:
    """Return the registered operator device ``name``, not connected.

    Args:
        name: as in ``robot-rl list teleop``.
        action_size: number of elements of the robot's action.
        options: settings by name; they win over the file's.
        config: YAML file of settings.

    Raises:
        UnknownNameError: no such device or setting; the nearest is suggested.
        ConfigError: a setting of the wrong kind.
    """
    settings = {**({} if not config else read_settings(Path(config))), **(options or {})}
    factory = load("teleop", name)
    if hasattr(factory, "Config"):
        device: Teleop = factory(action_size, fill(factory.Config, settings, f"operator device '{name}'"))
        return device
    try:
        return factory(action_size, **settings)
    except TypeError as error:
        if "argument" in str(error):
            raise ConfigError(f"operator device '{name}': {error}") from error
        raise
