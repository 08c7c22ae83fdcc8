"""Devices with axes and buttons as operator devices: what gamepads and 3-D mice have in common."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.teleop import OperatorEvent, OperatorInput

logger = logging.getLogger(__name__)


@dataclass
class AxesReading:
    """Where a device's axes and buttons are."""

    axes: Sequence[float]
    """In [-1, 1], zero at rest."""
    buttons: Sequence[bool]
    """Whether each button is pressed."""
    fresh: bool = True
    """Whether the device has said so lately, rather than nothing since."""


class AxesBackend(Protocol):
    """Talks to the device, through whatever library."""

    def open(self) -> None:
        """Open the device; raises `HardwareError` naming what is missing."""

    def read(self) -> AxesReading:
        """Return the newest reading without waiting; raises `OSError` when the device has gone."""

    def close(self) -> None:
        """Close the device."""


@dataclass(frozen=True)
class AxesConfig:
    """What axes and buttons do."""

    axes: tuple[int, ...] = ()
    """Axis that moves each element of the action, -1 for none; by default in their order."""
    signs: tuple[float, ...] = ()
    """Factor of each element's motion, for example -1 to turn it round; 1 by default."""
    deadband: float = 0.1
    """Deflection below which an axis is at rest: sticks do not come back to zero."""
    dead_man: int = -1
    """Button that must be held for any motion; -1 for none."""
    buttons: Mapping[int, str] | None = None
    """What each button asks for, by number: take_over, hand_back, hold, emergency_stop, enable, reset, success,
    failure. By default the device's own."""


class AxesTeleop:
    """An operator device on an `AxesBackend`.

    Loss is neutral: where the device has gone, readings keep the stamp of its last sign of life, so that the executor
    counts the operator as lost; where it merely says nothing, nothing moves.
    """

    def __init__(
        self,
        action_size: int,
        backend: AxesBackend,
        config: AxesConfig,
        buttons: Mapping[int, OperatorEvent],
        *,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Assign axes and buttons.

        Args:
            action_size: number of action elements A.
            backend: the device.
            config: assignment; ``buttons`` is what it says nothing of.
            buttons: what buttons ask for by default.
            name: of the device, for messages and as the source of readings.
            clock: monotonic time in seconds.

        Raises:
            ConfigError: the assignment does not fit the action, or a button asks for something unknown.
        """
        axes = config.axes or tuple(range(action_size))
        signs = config.signs or (1.0,) * action_size
        if len(axes) != action_size or len(signs) != action_size:
            raise ConfigError(f"{name}: axes and signs need {action_size} entries, one per element of the action")
        if not 0 <= config.deadband < 1:
            raise ConfigError(f"{name}: deadband must be in [0, 1), got {config.deadband}")
        self.config, self._backend, self._name, self._now = config, backend, name, clock
        self._axes, self._signs = axes, np.array(signs, float)
        self._events = dict(buttons) if config.buttons is None else _named(config.buttons, name)
        self._pressed: set[int] = set()
        self._stamp, self._seq, self._lost = 0.0, 0, True

    def connect(self) -> None:
        """Open the device; raises `HardwareError` naming what is missing."""
        self._backend.open()
        self._stamp, self._lost = self._now(), False
        self._pressed = {index for index, down in enumerate(self._backend.read().buttons) if down}

    def poll(self) -> OperatorInput:
        """Return motion and wishes; a button asks once each time it is pressed."""
        self._seq += 1
        motion, enabled = np.zeros(len(self._axes)), False
        events: tuple[OperatorEvent, ...] = ()
        if not self._lost:
            try:
                reading = self._backend.read()
            except OSError as error:
                logger.warning("%s lost: %s", self._name, error)
                self._lost = True
            else:
                self._stamp = self._now()
                motion = self._motion(reading)
                held = self.config.dead_man < 0 or _down(reading.buttons, self.config.dead_man)
                enabled = held and bool(motion.any())
                pressed = {index for index, down in enumerate(reading.buttons) if down}
                new = sorted(pressed - self._pressed)
                events = tuple(self._events[index] for index in new if index in self._events)
                self._pressed = pressed
        if not enabled:
            motion = np.zeros(len(self._axes))
        return OperatorInput(self._stamp, self._seq, enabled, motion, events, self._name)

    def disconnect(self) -> None:
        """Close the device; safe to call twice."""
        self._lost = True
        self._backend.close()

    def _motion(self, reading: AxesReading) -> np.ndarray:
        """Return motions (A,): the deflection beyond the deadband, from zero at its edge to one."""
        if not reading.fresh:
            return np.zeros(len(self._axes))
        values = [reading.axes[axis] if 0 <= axis < len(reading.axes) else 0.0 for axis in self._axes]
        value = np.nan_to_num(np.array(values, float))
        beyond = np.maximum(np.abs(value) - self.config.deadband, 0.0) / (1.0 - self.config.deadband)
        return np.clip(self._signs * np.sign(value) * beyond, -1.0, 1.0)


def library(name: str, device: str) -> Any:
    """Return an optional library; raises `MissingDependencyError` naming the extra."""
    import importlib

    from robot_rl.core.errors import MissingDependencyError

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or name, "teleop", f"The operator device '{device}'") from error
    except (OSError, AttributeError) as error:  # a shared library of the system is missing
        raise HardwareError(f"operator device '{device}': {name} does not load: {error}") from error


def _down(buttons: Sequence[bool], index: int) -> bool:
    return index < len(buttons) and bool(buttons[index])


def _named(buttons: Mapping[int, str], name: str) -> dict[int, OperatorEvent]:
    try:
        return {int(index): OperatorEvent(wish) for index, wish in buttons.items()}
    except ValueError as error:
        known = ", ".join(event.value for event in OperatorEvent)
        raise ConfigError(f"{name}: buttons ask for one of {known} ({error})") from error
