"""Limits of position, velocity and acceleration between consecutive commands, in discrete time.

Everything is in displacement per tick: a velocity limit V is ``V * dt`` and an acceleration limit A is ``A * dt**2``.
The braking rule is exact for sampled motion: a step d is permitted if d and the shrinking steps ``d - u, d - 2u, …``
that follow under full braking stay within the room that is left, so that a stop inside the limits is possible from
every permitted state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hardware.safety import arithmetic
from hardware.safety.flags import SafetyFlag
from robot_rl.core.errors import ConfigError
from robot_rl.core.robot import Limits

_FAR = 1e9
_SLACK = 1e-6
"""Relative margin inside the limits that absorbs rounding, so that the result keeps them exactly."""
_NAMED = {
    arithmetic.POSITION: SafetyFlag.POSITION_LIMITED,
    arithmetic.VELOCITY: SafetyFlag.VELOCITY_LIMITED,
    arithmetic.ACCELERATION: SafetyFlag.ACCELERATION_LIMITED,
    arithmetic.JERK: SafetyFlag.JERK_LIMITED,
}
FLAGS = [sum(int(flag) for bit, flag in _NAMED.items() if which & bit) for which in range(2 * max(_NAMED))]
"""Flags of each set of limits that `hardware.safety.arithmetic` names."""


class MotionState(NamedTuple):
    """What a `MotionLimiter` remembers from one command to the next."""

    position: np.ndarray
    """(A,) the last command."""
    step: np.ndarray
    """(A,) the displacement that led to it."""
    low: np.ndarray
    """(A,) lowest position now permitted."""
    high: np.ndarray
    """(A,) highest position now permitted."""
    target: np.ndarray
    """(A,) what was asked for last."""
    behind: bool
    """Whether the last command fell short of it."""
    change: np.ndarray | None
    """(A,) by how much the step changed with the last command; None where no limit depends on it."""


class MotionLimiter:
    """Stages 5 and 6: keeps a sequence of commands inside position, velocity and acceleration limits.

    ``position`` (A,) is the last command and ``step`` (A,) the displacement that led to it. Elements with ``resting``
    set are rates themselves (a base's speed): they brake towards zero instead of towards standing still.
    """

    most_ticks = 1000
    """Length of the longest braking path that is looked at, in ticks."""
    change: np.ndarray | None = None
    """(A,) by how much the step changed with the last command; None where no limit depends on it."""

    def __init__(self, limits: Limits, dt: float, resting: np.ndarray | None = None) -> None:
        """Convert ``limits`` to displacements per tick of ``dt`` seconds; raises `ConfigError` if they cannot work."""
        low, high = (np.clip(np.asarray(x, float), -_FAR, _FAR) for x in (limits.low, limits.high))
        velocity, acceleration = (
            np.minimum(np.broadcast_to(np.asarray(x, float), low.shape), _FAR)
            for x in (limits.velocity, limits.acceleration)
        )
        if not (low <= high).all() or not (velocity > 0).all() or not (acceleration > 0).all() or dt <= 0:
            raise ConfigError(
                "limits need low <= high, velocity > 0 and acceleration > 0 in every element, and a positive period; "
                f"got low {low.tolist()}, high {high.tolist()}, velocity {velocity.tolist()}, "
                f"acceleration {acceleration.tolist()}, period {dt:g} s"
            )
        self.dt, self.low, self.high = dt, low, high
        self.largest_step, self.largest_change = velocity * dt, acceleration * dt * dt
        self._change = self.largest_change * (1 - _SLACK)
        rounding = 1e-6 * np.maximum(np.abs(low), np.abs(high))
        self._limits = np.stack(
            [self.largest_step, self.largest_step * (1 - _SLACK), self.largest_change, self._change, rounding]
        )
        """(R, A): what `hardware.safety.arithmetic` calls ``limits``."""
        self.resting = np.zeros(low.shape, bool) if resting is None else np.asarray(resting, bool)
        self._has_rates = bool(self.resting.any())
        self.position = np.clip(np.zeros_like(low), low, high)
        self.step = np.zeros_like(low)
        self._low_now, self._high_now = low, high
        self._last_target = self.position
        self._behind = False

    def anchor(self, position: np.ndarray) -> None:
        """Start from ``position`` (A,) at rest; a start outside the range is kept and may only move inwards."""
        self.position = np.array(position, float)
        self.step = np.zeros_like(self.position)
        self._last_target = self.position
        self._behind = False
        self._widen()

    def save(self) -> MotionState:
        """Return all that the next command depends on, for `restore`; the arrays are replaced, never written."""
        return MotionState(
            self.position, self.step, self._low_now, self._high_now, self._last_target, self._behind, self.change
        )

    def restore(self, saved: MotionState) -> None:
        """Go back to what `save` returned, as if nothing had been committed since."""
        self.position, self.step, self._low_now, self._high_now, self._last_target, self._behind, self.change = saved

    def _widen(self) -> None:
        inside = bool(((self.low <= self.position) & (self.position <= self.high)).all())
        self._low_now = self.low if inside else np.minimum(self.low, self.position)
        self._high_now = self.high if inside else np.maximum(self.high, self.position)

    @property
    def moving(self) -> bool:
        """Whether the last command differed from the one before, or a rate is not zero."""
        return bool(self.step.any()) or (self._has_rates and bool(self.position[self.resting].any()))

    def limit(self, target: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the permitted command (A,) nearest to ``target`` (A,) along the way, and the flags of what limited it.

        ``target`` itself is returned, bit for bit, if it keeps all limits (or breaks the range by no more than the
        rounding of single precision, which is not an intervention).
        """
        command, self._last_target, which, self._behind = arithmetic.limited(
            target, self._last_target, *self._now, self._limits, self._behind
        )
        return command, FLAGS[which]

    @property
    def _now(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Position, step and the range now permitted."""
        return self.position, self.step, self._low_now, self._high_now

    def brake(self) -> np.ndarray:
        """Return the next command (A,) of the fastest stop that keeps the acceleration limits."""
        command = self._braked()
        if self._has_rates:
            home = np.minimum(np.maximum(0.0, self.low), self.high)
            self._last_target = home  # a rest that does not move
            command = np.where(self.resting, self.limit(home)[0], command)
        self._last_target = command
        self._behind = True
        return command

    def _braked(self) -> np.ndarray:
        command: np.ndarray = arithmetic.braked(*self._now, self._limits)
        return command

    @property
    def braking_ticks(self) -> int:
        """Ticks that a stop from full speed takes."""
        return math.ceil((self.largest_step / self._change).max())

    def braking_path(self, command: np.ndarray) -> np.ndarray:
        """Return the commands (T, A) from ``command`` (A,) through full braking to standstill, first ``command``.

        All of them, if `braking_ticks` are no more than `most_ticks`: whoever judges by the path sees to that.
        """
        return arithmetic.braking_path(command, self.position, self._limits, self.most_ticks)

    def rest_after(self, command: np.ndarray) -> np.ndarray:
        """Return where (A,) full braking from ``command`` (A,) ends."""
        rest: np.ndarray = self.braking_path(command)[-1]
        return rest

    def window(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the smallest and largest displacement (A,) that keep all limits, full braking among them."""
        return arithmetic.window(*self._now, self._limits)

    def permits(self, command: np.ndarray) -> bool:
        """Return whether ``command`` (A,) may follow: all limits kept, and a stop inside the range possible after it.

        The command is one inside `window`, from which a stop is possible, or between two such: a convex set.
        """
        return not self.violations(command)

    def violations(self, command: np.ndarray) -> int:
        """Stage 11: return the flags of the limits that ``command`` (A,) breaks; 0 if it keeps all of them exactly."""
        return FLAGS[arithmetic.broken(command, *self._now, self._limits)]

    def commit(self, command: np.ndarray) -> None:
        """Take ``command`` (A,) as sent."""
        self.step = command - self.position
        self.position = command
        if self._low_now is not self.low:
            self._widen()

    def bounded(self, command: np.ndarray) -> np.ndarray:
        """Return ``command`` (A,) inside the range that is now permitted."""
        return np.minimum(np.maximum(command, self._low_now), self._high_now)
