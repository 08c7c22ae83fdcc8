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

from hardware.safety.flags import SafetyFlag
from robot_rl.core.errors import ConfigError
from robot_rl.core.robot import Limits

_FAR = 1e9
_POSITION, _VELOCITY, _ACCELERATION = (
    int(flag) for flag in (SafetyFlag.POSITION_LIMITED, SafetyFlag.VELOCITY_LIMITED, SafetyFlag.ACCELERATION_LIMITED)
)
_SLACK = 1e-9
"""Relative margin inside the limits that absorbs rounding, so that the result keeps them exactly."""


def any_of(which: np.ndarray) -> bool:
    """Return whether any of ``which`` is true; of a few elements, counting them is the quickest way to ask."""
    return bool(np.count_nonzero(which))


def all_of(which: np.ndarray) -> bool:
    """Return whether all of ``which`` are true, as quickly as `any_of`."""
    return np.count_nonzero(which) == which.size


def braking_step(room: np.ndarray, brake: np.ndarray) -> np.ndarray:
    """Return the largest step (A,) from which a stop within ``room`` (A,) is possible.

    Args:
        room: distance to the limit, >= 0, in the command's unit.
        brake: by how much a step may shrink per tick, > 0, in the same unit.

    With n = floor((sqrt(1 + 8 room / brake) - 1) / 2) full braking ticks after it, the step d fulfils
    ``(n + 1) d - brake n (n + 1) / 2 = room``.
    """
    ticks = np.floor((np.sqrt(1.0 + 8.0 * room / brake) - 1.0) * 0.5)
    return room / (ticks + 1.0) + 0.5 * brake * ticks


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
    change: np.ndarray | None = None
    """(A,) by how much the step changed with the last command, where the jerk is limited."""


