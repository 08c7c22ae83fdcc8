"""Residual fine-tuning: a per-step Gaussian correction on a frozen chunked policy (ResiP, arXiv 2407.16677)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation, VecEnv
from robot_rl.core.policy import Policy
from robot_rl.core.spec import Spec
from robot_rl.data.frames import Frames
from robot_rl.nets.device import device_of
from robot_rl.policies.residual import ResidualPolicy, ResidualPolicyConfig
from robot_rl.rl.on_policy.learner import OnPolicyConfig, run_on_policy
from robot_rl.rl.on_policy.ratios import OnPolicyActor, Trace, gaussian_divergence
from robot_rl.rl.session import SessionConfig
from robot_rl.rollout.player import PolicyRunner
from robot_rl.train.run import Run


@dataclass(frozen=True)
class ResidualConfig:
    """Settings of residual fine-tuning."""

    lanes: int = 64
    """Environments stepped at once."""
    learn_std: bool = True
    """Whether the exploration's standard deviation is trained; else it stays at its initial value."""
    residual: ResidualPolicyConfig = field(default_factory=ResidualPolicyConfig)
    """The correction."""
    core: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    """The on-policy core."""


class ResidualActor(OnPolicyActor):
    """Explores with u ~ N(mean, std) around the base's chunk, each lane at its own place in it.

    It stands in for the policy in the one chunk player, and only its `refine` differs: it samples and traces.
    """

    def __init__(self, policy: ResidualPolicy, num_lanes: int, seed: int = 0, learn_std: bool = True) -> None:
        self.policy: ResidualPolicy = policy
        self.spec: Spec = policy.spec
        self.obs_steps, self.horizon, self.execute_steps = policy.obs_steps, policy.horizon, policy.execute_steps
        self.closed_loop = True
        self.learn_std = learn_std
        self.trace: Trace = {}
        self.decided = np.ones(num_lanes, bool)
        self.plans = 0
        """Chunks asked of the base so far."""
        self._runner = PolicyRunner(self, num_lanes)
        self._generator = torch.Generator().manual_seed(seed)
        self._history: Observation = {}
        policy.seed(seed)

    def seed(self, seed: int) -> None:
        """Make exploration and the base's sampling reproducible."""
        self._generator.manual_seed(seed)
        self.policy.seed(seed)

    def plan(self, history: Observation) -> np.ndarray:
        """Return the base's chunks (B, H, A)."""
        chunks = self.policy.plan(history)
        self.plans += len(chunks)
        return chunks

    @torch.no_grad()
    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return exploring actions (N, A) and trace what the ratio needs."""
        self._history = history
        features = self.policy.features(history, actions)
        mean = self.policy.actor(features)
        eps = torch.randn(mean.shape, generator=self._generator).to(mean.device)
        u = mean + self.policy.log_std.exp() * eps
        self.trace = {"features": features, "u": u}
        return self.policy.apply_correction(actions, u)

    def act(self, observation: Observation) -> np.ndarray:
        """Return exploring actions (N, A) in the units of the spec and set `trace`."""
        return self._runner.step(observation)

    def reset(self, lanes: np.ndarray) -> None:
        """Start new episodes in ``lanes``."""
        self._runner.reset(lanes)

    def look_ahead(self, observation: Observation) -> Tensor:
        """Return critic inputs (N, F), with the chunk's next action as the base action.

        Where a new plan would be due the old chunk's continuation stands for it: asking the base for one only to
        value a state would change its random stream and cost a plan.
        """
        newest = {k: np.concatenate([v[:, 1:], observation[k][:, None]], axis=1) for k, v in self._history.items()}
        return self.policy.features(newest, self._runner.player.peek()[:, 0])

    def critic_input(self, trace: Trace) -> Tensor:
        """Return what the correction sees: observation and base action."""
        return trace["features"]

    def score(self, trace: Trace) -> Tensor:
        """Return log-densities of u (B, 1), summed over the action."""
        return self.policy.log_prob(trace["features"], trace["u"])[:, None]

    def entropy(self, trace: Trace) -> Tensor:
        """Return the entropy of u."""
        return self.policy.entropy()

    def snapshot(self, trace: Trace) -> Trace:
        """Return mean and log standard deviation (B, A) of u."""
        mean = self.policy.actor(trace["features"])
        return {"mean": mean, "log_std": self.policy.log_std.expand_as(mean)}

    def divergence_from(self, snapshot: Trace, trace: Trace) -> Tensor:
        """Return KL(snapshot || present) of u (B,)."""
        mean = self.policy.actor(trace["features"])
        return gaussian_divergence(snapshot["mean"], snapshot["log_std"], mean, self.policy.log_std)

    def divergence_to_base(self, trace: Trace) -> Tensor:
        """Return KL(u || N(0, initial std)) (B,): the base's own action with the exploration noise at the start."""
        mean = self.policy.actor(trace["features"])
        start = torch.full_like(self.policy.log_std, float(self.policy.config.log_std))
        return gaussian_divergence(mean, self.policy.log_std, torch.zeros_like(mean), start)

    def parameters(self) -> list[nn.Parameter]:
        """Return the correction's weights, and the standard deviation if it is learned."""
        deviation = [self.policy.log_std] if self.learn_std else []
        return [*self.policy.actor.parameters(), *deviation]


def finetune(
    base: Policy,
    env_factory: Callable[..., VecEnv],
    config: ResidualConfig,
    run: Run,
    *,
    session: SessionConfig | None = None,
    demonstrations: Frames | None = None,
) -> Policy:
    """Improve ``base`` in the environment and return the best policy found, which is also saved in ``run``.

    Args:
        base: chunked policy with a normaliser; stays as it is.
        env_factory: ``env_factory(num_envs=…) -> VecEnv`` for the task.
        config: settings.
        run: run directory, which is continued if it holds a learner's state.
        session: budget and evaluation.
        demonstrations: not used by this method.
    """
    torch.manual_seed(run.seed)
    policy = ResidualPolicy(base, config.residual).to(device_of(base))
    policy.actor.requires_grad_(True)
    policy.log_std.requires_grad_(config.learn_std)
    actor = ResidualActor(policy, config.lanes, run.seed, config.learn_std)
    return run_on_policy(actor, env_factory, config.lanes, config.core, run, session)
