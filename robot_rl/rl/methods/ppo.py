"""PPO on a Gaussian policy, from scratch or from a Gaussian base (arXiv 1707.06347)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation, VecEnv
from robot_rl.core.errors import ConfigError
from robot_rl.core.policy import Policy
from robot_rl.core.spec import Spec
from robot_rl.data.frames import Frames
from robot_rl.data.normalizer import Normalizer
from robot_rl.nets.device import device_of
from robot_rl.policies.diagonal import DiagonalConfig, DiagonalPolicy
from robot_rl.policies.frozen import frozen
from robot_rl.rl.on_policy.learner import OnPolicyConfig, OnPolicyLearner, run_on_policy
from robot_rl.rl.on_policy.ratios import OnPolicyActor, Trace, gaussian_divergence, gaussian_log_prob
from robot_rl.rl.session import SessionConfig
from robot_rl.rollout.player import History
from robot_rl.train.run import Run

_LEAST_STD = 1e-2


def _core() -> OnPolicyConfig:
    return OnPolicyConfig(
        rollout_steps=32, epochs=5, minibatches=4, target_kl=0.0, schedule="linear", warmup_iterations=0
    )


@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO."""

    lanes: int = 64
    """Environments stepped at once."""
    normalizer: Literal["auto", "running", "base"] = "auto"
    """Observation statistics: running ones, which stand still while an iteration lasts, or the base's; auto takes the
    base's where it has any."""
    policy: DiagonalConfig = field(default_factory=DiagonalConfig)
    """The Gaussian policy; a Gaussian base keeps its own shape."""
    core: OnPolicyConfig = field(default_factory=_core)
    """The on-policy core."""

    needs_policy: ClassVar[bool] = False
    """Whether there must be a policy to begin with; without one it learns from scratch."""


