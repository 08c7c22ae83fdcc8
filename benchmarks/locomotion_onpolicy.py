"""Policy gradients from scratch on HalfCheetah: our PPO and FPO, and Stable-Baselines3's PPO on the same task.

Interrupted runs continue: every stage is kept in ``runs/bench/locomotion_onpolicy``; ``--fresh`` starts again.
Returns are those of the policy after its last step, without exploration, over 1000 steps on seeds never trained on.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import report
from benchmarks.pusht_human import stage
from robot_rl.core.registry import load, make_env
from robot_rl.policies.checkpoint import load_policy
from robot_rl.policies.diagonal import DiagonalConfig
from robot_rl.rl.methods.ppo import PPOConfig
from robot_rl.rl.on_policy.learner import OnPolicyConfig
from robot_rl.rl.session import SessionConfig
from robot_rl.rollout.evaluate import evaluate
from robot_rl.train.run import Run

TASK, TEST_SEED, EPISODES = "half_cheetah", 1_000_000, 50
PPO = PPOConfig(
    lanes=32,
    normalizer="running",
    policy=DiagonalConfig(hidden=(256, 256), activation="relu", log_std=-1.0),
    core=OnPolicyConfig(
        rollout_steps=64,
        stagger=True,
        epochs=8,
        minibatches=16,
        discount=0.98,
        gae_lambda=0.92,
        target_kl=0.0,
        schedule="linear",
        actor_learning_rate=3e-4,
        critic_learning_rate=1e-3,
        warmup_iterations=0,
        value_hidden=(256, 256),
    ),
)
SB3 = {
    "n_steps": 512,
    "batch_size": 64,
    "n_epochs": 20,
    "gamma": 0.98,
    "gae_lambda": 0.92,
    "learning_rate": 2.0633e-05,
    "ent_coef": 0.000401762,
    "clip_range": 0.1,
    "max_grad_norm": 0.8,
    "vf_coef": 0.58096,
}
"""rl-baselines3-zoo's tuned settings of PPO for HalfCheetah: one environment, networks of 2 x 256, normalisation."""


def fpo_settings() -> Any:
    """Return FPO's settings: PPO's lanes, discount and critic, half as many minibatches, and an anchor."""
    from robot_rl.policies.scratch import ScratchConfig
    from robot_rl.rl.methods.fpo import FPOConfig
    from robot_rl.rl.on_policy.anchor import AnchorConfig

    core = replace(PPO.core, minibatches=8, clip=0.05, anchor=AnchorConfig(weight=0.01))
    return FPOConfig(scratch=True, lanes=PPO.lanes, relative=True, policy=ScratchConfig(sample_steps=5), core=core)


def environment(num_envs: int) -> Any:
    """Make lanes of the task on one thread."""
    return make_env(TASK, num_envs=num_envs, threads=1)


def learn(path: Path, method: str, seed: int, steps: int) -> dict[str, Any]:
    """Learn with one of our methods; returns what it scores at the end."""
    config = PPO if method == "ppo" else fpo_settings()
    env = environment(EPISODES)
    try:
        session = SessionConfig(steps=steps, evaluations=3, eval_episodes=20, eval_lanes=20)
        record = {"method": method, "config": config, "session": session}
        with Run.create(path, record, spec=env.spec, seed=seed, resume=True) as run:
            # From scratch a method asks of its base no more than the task's interface.
            load("finetuners", method)(SimpleNamespace(spec=env.spec), environment, config, run, session=session)
        returns = evaluate(load_policy(path / "checkpoints" / "last"), env, EPISODES, TEST_SEED).returns
    finally:
        env.close()
    return {"return": float(returns.mean()), "deviation": float(returns.std()), "steps": steps}


