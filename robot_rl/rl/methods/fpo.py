"""Flow-matching policy optimisation: PPO whose ratio comes from the flow-matching loss (FPO, arXiv 2507.21053)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation, VecEnv
from robot_rl.core.errors import ConfigError
from robot_rl.core.policy import Policy
from robot_rl.data.frames import Frames
from robot_rl.heads.base import require_head
from robot_rl.nets.device import device_of
from robot_rl.policies.chunked import ChunkedPolicy
from robot_rl.policies.frozen import frozen
from robot_rl.policies.scratch import ScratchConfig, flow_from_scratch
from robot_rl.rl.methods.ppo import ObservationMoments
from robot_rl.rl.on_policy.chunk_actor import ChunkActor
from robot_rl.rl.on_policy.learner import OnPolicyConfig, run_on_policy
from robot_rl.rl.on_policy.ratios import Trace
from robot_rl.rl.session import SessionConfig
from robot_rl.train import distributed
from robot_rl.train.run import Run

_LARGEST_LOG_RATIO = 3.0
"""Of a ratio of one pair, as in the authors' code."""


def _core() -> OnPolicyConfig:
    # The ratio stands on a mean of squared errors, which moves far less than a density does: hence the small clip
    # range, and no limit on what is no KL.
    return OnPolicyConfig(rollout_steps=16, epochs=4, clip=0.05, target_kl=0.0, actor_learning_rate=3e-5)


@dataclass(frozen=True)
class FPOConfig:
    """Settings of flow-matching policy optimisation."""

    scratch: bool = False
    """Learn a small policy that decides at every step from nothing; the policy given only lends its interface. The
    other defaults are for clones: from nothing, also set lanes=32 relative=yes policy.sample_steps=5
    core.rollout_steps=64 core.stagger=yes core.epochs=8 core.schedule=linear core.actor_learning_rate=3e-4
    core.warmup_iterations=0 core.anchor.weight=0.01."""
    lanes: int = 64
    """Environments stepped at once."""
    samples: int = 8
    """Pairs of noise and time per decision, from which its loss is estimated."""
    average_first: bool = True
    """One ratio per decision, of the mean loss; else one per pair, each clipped on its own (arXiv 2602.02481)."""
    loss: Literal["velocity", "noise"] = "velocity"
    """Error of the velocity, or of the noise that it implies, which counts pairs near the noise less."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over the executed steps of a chunk; always the mean over a step's action."""
    relative: bool = False
    """Count losses relative to the policy's own mean loss, so that a clip range bounds a step by the policy's spread.

    The loss of a flow that samples with spread s is about s, and a shift d of its mean adds about d^2 / s, so that
    absolute ratios allow ever more spreads of shift, in a policy that becomes sure. Relative ones are ratios of
    densities for a Gaussian flow of one number and one spread everywhere; of n numbers, their n-th roots. Where spreads
    differ, one mean loss stands for all, and what is surer may shift by more of its own spread.
    """
    policy: ScratchConfig = field(default_factory=ScratchConfig)
    """The policy from scratch."""
    core: OnPolicyConfig = field(default_factory=_core)
    """The on-policy core."""

    def __post_init__(self) -> None:
        choices = {"loss": ("velocity", "noise"), "reduction": ("mean", "sum")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"unknown {name} '{getattr(self, name)}': expected {' or '.join(known)}")
        if self.samples < 1:
            raise ConfigError(f"samples must be at least 1, got {self.samples}")

    @property
    def needs_policy(self) -> bool:
        """Whether there must be a policy to begin with."""
        return not self.scratch


