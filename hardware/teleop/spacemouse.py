"""A 3-D mouse (SpaceMouse) as an operator device, through pyspacemouse.

Its six axes move the first six elements of the action, in a right-handed frame with z up. It reports while it is
deflected and falls silent at rest; a deflection that is not reported any more is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hardware.teleop.axes import AxesBackend, AxesConfig, AxesReading, AxesTeleop, library
from robot_rl.core.errors import HardwareError
from robot_rl.core.teleop import OperatorEvent

BUTTONS = {0: OperatorEvent.HAND_BACK, 1: OperatorEvent.EMERGENCY_STOP}
"""Left and right button; enabling, reset and marks are the keyboard's or the console's."""
_AXES = ("x", "y", "z", "roll", "pitch", "yaw")
_MOST_REPORTS = 32


@dataclass(frozen=True)
class SpaceMouseConfig:
    """Settings of a 3-D mouse."""

    device: str = ""
    """Name as pyspacemouse has it, for example SpaceMouse Compact; by default the first that is found."""
    silence: float = 0.2
    """Seconds without a report after which a deflection counts as released."""
    layout: AxesConfig = field(default_factory=AxesConfig)
    """What axes and buttons do."""


class SpaceMouseBackend:
    """Reads one device of pyspacemouse."""

    def __init__(self, config: SpaceMouseConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._now = config, clock
        self._device: Any = None
        self._reported, self._heard = -1.0, 0.0

    def open(self) -> None:
        """Open the device; raises `HardwareError` if there is none, or no right to read it."""
        pyspacemouse = library("pyspacemouse", "spacemouse")
        try:
            self._device = pyspacemouse.open(
                device=self._config.device or None, axis_convention=pyspacemouse.AxisConvention.HID_Z_UP
            )
        except Exception as error:  # hidapi raises kinds of its own
            raise HardwareError(f"no 3-D mouse can be opened (a udev rule must permit it): {error}") from error
        self._heard = self._now()

    def read(self) -> AxesReading:
        """Return the newest reading; raises `OSError` when the device has gone."""
        if self._device is None or not self._device.connected:
            raise OSError("it is not connected")
        state: Any = None
        for _ in range(_MOST_REPORTS):  # each call takes one report in
            try:
                state = self._device.read()
            except Exception as error:
                raise OSError(str(error)) from error
            if state.t == self._reported:
                break
            self._reported, self._heard = state.t, self._now()
        fresh = self._now() - self._heard <= self._config.silence
        return AxesReading([getattr(state, axis) for axis in _AXES], [bool(down) for down in state.buttons], fresh)

    def close(self) -> None:
        """Close the device."""
        if self._device is not None:
            self._device.close()
            self._device = None


class SpaceMouse(AxesTeleop):
    """A 3-D mouse."""

    Config = SpaceMouseConfig

    def __init__(
        self,
        action_size: int,
        config: SpaceMouseConfig | None = None,
        backend: AxesBackend | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Choose the device; ``backend`` replaces pyspacemouse."""
        config = config or SpaceMouseConfig()
        backend = backend or SpaceMouseBackend(config, clock)
        super().__init__(action_size, backend, config.layout, BUTTONS, name="spacemouse", clock=clock)
