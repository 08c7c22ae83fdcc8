"""How fast a flow policy trains: fp32 against bf16 autocast, windows from a dataset against a tensor in memory."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import report
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames
from robot_rl.data.windows import WindowSampler
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
from robot_rl.train.run import Run
from robot_rl.train.trainer import TrainConfig, Trainer, has_fast_bf16

BATCH = 512
CURVE_STEPS = 600
SEED = 0


def frames() -> Frames:
    """Return smooth random demonstrations of the size of a Push-T dataset, so that nothing need be downloaded."""
    rng = np.random.default_rng(SEED)
    ends = np.cumsum(np.full(206, 124))
    phase = rng.uniform(0, 2 * np.pi, (206, 1, 18)) + np.linspace(0, 6, 124)[None, :, None] * rng.uniform(
        0.5, 2, (206, 1, 18)
    )
    state = np.sin(phase).reshape(-1, 18).astype(np.float32)
    action = np.stack([state[:, :9].mean(1), state[:, 9:].mean(1)], axis=1)
    spec = Spec({"state": ArraySpec((18,))}, ArraySpec((2,)), 10.0)
    return Frames({"state": state}, action, ends, spec)


class Resident:
    """Feeds one fixed batch: what training would cost if data were free."""

    def __init__(self, sampler: WindowSampler) -> None:
        self._batch = sampler.sample(0, BATCH, SEED)

    def sample(self, step: int, batch_size: int, seed: int) -> dict[str, Any]:
        """Return the same batch at every step."""
        return self._batch


def trainer(data: Frames, sampler: Any, precision: str, steps: int = 10_000) -> Trainer:
    """Return a trainer of the default policy in a run directory of its own."""
    torch.manual_seed(SEED)
    config = TrainConfig(steps=steps, batch_size=BATCH, precision=precision)
    run = Run.create(Path(tempfile.mkdtemp()) / "run", config)
    return Trainer(ChunkedPolicy.fit(data, ChunkedConfig()), sampler, config, run, SEED)


def seconds_per_step(variants: dict[str, Callable[[], Any]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Time the variants in turn, so that a machine whose speed drifts treats them alike."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, step in variants.items():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            times[name].append((time.perf_counter() - start) / steps)
    return {name: values[1:] for name, values in times.items()}


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Return the median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def loss_curves(data: Frames, sampler: WindowSampler) -> dict[str, list[float]]:
    """Train from the same start in both precisions; returns means over 50 steps."""
    curves = {}
    for precision in ("fp32", "bf16"):
        learner = trainer(data, sampler, precision, CURVE_STEPS)
        losses = torch.stack([learner.update() for _ in range(CURVE_STEPS)])
        curves[precision] = losses.view(-1, 50).mean(1).tolist()
    return curves


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps per round and variant")
    options = parser.parse_args()
    data = frames()
    sampler = WindowSampler(data, 2, 16)
    variants = {precision: trainer(data, sampler, precision) for precision in ("fp32", "bf16")}
    resident = trainer(data, Resident(sampler), "bf16")
    times = seconds_per_step(
        {"fp32": variants["fp32"].update, "bf16": variants["bf16"].update, "resident": resident.update},
        options.rounds,
        options.steps,
    )
    window_times = seconds_per_step({"windows": lambda: sampler.sample(1, BATCH, SEED)}, options.rounds, 200)["windows"]
    curves = loss_curves(data, sampler)
    difference = max(abs(b / a - 1) for a, b in zip(curves["fp32"], curves["bf16"], strict=True))
    report(
        "train_step",
        seeds=SEED,
        budget={
            "rounds": options.rounds,
            "steps_per_round": options.steps,
            "batch": BATCH,
            "threads": torch.get_num_threads(),
        },
        metrics={
            "bf16_speedup": median_ratio(times["fp32"], times["bf16"]),
            "samples_per_second_fp32": BATCH / statistics.median(times["fp32"]),
            "samples_per_second_bf16": BATCH / statistics.median(times["bf16"]),
            "step_ms_bf16": 1e3 * statistics.median(times["bf16"]),
            "windows_per_second": BATCH / statistics.median(window_times),
            "dataset_over_resident": median_ratio(times["bf16"], times["resident"]),
            "largest_loss_curve_difference": difference,
            "parameters": sum(p.numel() for p in resident.policy.parameters()),
        },
        peers={
            "the same network fed from a tensor in memory, step_ms": 1e3 * statistics.median(times["resident"]),
            "loss curve, fp32": [round(x, 4) for x in curves["fp32"]],
            "loss curve, bf16": [round(x, 4) for x in curves["bf16"]],
        },
        targets={
            "bf16_speedup": (">=", 2.5),
            "dataset_over_resident": ("<=", 1.15),
            "largest_loss_curve_difference": ("<=", 0.05),
        },
        notes=f"bf16 matrix products in hardware: {has_fast_bf16()}. Ratios are medians of interleaved rounds.",
    )


if __name__ == "__main__":
    main()
