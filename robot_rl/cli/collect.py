"""Collect demonstrations of a task from its expert."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Config:
    """Settings of ``robot-rl collect``."""

    task: str
    """Task with an expert (`robot-rl list tasks`)."""
    out: Path
    """Dataset directory to create."""
    episodes: int = 50
    """Episodes to keep."""
    noise: float = 1.0
    """How imperfect the expert is; 0 is its best."""
    keep: Literal["success", "all"] = "success"
    """Which episodes to keep."""
    lanes: int = 25
    """Episodes run side by side."""
    seed: int = 0
    """First episode seed."""
    append: bool = False
    """Add to an existing dataset of the same interface."""


def run(config: Config) -> None:
    """Collect and say how the expert fared."""
    from robot_rl.train.progress import say

    result = collect_demonstrations(config)
    say(
        f"{result.kept} episodes, {result.frames} frames in {config.out}; "
        f"the expert succeeded in {result.succeeded} of {result.tried}"
    )


def collect_demonstrations(config: Config):  # noqa: ANN201 - the type would import numpy into the parser
    """Collect as configured and return the `robot_rl.rollout.collect.Collected` summary.

    Raises:
        CapabilityError: the task has no expert.
    """
    from robot_rl.core.errors import CapabilityError
    from robot_rl.core.registry import make_env
    from robot_rl.data.store import EpisodeWriter
    from robot_rl.rollout.collect import collect
    from robot_rl.train.progress import progress

    env = make_env(config.task, num_envs=min(config.lanes, config.episodes))
    try:
        if not hasattr(env, "make_expert"):
            raise CapabilityError(f"task '{config.task}' has no expert to collect from")
        expert = env.make_expert(noise=config.noise, seed=config.seed)
        writer = EpisodeWriter(config.out, env.spec, task=config.task, append=config.append)
        with progress("collect", config.episodes, unit="episode") as bar:
            result = collect(
                env,
                lambda observation: expert.act(),
                writer,
                config.episodes,
                seed=config.seed,
                keep=config.keep,
                label=getattr(expert, "label", None),
                progress=bar,
            )
        writer.close()
    finally:
        env.close()
    return result
