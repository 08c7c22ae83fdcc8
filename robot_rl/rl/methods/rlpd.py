"""RLPD: off-policy learning from scratch with demonstrations as half of every batch (arXiv 2302.02948)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from robot_rl.core.env import Observation, VecEnv
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.policy import Policy
from robot_rl.core.spec import Spec
from robot_rl.data.frames import Frames, parse_source
from robot_rl.data.normalizer import Normalizer
from robot_rl.nets.device import device_of
from robot_rl.policies.gaussian import GaussianConfig, GaussianPolicy
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.off_policy.collector import Behaviour
from robot_rl.rl.off_policy.core import OffPolicyConfig, OffPolicyCore
from robot_rl.rl.off_policy.learner import run_off_policy
from robot_rl.rl.off_policy.proposals import GaussianProposal
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run


def _core() -> OffPolicyConfig:
    return OffPolicyConfig(
        critics=10, subset=2, entropy_backup=False, initial_temperature=0.1, updates_per_step=0.5, actor_every=4
    )


@dataclass(frozen=True)
class RLPDConfig:
    """Settings of RLPD."""

    lanes: int = 8
    """Environments stepped at once."""
    horizon: int = 1
    """Actions per decision; more make it act in chunks."""
    obs_steps: int = 1
    """Observations that the policy sees."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the actor's hidden layers."""
    bounds: Literal["auto", "spec", "demonstrations"] = "auto"
    """Range of the actions: the spec's or the demonstrations' (with a margin of a tenth); auto takes the latter
    where there are demonstrations."""
    relative_to: str = ""
    """Part of the observation that the policy's actions are offsets from, such as state[0:6] where that is the tool's
    pose and the action a target for it; empty for the actions themselves."""
    reach: tuple[float, ...] = ()
    """Largest offset per element of the action, with relative_to; by default that of the demonstrations."""
    demonstration_share: float = 0.5
    """Share of demonstrations in every batch, where there are any."""
    block: int = 4
    """Control steps of every lane between updates."""
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    """Reward and discount of a decision."""
    core: OffPolicyConfig = field(default_factory=_core)
    """The off-policy core."""

    needs_policy: ClassVar[bool] = False
    """Whether there must be a policy to begin with; without one it learns from scratch."""


class GaussianBehaviour(Behaviour):
    """Samples the Gaussian policy; until learning begins, uniform actions."""

    def __init__(self, policy: GaussianPolicy, seed: int) -> None:
        self.policy, self.spec, self.obs_steps = policy, policy.spec, policy.obs_steps
        self.horizon, self.execute_steps = policy.horizon, policy.execute_steps
        self.learning = False
        self.record = {}
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def plan(self, history: Observation) -> np.ndarray:
        """Return exploring chunks (b, H, A) and set `record`."""
        state = self.state(history)
        shape = (len(state), self.policy.actor.action_size)
        if self.learning:
            eps = torch.randn(shape, generator=self._generator).to(state.device)
            action = self.policy.actor(state, eps)[0]
        else:
            action = (2 * torch.rand(shape, generator=self._generator) - 1).to(state.device)
        self.record = {"state": state, "action": action}
        return self.policy.unsquash(action, self.policy.origin(history)).cpu().numpy()

    @torch.no_grad()
    def state(self, history: Observation) -> Tensor:
        """Return the policy's features (b, S)."""
        device = device_of(self.policy)
        tensors = {k: torch.as_tensor(v, dtype=torch.float32, device=device) for k, v in history.items()}
        return self.policy.features(tensors)

    def action(self, chunks: np.ndarray) -> Tensor:
        """Return squashed chunks (b, H * A) in [-1, 1]."""
        if self.policy.config.relative_to:
            raise CapabilityError("offsets cannot be told from actions alone; see `demonstrated`")
        return self.policy.squash(torch.as_tensor(chunks, dtype=torch.float32, device=device_of(self.policy)))

    def demonstrated(self, history: Observation, chunks: np.ndarray) -> dict[str, Tensor]:
        """Return state and squashed action of decisions that executed ``chunks`` (b, H, A)."""
        actions = torch.as_tensor(chunks, dtype=torch.float32, device=device_of(self.policy))
        return self.successor(history) | {"action": self.policy.squash(actions, self.policy.origin(history))}


