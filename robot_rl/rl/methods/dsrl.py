"""Latent-space fine-tuning: learn which start noise to give a frozen policy (DSRL, arXiv 2506.15799)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from robot_rl.core.env import Observation, VecEnv
from robot_rl.core.errors import CapabilityError
from robot_rl.core.policy import Policy
from robot_rl.data.frames import Frames
from robot_rl.nets.device import device_of
from robot_rl.policies.chunked import ChunkedPolicy
from robot_rl.policies.steered import SteeredPolicy, SteeredPolicyConfig
from robot_rl.rl.critics import EnsembleCritic
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.off_policy.collector import PriorBehaviour
from robot_rl.rl.off_policy.core import OffPolicyConfig, OffPolicyCore
from robot_rl.rl.off_policy.learner import run_off_policy
from robot_rl.rl.off_policy.proposals import AliasedNoiseProposal, GaussianProposal, Proposal
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run


def _core() -> OffPolicyConfig:
    # With the entropy of a whole chunk's noise in the backup, long episodes earn more than success does. The actor
    # wanders between noises that serve alike, and on the way through some that do not: its average does not.
    return OffPolicyConfig(
        entropy_backup=False,
        initial_temperature=0.02,
        target_entropy=0.0,
        updates_per_step=0.06,
        actor_reduce="min",
        start_steps=10_000,
        actor_average=0.998,
    )


@dataclass(frozen=True)
class DSRLConfig:
    """Settings of latent-space fine-tuning."""

    variant: Literal["na", "plain"] = "plain"
    """plain: SAC over noises. na: noise-aliased, a critic of executed actions distilled into one of noises; its
    updates ask the frozen policy, and it can learn from demonstrations."""
    lanes: int = 64
    """Environments stepped at once."""
    demonstration_share: float = 0.5
    """Share of demonstrations in a batch, where there are any; na only."""
    sample_steps: int = 0
    """Sampling steps of the base from now on; 0 for its own. Fewer make roll-outs and updates of na cheaper."""
    block: int = 8
    """Control steps of every lane between updates."""
    steering: SteeredPolicyConfig = field(default_factory=SteeredPolicyConfig)
    """The noise policy."""
    decision: DecisionConfig = field(default_factory=lambda: DecisionConfig(penalty=1.0))
    """Reward and discount of a chunk."""
    core: OffPolicyConfig = field(default_factory=_core)
    """The off-policy core."""


class NoiseBehaviour(PriorBehaviour):
    """Steers with sampled noise; until learning begins, with N(0, I), which is the base policy itself."""

    def __init__(self, policy: SteeredPolicy, variant: str) -> None:
        self.policy, self.variant = policy, variant
        self.spec, self.obs_steps = policy.spec, policy.obs_steps
        self.horizon, self.execute_steps = policy.horizon, policy.execute_steps
        self.learning = False
        self.record = {}

    @torch.no_grad()
    def plan(self, history: Observation) -> np.ndarray:
        """Return exploring chunks (b, H, A) and set `record`."""
        policy = self.policy
        cond = policy.encode(history)
        eps = policy.draw(len(cond)).to(cond.device)
        noise = policy.actor(cond, eps)[0] if self.learning else eps / policy.config.bound
        sample = policy.decode(cond, policy.config.bound * noise)
        chunks = policy.base.unnormalize_action(sample)
        executed = policy.base.normalize_action(chunks[:, : self.execute_steps]).flatten(1)
        self.record = {"state": cond, "action": noise if self.variant == "plain" else executed}
        return chunks.cpu().numpy()

    def state(self, history: Observation) -> Tensor:
        """Return the base's conditions (b, C)."""
        return self.policy.encode(history)

    def action(self, chunks: np.ndarray) -> Tensor:
        """Return normalised executed chunks (b, execute_steps * A)."""
        if self.variant == "plain":
            raise CapabilityError("plain DSRL cannot use demonstrations, for they hold no noise; variant 'na' can")
        executed = torch.as_tensor(chunks, dtype=torch.float32, device=device_of(self.policy))
        normalized: Tensor = self.policy.base.normalize_action(executed)
        return normalized.flatten(1)


class ExecutedChunk:
    """Decodes noise to what the environment will be given: the executed part of the chunk, inside the bounds."""

    def __init__(self, policy: SteeredPolicy) -> None:
        self.policy = policy

    def __call__(self, cond: Tensor, noise: Tensor) -> Tensor:
        """Map conditions (B, C) and unscaled noise (B, D) to normalised actions (B, execute_steps * A)."""
        base = self.policy.base
        chunks = base.unnormalize_action(self.policy.decode(cond, noise))[:, : self.policy.execute_steps]
        actions: Tensor = base.normalize_action(chunks).flatten(1)
        return actions


def make_core(policy: SteeredPolicy, config: DSRLConfig, seed: int) -> OffPolicyCore:
    """Put the noise policy on the off-policy core, with one critic or two."""
    noise_size = policy.actor.action_size
    if config.variant == "plain":
        proposal: Proposal = GaussianProposal(policy.actor)
        return OffPolicyCore(policy.state_size, noise_size, proposal, config.core, seed)
    core = config.core
    noise_critic = EnsembleCritic(policy.state_size, noise_size, core.critics, core.hidden, core.layer_norm)
    noise_critic.to(device_of(policy))
    decode = ExecutedChunk(policy)
    proposal = AliasedNoiseProposal(policy.actor, noise_critic, decode, policy.config.bound)
    return OffPolicyCore(policy.state_size, policy.execute_steps * policy.spec.action.size, proposal, config.core, seed)


def finetune(
    base: Policy,
    env_factory: Callable[..., VecEnv],
    config: DSRLConfig,
    run: Run,
    *,
    session: SessionConfig | None = None,
    demonstrations: Frames | None = None,
) -> Policy:
    """Steer ``base`` in the environment and return the best policy found, which is also saved in ``run``.

    Args:
        base: chunked policy whose samples are a deterministic function of their start noise; stays as it is.
        env_factory: ``env_factory(num_envs=…) -> VecEnv`` for the task.
        config: settings.
        run: run directory, which is continued if it holds a learner's state.
        session: budget and evaluation.
        demonstrations: a second source of transitions for the na variant.
    """
    session = session or SessionConfig()
    torch.manual_seed(run.seed)
    if config.sample_steps:
        if not isinstance(base, ChunkedPolicy):
            raise CapabilityError(f"sample_steps needs a base of kind 'chunked', got {type(base).__name__}")
        base = base.with_sample_steps(config.sample_steps)
    policy = SteeredPolicy(base, config.steering).to(device_of(base))
    policy.actor.requires_grad_(True)
    policy.seed(run.seed)
    behaviour = NoiseBehaviour(policy, config.variant)
    core = make_core(policy, config, run.seed)
    return run_off_policy(policy, behaviour, core, env_factory, config, run, session, demonstrations)
