"""The arithmetic of the limits of motion, element by element, compiled before the first tick.

`hardware.safety.motion` and `hardware.safety.jerk` say what it means. Arrays are (A,), all in displacement per tick;
``limits`` (R, A) holds one limit per row, in the order of the constants below.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from robot_rl.core.compiled import (
    INTEGER,
    MATRIX,
    NEW_MATRIX,
    NEW_VECTOR,
    NUMBER,
    TRUTH,
    VECTOR,
    compiled,
    compiled_ufunc,
    part_of_compiled,
)

STEP, INNER_STEP, CHANGE, INNER_CHANGE, ROUNDING, SURGE, INNER_SURGE, FARTHEST = range(8)
"""Rows of ``limits``: largest step, its change and the change of that (surge), each also less a margin that absorbs
rounding; what counts as rounding of a position; and the longest way to standstill. Without a limit of the jerk the last
three are missing."""
POSITION, VELOCITY, ACCELERATION, JERK = 1, 2, 4, 8
"""Bits of the limits that shaped or would have to shape a command."""
_SHARES = 12
"""In how many parts the way from braking to what is wished for is divided to find the largest one permitted."""
_LEAST, _UNBOUNDED = 1e-12, 1e30
"""Metres that a distance's change can be braked by per tick, at least, where no joint changes it; and no bound."""
_Limited = numba.types.Tuple((NEW_VECTOR, NEW_VECTOR, INTEGER, TRUTH))
_Window = numba.types.Tuple((NEW_VECTOR, NEW_VECTOR))


@compiled_ufunc(NUMBER(NUMBER, NUMBER))
def braking_step(room: Any, brake: Any) -> Any:
    """Return the largest step from which a stop within ``room`` is possible; of numbers or, as a ufunc, of arrays.

    Args:
        room: distance to the limit, >= 0, in the command's unit.
        brake: by how much a step may shrink per tick, > 0, in the same unit.

    With n = floor((sqrt(1 + 8 room / brake) - 1) / 2) full braking ticks after it, the step d fulfils
    ``(n + 1) d - brake n (n + 1) / 2 = room``.
    """
    ticks = math.floor((math.sqrt(1.0 + 8.0 * room / brake) - 1.0) * 0.5)
    return room / (ticks + 1.0) + 0.5 * brake * ticks


@part_of_compiled
def _between(low: float, value: float, high: float) -> float:
    return min(max(value, low), high)


@part_of_compiled
def _within(way: float, step: float, limits: np.ndarray, k: int) -> float:
    """Return the displacement nearest to ``way`` that the limit of acceleration permits after ``step``.

    Half of its margin is left for what a step rounds; the other half makes good what the steps before have rounded,
    each of which a stop at the end of the range would otherwise carry on until its last tick.
    """
    change = 0.5 * (limits[CHANGE, k] + limits[INNER_CHANGE, k])
    return _between(step - change, way, step + change)


