"""How fast the on-policy core updates, against Stable-Baselines3's PPO on identical sizes."""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.common import report
from robot_rl.core.env import Observation, Step
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.policies.diagonal import DiagonalConfig
from robot_rl.rl.methods.ppo import PPOConfig, make_learner
from robot_rl.rl.on_policy.learner import OnPolicyConfig

STATE, ACTION, ROWS, BATCH, EPOCHS, LANES = 17, 6, 2048, 64, 10, 16
"""Stable-Baselines3's defaults on HalfCheetah's sizes."""


class Blank:
    """Lanes of random numbers, so that only learning takes time."""

    num_envs, max_episode_steps = LANES, 1000
    spec = Spec({"state": ArraySpec((STATE,))}, ArraySpec((ACTION,), low=(-1.0,) * ACTION, high=(1.0,) * ACTION), 20.0)

    def reset(self, seed: Any = None) -> Observation:
        """Start."""
        self.rng = np.random.default_rng(0)
        return self._observe()

    def step(self, actions: np.ndarray) -> Step:
        """Go on."""
        reward, never = self.rng.standard_normal(LANES).astype(np.float32), np.zeros(LANES, bool)
        observation = self._observe()
        return Step(observation, reward, never, never, observation, {"success": never})

    def _observe(self) -> Observation:
        return {"state": self.rng.standard_normal((LANES, STATE)).astype(np.float32)}

    def close(self) -> None:
        """Stop."""


def ours(hidden: tuple[int, ...], schedule: str = "constant") -> Callable[[], None]:
    """Return a function that makes one iteration's update: advantages, old scores, 10 passes of 32 minibatches."""
    core = OnPolicyConfig(
        rollout_steps=ROWS // LANES,
        epochs=EPOCHS,
        minibatches=ROWS // BATCH,
        normalize="minibatch",
        target_kl=0.0,
        schedule=schedule,  # type: ignore[arg-type]
        actor_learning_rate=3e-4,
        critic_learning_rate=3e-4,
        max_grad_norm=0.5,
        warmup_iterations=0,
        value_hidden=hidden,
    )
    learner = make_learner(Blank(), PPOConfig(lanes=LANES, policy=DiagonalConfig(hidden=hidden), core=core))
    rollout = learner.collect()
    return lambda: learner.update(rollout, 0.0) and None


def stable_baselines(hidden: tuple[int, ...]) -> Callable[[], None]:
    """Return the same for Stable-Baselines3, whose advantages are computed beforehand."""
    import gymnasium as gym
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import configure

    class Empty(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (STATE,), np.float32)
        action_space = gym.spaces.Box(-1, 1, (ACTION,), np.float32)

        def reset(self, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
            super().reset(seed=seed)
            return self.np_random.standard_normal(STATE).astype(np.float32), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            return self.np_random.standard_normal(STATE).astype(np.float32), self.np_random.normal(), False, False, {}

    model = PPO("MlpPolicy", Empty(), n_steps=ROWS, policy_kwargs={"net_arch": list(hidden)}, seed=0, device="cpu")
    model.set_logger(configure(None, []))
    _, callback = model._setup_learn(ROWS)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, ROWS)
    return model.train


def time_in_turn(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return processor seconds per update, round by round, the variants taking turns so that a busy machine is fair."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, update in variants.items():
            start = time.process_time()
            update()
            times[name].append(time.process_time() - start)
    return {name: values[1:] for name, values in times.items()}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of timing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    small, large = (64, 64), (256, 256)
    times = time_in_turn(
        {
            "ours": ours(small),
            "sb3": stable_baselines(small),
            "ours adaptive": ours(small, "adaptive"),
            "ours 256": ours(large),
            "sb3 256": stable_baselines(large),
        },
        arguments.rounds,
    )

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    samples = {name: ROWS * EPOCHS / statistics.median(values) for name, values in times.items()}
    report(
        "ppo_updates",
        seeds=0,
        budget={"rounds": arguments.rounds, "threads": 1},
        metrics={
            "samples_per_s": samples["ours"],
            "samples_per_s_256": samples["ours 256"],
            "samples_per_s_adaptive": samples["ours adaptive"],
            "ratio_to_sb3": ratio("sb3", "ours"),
            "ratio_to_sb3_256": ratio("sb3 256", "ours 256"),
        },
        peers={
            "stable_baselines3_samples_per_s": samples["sb3"],
            "stable_baselines3_samples_per_s_256": samples["sb3 256"],
        },
        targets={"ratio_to_sb3": (">=", 2.0)},
        notes=f"Samples through the update: {ROWS} decisions, {EPOCHS} passes, minibatches of {BATCH}, {STATE} numbers "
        f"seen, {ACTION} actions, networks of 2 x 64 (2 x 256 where said). Our time includes values, advantages and "
        "old scores, that of Stable-Baselines3 does not. Times are processor times, median over rounds taken in turn.",
    )


if __name__ == "__main__":
    main()
