"""The demo, measured: peg insertion before and after fine-tuning on 200 fresh episodes, and the time of it all."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.common import report
from benchmarks.picture import write_picture
from robot_rl.cli.demo import Config, Settings, run_demo

TARGETS = {
    "success_before": (">=", 0.30),
    "success_before_upper": ("<=", 0.60),
    "success_after": (">=", 0.90),
    "wall_minutes": ("<=", 10.0),
}


def main() -> None:
    """Run the demo from nothing and keep its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="training seed")
    parser.add_argument("--out", type=Path, default=None, help="keep the run here; a finished one is only reported")
    parser.add_argument("--picture", type=Path, default=None, help="draw the picture of the README here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder) / "demo"
        outcomes = run_demo(Config(out=out, seed=arguments.seed))
        if arguments.picture is not None:
            write_picture(out, arguments.picture)
    before, after = outcomes["before"].facts, outcomes["after"].facts
    seconds = {name: outcome.seconds for name, outcome in outcomes.items()}
    settings = Settings()
    report(
        "demo",
        seeds={"training": arguments.seed, "test": [after["first_seed"], after["first_seed"] + after["episodes"] - 1]},
        budget={
            "demonstrations": settings.demonstrations,
            "train_steps": settings.train_steps,
            "finetune_minutes": settings.finetune_minutes,
            "test_episodes": settings.test_episodes,
        },
        metrics={
            "success_before": before["success_rate"],
            "success_before_upper": before["success_rate"],
            "success_before_low": before["success_interval_95"][0],
            "success_before_high": before["success_interval_95"][1],
            "success_after": after["success_rate"],
            "success_after_low": after["success_interval_95"][0],
            "success_after_high": after["success_interval_95"][1],
            "wall_minutes": sum(seconds.values()) / 60,
            **{f"seconds_{name}": value for name, value in seconds.items()},
        },
        targets=TARGETS,
        notes="success_before_upper repeats success_before: the base shall leave room to improve. Installation is not "
        "counted. The interval is over episodes of one training seed.",
    )


if __name__ == "__main__":
    main()
