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

from hardware.safety.flags import SafetyFlag
from hardware.safety.motion import MotionLimiter, MotionState, all_of, any_of, braking_step
from robot_rl.core.errors import ConfigError
from robot_rl.core.robot import Limits

_POSITION, _VELOCITY, _ACCELERATION, _JERK = (
    int(flag)
    for flag in (
        SafetyFlag.POSITION_LIMITED,
        SafetyFlag.VELOCITY_LIMITED,
        SafetyFlag.ACCELERATION_LIMITED,
        SafetyFlag.JERK_LIMITED,
    )
)
_SLACK = 1e-6
"""Relative margin inside the limit that absorbs the rounding of third differences."""
_SHARES = np.linspace(0.0, 1.0, 13)[:, None]
"""(K, 1) parts of the way from braking to what is wished for that are tried."""


class JerkLimiter(MotionLimiter):
    """A `MotionLimiter` that keeps ``limits.jerk`` too, whether it follows a wish or brakes."""

    most_ticks = 400

    def __init__(self, limits: Limits, dt: float, resting: np.ndarray | None = None) -> None:
        """As `MotionLimiter`; raises `ConfigError` without a positive jerk limit."""
        super().__init__(limits, dt, resting)
        if limits.jerk is None or not (np.asarray(limits.jerk, float) > 0).all():
            raise ConfigError(f"a limit of the jerk must be positive in every element, got {limits.jerk}")
        self.largest_surge = np.broadcast_to(np.asarray(limits.jerk, float), self.low.shape) * dt**3
        """(A,) by how much the change of the step may change per tick."""
        self._surge = self.largest_surge * (1 - _SLACK)
        self.change = np.zeros_like(self.low)
        """(A,) by how much the step changed with the last command."""
        self._farthest = self.reach(self.largest_step, self.largest_change)[0]

    def anchor(self, position: np.ndarray) -> None:
        """Start from ``position`` (A,) at rest."""
        super().anchor(position)
        self.change = np.zeros_like(self.position)

    def save(self) -> MotionState:
        """Return all that the next command depends on, for `restore`."""
        return super().save()._replace(change=self.change)

    def restore(self, saved: MotionState) -> None:
        """Go back to what `save` returned."""
        super().restore(saved)
        assert saved.change is not None
        self.change = saved.change

    @property
    def moving(self) -> bool:
        """Whether the commanded motion has not yet come to rest."""
        return super().moving or any_of(self.change)

    def reach(self, step: np.ndarray, change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return bounds of how far braking leads forwards from ``step`` (…, A), and of the largest step in it.

        ``change`` (…, A) is led back to zero first if it points forwards, which takes m ticks and raises the step to
        ``w``; from there the way is at most that of continuous time, with the first tick's change taken off.
        """
        surge, most = self._surge, self._change
        forwards = np.maximum(change, 0.0)
        ticks = np.floor(forwards / surge)
        peak = step + ticks * (forwards - 0.5 * surge * (ticks + 1.0))
        way = ticks * (step + (ticks + 1.0) * (0.5 * forwards - surge * (ticks + 2.0) / 6.0))
        left = np.maximum(peak - np.minimum(surge - (forwards - ticks * surge), most), 0.0)
        stop = np.where(left * surge > most * most, 0.5 * left * (left / most + most / surge), left**1.5 / surge**0.5)
        return np.maximum(way + np.where(peak > 0.0, left + stop, 0.0), 0.0), peak

    def limit(self, target: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the permitted command (A,) nearest to ``target`` (A,) along the way, and the flags of what limited it.

        ``target`` itself is returned, bit for bit, if it keeps all limits.
        """
        if not self._behind and self._unhindered(target):
            self._last_target = target.copy()
            return self._last_target, 0
        position, step, change, surge = self.position, self.step, self.change, self._surge
        asked, target = target, np.minimum(np.maximum(target, self._low_now), self._high_now)
        wanted = target - position
        drift = np.minimum(np.maximum(target - self._last_target, -self._step_limit), self._step_limit)
        turn = wanted - step
        beyond = np.abs(asked - target) > self._rounding
        fast, sudden = np.abs(wanted) > self.largest_step, np.abs(turn) > self.largest_change
        jerky = np.abs(turn - change) > self.largest_surge
        self._last_target = target
        if not (self._behind or any_of(beyond | fast | sudden | jerky)) and all_of(self._stoppable(wanted, turn)):
            return target, 0
        most = self._change
        wish = np.minimum(np.maximum(np.minimum(np.maximum(turn, change - surge), change + surge), -most), most)
        wish, approached = self._towards(wanted, wish, drift)
        chosen, bounded = self._within_range(wish)
        reached = (chosen == turn) & ~(beyond | fast | sudden | jerky)
        self._behind = not all_of(reached)
        if not self._behind:
            return target, 0
        flags = _VELOCITY if any_of(fast) else 0
        flags |= _ACCELERATION if any_of(sudden) else 0
        flags |= _JERK if any_of(jerky | approached) else 0
        flags |= _POSITION if any_of(beyond | bounded) else 0
        return self.bounded(position + step + chosen), flags

    def _unhindered(self, target: np.ndarray) -> bool:
        """Return whether ``target`` (A,) keeps all limits, with room for more than `reach` bounds."""
        if not super()._unhindered(target):
            return False
        now = (target.tolist(), self.position.tolist(), self.step.tolist(), self.change.tolist())
        most = (self._change.tolist(), self._surge.tolist(), self._largest[0])
        for wish, place, step, change, hard, surge, fast, low, high in zip(*now, *most, *self._range, strict=True):
            way = wish - place
            turn = way - step
            peak = abs(way) + 0.5 * turn * turn / surge
            room = peak * (1.0 + abs(turn) / surge + 0.5 * (peak / hard + hard / surge))
            if not (abs(turn - change) <= surge and peak <= fast and low + room <= wish <= high - room):
                return False
        return True

    def brake(self) -> np.ndarray:
        """Return the next command (A,) of a stop that keeps the limits of acceleration and jerk."""
        chosen = self._braking(self.step, self.change)
        if self._has_rates:
            home = np.minimum(np.maximum(0.0, self.low), self.high)
            self._last_target = home  # a rest that does not move
            chosen = np.where(self.resting, self.limit(home)[0] - self.position - self.step, chosen)
        self._last_target = self.bounded(self.position + (self.step + chosen))
        self._behind = True
        return self._last_target

    @property
    def braking_ticks(self) -> int:
        """Ticks that a stop from full speed, and still gaining, takes at most."""
        return math.ceil((self.largest_step / self._change + 2.0 * self._change / self._surge).max()) + 2

    def braking_path(self, command: np.ndarray) -> np.ndarray:
        """Return the commands (T, A) from ``command`` (A,) through braking to standstill, first ``command``."""
        path, step = [command], command - self.position
        change = step - self.step
        for _ in range(self.most_ticks):
            change = self._braking(step, change)
            step = step + change
            if not any_of(step):
                break
            path.append(path[-1] + step)
        return np.array(path)

    def rest_after(self, command: np.ndarray) -> np.ndarray:
        """Return where (A,) braking from ``command`` (A,) ends, or up to two ticks' way beyond."""
        step = command - self.position
        side = np.sign(step)
        return command + side * self.reach(np.abs(step), side * (step - self.step))[0]

    def window(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the smallest and largest displacement (A,) that keep all limits but the range; see `permits`."""
        low = np.maximum(np.maximum(self.change - self._surge, -self._change) + self.step, -self._step_limit)
        high = np.minimum(np.minimum(self.change + self._surge, self._change) + self.step, self._step_limit)
        braked = self.step + self._braking(self.step, self.change)
        return np.minimum(low, braked), np.maximum(high, braked)

    def permits(self, command: np.ndarray) -> bool:
        """Return whether ``command`` (A,) may follow: within all limits, with a stop inside the range after it."""
        step = command - self.position
        return not self.violations(command) and all_of(self._stoppable(step, step - self.step))

    def violations(self, command: np.ndarray) -> int:
        """Stage 11: return the flags of the limits that ``command`` (A,) breaks; 0 if it keeps all of them exactly."""
        change = command - self.position - self.step
        kept = np.abs(change - self.change) <= self.largest_surge
        return super().violations(command) | (0 if all_of(kept) else _JERK)

    def commit(self, command: np.ndarray) -> None:
        """Take ``command`` (A,) as sent."""
        before = self.step
        super().commit(command)
        self.change = self.step - before

    def _braking(self, step: np.ndarray, change: np.ndarray) -> np.ndarray:
        """Return the change (A,) of the step that brakes: as much as can be led back to zero when the step is."""
        size = np.minimum(braking_step(np.abs(step), self._surge), self._change)
        return np.minimum(np.maximum(-np.sign(step) * size, change - self._surge), change + self._surge)

    def _stoppable(self, step: np.ndarray, change: np.ndarray) -> np.ndarray:
        """Return for steps (…, A) and their changes whether a stop inside range and velocity limit follows."""
        place = self.position + step
        above, below = self._high_now - place, place - self._low_now
        slow = np.abs(step) + 0.5 * change * change / self._surge <= self.largest_step
        if all_of(slow & (np.minimum(above, below) >= self._farthest)):
            return slow  # far from both ends, and no faster than permitted whichever way the change is led back
        forwards, peak = self.reach(step, change)
        backwards, trough = self.reach(-step, -change)
        within = (forwards <= above) & (backwards <= below)
        return within & (np.maximum(peak, trough) <= np.maximum(self.largest_step, np.abs(self.step)))

    def _towards(self, wanted: np.ndarray, wish: np.ndarray, drift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the change nearest to ``wish`` from which one can brake to the target, and where that is less.

        Braking is relative to the target's own motion ``drift``, so that neither overshoot nor lag remains.
        """
        braked = self._braking(self.step - drift, self.change)
        tried = braked + _SHARES * (wish - braked)
        steps, side = self.step + tried, np.sign(wanted - drift)  # who is ahead of a moving target waits for it
        left = side * (wanted - steps)
        permitted = (left >= 0.0) & (self.reach(side * (steps - drift), side * tried)[0] <= left)
        return _last(tried, permitted, wish)

    def _within_range(self, wish: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the change nearest to ``wish`` after which a stop inside the limits follows, and where that is less.

        Braking is such a change: the command before was admitted for it.
        """
        if all_of(self._stoppable(self.step + wish, wish)):
            return wish, np.zeros(wish.shape, bool)
        braked = self._braking(self.step, self.change)
        tried = braked + _SHARES * (wish - braked)
        return _last(tried, self._stoppable(self.step + tried, tried), wish)


def _last(tried: np.ndarray, permitted: np.ndarray, wish: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each element the last of ``tried`` (K, A) that is ``permitted``, else the first; and where not all.

    The last of all is ``wish`` (A,) itself, bit for bit.
    """
    last = len(tried) - 1 - np.argmax(permitted[::-1], axis=0)
    last = np.where(permitted.any(axis=0), last, 0)
    less = last < len(tried) - 1
    return np.where(less, tried[last, np.arange(tried.shape[1])], wish), less
