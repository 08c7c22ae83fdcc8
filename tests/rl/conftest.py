"""Toy tasks and base policies whose right answers are known; lets the tests of this room import its modules."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robot_rl.core import registry
from robot_rl.core.env import Step
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.normalizer import Normalizer

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))


class ReachEnv:
    """Walk to a goal: x += 0.1 a in every axis; success within ``radius`` of the goal, sparse reward, time limit.

    With ``hold`` the state does not move: each step is scored on how near ``a`` is to the goal (a bandit).
    """

    def __init__(self, num_envs=1, size=2, limit=20, radius=0.1, seed=0, hold=False):
        self.num_envs, self.max_episode_steps = num_envs, limit
        self.size, self.radius, self.hold = size, radius, hold
        bound = (1.0,) * size
        low = (-1.0,) * size
        self.spec = Spec({"state": ArraySpec((2 * size,))}, ArraySpec((size,), low=low, high=bound), 10.0)
        self.nan_at = None
        self.closed = False
        self.reset(seed)

    def reset(self, seed=None):
        self._seed = self._seed if seed is None else seed
        self.count = np.zeros(self.num_envs, np.int64)
        self.x = np.zeros((self.num_envs, self.size), np.float32)
        self.goal = np.zeros_like(self.x)
        self.time = np.zeros(self.num_envs, np.int64)
        self.total = 0
        self._begin(np.ones(self.num_envs, bool))
        return self._observe()

    def _begin(self, lanes):
        for i in np.flatnonzero(lanes):
            rng = np.random.default_rng(self._seed + i + self.count[i] * self.num_envs)
            self.count[i] += 1
            self.x[i] = 0
            self.goal[i] = rng.uniform(-0.8, 0.8, self.size)
            self.time[i] = 0

    def _observe(self):
        return {"state": np.concatenate([self.x, self.goal], axis=1)}

    def step(self, actions):
        actions = np.clip(actions, -1, 1)
        self.total += 1
        self.x = actions.astype(np.float32) if self.hold else self.x + 0.1 * actions.astype(np.float32)
        self.time += 1
        success = np.linalg.norm(self.x - self.goal, axis=1) < self.radius
        truncated = (self.time >= self.max_episode_steps) & ~success
        reward = success.astype(np.float32)
        if self.nan_at is not None and self.total >= self.nan_at:
            reward[:] = np.nan
        final = self._observe()
        seeds = self._seed + np.arange(self.num_envs) + (self.count - 1) * self.num_envs
        self._begin(success | truncated)
        return Step(self._observe(), reward, success, truncated, final, {"success": success, "episode_seed": seeds})

    def render(self, lane=0):
        return np.zeros((8, 8, 3), np.uint8)

    def close(self):
        self.closed = True


class FakeBase(nn.Module):
    """Heads for the goal with a constant ``offset``, plus its start noise times ``noise_gain``."""

    kind = "fake_base"
    closed_loop = False
    base = None

    def __init__(
        self, spec, offset=0.0, noise_gain=0.0, horizon=8, execute_steps=4, obs_steps=2, hold=False, fold=None
    ):
        super().__init__()
        self.spec, self.horizon, self.execute_steps, self.obs_steps = spec, horizon, execute_steps, obs_steps
        self.options = {"offset": offset, "noise_gain": noise_gain, "horizon": horizon, "fold": fold}
        self.options |= {"execute_steps": execute_steps, "obs_steps": obs_steps, "hold": hold}
        self.normalizer = Normalizer(spec)
        self.register_buffer("offset", torch.tensor(float(offset)))
        self.noise_gain, self.hold, self.fold = noise_gain, hold, fold
        self.calls = 0
        self._generator = torch.Generator()

    @classmethod
    def from_parts(cls, config, spec, base=None):
        return cls(spec, **config)

    def config_dict(self):
        return self.options

    def seed(self, seed):
        self._generator.manual_seed(seed)

    def encode(self, history):
        return history["state"][:, -1].float()

    def normalize_action(self, actions):
        return self.normalizer.normalize("action", actions)

    def unnormalize_action(self, actions):
        return self.normalizer.unnormalize("action", actions).clamp(-1, 1)

    def sample(self, cond, noise=None):
        size = self.spec.action.size
        if noise is None:
            noise = torch.randn(len(cond), self.horizon, size, generator=self._generator)
        if self.fold == "identity":
            return noise
        if self.fold == "absolute":
            return noise.abs()
        x, goal = cond[:, :size], cond[:, size:]
        step = goal if self.hold else (10 * (goal - x) / self.execute_steps).clamp(-1, 1)
        return step[:, None] + self.offset + self.noise_gain * noise

    def plan(self, history):
        self.calls += len(history["state"])
        cond = self.encode({"state": torch.from_numpy(history["state"])})
        return self.unnormalize_action(self.sample(cond)).numpy()

    def refine(self, history, actions):
        return actions


@pytest.fixture(scope="session", autouse=True)
def _registered():
    from robot_rl.core import registry

    registry.register("policies", "fake_base", FakeBase)


@pytest.fixture(scope="session")
def reach_env():
    return ReachEnv


@pytest.fixture(scope="session")
def fake_base():
    return FakeBase


@pytest.fixture
def clustered(tmp_path, monkeypatch):
    """A comparison on a cluster, of a method that works and one that fails, and what stands for the commands."""
    from robot_rl.rl.compare.run import Config

    @dataclass(frozen=True)
    class Settings:
        scale: float = 0.1

    def finetune(base, env_factory, config, run):
        raise AssertionError("runs are processes of their own")

    finetune.__annotations__["config"] = Settings
    for name in ("good", "broken"):
        monkeypatch.setitem(registry._overrides, ("finetuners", name), finetune)
    base = tmp_path / "base"
    base.mkdir()
    (base / "policy.json").write_text(json.dumps({"rate": 0.5}))
    (base / "model.safetensors").write_bytes(b"")
    config = Config(base, "toy", ("good", "broken"), minutes=1.0, out=tmp_path / "out", cluster=True)
    launcher = (str(Path(__file__).parent / "fake_commands.py"),)
    return config, launcher
