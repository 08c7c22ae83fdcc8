"""What a comparison says: success with intervals, gain over the base, curves, and a recommendation in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robot_rl.rollout.evaluate import wilson

_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Quantiles of Student's distribution for 95 %, by degrees of freedom from one."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Test:
    """Outcome of one policy on the test episodes."""

    successes: int
    episodes: int

    @property
    def rate(self) -> float:
        """Share of successful episodes."""
        return self.successes / self.episodes


@dataclass(frozen=True)
class Curve:
    """Validation success of one run."""

    steps: Sequence[float]
    seconds: Sequence[float]
    success: Sequence[float]


@dataclass(frozen=True)
class SeedResult:
    """A finished run."""

    method: str
    seed: int
    test: Test
    steps: int
    """Environment steps, over all lanes."""
    seconds: float
    """Wall-clock time, validation included."""
    curve: Curve


def over_seeds(rates: Sequence[float]) -> Interval:
    """Return Student's 95 % interval of the mean over seeds, within 0 and 1; (0, 1) for a single seed."""
    count = len(rates)
    if count < 2:
        return 0.0, 1.0
    mean, half = float(np.mean(rates)), _student(count - 1) * float(np.std(rates, ddof=1)) / math.sqrt(count)
    return max(0.0, mean - half), min(1.0, mean + half)


def success_interval(tests: Sequence[Test]) -> Interval:
    """Return the 95 % interval of a method's success.

    With one seed it is Wilson's, of that one policy. With several it is the wider one of Wilson's over all episodes and
    Student's over seeds, at either end: seeds can differ by more than their episodes explain.
    """
    low, high = wilson(sum(test.successes for test in tests), sum(test.episodes for test in tests))
    if len(tests) < 2:
        return low, high
    seeds = over_seeds([test.rate for test in tests])
    return min(low, seeds[0]), max(high, seeds[1])


def difference_interval(after: float, of_after: Interval, before: float, of_before: Interval) -> Interval:
    """Return the 95 % interval of ``after - before`` from those of both (R. G. Newcombe, 1998, method 10)."""
    gain = after - before
    below = math.hypot(after - of_after[0], of_before[1] - before)
    above = math.hypot(of_after[1] - after, before - of_before[0])
    return gain - below, gain + above


def summarise(
    *,
    methods: Sequence[str],
    bases: Mapping[str, Test],
    base_of: Mapping[str, str],
    results: Sequence[SeedResult],
    errors: Mapping[str, str],
) -> dict[str, Any]:
    """Return bases, one row per method (best first, failed last) and the recommendation, ready for JSON.

    Args:
        methods: all methods of the comparison.
        bases: tests of the policies that were improved, by name.
        base_of: name of each method's base.
        results: finished runs.
        errors: methods that failed with some seed, and why.
    """
    rows = []
    for method in methods:
        own = [result for result in results if result.method == method]
        row: dict[str, Any] = {"method": method, "base": base_of[method], "error": errors.get(method, "")}
        rows.append(row | (_measured(own, bases[base_of[method]]) if own else {"seeds": []}))
    rows.sort(key=lambda row: (not row["seeds"], -row.get("success", 0.0)))
    described = {name: _of_one(test) for name, test in bases.items()}
    return {"bases": described, "methods": rows, "recommendation": recommend(rows, described)}


