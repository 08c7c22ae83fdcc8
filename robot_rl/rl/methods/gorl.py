"""Generative online RL: PPO over a decoder's start noise, and the decoder re-fitted in stages (arXiv 2512.02581)."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from robot_rl.core.env import Observation, VecEnv
from robot_rl.core.errors import ConfigError
from robot_rl.core.policy import Policy
from robot_rl.data.frames import Frames
from robot_rl.heads.base import Head, require_head
from robot_rl.nets.device import device_of
from robot_rl.policies.scratch import ScratchConfig, flow_from_scratch
from robot_rl.policies.steered import SteeredPolicy, SteeredPolicyConfig
from robot_rl.rl.methods.ppo import ObservationMoments
from robot_rl.rl.on_policy.anchor import AnchorConfig
from robot_rl.rl.on_policy.chunk_actor import ChunkActor
from robot_rl.rl.on_policy.learner import OnPolicyConfig, run_on_policy
from robot_rl.rl.on_policy.ratios import Trace, gaussian_divergence
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run
from robot_rl.train.trainer import TrainConfig, Trainer, step_generator


def _core() -> OnPolicyConfig:
    return OnPolicyConfig(rollout_steps=16, actor_learning_rate=1e-4, anchor=AnchorConfig(weight=1e-3))


def _steering() -> SteeredPolicyConfig:
    return SteeredPolicyConfig(bound=1.0, squashed=False)


def _train() -> TrainConfig:
    return TrainConfig(steps=2000, batch_size=256, learning_rate=3e-4, precision="fp32", log_every=500)


@dataclass(frozen=True)
class RefitConfig:
    """How a stage ends: the decoder is fitted to what the stage has learned to do."""

    decisions: int = 50_000
    """Latest decisions that it is fitted to."""
    fresh: bool = False
    """Start from new weights rather than from the present decoder's."""
    train: TrainConfig = field(default_factory=_train)
    """The supervised training."""


@dataclass(frozen=True)
class GoRLConfig:
    """Settings of generative online RL."""

    scratch: bool = False
    """Start from an identity decoder that decides at every step; the policy given only lends its interface."""
    stages: int = 1
    """Stages of equal share of the budget; the decoder is re-fitted and the noise policy renewed between them."""
    lanes: int = 64
    """Environments stepped at once."""
    steering: SteeredPolicyConfig = field(default_factory=_steering)
    """The noise policy."""
    policy: ScratchConfig = field(default_factory=ScratchConfig)
    """The decoder from scratch."""
    refit: RefitConfig = field(default_factory=RefitConfig)
    """The decoder's training between stages."""
    core: OnPolicyConfig = field(default_factory=_core)
    """The on-policy core; its anchor keeps the noise near N(0, I), where the decoder has been trained."""

    def __post_init__(self) -> None:
        if self.stages < 1 or self.refit.decisions < 1:
            raise ConfigError(f"stages and refit.decisions must be at least 1: {self.stages}, {self.refit.decisions}")
        if self.steering.squashed or self.steering.bound != 1:
            raise ConfigError("gorl takes an unbounded noise policy: steering.squashed=no steering.bound=1")


