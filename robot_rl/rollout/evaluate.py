"""Evaluation: a fixed block of episode seeds, many lanes at once, success with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robot_rl.core.env import VecEnv
from robot_rl.core.errors import DataError
from robot_rl.core.policy import Policy
from robot_rl.rollout.player import PolicyRunner

TEST_SEED = 1_000_000
"""First episode seed of evaluations; training and demonstrations use seeds below it."""


@dataclass
class EvaluationResult:
    """Outcomes of E episodes, ordered by seed."""

    seeds: np.ndarray
    """(E,) int64 episode seeds."""
    success: np.ndarray
    """(E,) bool."""
    returns: np.ndarray
    """(E,) float32, undiscounted."""
    lengths: np.ndarray
    """(E,) int64 control steps."""
    max_reward: np.ndarray
    """(E,) float32, largest reward of a single step; the score of coverage tasks."""
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    """Other per-lane info of each episode's last step, by name, each (E,)."""

    @property
    def success_rate(self) -> float:
        """Share of successful episodes."""
        return float(self.success.mean())

    @property
    def success_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the success rate."""
        return wilson(int(self.success.sum()), len(self.success))

    def summary(self) -> str:
        """Return one line for people."""
        low, high = self.success_interval
        return (
            f"success {self.success_rate:.1%} [{low:.1%}, {high:.1%}] over {len(self.success)} episodes, "
            f"return {self.returns.mean():.2f}, length {self.lengths.mean():.0f}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready results: summary figures and the per-episode arrays."""
        return {
            "episodes": len(self.success),
            "first_seed": int(self.seeds[0]),
            "success_rate": self.success_rate,
            "success_interval_95": list(self.success_interval),
            "return_mean": float(self.returns.mean()),
            "length_mean": float(self.lengths.mean()),
            "max_reward_mean": float(self.max_reward.mean()),
            "extras_mean": {name: float(np.mean(value)) for name, value in self.extras.items()},
            "per_episode": {
                "seed": self.seeds.tolist(),
                "success": self.success.tolist(),
                "return": self.returns.tolist(),
                "length": self.lengths.tolist(),
                "max_reward": self.max_reward.tolist(),
            },
        }


def evaluate(
    policy: Policy, env: VecEnv, episodes: int, seed: int = TEST_SEED, progress: Any = None
) -> EvaluationResult:
    """Run ``policy`` in ``env`` for the episodes ``seed … seed + episodes - 1``, each exactly once.

    Lanes go round by round, so that short episodes are not counted more often than long ones.

    Args:
        policy: what to evaluate; its noise is seeded with ``seed``.
        env: the environment; its number of lanes changes the speed, not which episodes are run.
        episodes: number E of episodes.
        seed: first episode seed.
        progress: a progress bar with ``advance(n, **values)``.

    Raises:
        SpecMismatchError: the environment does not provide what the policy needs.
        DataError: its steps do not say which episode they belong to, or whether it succeeded.
    """
    policy.spec.require(env.spec, "the policy", "the environment")
    policy.seed(seed)
    record = _Record(episodes, seed)
    runner = PolicyRunner(policy, env.num_envs)
    observation = env.reset(seed)
    while not record.complete:
        step = env.step(runner.step(observation))
        finished = record.add(step)
        if progress is not None and finished:
            progress.advance(finished, success=record.success_so_far)
        if step.done.any():
            runner.reset(step.done)
        observation = step.observation
    return record.result()


class _Record:
    """Collects the episodes whose seeds belong to the evaluation."""

    def __init__(self, episodes: int, seed: int) -> None:
        self.first = seed
        self.finished = np.zeros(episodes, bool)
        self.success = np.zeros(episodes, bool)
        self.returns = np.zeros(episodes, np.float64)
        self.lengths = np.zeros(episodes, np.int64)
        self.max_reward = np.full(episodes, -np.inf, np.float32)
        self.extras: dict[str, np.ndarray] = {}

    @property
    def complete(self) -> bool:
        return bool(self.finished.all())

    @property
    def success_so_far(self) -> float:
        return float(self.success[self.finished].mean())

    def add(self, step: Any) -> int:
        """Take in one step of all lanes; returns how many of our episodes ended with it."""
        if missing := [repr(key) for key in ("success", "episode_seed") if key not in step.info]:
            raise DataError(f"the info of the environment's steps lacks {' and '.join(missing)}, (N,) each")
        episode = step.info["episode_seed"] - self.first
        ours = (episode >= 0) & (episode < len(self.finished))
        index = episode[ours]
        self.returns[index] += step.reward[ours]
        self.lengths[index] += 1
        self.max_reward[index] = np.maximum(self.max_reward[index], step.reward[ours])
        ended = ours & step.done
        if not ended.any():
            return 0
        index = episode[ended]
        self.finished[index] = True
        self.success[index] = step.info["success"][ended]
        for name, values in step.info.items():
            if name not in ("success", "episode_seed") and np.ndim(values) == 1:
                self.extras.setdefault(name, np.zeros(len(self.finished), np.float64))[index] = values[ended]
        return len(index)

    def result(self) -> EvaluationResult:
        seeds = self.first + np.arange(len(self.finished))
        returns = self.returns.astype(np.float32)
        return EvaluationResult(seeds, self.success, returns, self.lengths, self.max_reward, self.extras)


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a share (E. B. Wilson, 1927); ``z`` defaults to 95 %."""
    if trials == 0:
        return (0.0, 1.0)
    share = successes / trials
    centre = share + z**2 / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    return (max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))
