"""Collects with a behaviour and updates the off-policy core, so many updates per environment step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from robot_rl.core.env import VecEnv
from robot_rl.core.errors import ConfigError
from robot_rl.core.policy import Policy
from robot_rl.data.frames import Frames
from robot_rl.data.replay import Replay
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.guard import Guard
from robot_rl.rl.off_policy.collector import Behaviour, Collector, add_demonstrations, make_replay
from robot_rl.rl.off_policy.core import OffPolicyConfig, OffPolicyCore
from robot_rl.rl.session import SessionConfig, resumed_seed, run_session
from robot_rl.rl.state import reseed
from robot_rl.train.run import Run

_LARGEST_BLOCK = 32


class OffPolicyLearner:
    """Alternates blocks of control steps and of updates.

    Args:
        policy: the policy being improved, which shares its weights with the core's proposal.
        collector: steps the lanes.
        core: critic and proposal.
        replay: where decisions go; batches hold its sources in the given ``shares``.
        shares: share of each source, for example ``{"online": 0.5, "demonstrations": 0.5}``.
        block: control steps of every lane between updates.
    """

    def __init__(
        self,
        policy: Policy,
        collector: Collector,
        core: OffPolicyCore,
        replay: Replay,
        shares: dict[str, float],
        block: int = 8,
    ) -> None:
        self._policy: Any = policy
        self.collector, self.core, self.replay = collector, core, replay
        self.shares, self.block = shares, block
        self._owed = 0.0

    @property
    def policy(self) -> Any:
        """The policy as evaluated and saved: a copy with the actor's running average, where the core keeps one."""
        if not self.core.average:
            return self._policy
        twin = copy.deepcopy(self._policy)
        average = dict(zip(map(id, self.core.proposal.actor_parameters()), self.core.average, strict=True))
        with torch.no_grad():
            for own, copied in zip(self._policy.parameters(), twin.parameters(), strict=True):
                copied.copy_(average.get(id(own), own))
        return twin

    @property
    def steps(self) -> int:
        """Environment steps taken, over all lanes."""
        return self.collector.steps

    def iterate(self, fraction: float) -> dict[str, float]:
        """Take one block of control steps and the updates that it earns."""
        before = self.steps
        self.collector.collect(self.replay, self.block)
        config = self.core.config
        metrics: dict[str, float] = {"stored": float(sum(self.replay.size.values()))}
        ready = self.steps >= config.start_steps and self.replay.size["online"] >= config.batch_size
        if ready:
            self._owed += (self.steps - before) * config.updates_per_step
            self._owed = max(self._owed, config.critic_updates - self.core.updates)
            while self._owed >= 1:
                slices = min(int(self._owed), _LARGEST_BLOCK)
                self._owed -= slices
                metrics |= self.core.update(self.replay.sample(slices, config.batch_size, self.shares))
            metrics["updates"] = float(self.core.updates)
        self.started()
        return metrics | self.collector.episodes.recent()

    def started(self) -> None:
        """Tell the behaviour whether anything has been learned; before that it may act by its prior."""
        behaviour = self.collector.behaviour
        if hasattr(behaviour, "learning"):
            behaviour.learning = self.core.updates > 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return what `restore` needs, the replay included."""
        tensors, numbers = self.core.state()
        rows, cursors = self.replay.state()
        return {**tensors, **rows}, {**numbers, **cursors, "steps": self.steps, "owed": self._owed}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Continue from `state`; the lanes start new episodes, and explore with numbers not drawn before."""
        self.core.restore(tensors, numbers)
        self.replay.restore(tensors, numbers)
        self.collector.steps, self._owed = int(numbers["steps"]), numbers["owed"]
        self.started()
        seed = resumed_seed(self.collector.first_seed, self.steps)
        reseed(seed, self._policy, self.collector.behaviour)
        self.collector.restart(seed)


class OffPolicySettings(Protocol):
    """What the config of every off-policy method has."""

    @property
    def lanes(self) -> int:
        """Environments stepped at once."""

    @property
    def block(self) -> int:
        """Control steps of every lane between updates."""

    @property
    def demonstration_share(self) -> float:
        """Share of demonstrations in a batch, where there are any."""

    @property
    def decision(self) -> DecisionConfig:
        """Reward and discount of a decision."""

    @property
    def core(self) -> OffPolicyConfig:
        """Settings of the core."""


def run_off_policy(
    policy: Policy,
    behaviour: Behaviour,
    core: OffPolicyCore,
    env_factory: Callable[..., VecEnv],
    config: OffPolicySettings,
    run: Run,
    session: SessionConfig,
    demonstrations: Frames | None = None,
) -> Policy:
    """Fine-tune with an off-policy method and return the best policy found, which is also saved in ``run``.

    Args:
        policy: the policy being improved, which shares its weights with ``core.proposal``.
        behaviour: what acts while learning, and says what is stored.
        core: critic and proposal.
        env_factory: ``env_factory(num_envs=…) -> VecEnv`` for the task.
        config: settings of the method.
        run: run directory, which is continued if it holds a learner's state.
        session: budget and evaluation.
        demonstrations: a second source of decisions, ``demonstration_share`` of every batch.
    """
    capacity, shares = {"online": config.core.replay_capacity}, {"online": 1.0}
    if demonstrations is not None:
        share = config.demonstration_share
        if not 0 < share < 1:
            raise ConfigError(f"demonstration_share must be between 0 and 1, got {share}")
        capacity["demonstrations"] = demonstrations.num_frames
        shares = {"online": 1 - share, "demonstrations": share}
    replay = make_replay(core.state_size, core.action_size, capacity, run.seed, behaviour.extra_fields, core.device)
    if demonstrations is not None:
        add_demonstrations(replay, demonstrations, behaviour, config.decision, discount=config.core.discount)
    env = env_factory(num_envs=config.lanes)
    try:
        seed = session.training_seed(run.seed)
        collector = Collector(env, behaviour, config.decision, seed, Guard(run.path), config.core.discount)
        learner = OffPolicyLearner(policy, collector, core, replay, shares, config.block)
        return run_session(learner, env_factory, run, session)
    finally:
        env.close()