class GoRLActor(ChunkActor):
    """Draws the decoder's start noise from a Gaussian and is scored by that Gaussian's density.

    The decoder is a constant of every stage. Where it is the identity, this is PPO on a Gaussian policy.
    """

    policy: SteeredPolicy
    log_ratio_limit = 3.0
    """Decisions that a change of stage interrupted belong to another Gaussian, and would outweigh all others."""

    def __init__(
        self,
        policy: SteeredPolicy,
        num_lanes: int,
        seed: int = 0,
        config: GoRLConfig | None = None,
        directory: Path | None = None,
        moments: ObservationMoments | None = None,
    ) -> None:
        """Create an actor that improves ``policy`` in place.

        Args:
            policy: with a `LatentGaussian` as noise policy.
            num_lanes: environments stepped at once.
            seed: seed of exploration.
            config: settings.
            directory: for the runs that re-fit the decoder; needed where there is more than one stage.
            moments: observation statistics that the decoder's normaliser follows; in the first stage only, because
                afterwards the decoder's weights depend on it.
        """
        super().__init__(policy, num_lanes, seed)
        self.config, self.directory, self.moments = config or GoRLConfig(), directory, moments
        if self.config.stages > 1 and directory is None:
            raise ConfigError("more than one stage needs a directory for the decoder's training")
        self.stage, self._seed = 0, seed
        self._decisions: list[Trace] = []

    def act(self, observation: Observation) -> np.ndarray:
        """Return exploring actions (N, A) in the units of the spec and set `trace`."""
        if self.moments is not None:
            self.moments.add(observation)
        return super().act(observation)

    def decide(self, cond: Tensor) -> tuple[Tensor, Trace]:
        """Return decoded chunks (n, H, A) for conditions (n, C), with the noise and, for later stages, the chunk."""
        eps = torch.randn(len(cond), self.policy.actor.action_size, generator=self.generator).to(cond.device)
        noise, _ = self.policy.actor(cond, eps)
        chunk = self.policy.decode(cond, noise)
        return chunk, {"noise": noise} | ({"chunk": chunk} if self.config.stages > 1 else {})

    def score(self, trace: Trace) -> Tensor:
        """Return log-densities (B, 1) of the noise, summed over it."""
        density: Tensor = self.policy.actor.log_prob(trace["cond"], trace["noise"])
        return density[:, None]

    def entropy(self, trace: Trace) -> Tensor:
        """Return the entropy of the noise."""
        return (self.policy.actor.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()

    def snapshot(self, trace: Trace) -> Trace:
        """Return mean and log standard deviation (B, D) of the noise."""
        mean = self.policy.actor.mode(trace["cond"])
        return {"mean": mean, "log_std": self.policy.actor.log_std.detach().clone().expand_as(mean)}

    def divergence_from(self, snapshot: Trace, trace: Trace) -> Tensor:
        """Return KL(snapshot || present) of the noise (B,)."""
        actor = self.policy.actor
        return gaussian_divergence(snapshot["mean"], snapshot["log_std"], actor.mode(trace["cond"]), actor.log_std)

    def divergence_to_base(self, trace: Trace) -> Tensor:
        """Return KL(noise || N(0, I)) (B,), of which the base is the decoder's image; by mean and deviation."""
        mean, log_std = self.policy.actor.mode(trace["cond"]), self.policy.actor.log_std
        return gaussian_divergence(mean, log_std, torch.zeros_like(mean), torch.zeros_like(log_std))

    def parameters(self) -> list[nn.Parameter]:
        """Return the noise policy's weights."""
        return list(self.policy.actor.parameters())

    def end_iteration(self, trace: Trace, fraction: float) -> dict[str, float]:
        """Let the normaliser follow, keep the decisions, and end the stage when its share of the budget is spent."""
        config = self.config
        # What the decoder will be fitted to has to have gone through the normaliser that it will have.
        follows = self.moments is not None and (config.stages == 1 or fraction < 0.5 / config.stages)
        if follows and self.moments is not None:
            self.moments.write(self.policy.base.normalizer)
        elif config.stages > 1:
            self._remember({name: trace[name] for name in ("cond", "chunk")})
        if fraction >= (self.stage + 1) / config.stages and self.stage + 1 < config.stages:
            self._next_stage()
        noise = trace["noise"]
        metrics = {"noise_norm": float(noise.square().mean().sqrt()), "refits": float(self.stage)}
        return metrics | {"noise_std": float(self.policy.actor.log_std.detach().exp().mean())}

    def state(self) -> dict[str, Tensor]:
        """Return stage, decoder and observation statistics; the kept decisions are collected anew."""
        decoder = {f"decoder.{name}": value for name, value in self.policy.base.state_dict().items()}
        moments = {} if self.moments is None else self.moments.state()
        return {"stage": torch.tensor(self.stage), **decoder, **{f"moments.{k}": v for k, v in moments.items()}}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        self.stage = int(tensors["stage"])
        self.policy.base.load_state_dict(_part(tensors, "decoder."))
        if self.moments is not None:
            self.moments.restore(_part(tensors, "moments."))

    def _remember(self, rows: Trace) -> None:
        """Keep the latest decisions."""
        self._decisions.append(rows)
        while sum(len(part["cond"]) for part in self._decisions[1:]) >= self.config.refit.decisions:
            self._decisions.pop(0)

    def _next_stage(self) -> None:
        """Re-fit the decoder to the kept decisions, from its fixed prior, and renew the noise policy."""
        if not self._decisions or self.directory is None:
            return
        kept = {name: torch.cat([part[name] for part in self._decisions]) for name in ("cond", "chunk")}
        refit_decoder(self.policy.base, kept, self.config.refit, self.directory / str(self.stage), self._seed)
        self.policy.actor.reset()
        self.stage, self._decisions = self.stage + 1, []


class _HeadLoss(nn.Module):
    """A head as the trainer takes it."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def loss(self, batch: Trace, generator: Generator | None = None) -> Tensor:
        return self.head.loss(batch["chunk"], batch["cond"], None, generator)


class _Rows:
    """Random rows as the trainer takes them: a pure function of seed and step."""

    def __init__(self, rows: Trace) -> None:
        self.rows = rows

    def sample(self, step: int, batch_size: int, seed: int = 0) -> Trace:
        generator = step_generator(seed, step)
        count = len(next(iter(self.rows.values())))
        index = torch.randint(count, (batch_size,), generator=generator)
        return {name: values[index.to(values.device)] for name, values in self.rows.items()}


def refit_decoder(decoder: Any, decisions: Trace, config: RefitConfig, directory: Path, seed: int = 0) -> None:
    """Train the head of ``decoder`` in place to turn N(0, I) into the chunks that were decided.

    The noise that the chunks were decoded from is not used: fitting to it would only copy the old map.

    Args:
        decoder: chunked policy.
        decisions: ``cond`` (B, C) and ``chunk`` (B, H, A), normalised.
        config: settings.
        directory: the training's run directory; one of an earlier attempt is replaced.
        seed: seed of weights, batches and noise.
    """
    head = copy.deepcopy(decoder.head)
    if config.fresh:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in head.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
    shutil.rmtree(directory, ignore_errors=True)
    with Run.create(directory, config, seed=seed) as run:
        rows: Any = _Rows(decisions)
        trainer = Trainer(_HeadLoss(head.requires_grad_(True)), rows, config.train, run, seed)
        trainer.run_all()
    fitted: Any = trainer.ema.module
    decoder.head.load_state_dict(fitted.head.state_dict())


def make_actor(base: Any, config: GoRLConfig, seed: int, directory: Path | None = None) -> GoRLActor:
    """Return the actor that steers a copy of ``base``, or an identity decoder for the base's interface."""
    moments = None
    if config.scratch:
        decoder = flow_from_scratch(base.spec, replace(config.policy, start_scale=1.0))
        moments = ObservationMoments(base.spec)
    else:
        if hasattr(base, "head") or config.stages > 1:
            require_head(base, "steerable", "gorl")
        decoder = copy.deepcopy(base)
    policy = SteeredPolicy(decoder, config.steering).to(device_of(base))
    policy.seed(seed)
    policy.actor.requires_grad_(True)
    return GoRLActor(policy, config.lanes, seed, config, directory, moments)


def finetune(
    base: Policy,
    env_factory: Callable[..., VecEnv],
    config: GoRLConfig,
    run: Run,
    *,
    session: SessionConfig | None = None,
    demonstrations: Frames | None = None,
) -> Policy:
    """Steer a copy of ``base`` in the environment and return the best policy found, which is also saved in ``run``.

    Args:
        base: chunked policy whose samples are a deterministic function of their start noise; from scratch any policy
            of the task's interface.
        env_factory: ``env_factory(num_envs=…) -> VecEnv`` for the task.
        config: settings.
        run: run directory, which is continued if it holds a learner's state.
        session: budget and evaluation.
        demonstrations: not used by this method.
    """
    torch.manual_seed(run.seed)
    actor = make_actor(base, config, run.seed, run.path / "decoder")
    return run_on_policy(actor, env_factory, config.lanes, config.core, run, session)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
