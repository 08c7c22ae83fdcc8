"""Plays timed key presses into a pseudo terminal that the keyboard device reads: a rehearsed operator.

The keys take the real path (terminal driver, key map, dead-man dwell), so that what works here works with a person.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hardware.teleop.keyboard import EVENT_KEYS, KeyboardTeleop, motion_keys
from robot_rl.core.errors import ConfigError, DataError
from robot_rl.core.teleop import OperatorInput

REPEAT_SECONDS = 0.04
"""Pause between the repetitions of a key that is held."""
_NAMES = {"space": " "}

DEMONSTRATION = """
0.5 n          # enable: the policy takes control
5.0 t          # take over: from the policy, or from a hold
5.2 w 0.8      # hold a motion key
6.0 a 0.7
7.2 b          # hand back to the policy
12.0 space     # emergency stop
13.5 r         # reset: nothing moves yet
14.5 n         # enable again
"""
"""Key presses of the demonstration (20 s): one takeover and one emergency stop with reset and enable."""
DEMONSTRATION_SECONDS = 20.0
"""Length of the demonstration."""


@dataclass(frozen=True)
class KeyPress:
    """One key of a script."""

    time: float
    """Seconds after the start."""
    key: str
    """Character that the terminal delivers."""
    hold: float = 0.0
    """Seconds for which it is held (it repeats as on a keyboard); 0 for a single press."""


def parse_script(text: str, size: int = 8) -> list[KeyPress]:
    """Parse lines of ``<seconds> <key> [<hold seconds>]``; ``#`` begins a comment, ``space`` names the space bar.

    Args:
        text: the script.
        size: number of action elements, which decides the motion keys that exist.

    Raises:
        DataError: a line that cannot be read; the message names it.
    """
    known = set(EVENT_KEYS) | set(motion_keys(size))
    presses = []
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split("#")[0].split()
        if not parts:
            continue
        try:
            key = _NAMES.get(parts[1], parts[1])
            press = KeyPress(float(parts[0]), key, float(parts[2]) if len(parts) > 2 else 0.0)
        except (IndexError, ValueError) as error:
            raise DataError(f"key script line {number}: expected '<seconds> <key> [<hold>]', got '{line}'") from error
        if key not in known:
            names = ", ".join(sorted("space" if key == " " else key for key in known))
            raise DataError(f"key script line {number}: unknown key '{parts[1]}'; keys: {names}")
        presses.append(press)
    return sorted(presses, key=lambda press: press.time)


def load_script(name: str, size: int = 8, seconds: float = 0.0) -> list[KeyPress]:
    """Return the script called ``name``: ``demonstration``, or the path of a file.

    The demonstration is squeezed or stretched from 20 s to ``seconds`` where that is positive.
    """
    if name == "demonstration":
        share = seconds / DEMONSTRATION_SECONDS if seconds > 0 else 1.0
        presses = parse_script(DEMONSTRATION, size)
        return [KeyPress(share * press.time, press.key, min(1.0, share) * press.hold) for press in presses]
    try:
        return parse_script(Path(name).read_text(), size)
    except OSError as error:
        raise ConfigError(f"no key script '{name}'; give a file, or one of: demonstration") from error


class ScriptedTeleop:
    """A `KeyboardTeleop` on a pseudo terminal with a thread that presses the keys of a script.

    The script's clock starts with `start`, so that it can wait until the policy answers.
    """

    def __init__(
        self,
        action_size: int,
        script: str | list[KeyPress] = "demonstration",
        *,
        autostart: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the script.

        Args:
            action_size: number of action elements A.
            script: name or file for `load_script`, or the key presses themselves.
            autostart: start the script's clock on `connect`.
            clock: monotonic time in seconds.
        """
        self.presses = load_script(script, action_size) if isinstance(script, str) else list(script)
        self._size, self._autostart, self._now = action_size, autostart, clock
        self._keyboard: KeyboardTeleop | None = None
        self._master = self._slave = -1
        self._started, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def connect(self) -> None:
        """Open the pseudo terminal, connect the keyboard device to it, and make ready to type."""
        self._master, self._slave = os.openpty()
        self._keyboard = KeyboardTeleop(self._size, file_descriptor=self._slave, clock=self._now)
        self._keyboard.connect()
        self._thread = threading.Thread(target=self._type, name="key-script", daemon=True)
        self._thread.start()
        if self._autostart:
            self.start()

    def start(self) -> None:
        """Start the script's clock; does nothing if it runs."""
        self._started.set()

    def poll(self) -> OperatorInput:
        """Return what the keyboard device read."""
        if self._keyboard is None:
            raise ConfigError("connect the scripted operator before polling it")
        return self._keyboard.poll()

    def disconnect(self) -> None:
        """Stop typing and close the pseudo terminal."""
        self._ended.set()
        self._started.set()
        if self._thread is not None:
            self._thread.join(2.0)
            self._thread = None
        if self._keyboard is not None:
            self._keyboard.disconnect()
            self._keyboard = None
            os.close(self._master)
            os.close(self._slave)

    def _type(self) -> None:
        self._started.wait()
        start = self._now()
        for moment, key in _strokes(self.presses):
            if self._ended.wait(max(0.0, start + moment - self._now())):
                return
            os.write(self._master, key.encode())


def _strokes(presses: list[KeyPress]) -> list[tuple[float, str]]:
    """Return (seconds, key) of every character, with the repetitions of keys that are held."""
    strokes = []
    for press in presses:
        count = 1 + int(press.hold / REPEAT_SECONDS)
        strokes += [(press.time + index * REPEAT_SECONDS, press.key) for index in range(count)]
    return sorted(strokes)
