"""Policy gradients on a flow policy made stochastic by learned, bounded noise (ReinFlow, arXiv 2505.22094)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from robot_rl.core.env import VecEnv
from robot_rl.core.errors import ConfigError
from robot_rl.core.policy import Policy
from robot_rl.data.frames import Frames
from robot_rl.heads.base import require_head
from robot_rl.heads.chain import chain_moments
from robot_rl.nets.mlp import mlp
from robot_rl.policies.chunked import ChunkedPolicy
from robot_rl.policies.frozen import frozen
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.on_policy.chain_actor import ChainActor
from robot_rl.rl.on_policy.learner import OnPolicyConfig, run_on_policy
from robot_rl.rl.on_policy.ratios import Trace
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run


def _core() -> OnPolicyConfig:
    # Densities are averaged over chain and chunk, so that clip ranges are far smaller than those of a joint density.
    return OnPolicyConfig(
        rollout_steps=15,
        epochs=5,
        minibatches=4,
        clip=0.002,
        target_kl=0.0,
        actor_learning_rate=1e-5,
        warmup_iterations=2,
    )


@dataclass(frozen=True)
class NoiseConfig:
    """The learned noise of exploration, in normalised actions."""

    std_min: float = 0.03
    """Least standard deviation of an integration step's noise."""
    std_max: float = 0.07
    """Largest standard deviation."""
    hold: float = 0.35
    """Share of the budget over which ``std_max`` stays; it falls along a cosine after that."""
    keep: float = 0.7
    """Share of the range between the bounds that is left at the end of the budget."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""

    def __post_init__(self) -> None:
        if not 0 < self.std_min <= self.std_max:
            raise ConfigError(f"noise needs 0 < std_min <= std_max, got {self.std_min} and {self.std_max}")

    def upper(self, fraction: float) -> float:
        """Return the upper bound with ``fraction`` of the budget spent."""
        place = min(max((fraction - self.hold) / max(1 - self.hold, 1e-9), 0.0), 1.0)
        share = self.keep + (1 - self.keep) * (1 + math.cos(math.pi * place)) / 2
        return self.std_min + share * (self.std_max - self.std_min)


@dataclass(frozen=True)
class ReinFlowConfig:
    """Settings of policy gradients on a noisy flow."""

    lanes: int = 64
    """Environments stepped at once."""
    steps: int = 4
    """Integration steps K per plan, of the tuned policy too; 0 for as many as the base takes."""
    anchor_form: Literal["chain", "same_noise"] = "chain"
    """What ``core.anchor`` penalises: the divergence of the chains, or the distance between the noiseless chunks of
    policy and base from the same start noise."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """Exploration."""
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    """Reward and discount of a chunk."""
    core: OnPolicyConfig = field(default_factory=_core)
    """The on-policy core."""


class ChainNoise(nn.Module):
    """Standard deviations (B, K, H, A) of the noise that follows each integration step, between two bounds.

    It starts at the bounds' geometric mean everywhere.
    """

    clamp = 5.0
    """Conditions are clamped to this."""

    def __init__(self, cond_size: int, shape: tuple[int, int, int], config: NoiseConfig) -> None:
        super().__init__()
        self.shape, self.low, self.high = shape, config.std_min, config.std_max
        self.net = mlp((cond_size, *config.hidden, math.prod(shape)), nn.SiLU)
        last = self.net[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    @property
    def middle(self) -> float:
        """Geometric mean of the present bounds."""
        return math.sqrt(self.low * self.high)

    def forward(self, cond: Tensor) -> Tensor:
        """Return deviations (B, K, H, A) for conditions (B, C)."""
        place = (self.net(cond.clamp(-self.clamp, self.clamp)).tanh() + 1) / 2
        log_std = math.log(self.low) + (math.log(self.high) - math.log(self.low)) * place
        return log_std.exp().unflatten(-1, self.shape)


class ReinFlowActor(ChainActor):
    """A decision is a chunk, its score one number: the log-density of the noisy chain, averaged over its elements."""

    policy: ChunkedPolicy

    def __init__(self, policy: ChunkedPolicy, num_lanes: int, config: ReinFlowConfig, seed: int = 0) -> None:
        super().__init__(policy, num_lanes, seed)
        self.config, self.head, self.steps = config, policy.head, policy.head.steps
        self.base_head = frozen(policy.head)
        self.noise = ChainNoise(policy.cond_size, (self.steps, *policy.head.noise_shape), config.noise)
        self.noise.to(self._device)

    def decide(self, cond: Tensor) -> tuple[Tensor, Trace]:
        """Return exploring chunks (n, H, A) and their chains (n, K + 1, H, A), start noise first."""
        shape = (len(cond), self.steps + 1, *self.head.noise_shape)
        chain = torch.randn(shape, generator=self.generator).to(cond.device)
        std = self.noise(cond)
        for k in range(self.steps):
            index = torch.full((len(cond),), k, device=cond.device)
            mean, _ = self.head.chain_step(chain[:, k], index, cond, self.steps)
            chain[:, k + 1] = mean + std[:, k] * chain[:, k + 1]
        return chain[:, -1], {"chain": chain}

    def moments(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (B, K, H, A) of the chain's steps, on the time grid of sampling."""
        mean, _ = chain_moments(self.head, trace["chain"], trace["cond"], self.steps)
        return mean, self.noise(trace["cond"])

    def base_moments(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """Return those of the base, with the noise that exploration starts with."""
        mean, _ = chain_moments(self.base_head, trace["chain"], trace["cond"], self.steps)
        return mean, torch.full_like(mean, self.noise.middle)

    def score(self, trace: Trace) -> Tensor:
        """Return the chain's log-density (B, 1), averaged over its elements.

        What the last step gives to actions that are never executed is left out, which is exact: given the iterate
        before, they are independent of the rest.
        """
        density = self.log_prob(trace)
        parts = [density[:, :-1].flatten(1), density[:, -1, : self.execute_steps].flatten(1)]
        return torch.cat(parts, dim=1).mean(-1, keepdim=True)

    def entropy(self, trace: Trace) -> Tensor:
        """Return the entropy of the chain's steps, averaged over its elements."""
        return self.noise(trace["cond"]).log().mean() + 0.5 * math.log(2 * math.pi * math.e)

    def divergence_to_base(self, trace: Trace) -> Tensor:
        """Return KL(chain || base's chain) (B,), or the mean square distance of their chunks from the same noise."""
        if self.config.anchor_form == "chain":
            return super().divergence_to_base(trace)
        noise, cond = trace["chain"][:, 0], trace["cond"]
        with torch.no_grad():
            base = self.base_head.sample(cond, noise, self.steps).actions
        return (self.head.sample(cond, noise, self.steps).actions - base).square().mean((-2, -1))

    def parameters(self) -> list[nn.Parameter]:
        """Return the weights of the velocity and of the noise."""
        return [*self.head.parameters(), *self.noise.parameters()]

    def end_iteration(self, trace: Trace, fraction: float) -> dict[str, float]:
        """Lower the noise's upper bound as scheduled, between roll-outs."""
        with torch.no_grad():
            std = self.noise(trace["cond"]).mean().item()
        self.noise.high = self.config.noise.upper(fraction)
        return {"noise_std": std}

    def state(self) -> dict[str, Tensor]:
        """Return the present upper bound."""
        return {"noise_high": torch.tensor(self.noise.high, dtype=torch.float64)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue with the upper bound of `state`."""
        self.noise.high = tensors["noise_high"].item()


def trainable_flow(base: Policy, steps: int) -> ChunkedPolicy:
    """Return a trainable copy of a flow policy that takes ``steps`` Euler steps; 0 for as many as ``base``.

    Raises:
        CapabilityError: the base's head does not integrate a velocity.
    """
    require_head(base, "velocity_steps", "reinflow")
    assert isinstance(base, ChunkedPolicy)
    options = {key: value for key, value in base.config.head_options.items() if key != "solver"}
    config = replace(base.config, sample_steps=steps or base.config.sample_steps, head_options=options)
    policy = ChunkedPolicy(base.spec, config).to(base.device)
    policy.load_state_dict(base.state_dict())
    policy.requires_grad_(False).eval()
    policy.head.requires_grad_(True)
    return policy


def finetune(
    base: Policy,
    env_factory: Callable[..., VecEnv],
    config: ReinFlowConfig,
    run: Run,
    *,
    session: SessionConfig | None = None,
    demonstrations: Frames | None = None,
) -> Policy:
    """Improve ``base`` in the environment and return the best policy found, which is also saved in ``run``.

    The result is a chunked policy like the base, which samples without noise.

    Args:
        base: chunked policy with a flow head; stays as it is.
        env_factory: ``env_factory(num_envs=…) -> VecEnv`` for the task.
        config: settings.
        run: run directory, which is continued if it holds a learner's state.
        session: budget and evaluation.
        demonstrations: not used by this method.

    Raises:
        CapabilityError: the base's head does not integrate a velocity.
    """
    torch.manual_seed(run.seed)
    policy = trainable_flow(base, config.steps)
    actor = ReinFlowActor(policy, config.lanes, config, run.seed)
    return run_on_policy(actor, env_factory, config.lanes, config.core, run, session, decision=config.decision)
