"""Whether `torch.compile` pays: training steps of a flow policy and off-policy updates, compiled against eager.

The policy's network is what is compiled, and for the updates the networks of a SAC loop as one writes it down, beside
our own update, which is written out by hand. Compiling takes a C++ compiler and the seconds that are given; a speed-up
of ``s`` has paid for them after ``compile_seconds / (1 - 1 / s)`` of eager training, ``pays_after_minutes``.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import sac_updates
from benchmarks.common import report
from benchmarks.train_step import BATCH, frames, median_ratio, seconds_per_step, trainer
from robot_rl.data.windows import WindowSampler


def first_call(function: Callable[[], Any]) -> float:
    """Return how long the first call takes, in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds in which the variants take turns")
    parser.add_argument("--steps", type=int, default=8, help="training steps per round and variant")
    parser.add_argument("--updates", type=int, default=32, help="off-policy updates per round and variant")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)

    data = frames()
    sampler = WindowSampler(data, 2, 16)
    eager, compiled = (trainer(data, sampler, "auto") for _ in range(2))
    compiled.policy.head.backbone = torch.compile(compiled.policy.head.backbone)  # type: ignore[assignment]
    seconds = {"train": first_call(compiled.update)}
    steps = seconds_per_step({"eager": eager.update, "compiled": compiled.update}, options.rounds, options.steps)

    loops = {"eager": sac_updates.plain(), "compiled": sac_updates.plain(transform=torch.compile)}
    seconds["update"] = first_call(lambda: loops["compiled"](1))
    loops["ours"] = sac_updates.ours("auto")
    updates = seconds_per_step(
        {name: lambda loop=loop: loop(options.updates) for name, loop in loops.items()}, options.rounds, 1
    )
    gains = {
        "train": median_ratio(steps["eager"], steps["compiled"]),
        "update": median_ratio(updates["eager"], updates["compiled"]),
    }
    metrics = {
        "train_samples_per_second": BATCH / statistics.median(steps["compiled"]),
        "updates_per_s": options.updates / statistics.median(updates["compiled"]),
    }
    for name, gain in gains.items():
        metrics[f"{name}_speedup"], metrics[f"{name}_compile_seconds"] = gain, seconds[name]
        metrics[f"{name}_pays_after_minutes"] = seconds[name] / 60 / (1 - 1 / gain) if gain > 1 else float("inf")
    report(
        "compile",
        seeds=[0],
        budget={"rounds": options.rounds, "batch": BATCH, "threads": torch.get_num_threads()},
        metrics=metrics,
        peers={
            "train_samples_per_second_eager": BATCH / statistics.median(steps["eager"]),
            "updates_per_s_eager": options.updates / statistics.median(updates["eager"]),
            "updates_per_s_ours": options.updates / statistics.median(updates["ours"]),
        },
        targets={},
        notes="Ratios are medians of interleaved rounds; the first call compiles.",
    )


if __name__ == "__main__":
    main()
