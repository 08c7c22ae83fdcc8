"""Point-goal navigation cloned from a planner: 300 demonstrations, a flow policy, 200 rooms never seen in training.

The policy sees 36 lidar beams and the goal's direction; the planner that it is measured against sees the whole map and
runs in the same rooms of the same run.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import numpy as np
import torch

from benchmarks.common import measure, report
from robot_rl.core.env import Observation, VecEnv
from robot_rl.core.registry import make_env
from robot_rl.core.spec import Spec
from robot_rl.data.frames import Frames
from robot_rl.data.windows import WindowSampler
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
from robot_rl.rollout.collect import collect
from robot_rl.rollout.evaluate import EvaluationResult, evaluate, wilson
from robot_rl.train.run import Run
from robot_rl.train.trainer import TrainConfig, train
from sim.tasks.navigate import mirrored, success_weighted_path_length

DEMONSTRATIONS = 300
NOISE = 1.5
KEYS = ("nearness", "goal")
TEST_SEED = 1_000_000
TEST_ROOMS = 200
POLICY = ChunkedConfig(
    obs_steps=2,
    horizon=8,
    execute_steps=2,
    sample_steps=5,
    width=256,
    depth=3,
    normalization="meanstd",
    observation_noise=0.15,
)
TRAINING = TrainConfig(steps=4_000, batch_size=512, checkpoint_every=4_000)


class Memory:
    """Takes episodes as `robot_rl.data.store.EpisodeWriter` does, and keeps them."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.observation: dict[str, list[np.ndarray]] = {key: [] for key in spec.observation}
        self.action: list[np.ndarray] = []
        self.ends: list[int] = []

    def add(self, observation: Observation, action: np.ndarray, **_extras: Any) -> None:
        """Take one frame."""
        for key, value in observation.items():
            self.observation[key].append(value)
        self.action.append(action)

    def save_episode(self, success: bool) -> None:
        """End the episode."""
        self.ends.append(len(self.action))

    def frames(self) -> Frames:
        """Return everything taken."""
        observation = {key: np.stack(values) for key, values in self.observation.items()}
        return Frames(observation, np.stack(self.action), np.array(self.ends), self.spec)


class FullMap:
    """The planner with the full map behind the interface of a policy, so that both are evaluated by the same code."""

    obs_steps, horizon, execute_steps, closed_loop = 1, 1, 1, False

    def __init__(self, env: VecEnv) -> None:
        self.spec, self._expert = env.spec, env.make_expert(noise=0.0)

    def seed(self, seed: int) -> None:
        """Nothing is random."""

    def plan(self, history: Observation) -> np.ndarray:
        """Return the planner's actions (N, 1, A); it reads the simulator, not the history."""
        return self._expert.act()[:, None]

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return ``actions``."""
        return actions


def demonstrations(seed: int) -> Frames:
    """Return the planner's demonstrations, each in a room of its own, with errors, recoveries and clean labels."""
    env = make_env("navigate", 25, worlds=0, threads=1)
    expert, memory = env.make_expert(noise=NOISE, seed=seed), Memory(env.spec)
    collect(env, lambda _: expert.act(), memory, DEMONSTRATIONS, seed=seed * 10_000, label=expert.label)
    return memory.frames()


def learn(seed: int) -> tuple[ChunkedPolicy, dict[str, float]]:
    """Return a policy trained from scratch, and what it cost."""
    torch.manual_seed(seed)
    with measure() as collecting:
        frames = demonstrations(seed)
    augmented = mirrored(frames.select(KEYS))
    with measure() as training, tempfile.TemporaryDirectory() as folder:
        policy = ChunkedPolicy.fit(augmented, POLICY)
        sampler = WindowSampler(augmented, POLICY.obs_steps, POLICY.horizon)
        with Run.create(f"{folder}/run", TRAINING, spec=augmented.spec, seed=seed) as run:
            policy = train(policy, sampler, TRAINING, run, seed)
    return policy, {
        "demonstrations": frames.num_episodes,
        "demonstration_frames": frames.num_frames,
        "collecting_core_minutes": collecting.cpu / 60,
        "training_wall_minutes": training.wall / 60,
        "training_core_minutes": training.cpu / 60,
    }


def outcomes(result: EvaluationResult) -> dict[str, np.ndarray]:
    """Return the arrays (E,) of an evaluation that `figures` needs."""
    names = ("collision", "shortest_length", "path_length")
    return {"success": result.success, "length": result.lengths, **{name: result.extras[name] for name in names}}


def figures(episodes: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return success, collisions and SPL of ``episodes``, shares with their 95 % intervals."""
    success, collided = episodes["success"], episodes["collision"] > 0
    return {
        "success": float(success.mean()),
        "success_interval_95": list(wilson(int(success.sum()), len(success))),
        "collisions": float(collided.mean()),
        "collisions_interval_95": list(wilson(int(collided.sum()), len(collided))),
        "timeouts": float((~success & ~collided).mean()),
        "spl": success_weighted_path_length(success, episodes["shortest_length"], episodes["path_length"]),
        "seconds_to_goal": float(episodes["length"][success].mean() / 10.0),
    }


def main() -> None:
    """Collect, train, evaluate policies and planner, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one training from scratch for each")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    env = make_env("navigate", 50, threads=1)
    costs, runs = [], []
    for seed in options.seeds:
        policy, cost = learn(seed)
        costs.append(cost)
        runs.append(outcomes(evaluate(policy, env, TEST_ROOMS, TEST_SEED)))
    cloned = figures({name: np.concatenate([run[name] for run in runs]) for name in runs[0]})
    planner = figures(outcomes(evaluate(FullMap(env), env, TEST_ROOMS, TEST_SEED)))
    report(
        "navigate_rooms",
        seeds={"training": options.seeds, "rooms": [TEST_SEED, TEST_SEED + TEST_ROOMS - 1]},
        budget={"per_seed": costs, "training_steps": TRAINING.steps, "torch_threads": options.threads},
        metrics={
            **cloned,
            "spl_ratio": cloned["spl"] / planner["spl"],
            "training_minutes": max(cost["training_wall_minutes"] for cost in costs),
        },
        peers={
            "planner_with_full_map": planner,
            **{f"seed_{seed}": figures(run) for seed, run in zip(options.seeds, runs, strict=True)},
        },
        targets={"success": (">=", 0.9), "spl_ratio": (">=", 0.9), "training_minutes": ("<=", 10.0)},
        notes="Every demonstration and every test in a room of its own; demonstrations are mirrored for training. "
        "Figures pool the training seeds, all tested in the same rooms.",
    )


if __name__ == "__main__":
    main()
