"""Peg insertion from 20 demonstrations: cloning, SERL, and HIL-SERL with a scripted, imperfect operator.

All act through the executor, on simulated time; the learner is a process of its own. SERL and HIL-SERL have the same
settings and budget and differ in the operator's corrections alone. Interrupted, it goes on: ``runs/bench/hil_peg``
keeps all, ``--fresh`` starts again. ``--trial --minutes 1 --seeds 0`` shows in a few minutes that everything runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import report
from benchmarks.pusht_human import stage
from hardware.control.executor import ExecutorConfig
from hardware.hil.config import HILConfig
from hardware.hil.session import learn
from hardware.hil.validation import run_alone
from robot_rl.cli import collect
from robot_rl.data.dataset import open_dataset
from robot_rl.data.windows import WindowSampler
from robot_rl.policies.checkpoint import load_policy
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
from robot_rl.rollout.evaluate import wilson
from robot_rl.train.progress import progress
from robot_rl.train.run import Run, read_metrics
from robot_rl.train.trainer import TrainConfig, train

TASK = "peg_insert"
DEMONSTRATIONS = 20
TEST_SEED = 1_000_000
LEARNED = 0.95
"""Success in validation that counts as learned."""
VALIDATION_EPISODES = 20
WINDOW = 1_000
"""Latest steps over which the operator's share is taken."""
OPTIONS = ("relative_to=state[0:6]", "updates_per_step=4")
"""Actions are targets for the tool, whose pose the state begins with."""
EXECUTOR = ExecutorConfig(tick_rate_hz=100.0)
METHODS = ("serl", "hil_serl")


