"""The terminal's keyboard as an operator device: no window system, no root, works over ssh.

A terminal reports key presses and their automatic repetition, never releases. A motion key therefore counts as held
for a short dwell after each report; when reports stop, the motion is neutral. That is the dead-man switch.
"""

from __future__ import annotations

import logging
import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Callable
from typing import Any

import numpy as np

from robot_rl.core.errors import HardwareError
from robot_rl.core.teleop import OperatorEvent, OperatorInput

logger = logging.getLogger(__name__)

EVENT_KEYS: dict[str, OperatorEvent] = {
    "t": OperatorEvent.TAKE_OVER,
    "b": OperatorEvent.HAND_BACK,
    "h": OperatorEvent.HOLD,
    " ": OperatorEvent.EMERGENCY_STOP,
    "r": OperatorEvent.RESET,
    "n": OperatorEvent.ENABLE,
    "y": OperatorEvent.SUCCESS,
    "x": OperatorEvent.FAILURE,
}
"""Keys that ask for something. Capitals count as small letters."""
_PAIRS = (("w", "s"), ("a", "d"), ("e", "q"), ("i", "k"), ("j", "l"), ("o", "u"), ("g", "f"), ("v", "c"))
_ARROWS = {f"\x1b{kind}{letter}": key for kind in "[O" for letter, key in zip("ABDC", "wsad", strict=True)}
_SEQUENCE = re.compile(r"\x1b(?:\[\[[A-E]|\[[0-?]*[!-/]*[@-Z\\^-~]|O[@-~]|[^\[O \x03\x1b])")
"""What one press of a function, arrow or Alt key sends. Never a space: the emergency stop works after anything."""
_UNFINISHED = re.compile(r"\x1b(?:\[[0-?]*[!-/]*|\[\[|O)?")
_INTERRUPT = "\x03"


def motion_keys(size: int) -> dict[str, tuple[int, float]]:
    """Return for each motion key the action element that it moves and the direction, for actions of ``size``."""
    found = {}
    for element, (plus, minus) in enumerate(_PAIRS[:size]):
        found[plus], found[minus] = (element, 1.0), (element, -1.0)
    return found


def key_map(size: int, names: tuple[str, ...] = ()) -> str:
    """Return the key map as text for people, with the action elements' ``names`` where they are known."""
    lines = ["Keys (a motion key drives only while it is held):"]
    for element, (plus, minus) in enumerate(_PAIRS[:size]):
        name = names[element] if element < len(names) else f"action {element}"
        arrows = {0: "  (arrows up, down)", 1: "  (arrows left, right)"}.get(element, "")
        lines.append(f"  {plus} / {minus}    {name} + / -{arrows}")
    shown = {" ": "space"}
    lines += [f"  {shown.get(key, key):<8} {event.value.replace('_', ' ')}" for key, event in EVENT_KEYS.items()]
    lines.append("  Ctrl-C   end: the robot brakes, holds and is disconnected")
    return "\n".join(lines)


class KeyboardTeleop:
    """Reads keys from a terminal; see `key_map`.

    Any terminal's file descriptor will do, also one end of a pseudo terminal. If the terminal is gone, readings keep
    the stamp of the last sign of life, so that the executor counts the operator as lost.
    """

    def __init__(
        self,
        action_size: int,
        *,
        file_descriptor: int | None = None,
        first_dwell: float = 0.6,
        dwell: float = 0.15,
        on_interrupt: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Choose the terminal; nothing is changed before `connect`.

        Args:
            action_size: number of action elements A.
            file_descriptor: of the terminal, standard input by default.
            first_dwell: seconds for which the first report of a key counts as held: keyboards wait about 0.5 s
                before they repeat.
            dwell: seconds for which each repetition counts as held.
            on_interrupt: called on Ctrl-C, where the terminal passes it on as a character.
            clock: monotonic time in seconds.
        """
        self._size, self._fd = action_size, file_descriptor
        self._first_dwell, self._dwell = first_dwell, dwell
        self._on_interrupt, self._now = on_interrupt, clock
        self._keys = motion_keys(action_size)
        self._held: dict[str, tuple[float, float]] = {}
        self._saved: list[Any] | None = None
        self._stamp, self._seq = 0.0, 0
        self._lost = False
        self._partial = ""

    def connect(self) -> None:
        """Switch the terminal to single keys without echo; `disconnect` restores it.

        Raises:
            HardwareError: standard input is no terminal.
        """
        fd = sys.stdin.fileno() if self._fd is None else self._fd
        if not os.isatty(fd):
            raise HardwareError("the keyboard needs a terminal, and standard input is none; try '--operator script'")
        self._fd, self._saved = fd, termios.tcgetattr(fd)
        tty.setcbreak(fd)  # keeps Ctrl-C a signal, so that the keyboard can never lock the user out
        self._stamp = self._now()

    def poll(self) -> OperatorInput:
        """Return the keys pressed since the last reading, without waiting."""
        now = self._now()
        events = []
        for key in self._read():
            if key in EVENT_KEYS:
                events.append(EVENT_KEYS[key])
            elif key in self._keys:
                held = key in self._held and now < self._held[key][1]
                self._held[key] = (now, now + (self._dwell if held else self._first_dwell))
            elif key == _INTERRUPT and self._on_interrupt is not None:
                self._on_interrupt()
        if not self._lost:
            self._stamp = now
        self._seq += 1
        motion = np.zeros(self._size)
        for key, (_, until) in self._held.items():
            if now < until and not self._lost:
                element, direction = self._keys[key]
                motion[element] += direction
        return OperatorInput(self._stamp, self._seq, bool(motion.any()), np.clip(motion, -1, 1), tuple(events))

    def disconnect(self) -> None:
        """Restore the terminal; safe to call twice, and after the terminal has gone."""
        if self._saved is not None and self._fd is not None:
            try:
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
            except (termios.error, OSError) as error:
                logger.info("the terminal is gone: %s", error)
            self._saved = None

    def __enter__(self) -> KeyboardTeleop:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def _read(self) -> list[str]:
        """Return the keys waiting in the terminal, small letters, arrows as the letters they stand for.

        Other keys that send more than one character are passed over: a part of one must not drive the robot.
        """
        if self._fd is None or self._saved is None or self._lost:
            return []
        text = self._partial
        self._partial = ""
        try:
            while select.select([self._fd], [], [], 0)[0]:
                data = os.read(self._fd, 256)
                if not data:
                    raise OSError("end of file")
                text += data.decode("utf-8", "ignore")
        except (OSError, ValueError) as error:
            logger.warning("keyboard lost: %s", error)
            self._lost = True
        keys = []
        while text:
            sequence = _SEQUENCE.match(text)
            if sequence is not None:
                keys += [_ARROWS[sequence[0]]] if sequence[0] in _ARROWS else []
                text = text[sequence.end() :]
            elif _UNFINISHED.fullmatch(text):
                self._partial = text
                break
            else:
                keys.append(text[0].lower())
                text = text[1:]
        return keys
