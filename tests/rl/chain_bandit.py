"""A one-state task whose best chunk is known, and small generative policies for it."""

import numpy as np
import torch

from robot_rl.core.env import Step
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy

SPEC = Spec({"state": ArraySpec((1,))}, ArraySpec((1,), low=(-1.0,), high=(1.0,)), 10.0)
BEST = 0.6
"""The action that earns most; the policies' clones do 0.3."""


class BanditEnv:
    """Every episode is one chunk of two steps in the same state; reward ``-|a - BEST|^2``."""

    def __init__(self, num_envs=1):
        self.num_envs, self.max_episode_steps, self.spec = num_envs, 2, SPEC
        self.reset(0)

    def reset(self, seed=None):
        self.seeds = (seed or 0) + np.arange(self.num_envs)
        self.time = np.zeros(self.num_envs, int)
        return self._observe()

    def _observe(self):
        return {"state": np.zeros((self.num_envs, 1), np.float32)}

    def step(self, actions):
        self.time += 1
        error = actions[:, 0] - BEST
        done = self.time >= 2
        info = {"success": done & (np.abs(error) < 0.15), "episode_seed": self.seeds.copy()}
        self.seeds[done] += self.num_envs
        self.time[done] = 0
        return Step(self._observe(), (-(error**2)).astype(np.float32), done, np.zeros_like(done), self._observe(), info)

    def render(self, lane=0):
        return np.zeros((8, 8, 3), np.uint8)

    def close(self):
        pass


def small_policy(head, steps=4, train_steps=150, horizon=3, **options):
    """Clone actions N(0.3, 0.1) with a small network; the chunk's third action is never executed."""
    torch.manual_seed(0)
    config = ChunkedConfig(
        head, obs_steps=1, horizon=horizon, execute_steps=2, sample_steps=steps, width=24, depth=1, head_options=options
    )
    policy = ChunkedPolicy(SPEC, config)
    optimizer = torch.optim.Adam(policy.head.parameters(), 5e-3)
    for _ in range(train_steps):
        actions = 0.3 + 0.1 * torch.randn(64, horizon, 1)
        optimizer.zero_grad()
        policy.head.loss(actions, torch.zeros(64, 1)).mean().backward()
        optimizer.step()
    return policy.requires_grad_(False).eval()


def scrambled(module, scale=0.1, seed=1):
    """Move every parameter of ``module`` by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def history(lanes, seed=0):
    rng = np.random.default_rng(seed)
    return {"state": rng.normal(size=(lanes, 1, 1)).astype(np.float32)}