def clone(path: Path, demos: Path, seed: int, steps: int) -> dict[str, Any]:
    """Clone the demonstrations with a flow policy of the demo's size."""
    frames = open_dataset(demos).load()
    config = ChunkedConfig(width=256)
    settings = TrainConfig(steps=steps, batch_size=256, checkpoint_every=max(1, steps // 4))
    torch.manual_seed(seed)
    policy = ChunkedPolicy.fit(frames, config)
    with Run.create(path, {"policy": config, "train": settings}, spec=frames.spec, seed=seed, resume=True) as run:
        train(policy, WindowSampler(frames, config.obs_steps, config.horizon), settings, run, seed)
    return {}


def teach(path: Path, demos: Path, method: str, seed: int, minutes: float) -> dict[str, Any]:
    """Learn with a method for at most ``minutes`` on the wall clock, and return how it went."""
    config = HILConfig(
        demos=demos,
        method=method,  # type: ignore[arg-type]
        task=TASK,
        operator="scripted",
        clock="fast",
        minutes=minutes,
        out=path,
        resume=True,
        options=OPTIONS,
        robot_options=("max_episode_steps=160",),
        validate_every=1_000,
        validation_episodes=VALIDATION_EPISODES,
        seed=seed,
        executor=EXECUTOR,
    )
    with progress(f"{method} {seed}", max(1, round(60 * minutes)), unit="second") as bar:

        def show(done: Any, episode: Any) -> None:
            alone = f"{done.validations[-1].success:.0%}" if done.validations else "-"
            bar.advance(int(done.seconds) - bar.done, steps=done.steps, human=f"{human_share(path):.0%}", alone=alone)

        done = learn(config, show)
    return {
        "steps": done.steps,
        "human_steps": done.human_steps,
        "takeovers": done.takeovers,
        "episodes": done.episodes,
        "validations": [[one.steps, one.success] for one in done.validations],
        "learned_at": first_learned([(one.steps, one.success) for one in done.validations]),
        "human_share_at_end": human_share(path),
        "human_share": intervention_curve(path),
        "policy": str(done.policy),
    }


def first_learned(validations: list[tuple[int, float]]) -> float:
    """Return the steps of the first of two consecutive validations that reach `LEARNED`; infinity without any."""
    for (steps, success), (_, after) in pairwise(validations):
        if min(success, after) >= LEARNED:
            return float(steps)
    return float("inf")


def human_share(path: Path) -> float:
    """Return the operator's share of the latest `WINDOW` steps."""
    left, human = WINDOW, 0.0
    for row in reversed(read_metrics(path, "episode")):
        used = min(left, row["length"])
        human, left = human + used * row["intervention"], left - used
        if left <= 0:
            break
    return human / max(1, WINDOW - left)


def intervention_curve(path: Path) -> list[list[float]]:
    """Return (steps, the operator's share of the steps since the last point) about every `WINDOW` steps."""
    points, human, steps = [], 0.0, 0.0
    for row in read_metrics(path, "episode"):
        human, steps = human + row["length"] * row["intervention"], steps + row["length"]
        if steps >= WINDOW:
            points.append([row["step"], round(human / steps, 4)])
            human, steps = 0.0, 0.0
    return points


def test(checkpoint: Path, episodes: int) -> dict[str, Any]:
    """Return the successes of a policy alone on fresh scenes, through the executor."""
    outcomes = run_alone(load_policy(checkpoint), TASK, EXECUTOR, episodes, TEST_SEED)
    return {
        "successes": sum(outcomes),
        "episodes": len(outcomes),
        "interval": list(wilson(sum(outcomes), len(outcomes))),
    }


def main() -> None:
    """Run what is missing and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/hil_peg"))
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="wall-clock minutes of each run, validation included"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--episodes", type=int, default=100, help="test episodes")
    parser.add_argument("--train-steps", type=int, default=4_000, help="optimiser steps of cloning")
    parser.add_argument("--trial", action="store_true", help="print, but keep nothing in results")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fresh:
        shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    demos = options.out / "demonstrations"
    stage(options.out, "collect", lambda: _collect(demos))
    tested: dict[str, list[dict[str, Any]]] = {"bc": [], **{method: [] for method in METHODS}}
    taught: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for seed in options.seeds:
        place = options.out / f"bc_{seed}"
        stage(options.out, f"clone_{seed}", lambda p=place, s=seed: clone(p, demos, s, options.train_steps))
        tested["bc"].append(
            stage(options.out, f"test_bc_{seed}", lambda p=place: test(p / "checkpoints" / "best", options.episodes))
        )
        for method in METHODS:
            place = options.out / f"{method}_{seed}"
            found = stage(
                options.out, place.name, lambda p=place, m=method, s=seed: teach(p, demos, m, s, options.minutes)
            )
            taught[method].append(found)
            tested[method].append(
                stage(options.out, f"test_{place.name}", lambda f=found: test(Path(f["policy"]), options.episodes))
            )
    metrics = figures(tested, taught)
    if options.trial:
        sys.stdout.write(json.dumps({"metrics": metrics, "runs": taught}, indent=2) + "\n")
        return
    report(
        "hil_peg",
        seeds={"training": options.seeds, "test": [TEST_SEED, TEST_SEED + options.episodes - 1]},
        budget={"demonstrations": DEMONSTRATIONS, "minutes_per_run": options.minutes, "runs": taught},
        metrics=metrics,
        targets={
            "hil_serl_success": (">=", 0.95),
            "hil_serl_human_share_at_end": ("<=", 0.05),
            "steps_ratio": ("<=", 0.5),
        },
        notes="Success: means over seeds, alone, without exploration, on scenes that nobody learned or validated on, "
        f"through the executor. Learned: two consecutive validations of {VALIDATION_EPISODES} episodes that reach "
        f"{LEARNED:.0%}; steps count those of the operator. steps_ratio: HIL-SERL's steps until learned over SERL's, "
        "means over seeds; a run that did not learn counts with all its steps for SERL, and as infinity for HIL-SERL. "
        f"The operator's share is that of the last {WINDOW} steps. Actor and learner: one thread each.",
    )


def figures(tested: dict[str, list[dict[str, Any]]], taught: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Return the metrics of the result."""
    metrics: dict[str, float] = {}
    for name, runs in tested.items():
        successes, episodes = sum(run["successes"] for run in runs), sum(run["episodes"] for run in runs)
        metrics[f"{name}_success"] = successes / episodes
        metrics[f"{name}_success_low"], metrics[f"{name}_success_high"] = wilson(successes, episodes)
    for name, runs in taught.items():
        metrics[f"{name}_steps"] = float(np.mean([run["steps"] for run in runs]))
        metrics[f"{name}_learned_at"] = float(np.mean([_steps(run["learned_at"]) for run in runs]))
    human = taught["hil_serl"]
    metrics["hil_serl_human_share"] = sum(run["human_steps"] for run in human) / max(
        1, sum(run["steps"] for run in human)
    )
    metrics["hil_serl_human_share_at_end"] = max(run["human_share_at_end"] for run in human)
    own = [min(_steps(run["learned_at"]), run["steps"]) for run in taught["serl"]]
    metrics["steps_ratio"] = metrics["hil_serl_learned_at"] / max(1.0, float(np.mean(own)))
    return metrics


def _steps(value: float | None) -> float:
    """Return steps as a number; JSON keeps infinity as nothing."""
    return float("inf") if value is None else float(value)


def _collect(demos: Path) -> dict[str, Any]:
    shutil.rmtree(demos, ignore_errors=True)
    done = collect.collect_demonstrations(collect.Config(TASK, demos, DEMONSTRATIONS, 1.0))
    return {"kept": done.kept, "tried": done.tried}


if __name__ == "__main__":
    main()
