"""Fine-tuning a clone of human Push-T demonstrations: four methods, at most 20 minutes each, strict success.

The base is the flow policy that `benchmarks.pusht_human` leaves in runs/bench/pusht_human/clone. All methods run with
one seed, the best with three. Interrupted, it goes on. Strict success: coverage > 0.95 of the target.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.finetune_peg import figures, margins, markdown, run_in_two_rounds, write_documents
from benchmarks.pusht_human import SETTINGS, CoverageGain
from robot_rl.core.errors import DataError
from robot_rl.core.registry import make_env, register
from robot_rl.rl.compare.run import Config

TASK = "gym:gym_pusht/PushT-v0"
BASE = Path("runs/bench/pusht_human/clone/checkpoints/best")
LAUNCHER = ("-m", "benchmarks.finetune_pusht")
TEST_SEED = 1_000_000
SEEDS = (0, 1, 2)
METHODS = ("dsrl", "expo", "qchunk", "residual_offpolicy")
"""Methods that are compared; their settings are those of `benchmarks.pusht_human`."""


def rewarded(num_envs: int = 1, **options: Any) -> Any:
    """Push-T with the reward that is learned from: gains of coverage."""
    return CoverageGain(make_env(TASK, num_envs=num_envs, **options))


def child(arguments: list[str]) -> int:
    """Run one of our commands with the rewarded task in the registry; success in tests is the environment's own."""
    from robot_rl.cli.main import main as command

    register("tasks", "pusht_rewarded", rewarded)
    return command(arguments)


def main() -> None:
    """Run what is missing and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/finetune_pusht"))
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--episodes", type=int, default=200, help="test episodes")
    parser.add_argument("--validation-episodes", type=int, default=60, help="episodes per validation")
    parser.add_argument("--jobs", type=int, default=0, help="runs at once, 0 for one per processor")
    parser.add_argument("--trial", action="store_true", help="print, but record nothing in results and documents")
    arguments = parser.parse_args()
    if not (arguments.base / "policy.json").exists():
        raise DataError(f"no clone in {arguments.base}: run python -m benchmarks.pusht_human first")
    methods = tuple(arguments.methods)
    config = Config(
        policy=arguments.base,
        task="pusht_rewarded",
        methods=methods,
        minutes=arguments.minutes,
        options=tuple(f"{method}:{text}" for method in methods for text in SETTINGS.get(method, ())),
        evaluations=8,
        eval_episodes=arguments.validation_episodes,
        test_episodes=arguments.episodes,
        test_seed=TEST_SEED,
        out=arguments.out,
        jobs=arguments.jobs,
    )
    results, spent = run_in_two_rounds(config, 1, SEEDS, LAUNCHER)
    if arguments.trial:
        sys.stdout.write(json.dumps({**figures(results), **spent}, indent=2) + markdown(results))
        return
    write_documents("finetune_pusht", "Fine-tuning methods on human Push-T", config, results)
    above = margins(results, methods)
    report(
        "finetune_pusht",
        seeds={"training": SEEDS, "test": [TEST_SEED, TEST_SEED + config.test_episodes - 1]},
        budget={"minutes_per_run": config.minutes, "threads_per_run": 1, **spent},
        metrics={
            **figures(results),
            "best_success": max((m["success"] for m in above.values()), default=0.0),
            **{f"{method}_interval_gap": m["above"] for method, m in above.items()},
            **spent,
        },
        targets={
            "best_success": (">=", 0.90),
            "dsrl_interval_gap": (">=", 0.0),
            "expo_interval_gap": (">=", 0.0),
        },
        notes="Strict success: coverage > 0.95. An interval gap is the low end of the method's 95 % interval less the "
        "high end of the base's. Two runs at a time, one thread each; learned from gains of coverage.",
    )


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("finetune", "eval"):
        sys.exit(child(sys.argv[1:]))
    main()