class ObservationMoments:
    """Running count, mean and summed squared deviation of observations, per key and element."""

    def __init__(self, spec: Spec) -> None:
        self.count = 0.0
        self.mean = {key: np.zeros(array.shape) for key, array in spec.observation.items()}
        self.squared = {key: np.zeros(array.shape) for key, array in spec.observation.items()}

    def add(self, observation: Observation) -> None:
        """Take in observations (each (N, …))."""
        batch = len(next(iter(observation.values())))
        total = self.count + batch
        for key, mean in self.mean.items():
            values = observation[key]
            center = values.mean(0, dtype=np.float64)
            shift, deviation = center - mean, values - center
            self.squared[key] += np.einsum("n...,n...->...", deviation, deviation)
            self.squared[key] += shift**2 * (self.count * batch / total)
            self.mean[key] = mean + shift * (batch / total)
        self.count = total

    def write(self, normalizer: Normalizer) -> None:
        """Make ``normalizer`` give these observations zero mean and unit deviation."""
        own = normalizer.state_dict()
        for key, mean in self.mean.items():
            std = np.sqrt(self.squared[key] / max(self.count, 1))
            name = key.replace(".", "__")
            own[f"{name}__center"] = torch.from_numpy(mean).float()
            own[f"{name}__scale"] = torch.from_numpy(np.maximum(std, _LEAST_STD)).float()
        normalizer.load_state_dict(own)

    def state(self) -> dict[str, Tensor]:
        """Return the moments as tensors."""
        parts = {f"mean.{k}": v for k, v in self.mean.items()} | {f"squared.{k}": v for k, v in self.squared.items()}
        return {k: torch.from_numpy(v) for k, v in parts.items()} | {"count": torch.tensor(self.count)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        self.count = float(tensors["count"])
        for name, part in (("mean.", self.mean), ("squared.", self.squared)):
            part.update({k.removeprefix(name): v.numpy() for k, v in tensors.items() if k.startswith(name)})


class GaussianActor(OnPolicyActor):
    """Samples u ~ N(mean, std) at every control step."""

    def __init__(
        self,
        policy: DiagonalPolicy,
        num_lanes: int,
        seed: int = 0,
        running: bool = True,
        base: DiagonalPolicy | None = None,
    ) -> None:
        """Create an actor for ``policy``.

        Args:
            policy: what to improve.
            num_lanes: environments stepped at once.
            seed: seed of exploration.
            running: whether the policy's observation statistics follow what is seen.
            base: frozen policy for an anchor.
        """
        self.policy: DiagonalPolicy = policy
        self.base = base
        self.trace: Trace = {}
        self.decided = np.ones(num_lanes, bool)
        self.moments = ObservationMoments(policy.spec) if running else None
        self._generator = torch.Generator().manual_seed(seed)
        self._history = History(policy.obs_steps, tuple(policy.spec.observation))
        self._frames: Observation = {}
        self._fresh = np.ones(num_lanes, bool)
        self._scored = torch.empty(0), torch.empty(0)

    @torch.no_grad()
    def act(self, observation: Observation) -> np.ndarray:
        """Return exploring actions (N, A) in the units of the spec and set `trace`."""
        if self.moments is not None:
            self.moments.add(observation)
        self._frames = self._history.add(observation, self._fresh)
        self._fresh[:] = False
        features = self.policy.features(self._frames)
        mean = self.policy.mean(features)
        eps = torch.randn(mean.shape, generator=self._generator).to(mean.device)
        u = torch.addcmul(mean, eps, self.policy.log_std.exp())
        self.trace = {"features": features, "u": u}
        return self.policy.scale_up(u).cpu().numpy()

    def reset(self, lanes: np.ndarray) -> None:
        """Start new episodes in ``lanes`` (bool (N,))."""
        self._fresh |= lanes

    def look_ahead(self, observation: Observation) -> Tensor:
        """Return critic inputs (N, S) for the observation that follows."""
        return self.policy.features(
            {k: np.concatenate([v[:, 1:], observation[k][:, None]], axis=1) for k, v in self._frames.items()}
        )

    def critic_input(self, trace: Trace) -> Tensor:
        """Return what the policy sees."""
        return trace["features"]

    def score(self, trace: Trace) -> Tensor:
        """Return log-densities of u (B, 1), summed over the action."""
        mean = self.policy.mean(trace["features"])
        self._scored = trace["features"], mean
        return gaussian_log_prob(mean, self.policy.log_std, trace["u"]).unsqueeze(-1)

    def entropy(self, trace: Trace) -> Tensor:
        """Return the entropy of u."""
        return (self.policy.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()

    def snapshot(self, trace: Trace) -> Trace:
        """Return mean and log standard deviation (B, A) of u."""
        mean = self._mean(trace)
        return {"mean": mean, "log_std": self.policy.log_std.detach().clone().expand_as(mean)}

    def divergence_from(self, snapshot: Trace, trace: Trace) -> Tensor:
        """Return KL(snapshot || present) of u (B,)."""
        mean = self._mean(trace)
        return gaussian_divergence(snapshot["mean"], snapshot["log_std"], mean, self.policy.log_std)

    def divergence_to_base(self, trace: Trace) -> Tensor:
        """Return KL(policy || base) of u (B,); both see the same normalised features."""
        if self.base is None:
            return super().divergence_to_base(trace)
        features = trace["features"]
        own = self._mean(trace), self.policy.log_std
        return gaussian_divergence(*own, self.base.mean(features).detach(), self.base.log_std)

    def _mean(self, trace: Trace) -> Tensor:
        """Return the means that `score` has just computed for the same rows."""
        features, mean = self._scored
        return mean if features is trace["features"] else self.policy.mean(trace["features"])

    def parameters(self) -> list[nn.Parameter]:
        """Return the policy's weights and log standard deviation."""
        return [*self.policy.mean.parameters(), self.policy.log_std]

    def end_iteration(self, trace: Trace, fraction: float) -> dict[str, float]:
        """Let the observation statistics catch up with what was seen."""
        if self.moments is not None:
            self.moments.write(self.policy.normalizer)
        return {"std": float(self.policy.log_std.detach().exp().mean())}

    def state(self) -> dict[str, Tensor]:
        """Return the observation statistics."""
        return {} if self.moments is None else self.moments.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        if self.moments is not None:
            self.moments.restore(tensors)
            self.moments.write(self.policy.normalizer)


def make_policy(spec: Spec, config: DiagonalConfig, normalizer: Normalizer | None = None) -> DiagonalPolicy:
    """Create an untrained policy whose actions span the spec's bounds, or without such the range of ``normalizer``.

    Raises:
        ConfigError: there is nothing to take the range from.
    """
    low, high = config.low, config.high
    if not low:
        lowest, highest = spec.action.bounds()
        if not (np.isfinite(lowest).all() and np.isfinite(highest).all()):
            if normalizer is None:
                raise ConfigError("the action spec has no finite bounds; give policy.low and policy.high")
            ones = torch.ones(spec.action.size, device=device_of(normalizer))
            lowest, highest = (normalizer.unnormalize("action", sign * ones).cpu().numpy() for sign in (-1, 1))
        low, high = tuple(map(float, lowest)), tuple(map(float, highest))
    policy = DiagonalPolicy(spec, replace(config, low=low, high=high))
    if normalizer is not None:
        policy.normalizer.load_state_dict(normalizer.state_dict())
    return policy


def make_learner(env: VecEnv, config: PPOConfig, seed: int = 0) -> OnPolicyLearner:
    """Return a learner from scratch in ``env``, whose lanes must be ``config.lanes``; call its `iterate`."""
    torch.manual_seed(seed)
    policy = make_policy(env.spec, config.policy)
    return OnPolicyLearner(GaussianActor(policy, env.num_envs, seed), env, config.core, seed)


def finetune(
    base: Policy,
    env_factory: Callable[..., VecEnv],
    config: PPOConfig,
    run: Run,
    *,
    session: SessionConfig | None = None,
    demonstrations: Frames | None = None,
) -> Policy:
    """Learn a Gaussian policy and return the best one found, which is also saved in ``run``.

    Args:
        base: a diagonal Gaussian policy is improved, and is what an anchor holds on to; any other lends its interface
            and its normaliser, and the policy is learned from scratch.
        env_factory: ``env_factory(num_envs=…) -> VecEnv`` for the task.
        config: settings.
        run: run directory, which is continued if it holds a learner's state.
        session: budget and evaluation.
        demonstrations: not used by this method.
    """
    torch.manual_seed(run.seed)
    normalizer = getattr(base, "normalizer", None)
    running = config.normalizer == "running" or (config.normalizer == "auto" and normalizer is None)
    if isinstance(base, DiagonalPolicy):
        policy, reference = frozen(base).requires_grad_(True), frozen(base)
    else:
        policy, reference = make_policy(base.spec, config.policy, normalizer).to(device_of(base)), None
    if config.core.anchor.weight and running:
        raise ConfigError("an anchor needs observation statistics that stand still: normalizer=base")
    actor = GaussianActor(policy, config.lanes, run.seed, running, reference)
    return run_on_policy(actor, env_factory, config.lanes, config.core, run, session)