@compiled(_Limited(VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, MATRIX, TRUTH))
def limited(
    target: np.ndarray,
    last: np.ndarray,
    position: np.ndarray,
    step: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    limits: np.ndarray,
    behind: bool,
) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """Limit one command.

    Args:
        target: what is asked for.
        last: what was asked for before.
        position: the last command.
        step: the displacement that led to it.
        low: lowest position permitted.
        high: highest position permitted.
        limits: rows up to ``ROUNDING``.
        behind: whether the last command fell short of what was asked for.

    Returns:
        The permitted command nearest to ``target``, what of ``target`` lies in the range, which limits shaped the
        command, and whether it falls short.
    """
    size = len(position)
    wish, command = np.empty(size), np.empty(size)
    hindered = behind
    for k in range(size):
        wish[k] = _between(low[k], target[k], high[k])
        way, brake = wish[k] - position[k], limits[INNER_CHANGE, k]
        hindered |= abs(way) > limits[STEP, k] or abs(way - step[k]) > limits[CHANGE, k]
        hindered |= way > braking_step(high[k] - position[k], brake) or way < -braking_step(position[k] - low[k], brake)
        hindered |= abs(target[k] - wish[k]) > limits[ROUNDING, k]
    if not hindered:
        return wish, wish, 0, False
    which, short = 0, False
    for k in range(size):
        way, brake = wish[k] - position[k], limits[INNER_CHANGE, k]
        upper, lower = braking_step(high[k] - position[k], brake), -braking_step(position[k] - low[k], brake)
        direction = np.sign(way)
        # Approach no faster than one can brake to the target (relative to its own motion): no overshoot, no hunting.
        approach = max(braking_step(abs(way), brake) + direction * (wish[k] - last[k]), 0.0)
        beyond = abs(target[k] - wish[k]) > limits[ROUNDING, k]
        outside = way > upper or way < lower or beyond
        fast = abs(way) > limits[STEP, k]
        sudden = abs(way - step[k]) > limits[CHANGE, k] or abs(way) > approach
        short |= outside or fast or sudden
        if fast:
            which |= VELOCITY
        if sudden:
            which |= ACCELERATION
        if beyond or (outside and not fast and not sudden):
            which |= POSITION
        allowed = direction * min(abs(way), approach, limits[INNER_STEP, k])
        allowed = _within(_between(lower, allowed, upper), step[k], limits, k)
        command[k] = _between(low[k], position[k] + allowed, high[k])
    return (command, wish, which, True) if short else (wish, wish, 0, False)


@compiled(INTEGER(VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, MATRIX))
def broken(
    command: np.ndarray, position: np.ndarray, step: np.ndarray, low: np.ndarray, high: np.ndarray, limits: np.ndarray
) -> int:
    """Return which limits ``command`` breaks. What is no number breaks them all."""
    which = 0
    for k in range(len(position)):
        way = command[k] - position[k]
        if not low[k] <= command[k] <= high[k]:
            which |= POSITION
        if not abs(way) <= max(limits[STEP, k], abs(step[k])):
            which |= VELOCITY
        if not abs(way - step[k]) <= limits[CHANGE, k]:
            which |= ACCELERATION
    return which


