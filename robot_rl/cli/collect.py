"""Collect demonstrations of a task from its expert."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from robot_rl.core.ranges import require_range

_RECORD = Path("meta") / "collect.json"
"""File in the data set: the first seed that was not tried yet, and how many episodes there are to be in all."""


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
    seed: int | None = None
    """First episode seed; by default 0, or with --append the first that was not tried yet."""
    append: bool = False
    """Add to an existing dataset of the same interface."""

    def __post_init__(self) -> None:
        require_range(self, "episodes", "lanes", low=1)
        require_range(self, "noise", "seed")


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
        CapabilityError: the task has no expert, or one that does not succeed.
    """
    import numpy as np

    from robot_rl.core.errors import CapabilityError
    from robot_rl.core.registry import make_env
    from robot_rl.data.store import EpisodeWriter
    from robot_rl.rollout.collect import collect
    from robot_rl.train.progress import progress
    from robot_rl.train.run import write_json

    env = make_env(config.task, num_envs=min(config.lanes, config.episodes))
    try:
        if not hasattr(env, "make_expert"):
            raise CapabilityError(f"task '{config.task}' has no expert to collect from")
        with (
            EpisodeWriter(config.out, env.spec, task=config.task, append=config.append) as writer,
            progress("collect", config.episodes, unit="episode") as bar,
        ):
            untried = max(writer.num_episodes, _record(config.out).get("next_seed", 0))
            seed = untried if config.seed is None else config.seed
            goal = writer.num_episodes + config.episodes
            expert = env.make_expert(noise=config.noise, seed=seed)
            begun = np.ones(env.num_envs, np.int64)  # episodes of each lane
            try:
                return collect(
                    env,
                    lambda observation: expert.act(),
                    writer,
                    config.episodes,
                    seed=seed,
                    keep=config.keep,
                    label=getattr(expert, "label", None),
                    on_reset=lambda lanes: np.add(begun, lanes, out=begun),
                    progress=bar,
                )
            finally:
                if writer.num_episodes:
                    next_seed = max(untried, seed + env.num_envs * int(begun.max()))
                    write_json(config.out / _RECORD, {"next_seed": next_seed, "goal": goal})
    finally:
        env.close()


def resume_hint(config: Config) -> str:
    """Say how an interrupted collection goes on."""
    from robot_rl.cli.main import command

    record = _record(config.out)
    if not record:
        return f"Start again with: {command('collect', config)}"
    rest = replace(config, episodes=max(1, record["goal"] - _recorded(config.out)), append=True, seed=None)
    return f"What is finished is kept in {config.out}. Continue with: {command('collect', rest)}"


def _record(root: Path) -> dict[str, Any]:
    path = root / _RECORD
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _recorded(root: Path) -> int:
    from robot_rl.data.dataset import open_dataset

    return open_dataset(root).num_episodes
