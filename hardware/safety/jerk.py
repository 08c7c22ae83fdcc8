"""A limit of the jerk besides position, velocity and acceleration, with the same guarantee: a stop is always possible.

In displacement per tick, as in `hardware.safety.motion`: a step d changes by c per tick, and c itself by at most
``u = jerk * dt^3``. Braking brings d to rest as a command is brought to its target, one derivative further down: c is
never more than what can be led back to zero by the time that d is (`braking_step`). How far the motion goes on under
that rule has no short closed form, but a bound (`JerkLimiter.reach`) that costs little and is at most two ticks' way
too large. A command passes if the bound of what follows it lies inside the range; where none does, the rule itself is
followed, which a command before was admitted for.
"""

from __future__ import annotations

import math

import numpy as np

from hardware.safety import arithmetic
from hardware.safety.motion import FLAGS, MotionLimiter
from robot_rl.core.errors import ConfigError
from robot_rl.core.robot import Limits

_SLACK = 1e-6
"""Relative margin inside the limit that absorbs the rounding of third differences."""


class JerkLimiter(MotionLimiter):
    """A `MotionLimiter` that keeps ``limits.jerk`` too, whether it follows a wish or brakes."""

    most_ticks = 400
    change: np.ndarray

    def __init__(self, limits: Limits, dt: float, resting: np.ndarray | None = None) -> None:
        """As `MotionLimiter`; raises `ConfigError` without a positive jerk limit."""
        super().__init__(limits, dt, resting)
        if limits.jerk is None or not (np.asarray(limits.jerk, float) > 0).all():
            raise ConfigError(f"a limit of the jerk must be positive in every element, got {limits.jerk}")
        self.largest_surge = np.broadcast_to(np.asarray(limits.jerk, float), self.low.shape) * dt**3
        """(A,) by how much the change of the step may change per tick."""
        self._surge = self.largest_surge * (1 - _SLACK)
        self._limits = np.vstack([self._limits, self.largest_surge, self._surge, np.zeros_like(self.low)])
        self.change = np.zeros_like(self.low)
        self._limits[arithmetic.FARTHEST] = self.reach(self.largest_step, self.largest_change)[0]

    def anchor(self, position: np.ndarray) -> None:
        """Start from ``position`` (A,) at rest."""
        super().anchor(position)
        self.change = np.zeros_like(self.position)

    @property
    def moving(self) -> bool:
        """Whether the commanded motion has not yet come to rest."""
        return super().moving or bool(self.change.any())

    def reach(self, step: np.ndarray, change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return bounds of how far braking leads forwards from ``step`` (A,), and of the largest step in it.

        ``change`` (A,) is led back to zero first if it points forwards, which takes m ticks and raises the step to
        ``w``; from there the way is at most that of continuous time, with the first tick's change taken off.
        """
        return arithmetic.reaches(step, change, self._limits)

    def limit(self, target: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the permitted command (A,) nearest to ``target`` (A,) along the way, and the flags of what limited it.

        ``target`` itself is returned, bit for bit, if it keeps all limits.
        """
        command, self._last_target, which, self._behind = arithmetic.limited_jerk(
            target, self._last_target, self.position, self.step, self.change, *self._now[2:], self._limits, self._behind
        )
        return command, FLAGS[which]

    def _braked(self) -> np.ndarray:
        change = arithmetic.braking_change(self.step, self.change, self._limits)
        return self.bounded(self.position + (self.step + change))

    @property
    def braking_ticks(self) -> int:
        """Ticks that a stop from full speed, and still gaining, takes at most."""
        return math.ceil((self.largest_step / self._change + 2.0 * self._change / self._surge).max()) + 2

    def braking_path(self, command: np.ndarray) -> np.ndarray:
        """Return the commands (T, A) from ``command`` (A,) through braking to standstill, first ``command``."""
        return arithmetic.braking_path_jerk(command, self.position, self.step, self._limits, self.most_ticks)

    def rest_after(self, command: np.ndarray) -> np.ndarray:
        """Return where (A,) braking from ``command`` (A,) ends, or up to two ticks' way beyond."""
        return arithmetic.rest_after_jerk(command, self.position, self.step, self._limits)

    def window(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the smallest and largest displacement (A,) that keep all limits but the range; see `permits`."""
        return arithmetic.window_jerk(self.step, self.change, self._limits)

    def permits(self, command: np.ndarray) -> bool:
        """Return whether ``command`` (A,) may follow: within all limits, with a stop inside the range after it."""
        return not self.violations(command) and arithmetic.stoppable(command, *self._now, self._limits)

    def violations(self, command: np.ndarray) -> int:
        """Stage 11: return the flags of the limits that ``command`` (A,) breaks; 0 if it keeps all of them exactly."""
        return FLAGS[arithmetic.broken_jerk(command, *self._now, self._limits, self.change)]

    def commit(self, command: np.ndarray) -> None:
        """Take ``command`` (A,) as sent."""
        before = self.step
        super().commit(command)
        self.change = self.step - before
