"""What browser tabs ask for, as one operator device: who may, dead-man, target and jog. No browser is needed for it.

A tab drives only while it keeps saying so: each report of a held button is a heartbeat, and 200 ms after the last one
the wish is neutral, whatever the connection claims. A browser that freezes keeps its connection for most of a minute.
The reading's stamp is the last heartbeat, so that the executor's own watchdog makes a HOLD of its loss.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

import numpy as np

from robot_rl.core.teleop import OperatorEvent, OperatorInput

logger = logging.getLogger(__name__)

SOURCE = "console"
"""Name of this device in operator readings."""
FOR_EVERYONE = (OperatorEvent.EMERGENCY_STOP, OperatorEvent.HOLD)
"""What any tab may ask for at any time; the rest is for who holds control, while somebody does."""
_NEGLIGIBLE = 1e-3


class Desk:
    """Collects what tabs report, from the server's thread, and is polled by the executor's; tabs are numbers."""

    def __init__(
        self,
        action_size: int,
        *,
        timeout: float = 0.2,
        first_key: float = 0.6,
        reserved: float = 2.0,
        approach: float = 0.4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up a desk that nobody sits at.

        Args:
            action_size: number of action elements A.
            timeout: seconds without a heartbeat after which the wish is neutral.
            first_key: seconds for which the first report of a held key is a sign of life, though no wish: keyboards
                wait about 0.5 s before they repeat.
            reserved: seconds for which control stays with the tab that held it last.
            approach: time constant in seconds with which a target is approached, below full speed.
            clock: monotonic time in seconds.
        """
        self._size, self._now = action_size, clock
        self._timeout, self._first_key, self._reserved, self._approach = timeout, first_key, reserved, approach
        self.command: Callable[[], np.ndarray | None] = lambda: None
        """Returns the present command (A,), None where it is unknown; set by whoever knows."""
        self.speed = np.zeros(action_size)
        """(A,) speed of a full wish in the action's units per second; zero for elements that are rates."""
        self._lock = threading.Lock()
        self._tab: int | None = None
        self._beat, self._grace = -math.inf, 0.0
        self._events: list[OperatorEvent] = []
        self._target: np.ndarray | None = None
        self._jog, self._jogged = np.zeros(action_size), -math.inf
        self._seq = 0

    # ---- what tabs do ------------------------------------------------------------------------------------------------

    def ask(self, event: OperatorEvent, tab: int) -> str:
        """Ask for something; return why not, or an empty text."""
        with self._lock:
            refusal = "" if event in FOR_EVERYONE else self._refusal(tab)
            if not refusal:
                self._events.append(event)
                if event in (OperatorEvent.EMERGENCY_STOP, OperatorEvent.HAND_BACK, OperatorEvent.HOLD):
                    self._target = None
            return refusal

    def hold(self, tab: int, key: bool = False) -> str:
        """Report that the dead-man is held (a heartbeat): the first one takes over. Return why not, or an empty text.

        Args:
            tab: who holds it.
            key: it is a key, which reports its press at once and its repetitions after a pause.
        """
        with self._lock:
            refusal = self._refusal(tab)
            if not refusal:
                self._sign_of_life(tab, key)
            return refusal

    def jog(self, tab: int, element: int, direction: float, key: bool = False) -> str:
        """Report that a jog button or key is held, a dead-man that moves one element; return why not.

        Args:
            tab: who holds it.
            element: index of the action's element.
            direction: share of the full speed, in [-1, 1].
            key: see `hold`.
        """
        with self._lock:
            refusal = self._refusal(tab)
            if not refusal:
                now = self._now()
                self._sign_of_life(tab, key)
                if now - self._jogged > self._timeout:
                    self._jog[:] = 0.0
                self._jog[element], self._jogged, self._target = direction, now, None
            return refusal

    def place(self, tab: int, target: np.ndarray) -> str:
        """Say where the robot shall go while the dead-man is held (A,), in the action's units; return why not."""
        target = np.array(target, float)
        with self._lock:
            refusal = self._refusal(tab)
            if target.shape != (self._size,) or not np.isfinite(target).all():
                refusal = refusal or "That target is no place."
            if not refusal:
                self._target = target
            return refusal

    def leave(self, tab: int) -> None:
        """Say that a tab was closed; if it drove, its heartbeats end here."""
        with self._lock:
            if tab == self._tab:
                self._tab, self._grace, self._target = None, 0.0, None

    def follow(self) -> None:
        """Forget the target: the policy drives, or nobody may."""
        with self._lock:
            self._target = None

    # ---- what others see ---------------------------------------------------------------------------------------------

    @property
    def holder(self) -> int | None:
        """The tab that has control, None for nobody."""
        with self._lock:
            return self._holder()

    @property
    def target(self) -> np.ndarray | None:
        """Where the robot goes while the dead-man is held (A,); None for where it is."""
        with self._lock:
            return None if self._target is None else self._target.copy()

    def poll(self) -> OperatorInput:
        """Return the operator's reading at this moment."""
        command = self.command()
        with self._lock:
            now = self._now()
            held = self._tab is not None and now - self._beat <= self._timeout
            motion = np.zeros(self._size)
            if held and now - self._jogged <= self._timeout:
                motion = self._jog.copy()
            elif held and self._target is not None and command is not None:
                motion = pull(self._target - command, self.speed * self._approach)
            self._seq += 1
            events, self._events = tuple(self._events), []
            stamp = max(0.0, min(now, self._beat + self._grace))
            return OperatorInput(stamp, self._seq, held, motion, events, SOURCE)

    # ---- inside, with the lock held ----------------------------------------------------------------------------------

    def _holder(self) -> int | None:
        return self._tab if self._now() - self._beat - self._grace <= self._reserved else None

    def _refusal(self, tab: int) -> str:
        holder = self._holder()
        return "" if holder in (None, tab) else f"Tab {holder} has control."

    def _sign_of_life(self, tab: int, key: bool) -> None:
        now = self._now()
        fresh = tab == self._tab and now - self._beat <= (self._first_key if key else self._timeout)
        if not fresh:
            self._events.append(OperatorEvent.TAKE_OVER)
            logger.info("console: tab %d takes over", tab)
        self._tab, self._beat, self._grace = tab, now, self._first_key if key and not fresh else 0.0


def pull(error: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Return the wish (A,) in [-1, 1] towards a target: straight at full speed, slower within ``near``.

    Args:
        error: (A,) from command to target.
        near: (A,) distance per element below which the speed falls in proportion; elements with zero stay.
    """
    share = np.divide(error, near, out=np.zeros(len(error)), where=near > 0)
    largest = float(np.max(np.abs(share), initial=0.0))
    return np.zeros(len(error)) if largest < _NEGLIGIBLE else share / max(1.0, largest)