@compiled(NEW_VECTOR(VECTOR, VECTOR, VECTOR, VECTOR, MATRIX))
def braked(position: np.ndarray, step: np.ndarray, low: np.ndarray, high: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return the next command of the fastest stop that keeps the limit of acceleration."""
    command = np.empty(len(position))
    for k in range(len(position)):
        brake = limits[INNER_CHANGE, k]
        upper, lower = braking_step(high[k] - position[k], brake), -braking_step(position[k] - low[k], brake)
        slowed = _between(lower, step[k] - _between(-brake, step[k], brake), upper)
        command[k] = _between(low[k], position[k] + _within(slowed, step[k], limits, k), high[k])
    return command


@compiled(NEW_MATRIX(VECTOR, VECTOR, MATRIX, INTEGER))
def braking_path(command: np.ndarray, position: np.ndarray, limits: np.ndarray, most: int) -> np.ndarray:
    """Return the commands (T, A) from ``command`` through full braking to standstill, ``most`` ticks of it at most."""
    size, needed = len(command), 0.0
    for k in range(size):
        needed = max(needed, math.ceil(abs(command[k] - position[k]) / limits[INNER_CHANGE, k]))
    ticks = int(min(needed, most))
    path = np.empty((ticks + 1, size))
    for k in range(size):
        step, way = command[k] - position[k], 0.0
        path[0, k] = command[k]
        for tick in range(1, ticks + 1):
            way += np.sign(step) * max(abs(step) - tick * limits[INNER_CHANGE, k], 0.0)
            path[tick, k] = command[k] + way
    return path


@compiled(_Window(VECTOR, VECTOR, VECTOR, VECTOR, MATRIX))
def window(
    position: np.ndarray, step: np.ndarray, low: np.ndarray, high: np.ndarray, limits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and largest displacement that keep all limits, full braking among them."""
    least, most = np.empty(len(position)), np.empty(len(position))
    for k in range(len(position)):
        brake, fast = limits[INNER_CHANGE, k], limits[INNER_STEP, k]
        slowed = step[k] - _between(-brake, step[k], brake)
        least[k] = min(max(-braking_step(position[k] - low[k], brake), -fast, step[k] - brake), slowed)
        most[k] = max(min(braking_step(high[k] - position[k], brake), fast, step[k] + brake), slowed)
    return least, most


@compiled(_Window(MATRIX, MATRIX, VECTOR, VECTOR, VECTOR, NUMBER, NUMBER))
def slide_bounds(
    rows: np.ndarray,
    ends: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    brake: np.ndarray,
    apart: float,
    returning: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the upper and lower bounds (A + N,) of a displacement and of how it changes N distances.

    Args:
        rows: (N, A) how each distance changes per displacement.
        ends: (N, 7) with the distances in the last column.
        low: (A,) smallest displacement.
        high: (A,) largest one.
        brake: (A,) by how much a displacement may shrink per tick.
        apart: what must be left of each distance.
        returning: share of what is missing there that a distance must grow by.
    """
    size = len(low)
    upper, lower = np.full(size + len(rows), _UNBOUNDED), np.empty(size + len(rows))
    for k in range(size):
        upper[k], lower[k] = high[k], low[k]
    for row in range(len(rows)):
        brakes, room = 0.0, ends[row, 6] - apart
        for k in range(size):
            brakes += abs(rows[row, k]) * brake[k]
        shrinks = braking_step(room, max(0.5 * brakes, _LEAST)) if room > 0.0 else returning * room
        lower[size + row] = -shrinks
    return upper, lower


@part_of_compiled
def _reach(step: float, change: float, surge: float, most: float) -> tuple[float, float]:
    """Return a bound of how far braking leads forwards from ``step``, and the largest step in it; see `jerk.reach`."""
    forwards = max(change, 0.0)
    ticks = math.floor(forwards / surge)
    peak = step + ticks * (forwards - 0.5 * surge * (ticks + 1.0))
    way = ticks * (step + (ticks + 1.0) * (0.5 * forwards - surge * (ticks + 2.0) / 6.0))
    left = max(peak - min(surge - (forwards - ticks * surge), most), 0.0)
    if peak > 0.0:
        long = left * surge > most * most
        way += left + (0.5 * left * (left / most + most / surge) if long else left * math.sqrt(left / surge))
    return max(way, 0.0), peak


@part_of_compiled
def _braking(step: float, change: float, surge: float, most: float) -> float:
    """Return the change of the step that brakes: as much as can be led back to zero when the step is."""
    size = min(braking_step(abs(step), surge), most)
    return _between(change - surge, -np.sign(step) * size, change + surge)


@part_of_compiled
def _stoppable(
    step: float, change: float, position: float, before: float, low: float, high: float, limits: np.ndarray, k: int
) -> bool:
    """Return whether a stop inside range and velocity limit follows a ``step``, the one ``before`` it being known."""
    surge, most, fast = limits[INNER_SURGE, k], limits[INNER_CHANGE, k], limits[STEP, k]
    above, below = high - (position + step), (position + step) - low
    if abs(step) + 0.5 * change * change / surge <= fast and min(above, below) >= limits[FARTHEST, k]:
        return True  # far from both ends, and no faster than permitted whichever way the change is led back
    forwards, peak = _reach(step, change, surge, most)
    backwards, trough = _reach(-step, -change, surge, most)
    return forwards <= above and backwards <= below and max(peak, trough) <= max(fast, abs(before))


@part_of_compiled
def _arrives(tried: float, step: float, way: float, drift: float, surge: float, most: float) -> bool:
    """Return whether the target can be braked to after the change ``tried``, relative to the target's own ``drift``."""
    side = np.sign(way - drift)  # who is ahead of a moving target waits for it
    left = side * (way - (step + tried))
    return left >= 0.0 and _reach(side * (step + tried - drift), side * tried, surge, most)[0] <= left


@compiled(_Limited(VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, MATRIX, TRUTH))
def limited_jerk(
    target: np.ndarray,
    last: np.ndarray,
    position: np.ndarray,
    step: np.ndarray,
    change: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    limits: np.ndarray,
    behind: bool,
) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """As `limited`, with the jerk: ``change`` is by how much the step changed with the last command."""
    size = len(position)
    wish, command = np.empty(size), np.empty(size)
    hindered = behind
    for k in range(size):
        wish[k] = _between(low[k], target[k], high[k])
        way = wish[k] - position[k]
        turn = way - step[k]
        hindered |= abs(way) > limits[STEP, k] or abs(turn) > limits[CHANGE, k]
        hindered |= abs(turn - change[k]) > limits[SURGE, k] or abs(target[k] - wish[k]) > limits[ROUNDING, k]
        if not hindered:
            hindered = not _stoppable(way, turn, position[k], step[k], low[k], high[k], limits, k)
    if not hindered:
        return wish, wish, 0, False
    which, short = 0, False
    for k in range(size):
        way, surge, most = wish[k] - position[k], limits[INNER_SURGE, k], limits[INNER_CHANGE, k]
        turn = way - step[k]
        beyond = abs(target[k] - wish[k]) > limits[ROUNDING, k]
        fast, sudden = abs(way) > limits[STEP, k], abs(turn) > limits[CHANGE, k]
        jerky = abs(turn - change[k]) > limits[SURGE, k]
        drift = _between(-limits[INNER_STEP, k], wish[k] - last[k], limits[INNER_STEP, k])
        goal = _between(-most, _between(change[k] - surge, turn, change[k] + surge), most)
        # The change nearest to the goal from which one can brake to the target.
        chosen, part = goal, _SHARES
        rest = _braking(step[k] - drift, change[k], surge, most)
        while part > 0 and not _arrives(chosen, step[k], way, drift, surge, most):
            part -= 1
            chosen = rest + part / _SHARES * (goal - rest)
        approached = part < _SHARES
        # Of those, the one after which a stop inside the limits follows; braking is one, the last command saw to that.
        goal, part = chosen, _SHARES
        rest = _braking(step[k], change[k], surge, most)
        while part > 0 and not _stoppable(step[k] + chosen, chosen, position[k], step[k], low[k], high[k], limits, k):
            part -= 1
            chosen = rest + part / _SHARES * (goal - rest)
        bounded = part < _SHARES
        short |= chosen != turn or beyond or fast or sudden or jerky
        if fast:
            which |= VELOCITY
        if sudden:
            which |= ACCELERATION
        if jerky or approached:
            which |= JERK
        if beyond or bounded:
            which |= POSITION
        command[k] = _between(low[k], position[k] + step[k] + chosen, high[k])
    return (command, wish, which, True) if short else (wish, wish, 0, False)


@compiled(INTEGER(VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, MATRIX, VECTOR))
def broken_jerk(
    command: np.ndarray,
    position: np.ndarray,
    step: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    limits: np.ndarray,
    change: np.ndarray,
) -> int:
    """As `broken`, with the jerk."""
    which = broken(command, position, step, low, high, limits)
    for k in range(len(position)):
        if not abs(command[k] - position[k] - step[k] - change[k]) <= limits[SURGE, k]:
            which |= JERK
    return which


@compiled(TRUTH(VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, MATRIX))
def stoppable(
    command: np.ndarray, position: np.ndarray, step: np.ndarray, low: np.ndarray, high: np.ndarray, limits: np.ndarray
) -> bool:
    """Return whether a stop inside the limits follows ``command``."""
    for k in range(len(position)):
        way = command[k] - position[k]
        if not _stoppable(way, way - step[k], position[k], step[k], low[k], high[k], limits, k):
            return False
    return True


@compiled(NEW_VECTOR(VECTOR, VECTOR, MATRIX))
def braking_change(step: np.ndarray, change: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return the change of the step that brakes within the limits of acceleration and jerk."""
    found = np.empty(len(step))
    for k in range(len(step)):
        found[k] = _braking(step[k], change[k], limits[INNER_SURGE, k], limits[INNER_CHANGE, k])
    return found


@compiled(NEW_MATRIX(VECTOR, VECTOR, VECTOR, MATRIX, INTEGER))
def braking_path_jerk(
    command: np.ndarray, position: np.ndarray, step: np.ndarray, limits: np.ndarray, most: int
) -> np.ndarray:
    """Return the commands (T, A) from ``command`` through braking to standstill, ``most`` ticks of it at most."""
    size = len(command)
    path, steps, changes = np.empty((most + 1, size)), np.empty(size), np.empty(size)
    for k in range(size):
        path[0, k], steps[k] = command[k], command[k] - position[k]
        changes[k] = steps[k] - step[k]
    for tick in range(1, most + 1):
        moves = False
        for k in range(size):
            changes[k] = _braking(steps[k], changes[k], limits[INNER_SURGE, k], limits[INNER_CHANGE, k])
            steps[k] += changes[k]
            moves |= steps[k] != 0.0
            path[tick, k] = path[tick - 1, k] + steps[k]
        if not moves:
            return path[:tick].copy()
    return path


@compiled(_Window(VECTOR, VECTOR, MATRIX))
def reaches(step: np.ndarray, change: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return bounds of how far braking leads forwards from each ``step``, and of the largest step on the way."""
    ways, peaks = np.empty(len(step)), np.empty(len(step))
    for k in range(len(step)):
        ways[k], peaks[k] = _reach(step[k], change[k], limits[INNER_SURGE, k], limits[INNER_CHANGE, k])
    return ways, peaks


@compiled(NEW_VECTOR(VECTOR, VECTOR, VECTOR, MATRIX))
def rest_after_jerk(command: np.ndarray, position: np.ndarray, step: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return where braking from ``command`` ends, or up to two ticks' way beyond."""
    rest = np.empty(len(command))
    for k in range(len(command)):
        way = command[k] - position[k]
        side = np.sign(way)
        surge, most = limits[INNER_SURGE, k], limits[INNER_CHANGE, k]
        rest[k] = command[k] + side * _reach(abs(way), side * (way - step[k]), surge, most)[0]
    return rest


@compiled(_Window(VECTOR, VECTOR, MATRIX))
def window_jerk(step: np.ndarray, change: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and largest displacement that keep all limits but the range."""
    least, most = np.empty(len(step)), np.empty(len(step))
    for k in range(len(step)):
        surge, brake, fast = limits[INNER_SURGE, k], limits[INNER_CHANGE, k], limits[INNER_STEP, k]
        slowed = step[k] + _braking(step[k], change[k], surge, brake)
        least[k] = min(max(max(change[k] - surge, -brake) + step[k], -fast), slowed)
        most[k] = max(min(min(change[k] + surge, brake) + step[k], fast), slowed)
    return least, most


@compiled(TRUTH(VECTOR, VECTOR, VECTOR))
def lags(command: np.ndarray, measured: np.ndarray, allowed: np.ndarray) -> bool:
    """Return whether any element is farther from its command than ``allowed``, or is no number.

    What may be anywhere has a negative ``allowed``.
    """
    found = False
    for k in range(len(command)):
        found |= allowed[k] >= 0.0 and not abs(command[k] - measured[k]) <= allowed[k]
    return found
