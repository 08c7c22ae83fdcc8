"""Evaluate a policy on fresh episodes: success with its 95 % interval, return, length, videos."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from robot_rl.core.ranges import require_range
from robot_rl.rollout.evaluate import TEST_SEED


@dataclass(frozen=True)
class Config:
    """Settings of ``robot-rl eval``."""

    policy: str
    """Checkpoint or export directory, for example runs/train/checkpoints/best, or a policy server (ws://host:port)."""
    task: str
    """Task to evaluate in (`robot-rl list tasks`)."""
    episodes: int = 100
    """Episodes, each with a seed of its own."""
    seeds: int = TEST_SEED
    """First episode seed; training uses seeds below the default."""
    lanes: int = 50
    """Episodes run side by side; changes the speed only."""
    device: str = "cpu"
    """Where the policy runs: cpu, cuda, cuda:1."""
    video: Path | None = None
    """Write a video grid of the first episodes to this .mp4 file."""
    video_lanes: int = 9
    """Episodes in the video."""
    json: Path | None = None
    """Write all results to this JSON file."""

    def __post_init__(self) -> None:
        require_range(self, "episodes", "lanes", "video_lanes", low=1)
        require_range(self, "seeds")


def run(config: Config) -> None:
    """Evaluate and print one line."""
    from robot_rl.core.registry import make_env
    from robot_rl.nets.device import find_device
    from robot_rl.policies.checkpoint import load_policy
    from robot_rl.rollout.evaluate import evaluate
    from robot_rl.rollout.video import record_video
    from robot_rl.train.progress import progress, say
    from robot_rl.train.run import make_directories, write_json

    make_directories(*(path.parent for path in (config.json, config.video) if path is not None))
    policy = load_policy(config.policy, find_device(config.device))
    env = make_env(config.task, num_envs=min(config.lanes, config.episodes))
    try:
        with progress("evaluate", config.episodes, unit="episode") as bar:
            result = evaluate(policy, env, config.episodes, config.seeds, bar)
    finally:
        env.close()
    say(result.summary())
    if config.json:
        facts = {"policy": str(config.policy), "task": config.task, **result.to_json()}
        write_json(config.json, json.loads(json.dumps(facts)))
    if config.video:
        env = make_env(config.task, num_envs=min(config.video_lanes, config.episodes))
        try:
            say(f"Video: {record_video(policy, env, config.video, seed=config.seeds)}")
        finally:
            env.close()
