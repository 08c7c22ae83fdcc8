"""What the demo's report says: read from the files that its stages have left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robot_rl.report.charts import Curve, line_chart
from robot_rl.report.page import Deployment, Report, Share, Video, render
from robot_rl.train.run import read_metrics, to_plain, versions, write_text

if TYPE_CHECKING:
    from robot_rl.cli.demo import Config, Paths, Settings

BRIEF_SECONDS = 0.4
"""Modes that last less are drawn but not listed."""
WORDS = {
    ("auto", "enabled"): "enabled: the policy drives",
    ("human", "operator_motion"): "a motion key: the person drives",
    ("human", "operator_takeover"): "the person takes over",
    ("auto", "hand_back"): "handed back to the policy",
    ("stopped", "emergency_stop"): "emergency stop, latched",
    ("idle", "reset"): "reset: nothing moves before it is enabled",
    ("hold", "episode_restart"): "the simulator sets up the next peg",
    ("auto", "episode_restart"): "the next peg",
}
"""Changes of mode in the reader's words, by mode and reason."""
STAGES = ("collect", "train", "before", "finetune", "after", "deploy")
"""Stages whose time the report shows."""


def write_report(config: Config, settings: Settings, paths: Paths) -> None:
    """Write the page of a finished demo."""
    stamps = {name: json.loads((paths.root / "stages" / f"{name}.json").read_text()) for name in STAGES}
    titles = ("Collect", "Train", "Evaluate", "Fine-tune", "Evaluate again", "Deploy")
    timings = [(title, stamps[name]["seconds"]) for title, name in zip(titles, STAGES, strict=True)]
    report = Report(
        title="robot_rl demo: peg insertion" + (" (quick variant: its success means nothing)" if config.quick else ""),
        subject=_subject(settings, stamps["collect"]["facts"], sum(seconds for _, seconds in timings)),
        before=_success(paths.evaluation("before")),
        after=_success(paths.evaluation("after")),
        charts=_learning(paths),
        videos=[
            Video(paths.video("before"), "Imitation", "Green frames succeeded, red ones did not."),
            Video(paths.video("after"), "Fine-tuned", "The same episodes."),
            Video(
                paths.video("deployment"),
                "On the robot",
                "The deployment. Green: the policy drives; amber: the person; red: stopped; grey: nobody.",
            ),
        ],
        deployment=_deployment(json.loads((paths.deployment / "deployment.json").read_text())),
        timings=timings,
        facts={
            "Settings": to_plain(settings),
            "Versions": versions(),
            "Seeds": {
                "training": config.seed,
                "test episodes": f"from {_success(paths.evaluation('after')).first_seed}",
            },
            "Demonstrations": stamps["collect"]["facts"],
        },
        commands=_commands(settings),
    )
    write_text(paths.report, render(report))


def _subject(settings: Settings, collected: Mapping[str, Any], seconds: float) -> str:
    share = collected["succeeded"] / collected["tried"]
    return (
        f"{collected['kept']} demonstrations ({collected['frames']} steps) of a Panda arm inserting a peg with "
        f"0.5 mm of clearance, by an expert that errs and succeeds in {share:.0%} of its tries; a flow policy learned "
        f"from them; reinforcement learning ({settings.finetune_method}) improved it. "
        f"{seconds / 60:.1f} minutes in all."
    )


def _success(path: Path) -> Share:
    facts = json.loads(path.read_text())
    low, high = facts["success_interval_95"]
    return Share(facts["success_rate"], low, high, facts["episodes"], facts["first_seed"])


def _learning(paths: Paths) -> list[tuple[str, str, str]]:
    loss = read_metrics(paths.base, "train")
    tuning, validation = read_metrics(paths.tuned, "finetune"), read_metrics(paths.tuned, "eval")
    exploring = Curve("while exploring", *_column(tuning, "success"), style="faint")
    low, high = _column(validation, "success_low")[1], _column(validation, "success_high")[1]
    validated = Curve("validation", *_column(validation, "success"), style="first", band=(low, high))
    return [
        (
            "Imitation: loss",
            line_chart(
                [Curve("loss", *_column(loss, "loss"))], x_label="optimiser steps", y_label="loss", logarithmic=True
            ),
            "Flow-matching loss over optimiser steps.",
        ),
        (
            "Fine-tuning: success",
            line_chart(
                [validated, exploring], x_label="environment steps", y_label="success", percent=True, y_range=(0, 1)
            ),
            "Validation episodes (band: 95 % interval), and training episodes with exploration noise; its first points "
            "know only the episodes that ended early.",
        ),
        (
            "Fine-tuning: episode length",
            line_chart([Curve("length", *_column(tuning, "length"))], x_label="environment steps", y_label="steps"),
            "Control steps until success or time limit: a better policy is also a quicker one.",
        ),
    ]


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    kept = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in kept], [row[key] for row in kept]


def _deployment(facts: Mapping[str, Any]) -> Deployment:
    return Deployment(
        seconds=facts["seconds"],
        rate_hz=facts["rate_hz"],
        transport={"ros": "ROS 2", "inprocess": "one process"}[facts["transport"]],
        # Before the policy's first answer time is negative: the robot holds and waits.
        modes=[(max(start, 0.0), end, mode) for start, end, mode in facts["modes"] if end > 0],
        events=_events(facts["mode_changes"]),
        lateness=facts["lateness"],
        latency=facts["latency"],
        missed_ticks=facts["missed_ticks"],
        safety={name.replace("_", " "): count for name, count in facts["safety"].items()},
        acted=facts["acted"],
        episodes=facts["episodes"],
        notes=[facts["note"]] if facts["note"] else [],
    )


def _events(changes: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """Changes of mode in words; a mode that only leads to the next one is passed over."""
    ends = [change["time"] for change in changes[1:]] + [float("inf")]
    told = []
    for change, end in zip(changes, ends, strict=True):
        passing = change["mode"] in ("hold", "idle", "align") and end - change["time"] < BRIEF_SECONDS
        if change["time"] >= 0 and not passing and change["reason"] != "shutdown":
            reason = change["reason"]
            told.append((change["time"], WORDS.get((change["mode"], reason), reason.replace("_", " "))))
    return told


def _commands(settings: Settings) -> list[str]:
    s, task = settings, "--task peg_insert"
    return [
        f"robot-rl collect {task} --out demonstrations --episodes {s.demonstrations} --noise {s.expert_noise:g}",
        f"robot-rl train demonstrations --out base --train.steps {s.train_steps} --train.batch-size {s.train_batch}"
        f" --policy.width {s.width}",
        f"robot-rl eval --policy base/checkpoints/best {task} --episodes {s.test_episodes}",
        f"robot-rl finetune --policy base/checkpoints/best {task} --method {s.finetune_method}"
        f" --reward {s.finetune_reward} --minutes {s.finetune_minutes:g} --out tuned",
        f"robot-rl eval --policy tuned/checkpoints/best {task} --episodes {s.test_episodes}",
        f"robot-rl deploy --policy tuned/checkpoints/best {task} --operator script --duration {s.deploy_seconds:g}",
    ]