class FPOActor(ChunkActor):
    """Samples chunks from a flow policy and scores them by minus their flow-matching loss at stored pairs.

    Only the executed part of a chunk counts, for the rest of it had no consequences. Chunks are stored as they were
    sampled, before they are clipped to the action's bounds.
    """

    policy: ChunkedPolicy

    def __init__(
        self,
        policy: ChunkedPolicy,
        num_lanes: int,
        seed: int = 0,
        config: FPOConfig | None = None,
        base: ChunkedPolicy | None = None,
        moments: ObservationMoments | None = None,
    ) -> None:
        """Create an actor that improves ``policy`` in place.

        Args:
            policy: with a velocity head.
            num_lanes: environments stepped at once.
            seed: seed of exploration.
            config: settings.
            base: frozen copy to stay near, where the core has an anchor.
            moments: observation statistics that the policy's normaliser follows between iterations.

        Raises:
            CapabilityError: the head has no flow-matching loss; lists those that have.
        """
        super().__init__(policy, num_lanes, seed)
        self.head: Any = require_head(policy, "velocity_steps", "fpo")
        self.config, self.base, self.moments = config or FPOConfig(), base, moments
        executed = torch.arange(policy.horizon) < policy.execute_steps
        self._mask = None if executed.all() else executed
        self._scale = float(policy.execute_steps) if self.config.reduction == "sum" else 1.0
        # A pair by itself can have any ratio, and one outlier would outweigh all others.
        self.log_ratio_limit = math.inf if self.config.average_first else _LARGEST_LOG_RATIO
        self._reference: float | None = None if self.config.relative else 1.0
        """Mean loss that others are relative to; it moves between iterations and is stored with each decision."""

    def act(self, observation: Observation) -> np.ndarray:
        """Return exploring actions (N, A) in the units of the spec and set `trace`."""
        if self.moments is not None:
            self.moments.add(observation)
        return super().act(observation)

    def decide(self, cond: Tensor) -> tuple[Tensor, Trace]:
        """Return chunks (n, H, A) sampled for conditions (n, C), and the pairs at which to judge them."""
        shape, samples = self.head.noise_shape, self.config.samples
        noise = torch.randn(len(cond), *shape, generator=self.generator).to(cond.device)
        chunk = self.policy.sample(cond, noise)
        eps = torch.randn(len(cond), samples, *shape, generator=self.generator).to(cond.device)
        time = torch.rand(len(cond), samples, generator=self.generator).to(cond.device)
        trace = {"chunk": chunk, "eps": eps, "time": time}
        if self._reference is None:
            self._reference = self._loss(trace | {"cond": cond}).mean().item()
        return chunk, trace | {"reference": torch.full((len(cond), 1), self._reference, device=cond.device)}

    def score(self, trace: Trace) -> Tensor:
        """Return minus the loss of stored chunks at their stored pairs, (B, 1) or one per pair (B, N)."""
        score = -self._loss(trace) / trace["reference"]
        return score.mean(1, keepdim=True) if self.config.average_first else score

    def _loss(self, trace: Trace) -> Tensor:
        """Return the flow-matching loss (B, N) of stored chunks at each of their pairs."""
        chunk, eps, time, cond = self._pairs(trace)
        mask = None if self._mask is None else self._mask.to(cond.device).expand(len(cond), -1)
        loss = self._scale * self.head.loss_at(chunk, cond, eps, time, mask)
        if self.config.loss == "noise":
            # The noise implied at x_t is x_t + (1 - t) v, so that its error is (1 - t) times that of v.
            loss = (1 - time).square() * loss
        return loss.view(-1, self.config.samples)

    def inner_weight(self) -> Tensor:
        """Return equal weights of the pairs, which add up to one."""
        return (
            torch.ones(1) if self.config.average_first else torch.full((self.config.samples,), 1 / self.config.samples)
        )

    def inner_clip(self, clip: float) -> Tensor:
        """Return the same clip range for each pair."""
        return torch.full_like(self.inner_weight(), clip)

    def divergence_to_base(self, trace: Trace) -> Tensor:
        """Return the mean squared gap (B,) between the velocities of policy and base on the policy's own samples.

        It is the expected gap of their flow-matching losses there, and zero exactly where they are the same flow; no
        KL, for a flow without noise has none.
        """
        if self.base is None:
            return super().divergence_to_base(trace)
        chunk, eps, time, cond = self._pairs(trace)
        noised = self.head.path.noised(chunk, eps, time)
        with torch.no_grad():
            reference = self.base.head.backbone(noised, time, cond)
        gap = (self.head.backbone(noised, time, cond) - reference).square()
        return self._scale * gap[:, : self.execute_steps].mean((1, 2)).view(-1, self.config.samples).mean(1)

    def parameters(self) -> list[nn.Parameter]:
        """Return the head's weights."""
        return list(self.head.parameters())

    def end_iteration(self, trace: Trace, fraction: float) -> dict[str, float]:
        """Let statistics and the mean loss catch up; inside an iteration that would falsify the ratios."""
        if self.moments is not None:
            self.moments.write(self.policy.normalizer)
        if not self.config.relative:
            return {}
        with torch.no_grad():
            self._reference = distributed.mean(self._loss(trace).mean().item())
        return {"flow_loss": self._reference}

    def state(self) -> dict[str, Tensor]:
        """Return the observation statistics and the mean loss."""
        state = {} if self.moments is None else self.moments.state()
        return state if self._reference is None else state | {"reference": torch.tensor(self._reference)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        if "reference" in tensors:
            self._reference = tensors["reference"].item()
        if self.moments is not None:
            self.moments.restore(tensors)
            self.moments.write(self.policy.normalizer)

    def _pairs(self, trace: Trace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return chunks, noises (B * N, H, A), times (B * N,) and conditions (B * N, C) of all pairs."""
        samples = self.config.samples
        repeated = (trace[name].repeat_interleave(samples, dim=0) for name in ("chunk", "cond"))
        chunk, cond = repeated
        return chunk, trace["eps"].flatten(0, 1), trace["time"].flatten(), cond


def make_actor(base: Any, config: FPOConfig, seed: int) -> FPOActor:
    """Return the actor that improves a copy of ``base``, or one from scratch for the base's interface."""
    if config.scratch:
        policy = flow_from_scratch(base.spec, config.policy).to(device_of(base))
        start = frozen(policy) if config.core.anchor.weight else None  # N(0, I), where sampled actions are within reach
        return FPOActor(policy, config.lanes, seed, config, start, ObservationMoments(base.spec))
    require_head(base, "velocity_steps", "fpo")
    reference = frozen(base)
    policy = frozen(base).requires_grad_(True)
    return FPOActor(policy, config.lanes, seed, config, base=reference)


def finetune(
    base: Policy,
    env_factory: Callable[..., VecEnv],
    config: FPOConfig,
    run: Run,
    *,
    session: SessionConfig | None = None,
    demonstrations: Frames | None = None,
) -> Policy:
    """Improve a copy of ``base`` in the environment and return the best policy found, which is also saved in ``run``.

    Args:
        base: chunked policy with a flow head; from scratch any policy of the task's interface.
        env_factory: ``env_factory(num_envs=…) -> VecEnv`` for the task.
        config: settings.
        run: run directory, which is continued if it holds a learner's state.
        session: budget and evaluation.
        demonstrations: not used by this method.
    """
    torch.manual_seed(run.seed)
    actor = make_actor(base, config, run.seed)
    return run_on_policy(actor, env_factory, config.lanes, config.core, run, session)