def recommend(rows: Sequence[Mapping[str, Any]], bases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return sentences: what to use, how certain that is, and what is worse than it was.

    Args:
        rows: `summarise`'s rows, best first.
        bases: `summarise`'s bases.
    """
    measured = [row for row in rows if row["seeds"]]
    said = []
    if not measured:
        said.append("Nothing was measured: no run has finished.")
    else:
        said += _choice(measured)
        worse = [row["method"] for row in measured if row["interval"][1] < bases[row["base"]]["interval"][0]]
        if worse:
            said.append(f"Below their base, beyond both intervals: {_listed(worse)}.")
        said += _certainty(measured)
    failed = [row for row in rows if row["error"]]
    said += [f"{row['method']} failed: {row['error']}" for row in failed]
    return said


def _choice(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    best = measured[0]
    rivals = [row for row in measured[1:] if row["interval"][1] >= best["interval"][0]]
    described = f"{best['method']} at {_share(best)}"
    if best["gain"] <= 0:
        return [
            f"No method is better than its base: the best is {described}. Keep the base, or compare with more budget."
        ]
    if best["gain_interval"][0] <= 0:
        return [
            f"No method is clearly better than its base: the best is {described}, and its gain of "
            f"{100 * best['gain']:+.1f} points could be none. Keep the base, or compare with more budget."
        ]
    gained = f"a gain of {100 * best['gain']:.1f} points over its base"
    if len(measured) == 1:
        return [f"{described}: {gained}. It was the only method."]
    if not rivals:
        return [f"Use {described}, {gained}: its interval lies above those of all others."]
    names = _listed([f"{row['method']} ({100 * row['success']:.1f} %)" for row in rivals])
    sentences = [f"No clear winner: {described}, {gained}, is the highest, and these overlap with it: {names}."]
    level = best["interval"][0]
    first = min([best, *rivals], key=lambda row: _steps_to(row, level))
    if math.isfinite(_steps_to(first, level)):
        sentences.append(
            f"Of these {first['method']} reached {100 * level:.0f} %, the low end of the highest, in validation with "
            f"the fewest environment steps ({_steps_to(first, level):,.0f})."
        )
    return sentences


def _steps_to(row: Mapping[str, Any], level: float) -> float:
    """Return the environment steps after which validation first showed ``level``."""
    curve = row["curve_steps"]
    return min((x for x, y in zip(curve["x"], curve["mean"], strict=True) if y >= level), default=math.inf)


def _certainty(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    counts = {len(row["seeds"]) for row in measured}
    said = []
    if 1 in counts:
        once = [row["method"] for row in measured if len(row["seeds"]) == 1]
        subject = "Every method" if counts == {1} else _listed(once)
        said.append(
            f"{subject} ran with one seed: such an interval is that of one trained policy, and another seed may turn "
            "the order."
        )
    if counts - {1}:
        said.append(
            "With several seeds an interval is the wider one of Wilson's over episodes and Student's over seeds."
        )
    if len(measured) > 2:
        said.append("The highest of several, measured on the same episodes, looks a little better than it is.")
    return said


def _measured(results: Sequence[SeedResult], base: Test) -> dict[str, Any]:
    tests = [result.test for result in results]
    success = sum(test.successes for test in tests) / sum(test.episodes for test in tests)
    interval = success_interval(tests)
    steps = float(np.mean([result.steps for result in results]))
    seconds = float(np.mean([result.seconds for result in results]))
    by_steps = mean_curve([(result.curve.steps, result.curve.success) for result in results])
    by_minutes = mean_curve([([s / 60 for s in result.curve.seconds], result.curve.success) for result in results])
    return {
        "seeds": [result.seed for result in results],
        "success_by_seed": [test.rate for test in tests],
        "episodes": sum(test.episodes for test in tests),
        "success": success,
        "wilson": wilson(sum(test.successes for test in tests), sum(test.episodes for test in tests)),
        "interval": interval,
        "gain": success - base.rate,
        "gain_interval": difference_interval(success, interval, base.rate, wilson(base.successes, base.episodes)),
        "steps": steps,
        "minutes": seconds / 60,
        "steps_per_second": steps / max(seconds, 1e-9),
        "curve_steps": by_steps,
        "curve_minutes": by_minutes,
    }


def mean_curve(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> dict[str, list[float]]:
    """Return the mean of curves (x, y) and the range of their values, as far as all of them go.

    Returns:
        ``x``, ``mean``, ``low`` and ``high``; a value between the points of a curve is interpolated.
    """
    sorted_curves = []
    for x, y in curves:
        order = np.argsort(x, kind="stable")
        sorted_curves.append((np.asarray(x, float)[order], np.asarray(y, float)[order]))
    # Before its first point a run is the base, which that point measured.
    grid = np.unique(np.concatenate([x for x, _ in sorted_curves]))
    grid = grid[grid <= min(x[-1] for x, _ in sorted_curves)]
    values = np.stack([np.interp(grid, x, y) for x, y in sorted_curves])
    columns = {"x": grid, "mean": values.mean(0), "low": values.min(0), "high": values.max(0)}
    return {name: column.tolist() for name, column in columns.items()}


def _of_one(test: Test) -> dict[str, Any]:
    return {"success": test.rate, "episodes": test.episodes, "interval": wilson(test.successes, test.episodes)}


def _student(freedom: int) -> float:
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = 1.959964
    # Cornish and Fisher's expansion, exact to a thousandth from here on.
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _share(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return f"{100 * row['success']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