def learn_stable_baselines(path: Path, seed: int, steps: int) -> dict[str, Any]:
    """Learn with Stable-Baselines3's PPO at its published settings, through the Gymnasium view of our task."""
    import stable_baselines3
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    from sim.vector import GymnasiumEnv

    def make(statistics_from: Path | None) -> Any:
        lanes = DummyVecEnv([lambda: GymnasiumEnv(environment(1), key="state")])
        if statistics_from is not None:
            return VecNormalize.load(str(statistics_from), lanes)
        return VecNormalize(lanes, gamma=SB3["gamma"])

    path.mkdir(parents=True, exist_ok=True)
    model_file, statistics_file = path / "model.zip", path / "statistics.pkl"
    if model_file.exists():
        model = stable_baselines3.PPO.load(model_file, make(statistics_file), device="cpu")
    else:
        networks = {"net_arch": [256, 256], "activation_fn": nn.ReLU, "log_std_init": -2.0, "ortho_init": False}
        model = stable_baselines3.PPO("MlpPolicy", make(None), policy_kwargs=networks, seed=seed, device="cpu", **SB3)
    while model.num_timesteps < steps:
        model.learn(min(102_400, steps - model.num_timesteps), reset_num_timesteps=False)
        model.save(model_file)
        model.get_env().save(str(statistics_file))
    returns = score(model, model.get_env())
    return {"return": float(returns.mean()), "deviation": float(returns.std()), "steps": model.num_timesteps}


def score(model: Any, normalizer: Any) -> np.ndarray:
    """Return the peer's returns on the test seeds."""
    env = environment(EPISODES)
    observation, returns = env.reset(TEST_SEED), np.zeros(EPISODES)
    try:
        for _ in range(env.max_episode_steps):
            actions, _ = model.predict(normalizer.normalize_obs(observation["state"]), deterministic=True)
            step = env.step(actions)
            returns += step.reward
            observation = step.observation
    finally:
        env.close()
    return returns


def main() -> None:
    """Run what is missing and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/locomotion_onpolicy"))
    parser.add_argument("--steps", type=int, default=3_000_000, help="environment steps of each run")
    parser.add_argument("--only", default="", help="run only the stages whose name starts with this, without a report")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fresh:
        shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    work: dict[str, Any] = {
        f"ppo_{seed}": lambda seed=seed: learn(options.out / f"ppo_{seed}_run", "ppo", seed, options.steps)
        for seed in range(3)
    }
    work["fpo_0"] = lambda: learn(options.out / "fpo_0_run", "fpo", 0, options.steps)
    work["sb3_0"] = lambda: learn_stable_baselines(options.out / "sb3_0_run", 0, options.steps)
    done = {name: stage(options.out, name, job) for name, job in work.items() if name.startswith(options.only)}
    if len(done) < len(work):
        return
    rate = {name: found["steps"] / (60 * found["core_minutes"]) for name, found in done.items()}
    ours = [f"ppo_{seed}" for seed in range(3)]
    returns = [done[name]["return"] for name in ours]
    speed = statistics.median(rate[name] for name in ours)
    report(
        "locomotion_onpolicy",
        seeds={"training": [0, 1, 2], "peer": 0, "first_test_episode": TEST_SEED, "episodes": EPISODES},
        budget={"steps": options.steps, "threads": 1, "core_minutes": {k: v["core_minutes"] for k, v in done.items()}},
        metrics={
            "ppo_return": statistics.mean(returns),
            "ppo_return_lowest": min(returns),
            "ppo_return_highest": max(returns),
            "fpo_return": done["fpo_0"]["return"],
            "return_ratio": statistics.mean(returns) / done["sb3_0"]["return"],
            "ppo_steps_per_s": speed,
            "fpo_steps_per_s": rate["fpo_0"],
            "steps_per_s_ratio": speed / rate["sb3_0"],
            "fpo_to_ppo": done["fpo_0"]["return"] / statistics.mean(returns),
        },
        peers={
            "stable_baselines3_return": done["sb3_0"]["return"],
            "stable_baselines3_steps_per_s": rate["sb3_0"],
            "rl-baselines3-zoo, published return after 1 M steps": 5836,
        },
        targets={
            "return_ratio": (">=", 1.0),
            "steps_per_s_ratio": (">=", 3.0),
            "fpo_to_ppo": (">=", 0.7),
        },
        notes="Returns of the last policy without exploration. Steps per second of processor time of one core, with "
        "everything included: simulation, learning and, for ours, validation. The peer learns at "
        "rl-baselines3-zoo's settings for this task, in one lane of the same simulator.",
    )


if __name__ == "__main__":
    main()
