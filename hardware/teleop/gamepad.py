"""A gamepad as an operator device, through pygame (SDL); needs no window.

Left stick: elements 0 and 1 of the action; right stick: 3 and 4; the dead-man button (left shoulder) must be held.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from hardware.teleop.axes import AxesBackend, AxesConfig, AxesReading, AxesTeleop, library
from robot_rl.core.errors import HardwareError
from robot_rl.core.teleop import OperatorEvent

BUTTONS = {
    0: OperatorEvent.HAND_BACK,
    1: OperatorEvent.EMERGENCY_STOP,
    2: OperatorEvent.HOLD,
    3: OperatorEvent.TAKE_OVER,
    6: OperatorEvent.RESET,
    7: OperatorEvent.ENABLE,
    9: OperatorEvent.FAILURE,
    10: OperatorEvent.SUCCESS,
}
"""Buttons of the usual layout (A, B, X, Y, back, start, sticks pressed)."""


@dataclass(frozen=True)
class GamepadConfig:
    """Settings of a gamepad."""

    index: int = 0
    """Which of the gamepads, as the system counts them."""
    layout: AxesConfig = field(default_factory=lambda: AxesConfig(dead_man=4))
    """What axes and buttons do."""


class PygameBackend:
    """Reads one joystick of pygame."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._pygame: Any = None
        self._stick: Any = None

    def open(self) -> None:
        """Open the gamepad; raises `HardwareError` if there is none."""
        os.environ.setdefault("SDL_JOYSTICK_ALLOW_BACKGROUND_EVENTS", "1")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # events need the video subsystem, not a window
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        self._pygame = library("pygame", "gamepad")
        self._pygame.display.init()
        self._pygame.joystick.init()
        count = self._pygame.joystick.get_count()
        if self._index >= count:
            self.close()
            raise HardwareError(f"there is no gamepad {self._index}: {count} found")
        self._stick = self._pygame.joystick.Joystick(self._index)

    def read(self) -> AxesReading:
        """Return the newest reading; raises `OSError` when the gamepad has been pulled out."""
        if self._stick is None:
            raise OSError("it is not open")
        for event in self._pygame.event.get():
            if event.type == self._pygame.JOYDEVICEREMOVED and event.instance_id == self._stick.get_instance_id():
                self._stick = None
                raise OSError("it was pulled out")
        stick = self._stick
        return AxesReading(
            [stick.get_axis(index) for index in range(stick.get_numaxes())],
            [bool(stick.get_button(index)) for index in range(stick.get_numbuttons())],
        )

    def close(self) -> None:
        """Leave the gamepad and the display alone again."""
        self._stick = None
        if self._pygame is not None:
            self._pygame.joystick.quit()
            self._pygame.display.quit()
            self._pygame = None


class Gamepad(AxesTeleop):
    """A gamepad."""

    Config = GamepadConfig

    def __init__(
        self, action_size: int, config: GamepadConfig | None = None, backend: AxesBackend | None = None, **options: Any
    ) -> None:
        """Choose the gamepad; ``backend`` replaces pygame, ``options`` are those of `AxesTeleop`."""
        config = config or GamepadConfig()
        layout = config.layout
        if not layout.axes:
            usual = (0, 1, -1, 3, 4, -1)  # triggers (2 and 5) rest at -1 and stay out
            usual = usual[:action_size] + (-1,) * max(0, action_size - len(usual))
            layout = AxesConfig(usual, layout.signs, layout.deadband, layout.dead_man, layout.buttons)
        super().__init__(
            action_size, backend or PygameBackend(config.index), layout, BUTTONS, name="gamepad", **options
        )
