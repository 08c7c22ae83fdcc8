"""The frame of every benchmark: what a result records, where it is kept, and how time is measured."""

from __future__ import annotations

import json
import math
import operator
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from robot_rl.train.run import commit, processor, to_plain, versions, write_text

RESULTS = Path(__file__).resolve().parent / "results"
_COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


def report(
    name: str,
    *,
    seeds: Sequence[int] | int | str,
    budget: Mapping[str, Any] | str,
    metrics: Mapping[str, float],
    peers: Mapping[str, Any] | None = None,
    targets: Mapping[str, tuple[str, float] | list[Any]] | None = None,
    notes: str = "",
) -> dict[str, Any]:
    """Keep a result in ``benchmarks/results/<name>.json`` and print it as one line ``RESULT {json}``.

    Args:
        name: Name of the benchmark: that of its script.
        seeds: Seeds of what was measured.
        budget: What was spent: time, steps, episodes, threads.
        metrics: Measured values by name.
        peers: Values of other software, measured in the same run.
        targets: For each metric with a goal, ``[">=" or "<=", value]``; a target without its metric is not met.
        notes: What a reader must know to judge the numbers.

    Returns:
        The result as kept; ``met`` says for each target whether its metric reached it.
    """
    targets = targets or {}
    result = {
        "name": name,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "machine": machine(),
        "versions": {k: v for k, v in versions().items() if k not in ("commit", "processor", "cores")},
        "seeds": seeds,
        "budget": budget,
        "metrics": {key: _rounded(value) for key, value in metrics.items()},
        "peers": peers or {},
        "targets": {key: list(target) for key, target in targets.items()},
        "met": {key: _reached(metrics.get(key), *target) for key, target in targets.items()},
        "notes": notes,
    }
    plain = to_plain(result)
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / f"{name}.json", json.dumps(plain, indent=2) + "\n")
    print("RESULT " + json.dumps(plain), flush=True)
    return plain


def machine() -> dict[str, Any]:
    """Return processor, cores usable by this process and memory in GiB; nothing that names the machine."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages * size / 2**30, 1),
    }


@dataclass
class Timing:
    """Time spent in a measured block, in seconds."""

    wall: float = 0.0
    """Time by the clock."""
    cpu: float = 0.0
    """Processor time of this process and all its threads; finished child processes count too."""


@contextmanager
def measure() -> Iterator[Timing]:
    """Measure the block: the yielded `Timing` is filled when it ends.

    Work in child processes counts once they have been waited for, so close vector environments inside the block.
    """
    timing = Timing()
    wall, cpu = time.perf_counter(), _cpu_seconds()
    try:
        yield timing
    finally:
        timing.wall, timing.cpu = time.perf_counter() - wall, _cpu_seconds() - cpu


def steps_per_cpu_second(step: Callable[[], Any], steps_per_call: int, seconds: float = 3.0, warmup: int = 3) -> float:
    """Call ``step`` for about ``seconds`` and return steps per second of processor time of all threads."""
    for _ in range(warmup):
        step()
    calls = 0
    with measure() as timing:
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            step()
            calls += 1
    return calls * steps_per_call / timing.cpu


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _reached(value: float | None, comparison: str, bound: float) -> bool:
    return value is not None and math.isfinite(value) and _COMPARE[comparison](value, bound)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