def action_bounds(spec: Spec, config: RLPDConfig, demonstrations: Frames | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest action (A,), in the units of the spec.

    Raises:
        ConfigError: there is nothing to take them from.
    """
    low, high = spec.action.bounds()
    if config.relative_to:
        return _offset_bounds(spec, config, demonstrations)
    if config.bounds == "spec" or demonstrations is None:
        if config.bounds == "demonstrations":
            raise ConfigError("bounds=demonstrations needs demonstrations (--demos)")
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ConfigError("the action spec has no finite bounds; give demonstrations (--demos)")
        return low, high
    least, most = demonstrations.action.min(0), demonstrations.action.max(0)
    margin = np.maximum(0.1 * (most - least), 1e-3)
    return np.maximum(least - margin, low), np.minimum(most + margin, high)


def _offset_bounds(spec: Spec, config: RLPDConfig, demonstrations: Frames | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest offset (A,) from the part of the observation that actions are relative to."""
    if config.reach:
        if len(config.reach) != spec.action.size or min(config.reach) <= 0:
            raise ConfigError(f"reach needs {spec.action.size} positive numbers, got {config.reach}")
        reach = np.array(config.reach)
        return -reach, reach
    if demonstrations is None:
        raise ConfigError("relative_to needs a reach, or demonstrations to take it from (--demos)")
    key, part = parse_source(config.relative_to)
    offset = np.abs(demonstrations.action - demonstrations.observation[key][:, part]).max(0)
    reach = np.maximum(1.1 * offset, 1e-3)
    return -reach, reach


def make_policy(base: Policy, config: RLPDConfig, demonstrations: Frames | None) -> GaussianPolicy:
    """Create the Gaussian policy for the base's interface, with the base's normaliser if it has one."""
    low, high = action_bounds(base.spec, config, demonstrations)
    shape = GaussianConfig(
        hidden=config.hidden,
        obs_steps=config.obs_steps,
        horizon=config.horizon,
        low=tuple(map(float, low)),
        high=tuple(map(float, high)),
        relative_to=config.relative_to,
    )
    policy = GaussianPolicy(base.spec, shape)
    normalizer = getattr(base, "normalizer", None)
    if normalizer is None and demonstrations is not None:
        normalizer = Normalizer.fit(demonstrations)
    if normalizer is not None:
        policy.normalizer.load_state_dict(normalizer.state_dict())
    return policy


def finetune(
    base: Policy,
    env_factory: Callable[..., VecEnv],
    config: RLPDConfig,
    run: Run,
    *,
    session: SessionConfig | None = None,
    demonstrations: Frames | None = None,
) -> Policy:
    """Learn a Gaussian policy and return the best one found, which is also saved in ``run``.

    Args:
        base: lends its interface and its normaliser; its actions are not used.
        env_factory: ``env_factory(num_envs=…) -> VecEnv`` for the task.
        config: settings.
        run: run directory, which is continued if it holds a learner's state.
        session: budget and evaluation.
        demonstrations: the second source of transitions, ``demonstration_share`` of every batch.
    """
    session = session or SessionConfig()
    torch.manual_seed(run.seed)
    policy = make_policy(base, config, demonstrations).to(device_of(base))
    behaviour = GaussianBehaviour(policy, run.seed)
    state_size = policy.actor.net.sizes[0]
    core = OffPolicyCore(state_size, policy.actor.action_size, GaussianProposal(policy.actor), config.core, run.seed)
    return run_off_policy(policy, behaviour, core, env_factory, config, run, session, demonstrations)
