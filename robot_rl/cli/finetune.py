"""Improve a policy by reinforcement learning; eleven methods, from corrections to choosing among its own samples.

The result is a policy like any other, in checkpoints/best of the run. `--list-options` shows the settings of a method.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robot_rl.core.ranges import require_range

DEFAULT_POLICY = Path("runs/train/checkpoints/best")


@dataclass(frozen=True)
class Config:
    """Settings of ``robot-rl finetune``."""

    policy: Path | None = None
    """Checkpoint of the policy to improve. Where none is given, ppo, rlpd, and fpo with scratch=yes learn from scratch;
    other methods take runs/train/checkpoints/best."""
    task: str = ""
    """Task to improve it in (`robot-rl list tasks`)."""
    method: str = "residual"
    """How (`robot-rl list finetuners`, and docs/finetuning.md on choosing one)."""
    steps: int = 0
    """Environment steps, over all lanes; 0 for no limit."""
    minutes: float = 0.0
    """Wall-clock minutes, validation included; 0 for no limit. Without any limit it is 10 minutes."""
    seed: int = 0
    """Seed of weights, exploration and training episodes."""
    out: Path = Path("runs/finetune")
    """Run directory."""
    resume: bool = False
    """Continue an interrupted run in the same directory."""
    demos: Path | None = None
    """Demonstrations: half of every batch for rlpd, and for dsrl's variant na."""
    reward: str = "sparse"
    """Reward of the task: sparse, shaped, or that of a success classifier: classifier:PATH."""
    options: tuple[str, ...] = ()
    """Settings of the method as name=value, for example: lanes=128 scale=0.2."""
    list_options: bool = False
    """Show the settings of the method and stop."""
    evaluations: int = 5
    """Validations spread over the budget, after the one at the start; fewer where they would take over a quarter of the
    minutes."""
    eval_episodes: int = 100
    """Episodes per validation, on seeds that are neither trained nor tested on."""
    stop_at: float = 1.01
    """Stop when a validation's success rate reaches this; above 1 for never."""
    device: str = "cpu"
    """Where networks run: cpu, cuda, cuda:1. Environments stay on the processor."""
    threads: int = 0
    """Processor threads of the networks; 0 uses all cores."""

    def __post_init__(self) -> None:
        require_range(self, "steps", "minutes", "seed", "evaluations", "threads")
        require_range(self, "eval_episodes", low=1)


def run(config: Config) -> None:
    """Fine-tune and say where the result is."""
    from robot_rl.core import registry
    from robot_rl.core.errors import ConfigError
    from robot_rl.rl.options import config_class, override
    from robot_rl.train.progress import say

    finetune = registry.load("finetuners", config.method)
    settings = override(config_class(finetune)(), config.options)
    if hasattr(settings, "lanes"):
        require_range(settings, "lanes", low=1)
    if config.list_options:
        say(_listing(settings))
        return
    if not config.task:
        raise ConfigError(f"which task? --task one of: {', '.join(registry.names('tasks'))}")

    import torch

    from robot_rl.rl.session import SessionConfig
    from robot_rl.train import distributed
    from robot_rl.train.run import Run

    if config.threads:
        torch.set_num_threads(config.threads)
    device = distributed.own_device(config.device)
    rank = distributed.start(device)
    base = _base(config, device, getattr(settings, "needs_policy", True))
    session = SessionConfig(
        steps=config.steps,
        minutes=config.minutes if config.minutes or config.steps else 10.0,
        evaluations=config.evaluations,
        eval_episodes=config.eval_episodes,
        stop_at=config.stop_at,
    )
    demonstrations = _demonstrations(config.demos, base)
    record = {"command": config, "method": settings, "session": session}
    # A run may be given more time.
    free = ("command.steps", "command.minutes", "session.steps", "session.minutes")
    out = distributed.directory(config.out)
    # Every process explores by a seed of its own.
    with Run.create(
        out, record, spec=base.spec, seed=config.seed + rank, resume=config.resume, ignore=free
    ) as directory:
        finetune(base, _factory(config), settings, directory, session=session, demonstrations=demonstrations)
    if rank == 0:
        say(f"Policy: {config.out / 'checkpoints' / 'best'}")


def _base(config: Config, device: Any, needed: bool) -> Any:
    """Return the policy to improve or, where none is given nor needed, what lends the task's interface."""
    if config.policy is None and not needed:
        from types import SimpleNamespace

        env = _factory(config)(num_envs=1)
        env.close()
        return SimpleNamespace(spec=env.spec, device=device)
    from robot_rl.policies.checkpoint import load_policy

    return load_policy(config.policy or DEFAULT_POLICY, device)


def _factory(config: Config) -> Any:
    from robot_rl.core.errors import ConfigError
    from robot_rl.core.registry import make_env

    kind, _, path = config.reward.partition(":")
    if kind == "classifier":
        from robot_rl.policies.success import load_classifier
        from robot_rl.rl.rewards import ClassifierReward

        if not path:
            raise ConfigError("which classifier? --reward classifier:PATH (robot-rl reward train makes one)")
        classifier = load_classifier(path)
        return lambda num_envs: ClassifierReward(make_env(config.task, num_envs=num_envs), classifier)
    options = {} if config.reward == "sparse" else {"reward": config.reward}

    def make(num_envs: int) -> Any:
        return make_env(config.task, num_envs=num_envs, **options)

    return make


def _demonstrations(path: Path | None, base: Any) -> Any:
    if path is None:
        return None
    from robot_rl.data.dataset import open_dataset

    dataset = open_dataset(path)
    base.spec.require(dataset.spec, "the policy", "the demonstrations")
    return dataset.load(keys=list(base.spec.observation))


def _listing(settings: Any) -> str:
    from robot_rl.rl.options import describe

    lines = []
    for name, value, text in describe(settings):
        lines += [f"{name} = {value}", f"    {text}"]
    return "\n".join(lines)
