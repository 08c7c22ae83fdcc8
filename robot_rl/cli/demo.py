"""The whole road in ten minutes: demonstrations, policy, fine-tuning, deployment, and a report of what came of it.

A Panda arm learns to insert a peg: 50 demonstrations of an imperfect expert, a flow policy, reinforcement learning,
evaluation on fresh episodes before and after, 20 s on a simulated robot through ROS 2. Finished stages are kept, an
interrupted one goes on: run the same command again.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from robot_rl.cli.stages import Outcome, Pipeline, Stage

TASK = "peg_insert"
"""The task of the demo."""


@dataclass(frozen=True)
class Config:
    """Settings of ``robot-rl demo``."""

    out: Path = Path("runs/demo")
    """Directory of everything that the demo makes."""
    quick: bool = False
    """The same road in two minutes, to see that everything works; its success figures mean nothing."""
    seed: int = 0
    """Seed of demonstrations, weights and exploration; the evaluated episodes stay the same."""
    restart: bool = False
    """Forget finished stages."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the stages."""

    demonstrations: int = 50
    """Episodes of the expert."""
    expert_noise: float = 1.0
    """How imperfect the expert is."""
    train_steps: int = 3000
    """Optimiser steps of imitation."""
    train_batch: int = 256
    """Windows per step."""
    width: int = 256
    """Width of the policy's network."""
    finetune_method: str = "dsrl"
    """Method of reinforcement learning."""
    finetune_options: tuple[str, ...] = ()
    """Settings of the method, each name=value."""
    finetune_reward: str = "shaped"
    """Reward while learning: with progress counted as well, far fewer steps are needed than with success alone."""
    finetune_minutes: float = 5.0
    """Time for reinforcement learning, its validation included."""
    stop_at: float = 0.97
    """Validation success at which it stops early."""
    validations: int = 5
    """Validations spread over that time."""
    validation_episodes: int = 100
    """Episodes per validation."""
    test_episodes: int = 200
    """Fresh episodes per evaluation."""
    lanes: int = 50
    """Episodes side by side in evaluations."""
    filmed: int = 4
    """Episodes in each video."""
    deploy_seconds: float = 20.0
    """Real time on the robot."""
    threads: int = 1
    """Processor threads of the networks. They are small, so that one is nearly as fast as all, repeats to the bit, and
    is not held up by other programs; simulation uses every core."""


QUICK = Settings(
    demonstrations=8,
    train_steps=150,
    train_batch=64,
    finetune_minutes=0.25,
    validation_episodes=8,
    test_episodes=8,
    lanes=8,
    filmed=1,
    deploy_seconds=8.0,
)
"""Sizes that show the road and reach nothing."""


@dataclass(frozen=True)
class Paths:
    """Where everything is, below the demo's directory."""

    root: Path

    @property
    def demonstrations(self) -> Path:
        """Data set of the expert's episodes."""
        return self.root / "demonstrations"

    @property
    def base(self) -> Path:
        """Run of imitation."""
        return self.root / "imitation"

    @property
    def tuned(self) -> Path:
        """Run of fine-tuning."""
        return self.root / "finetuned"

    @property
    def deployment(self) -> Path:
        """What the deployment left."""
        return self.root / "deployment"

    @property
    def report(self) -> Path:
        """The page."""
        return self.root / "report.html"

    def evaluation(self, when: str) -> Path:
        """Results of the evaluation ``before`` or ``after``."""
        return self.root / f"success_{when}.json"

    def video(self, name: str) -> Path:
        """A film."""
        return self.root / f"{name}.mp4"


def run(config: Config) -> None:
    """Run the stages that are not finished, and say what came of it and where the report is."""
    from robot_rl.train.progress import say

    outcomes = run_demo(config)
    before, after = outcomes["before"].facts, outcomes["after"].facts
    minutes = sum(outcome.seconds for outcome in outcomes.values()) / 60
    say()
    say(f"Success {_share(before)} → {_share(after)} in {minutes:.1f} min", style="bold green")
    say(f"Report: {Paths(config.out).report}", style="bold")


def resume_hint(config: Config) -> str:
    """Say how an interrupted demo goes on."""
    options = [*(["--quick"] if config.quick else []), *(["--seed", str(config.seed)] if config.seed else [])]
    command = shlex.join(["robot-rl", "demo", "--out", str(config.out), *options])
    return f"What is finished is kept in {config.out}. Continue with: {command}"


def run_demo(config: Config, settings: Settings | None = None) -> dict[str, Outcome]:
    """Run the demo's stages and return their outcomes by name.

    Args:
        config: where, and which variant.
        settings: sizes of the stages, if not those of the variant.

    Raises:
        ConfigError: another process is at work in the directory.
    """
    settings = settings or (QUICK if config.quick else Settings())
    if config.restart:
        for stamp in (config.out / "stages").glob("*.json"):
            stamp.unlink()
    return Pipeline(config.out).run(_Demo(config, settings).stages())