class MotionLimiter:
    """Stages 5 and 6: keeps a sequence of commands inside position, velocity and acceleration limits.

    ``position`` (A,) is the last command and ``step`` (A,) the displacement that led to it. Elements with ``resting``
    set are rates themselves (a base's speed): they brake towards zero instead of towards standing still.
    """

    most_ticks = 1000
    """Length of the longest braking path that is looked at, in ticks."""

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
        self._step_limit, self._change = self.largest_step * (1 - _SLACK), self.largest_change * (1 - _SLACK)
        self._range = (self.low.tolist(), self.high.tolist())
        self._largest = (self.largest_step.tolist(), self.largest_change.tolist())
        self.resting = np.zeros(low.shape, bool) if resting is None else np.asarray(resting, bool)
        self._has_rates = any_of(self.resting)
        self.position = np.clip(np.zeros_like(low), low, high)
        self.step = np.zeros_like(low)
        self._low_now, self._high_now = low, high
        self._last_target = self.position
        self._room = np.zeros((3, *low.shape))
        self._behind = False
        self._rounding = 1e-6 * np.maximum(np.abs(low), np.abs(high))

    def anchor(self, position: np.ndarray) -> None:
        """Start from ``position`` (A,) at rest; a start outside the range is kept and may only move inwards."""
        self.position = np.array(position, float)
        self.step = np.zeros_like(self.position)
        self._last_target = self.position
        self._behind = False
        self._widen()

    def save(self) -> MotionState:
        """Return all that the next command depends on, for `restore`; the arrays are replaced, never written."""
        return MotionState(self.position, self.step, self._low_now, self._high_now, self._last_target, self._behind)

    def restore(self, saved: MotionState) -> None:
        """Go back to what `save` returned, as if nothing had been committed since."""
        self.position, self.step, self._low_now, self._high_now, self._last_target, self._behind = saved[:6]

    def _widen(self) -> None:
        self._low_now = np.minimum(self.low, self.position)
        self._high_now = np.maximum(self.high, self.position)

    @property
    def moving(self) -> bool:
        """Whether the last command differed from the one before, or a rate is not zero."""
        return any_of(self.step) or (self._has_rates and any_of(self.position[self.resting]))

    def limit(self, target: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the permitted command (A,) nearest to ``target`` (A,) along the way, and the flags of what limited it.

        ``target`` itself is returned, bit for bit, if it keeps all limits (or breaks the range by no more than the
        rounding of single precision, which is not an intervention).
        """
        position, step, change = self.position, self.step, self._change
        if not self._behind and self._unhindered(target):
            self._last_target = target.copy()
            return self._last_target, 0
        asked, target = target, np.minimum(np.maximum(target, self._low_now), self._high_now)
        wanted = target - position
        np.subtract(self._high_now, position, out=self._room[0])
        np.subtract(position, self._low_now, out=self._room[1])
        size = np.abs(wanted, out=self._room[2])
        upper, lower, approach = braking_step(self._room, change)
        lower = -lower
        turn = np.abs(wanted - step)
        beyond = np.abs(asked - target) > self._rounding
        outside = (wanted > upper) | (wanted < lower) | beyond
        fast, sudden = size > self.largest_step, turn > self.largest_change
        drift = target - self._last_target
        self._last_target = target
        if not (self._behind or any_of(outside | fast | sudden)):
            return target, 0
        # Approach no faster than one can brake to the target (relative to its own motion): no overshoot, no hunting.
        direction = np.sign(wanted)
        approach = np.maximum(approach + direction * drift, 0.0)
        sudden |= size > approach
        self._behind = any_of(outside | fast | sudden)
        if not self._behind:
            return target, 0
        flags = 0
        if any_of(fast):
            flags |= _VELOCITY
        if any_of(sudden):
            flags |= _ACCELERATION
        if any_of(beyond | (outside & ~fast & ~sudden)):
            flags |= _POSITION
        allowed = direction * np.minimum(np.minimum(size, approach), self._step_limit)
        allowed = np.minimum(np.maximum(allowed, lower), upper)
        allowed = np.minimum(np.maximum(allowed, step - change), step + change)
        return self.bounded(position + allowed), flags

    def _unhindered(self, target: np.ndarray) -> bool:
        """Return whether ``target`` (A,) keeps all limits, with room for the braking distance of continuous time.

        In plain numbers: for as few elements as a robot has, that costs a fraction of what arrays do.
        """
        now = (target.tolist(), self.position.tolist(), self.step.tolist(), self._change.tolist())
        for wish, place, step, brake, low, high, fast, hard in zip(*now, *self._range, *self._largest, strict=True):
            way = wish - place
            room = 0.5 * way * way / brake
            if not (low + room <= wish <= high - room and -fast <= way <= fast and -hard <= way - step <= hard):
                return False
        return True

    def brake(self) -> np.ndarray:
        """Return the next command (A,) of the fastest stop that keeps the acceleration limits."""
        step = self.step - np.minimum(np.maximum(self.step, -self._change), self._change)
        if self._has_rates:
            home = np.minimum(np.maximum(0.0, self.low), self.high)
            self._last_target = home  # a rest that does not move
            step = np.where(self.resting, self.limit(home)[0] - self.position, step)
        self._last_target = self.bounded(self.position + step)
        self._behind = True
        return self._last_target

    @property
    def braking_ticks(self) -> int:
        """Ticks that a stop from full speed takes."""
        return math.ceil((self.largest_step / self._change).max())

    def braking_path(self, command: np.ndarray) -> np.ndarray:
        """Return the commands (T, A) from ``command`` (A,) through full braking to standstill, first ``command``.

        All of them, if `braking_ticks` are no more than `most_ticks`: whoever judges by the path sees to that.
        """
        step = command - self.position
        needed = min(self.most_ticks, math.ceil((np.abs(step) / self._change).max()))
        shrink = np.arange(needed + 1)[:, None] * self._change
        steps = np.sign(step) * np.maximum(np.abs(step) - shrink, 0.0)
        steps[0] = 0.0
        return command + np.cumsum(steps, axis=0)

    def rest_after(self, command: np.ndarray) -> np.ndarray:
        """Return where (A,) full braking from ``command`` (A,) ends."""
        rest: np.ndarray = self.braking_path(command)[-1]
        return rest

    def window(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the smallest and largest displacement (A,) that keep all limits, full braking among them."""
        step, change = self.step, self._change
        room = np.stack([self._high_now - self.position, self.position - self._low_now])
        upper, lower = braking_step(room, change)
        low = np.maximum(np.maximum(-lower, -self._step_limit), step - change)
        high = np.minimum(np.minimum(upper, self._step_limit), step + change)
        braked = step - np.minimum(np.maximum(step, -change), change)
        return np.minimum(low, braked), np.maximum(high, braked)

    def permits(self, command: np.ndarray) -> bool:
        """Return whether ``command`` (A,) may follow: all limits kept, and a stop inside the range possible after it.

        The command is one inside `window`, from which a stop is possible, or between two such: a convex set.
        """
        return not self.violations(command)

    def violations(self, command: np.ndarray) -> int:
        """Stage 11: return the flags of the limits that ``command`` (A,) breaks; 0 if it keeps all of them exactly."""
        now = (command.tolist(), self.position.tolist(), self.step.tolist())
        bounds = (self._low_now.tolist(), self._high_now.tolist(), *self._largest)
        flags = 0
        for next_place, place, step, low, high, fast, hard in zip(*now, *bounds, strict=True):
            way = next_place - place
            # Each in this form, so that what is no number breaks them all.
            if not low <= next_place <= high:
                flags |= _POSITION
            if not abs(way) <= max(fast, abs(step)):
                flags |= _VELOCITY
            if not abs(way - step) <= hard:
                flags |= _ACCELERATION
        return flags

    def commit(self, command: np.ndarray) -> None:
        """Take ``command`` (A,) as sent."""
        self.step = command - self.position
        self.position = command
        if self._low_now is not self.low or self._high_now is not self.high:
            self._widen()

    def bounded(self, command: np.ndarray) -> np.ndarray:
        """Return ``command`` (A,) inside the range that is now permitted."""
        return np.minimum(np.maximum(command, self._low_now), self._high_now)
