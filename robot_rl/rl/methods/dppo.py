"""Policy gradients through the denoising chain of a diffusion policy (DPPO, arXiv 2409.00588)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robot_rl.core.env import VecEnv
from robot_rl.core.errors import ConfigError
from robot_rl.core.policy import Policy
from robot_rl.data.frames import Frames
from robot_rl.heads.base import Head
from robot_rl.heads.chain import chain_moments
from robot_rl.nets.device import device_of
from robot_rl.policies.chain import ChainPolicy, ChainPolicyConfig
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.on_policy.chain_actor import ChainActor
from robot_rl.rl.on_policy.learner import OnPolicyConfig, run_on_policy
from robot_rl.rl.on_policy.ratios import Trace
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run


def _core() -> OnPolicyConfig:
    # Densities are averaged over the chunk, so that clip ranges are far smaller than those of a joint density.
    return OnPolicyConfig(
        rollout_steps=15,
        epochs=5,
        minibatches=4,
        clip=0.01,
        target_kl=0.0,
        actor_learning_rate=1e-5,
        warmup_iterations=2,
    )


def _policy() -> ChainPolicyConfig:
    # As it is trained, less the floor: few steps of DDIM lose much of what the same steps reach with ancestral noise.
    return ChainPolicyConfig(eta=1.0)


@dataclass(frozen=True)
class DPPOConfig:
    """Settings of policy gradients through the denoising chain."""

    lanes: int = 64
    """Environments stepped at once."""
    eta: float = 1.0
    """Share of ancestral noise while exploring; 1 is DDPM's."""
    sample_std: float = 0.05
    """Least standard deviation of the noise in tuned denoising steps while exploring."""
    score_std: float = 0.05
    """Least standard deviation in their log-densities; above ``sample_std`` the steps are smoother than the noise."""
    denoising_discount: float = 0.99
    """Weight of a tuned step relative to the next less noisy one."""
    first_clip: float = 0.001
    """Clip range of the noisiest tuned step; grows to the core's ``clip``, which is that of the last."""
    clip_growth: float = 3.0
    """Rate of this exponential growth; near 0 it is linear."""
    policy: ChainPolicyConfig = field(default_factory=_policy)
    """Denoising steps, and how the evaluated policy samples."""
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    """Reward and discount of a chunk."""
    core: OnPolicyConfig = field(default_factory=_core)
    """The on-policy core; its ``clip`` is that of the last denoising step."""

    def __post_init__(self) -> None:
        if self.score_std <= 0:
            raise ConfigError(f"score_std must be above 0, got {self.score_std}: the last step has no noise of its own")


class DPPOActor(ChainActor):
    """A decision is a chunk, its inner indices are the K' tuned denoising steps, noisiest first.

    Each step is a Gaussian action of its own; log-densities are averaged over the executed part of the chunk.
    """

    policy: ChainPolicy

    def __init__(self, policy: ChainPolicy, num_lanes: int, config: DPPOConfig, seed: int = 0) -> None:
        super().__init__(policy, num_lanes, seed)
        self.config = config

    def decide(self, cond: Tensor) -> tuple[Tensor, Trace]:
        """Return exploring chunks (n, H, A) and the last iterates of their chains (n, K' + 1, H, A)."""
        noise = torch.randn(len(cond), *self.policy.tuned.noise_shape, generator=self.generator).to(cond.device)
        chain = self.policy.walk(cond, noise, self.config.eta, self.config.sample_std, self.generator)
        return chain[:, -1], {"chain": chain}

    def moments(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """Return mean (B, K', H, A) and floored deviation (B, K', 1, 1) of the tuned steps."""
        return self._moments(self.policy.tuned, trace)

    def base_moments(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """Return the same of the frozen base."""
        return self._moments(self.policy.base.head, trace)

    def _moments(self, head: Head, trace: Trace) -> tuple[Tensor, Tensor]:
        steps, eta = self.policy.steps, self.config.eta
        mean, std = chain_moments(head, trace["chain"], trace["cond"], steps, eta=eta)
        return mean, std.clamp_min(self.config.score_std)

    def score(self, trace: Trace) -> Tensor:
        """Return log-densities (B, K') of the tuned steps, averaged over the executed part of the chunk."""
        return self.log_prob(trace)[:, :, : self.execute_steps].mean((-2, -1))

    def parameters(self) -> list[nn.Parameter]:
        """Return the tuned network's weights."""
        return list(self.policy.tuned.parameters())

    def inner_weight(self) -> Tensor:
        """Return the denoising discount (K',): 1 for the last step, less for those before."""
        count = self.policy.tuned_steps
        return torch.pow(self.config.denoising_discount, torch.arange(count - 1, -1, -1.0, device=self._device))

    def inner_clip(self, clip: float) -> Tensor:
        """Return clip ranges (K',) that grow from ``first_clip`` to ``clip``."""
        count, rate = self.policy.tuned_steps, self.config.clip_growth
        if count == 1:
            return torch.full((1,), clip, device=self._device)
        place = torch.linspace(0, 1, count, device=self._device)
        share = place if abs(rate) < 1e-6 else (rate * place).expm1() / math.expm1(rate)
        return self.config.first_clip + (clip - self.config.first_clip) * share


def finetune(
    base: Policy,
    env_factory: Callable[..., VecEnv],
    config: DPPOConfig,
    run: Run,
    *,
    session: SessionConfig | None = None,
    demonstrations: Frames | None = None,
) -> Policy:
    """Improve ``base`` in the environment and return the best policy found, which is also saved in ``run``.

    Args:
        base: chunked policy with a diffusion head; stays as it is.
        env_factory: ``env_factory(num_envs=…) -> VecEnv`` for the task.
        config: settings.
        run: run directory, which is continued if it holds a learner's state.
        session: budget and evaluation.
        demonstrations: not used by this method.

    Raises:
        CapabilityError: the base's head is not one of denoising steps with a density.
    """
    torch.manual_seed(run.seed)
    policy = ChainPolicy(base, config.policy).to(device_of(base))
    policy.tuned.requires_grad_(True)
    actor = DPPOActor(policy, config.lanes, config, run.seed)
    return run_on_policy(actor, env_factory, config.lanes, config.core, run, session, decision=config.decision)