@dataclass
class _Demo:
    """The work of every stage."""

    config: Config
    settings: Settings
    paths: Paths = field(init=False)

    def __post_init__(self) -> None:
        self.paths = Paths(self.config.out)

    def stages(self) -> list[Stage]:
        s, p, seed = self.settings, self.paths, self.config.seed
        test = {"episodes": s.test_episodes, "filmed": s.filmed}
        collecting = {"task": TASK, "episodes": s.demonstrations, "noise": s.expert_noise, "seed": seed}
        training = {"steps": s.train_steps, "batch": s.train_batch, "width": s.width, "seed": seed}
        tuning = {"method": s.finetune_method, "minutes": s.finetune_minutes, "stop_at": s.stop_at, "seed": seed}
        tuning |= {
            "reward": s.finetune_reward,
            "options": s.finetune_options,
            "validations": s.validations,
            "episodes": s.validation_episodes,
        }
        report = {"version": 1}
        return [
            Stage("collect", "Collect demonstrations", collecting, self.collect, (p.demonstrations,)),
            Stage("train", "Train a flow policy", training, self.train, (p.base,), resumable=True),
            Stage("before", "Evaluate it", test, self.before, (p.evaluation("before"), p.video("before"))),
            Stage("finetune", "Fine-tune it by RL", tuning, self.finetune, (p.tuned,), resumable=True),
            Stage("after", "Evaluate again", test, self.after, (p.evaluation("after"), p.video("after"))),
            Stage(
                "deploy", "Deploy it", {"seconds": s.deploy_seconds}, self.deploy, (p.deployment, p.video("deployment"))
            ),
            Stage("report", "Write the report", report, self.report, (p.report,)),
        ]

    def collect(self) -> dict[str, Any]:
        from robot_rl.cli import collect

        s = self.settings
        result = collect.collect_demonstrations(
            collect.Config(TASK, self.paths.demonstrations, s.demonstrations, s.expert_noise, seed=self.config.seed)
        )
        return {"kept": result.kept, "tried": result.tried, "succeeded": result.succeeded, "frames": result.frames}

    def train(self) -> dict[str, Any]:
        from robot_rl.cli import train
        from robot_rl.policies.chunked import ChunkedConfig
        from robot_rl.train.trainer import TrainConfig

        s = self.settings
        sizes = TrainConfig(steps=s.train_steps, batch_size=s.train_batch, log_every=max(1, s.train_steps // 100))
        sizes = replace(sizes, warmup_steps=min(sizes.warmup_steps, s.train_steps // 4))
        train.run(
            train.Config(
                self.paths.demonstrations,
                self.paths.base,
                policy=ChunkedConfig(width=s.width),
                train=replace(sizes, checkpoint_every=max(1, s.train_steps // 6)),
                threads=s.threads,
                seed=self.config.seed,
                resume=True,
            )
        )
        return {}

    def before(self) -> dict[str, Any]:
        return self._evaluate(self.paths.base, "before")

    def after(self) -> dict[str, Any]:
        return self._evaluate(self.paths.tuned, "after")

    def _evaluate(self, run_directory: Path, when: str) -> dict[str, Any]:
        import torch

        from robot_rl.core.registry import make_env
        from robot_rl.policies.checkpoint import load_policy
        from robot_rl.rollout.evaluate import evaluate
        from robot_rl.rollout.video import record_video
        from robot_rl.train.progress import progress, say
        from robot_rl.train.run import write_json

        s = self.settings
        torch.set_num_threads(s.threads)
        policy = load_policy(run_directory / "checkpoints" / "best")
        env = make_env(TASK, num_envs=min(s.lanes, s.test_episodes))
        try:
            with progress("evaluate", s.test_episodes, unit="episode") as bar:
                result = evaluate(policy, env, s.test_episodes, progress=bar)
        finally:
            env.close()
        write_json(self.paths.evaluation(when), result.to_json())
        say(result.summary())
        env = make_env(TASK, num_envs=s.filmed)
        try:
            with progress("film", 1, unit="video") as bar:
                record_video(policy, env, self.paths.video(when))
                bar.advance()
        finally:
            env.close()
        facts = result.to_json()
        del facts["per_episode"]
        return facts

    def finetune(self) -> dict[str, Any]:
        from robot_rl.cli import finetune

        s = self.settings
        finetune.run(
            finetune.Config(
                policy=self.paths.base / "checkpoints" / "best",
                task=TASK,
                method=s.finetune_method,
                reward=s.finetune_reward,
                minutes=s.finetune_minutes,
                seed=self.config.seed,
                out=self.paths.tuned,
                resume=True,
                options=s.finetune_options,
                evaluations=s.validations,
                eval_episodes=s.validation_episodes,
                stop_at=s.stop_at,
                threads=s.threads,
            )
        )
        return {}

    def deploy(self) -> dict[str, Any]:
        from robot_rl.core.registry import load
        from robot_rl.train.progress import say

        s, p = self.settings, self.paths
        # By name, because robot_rl does not import hardware.
        command = load("commands", "deploy")
        report = command.deploy_shown(
            command.Config(
                policy=p.tuned / "checkpoints" / "best",
                task=TASK,
                duration=s.deploy_seconds,
                operator="script",
                record=p.deployment / "recording",
                video=p.video("deployment"),
                out=p.deployment,
            )
        )
        if report.note:
            say(report.note, style="bold yellow")
        if report.seconds < s.deploy_seconds - 1.0:
            raise KeyboardInterrupt  # Ctrl-C ends a deployment in order; the demo has still been interrupted.
        say(report.summary())
        return {"transport": report.transport, "seconds": report.seconds}

    def report(self) -> dict[str, Any]:
        from robot_rl.cli.demo_report import write_report

        write_report(self.config, self.settings, self.paths)
        return {}


def _share(facts: dict[str, Any]) -> str:
    low, high = facts["success_interval_95"]
    return f"{facts['success_rate']:.1%} [{low:.1%}, {high:.1%}]"
