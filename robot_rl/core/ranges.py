"""Ranges of settings: checked where a configuration is made, before anything is loaded or started."""

from __future__ import annotations

from typing import Any

from robot_rl.core.errors import ConfigError


def require_range(config: Any, *names: str, low: float = 0, high: float | None = None) -> None:
    """Raise unless each of these settings of ``config`` is at least ``low`` and at most ``high``; None is no number.

    Raises:
        ConfigError: one is not; names it and its value.
    """
    expected = f"at least {low:g}" if high is None else f"in {low:g}..{high:g}"
    for name in names:
        value = getattr(config, name)
        # Written so that NaN, which is in no range, is refused as well.
        if value is not None and not (low <= value and (high is None or value <= high)):
            raise ConfigError(f"{name} must be {expected}, got {value}")


def require_positive(config: Any, *names: str) -> None:
    """Raise unless each of these settings of ``config`` is above zero.

    Raises:
        ConfigError: one is not; names it and its value.
    """
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} must be above 0, got {getattr(config, name)}")
