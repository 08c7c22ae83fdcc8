"""Residual fine-tuning, off-policy: a small per-step correction on a frozen chunked policy, learned from a replay.

The correction's form is ResiP's (arXiv 2407.16677); the learner is a deterministic actor with fixed exploration noise
(TD3, arXiv 1802.09477) on the ensemble critic of RLPD (arXiv 2302.02948). A learned spread is what breaks such a
correction: before the critic has values to offer, the entropy term alone drives the noise up and the base apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation, Step, VecEnv
from robot_rl.core.errors import ConfigError
from robot_rl.core.policy import Policy
from robot_rl.data.frames import Frames
from robot_rl.data.replay import Replay
from robot_rl.nets.device import device_of
from robot_rl.policies.residual import ResidualPolicy, ResidualPolicyConfig
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.guard import Guard
from robot_rl.rl.off_policy.collector import Behaviour, Collector, make_replay
from robot_rl.rl.off_policy.core import OffPolicyConfig, OffPolicyCore
from robot_rl.rl.off_policy.learner import OffPolicyLearner
from robot_rl.rl.off_policy.n_step import NStepRows
from robot_rl.rl.off_policy.proposals import ActionValue, Batch, Proposal
from robot_rl.rl.session import SessionConfig, run_session
from robot_rl.rollout.player import PolicyRunner
from robot_rl.train.run import Run


def _core() -> OffPolicyConfig:
    return OffPolicyConfig(
        entropy_backup=False,
        temperature_learning_rate=0.0,
        actor_learning_rate=1e-4,
        critic_learning_rate=5e-4,
        updates_per_step=0.5,
        actor_every=2,
        actor_reduce="min",
        hidden=(128, 128),
        tau=0.02,
        start_steps=8_000,
        critic_updates=5_000,
        replay_capacity=100_000,
    )


@dataclass(frozen=True)
class ResidualOffPolicyConfig:
    """Settings of off-policy residual fine-tuning."""

    lanes: int = 32
    """Environments stepped at once."""
    block: int = 8
    """Control steps of every lane between updates."""
    n_steps: int = 10
    """Control steps per stored row: sparse rewards travel back that many steps per update."""
    anchor: float = 1.0
    """Weight of the mean squared distance to the corrections in the replay, against the critic's value in units of its
    mean magnitude: the correction goes no further than what was tried (TD3+BC, arXiv 2106.06860)."""
    demonstration_share: float = 0.25
    """Share of demonstrations in a batch, where there are any."""
    residual: ResidualPolicyConfig = field(
        default_factory=lambda: ResidualPolicyConfig(squashed=True, hidden=(128, 128))
    )
    """The correction; its ``log_std`` is the fixed exploration noise, which also smooths the critic's targets."""
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    """Reward of a control step."""
    core: OffPolicyConfig = field(default_factory=_core)
    """The off-policy core; its temperature is not used."""


class CorrectionProposal(Proposal):
    """The correction is the critic's action; the actor climbs its value, held near what was tried by ``anchor``.

    Args:
        policy: whose correction is learned.
        anchor: weight of the mean squared distance to the replay's corrections.
    """

    def __init__(self, policy: ResidualPolicy, anchor: float) -> None:
        super().__init__()
        self.actor, self.anchor = policy.actor, anchor
        self.noise_size = policy.spec.action.size
        self.register_buffer("std", policy.log_std.detach().exp(), persistent=False)
        self._size = torch.zeros(())

    def explore(self, state: Tensor, eps: Tensor) -> Tensor:
        """Return noisy corrections (B, A) in [-1, 1] for states (B, S) and standard normal ``eps`` (B, A)."""
        noisy: Tensor = self.actor(state) + self.get_buffer("std") * eps
        return noisy.clamp(-1, 1)

    def backup(self, batch: Batch, eps: Tensor, critic: ActionValue, target: ActionValue) -> tuple[Tensor, Tensor]:
        """Return noisy corrections (B, A) for the states that follow, and zeros (B,): their noise is fixed."""
        return self.explore(batch["next_state"], eps), batch["reward"].new_zeros(len(eps))

    def value(self, batch: Batch, eps: Tensor, critic: ActionValue) -> tuple[Tensor, Tensor]:
        """Return values (E, B) of the corrections, in units of their mean magnitude, less the anchor's pull.

        The log-densities (B,) are zero.
        """
        u = self.actor(batch["state"])
        self._size = u.detach().square().mean()
        value = critic(batch["state"], u, frozen=True)
        away = (u - batch["action"]).square().mean(-1)
        value = value / value.detach().abs().mean().clamp_min(1e-6) - self.anchor * away
        return value, 0 * u.sum(-1)

    def metrics(self) -> dict[str, float]:
        """Return the root mean square of the corrections of the latest update, before noise."""
        return {"correction": float(self._size.sqrt())}

    def actor_parameters(self) -> list[nn.Parameter]:
        """Return the correction's weights."""
        return list(self.actor.parameters())


class CorrectionBehaviour(Behaviour):
    """Plays the base's chunks with noisy corrections; every control step is a decision."""

    closed_loop = True

    def __init__(self, policy: ResidualPolicy, proposal: CorrectionProposal, seed: int) -> None:
        self.policy, self.proposal, self.spec = policy, proposal, policy.spec
        self.obs_steps, self.horizon, self.execute_steps = policy.obs_steps, policy.horizon, policy.execute_steps
        self.record: dict[str, Tensor] = {}
        self.upcoming = np.zeros((0, policy.spec.action.size), np.float32)
        """(b, A): the base's next actions for the histories given to `state`."""
        self._generator = torch.Generator().manual_seed(seed)
        policy.seed(seed)

    def plan(self, history: Observation) -> np.ndarray:
        """Return the base's chunks (b, H, A)."""
        return self.policy.plan(history)

    @torch.no_grad()
    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return exploring actions (N, A) and set `record`."""
        state = self.policy.features(history, actions)
        eps = torch.randn(state.shape[0], self.proposal.noise_size, generator=self._generator).to(state.device)
        u = self.proposal.explore(state, eps)
        self.record = {"state": state, "action": u}
        return self.policy.apply_correction(actions, u)

    def state(self, history: Observation) -> Tensor:
        """Return what the correction sees (b, S), with `upcoming` as the base's actions."""
        return self.policy.features(history, self.upcoming)

    def action(self, chunks: np.ndarray) -> Tensor:
        """Return corrections (b, A) that turn `upcoming` into the first actions of ``chunks``, within [-1, 1]."""
        return self.policy.correction_of(chunks[:, 0], self.upcoming).clamp(-1, 1)


class _EveryStep(PolicyRunner):
    """Counts every control step as a decision, not only those that plan."""

    def step(self, observation: Observation) -> np.ndarray:
        actions = super().step(observation)
        self.planned = np.ones_like(self.planned)
        return actions


class StepCollector(Collector):
    """Stores a row per control step, of up to ``n_steps`` of them."""

    def __init__(
        self,
        env: VecEnv,
        behaviour: CorrectionBehaviour,
        config: DecisionConfig,
        seed: int,
        guard: Guard | None,
        rows: NStepRows,
    ) -> None:
        self.rows = rows
        super().__init__(env, behaviour, config, seed, guard, rows.discount)
        self._runner = _EveryStep(behaviour, env.num_envs)

    def restart(self, seed: int) -> None:
        """Start new episodes in every lane; rows under way are dropped."""
        super().restart(seed)
        self.rows.clear()

    def _end(self, replay: Replay, source: str, step: Step, history: Observation) -> int:
        # Where a new plan would be due the old chunk's continuation stands for it: a plan would cost as much again.
        self.behaviour.upcoming = self._runner.player.peek()[step.done, 0]  # type: ignore[attr-defined]
        return super()._end(replay, source, step, history)

    def _store(self, replay: Any, source: str, lanes: np.ndarray, *arguments: Any) -> int:
        joined: Any = _Joined(replay, self.rows, torch.from_numpy(np.flatnonzero(lanes)))
        return super()._store(joined, source, lanes, *arguments)


class _Joined:
    """Stands before a replay and joins single steps to longer rows."""

    def __init__(self, replay: Replay, rows: NStepRows, lanes: Tensor) -> None:
        self.replay, self.rows, self.lanes = replay, rows, lanes

    def add(self, source: str, values: dict[str, Any]) -> None:
        single = {name: torch.as_tensor(value, dtype=torch.float32, device="cpu") for name, value in values.items()}
        complete = self.rows.push(self.lanes, single)
        if len(complete["reward"]):
            self.replay.add(source, complete)


def add_demonstrations(
    replay: Replay, frames: Frames, behaviour: CorrectionBehaviour, rows: NStepRows, penalty: float = 0.0
) -> None:
    """Store every control step of ``frames`` as the correction that turns the base's action into the demonstrated one.

    The base plays its chunks along the demonstration: it plans every ``execute_steps`` frames, as it does online.
    Corrections beyond what ``scale`` allows are clipped. Rewards and ends are those of
    `robot_rl.rl.off_policy.collector.add_demonstrations`.

    Args:
        replay: has a source ``demonstrations``.
        frames: episodes, which stand for the lanes of ``rows``.
        behaviour: names states and corrections.
        rows: joins the steps.
        penalty: subtracted from every reward.
    """
    steps, starts = behaviour.obs_steps, np.repeat(frames.episode_starts, frames.episode_lengths)
    now = np.arange(frames.num_frames)
    index = np.maximum(now[:, None] + np.arange(1 - steps, 1), starts[:, None])
    history = {key: frames.observation[key][index] for key in behaviour.spec.observation}
    place = (now - starts) % behaviour.execute_steps
    plans = behaviour.plan({key: value[place == 0] for key, value in history.items()})
    behaviour.upcoming = plans[np.cumsum(place == 0) - 1, place]
    state, action = behaviour.state(history), behaviour.action(frames.action[:, None])
    last = np.zeros(frames.num_frames, bool)
    last[frames.episode_ends - 1] = True
    succeeded = np.asarray(frames.extras.get("success", last), bool).reshape(-1)[frames.episode_ends - 1]
    succeeded = np.repeat(succeeded, frames.episode_lengths)
    reward = np.asarray(frames.extras.get("reward", last & succeeded), np.float32).reshape(-1) - penalty
    values = {
        "state": state,
        "action": action,
        "reward": torch.from_numpy(reward.astype(np.float32)),
        "next_state": state[torch.from_numpy(np.where(last, now, now + 1))],
        "terminated": torch.from_numpy((last & succeeded).astype(np.float32)),
        "truncated": torch.from_numpy((last & ~succeeded).astype(np.float32)),
        "exponent": torch.ones(len(now)),
        "weight": torch.ones(len(now)),
    }
    for t in range(int(frames.episode_lengths.max())):
        lanes = np.flatnonzero(frames.episode_lengths > t)
        at = torch.from_numpy(frames.episode_starts[lanes] + t)
        joined = _Joined(replay, rows, torch.from_numpy(lanes))
        joined.add("demonstrations", {name: column[at] for name, column in values.items()})


def finetune(
    base: Policy,
    env_factory: Callable[..., VecEnv],
    config: ResidualOffPolicyConfig,
    run: Run,
    *,
    session: SessionConfig | None = None,
    demonstrations: Frames | None = None,
) -> Policy:
    """Correct ``base`` in the environment and return the best policy found, which is also saved in ``run``.

    Args:
        base: chunked policy with a normaliser; stays as it is.
        env_factory: ``env_factory(num_envs=…) -> VecEnv`` for the task.
        config: settings.
        run: run directory, which is continued if it holds a learner's state.
        session: budget and evaluation.
        demonstrations: a second source of rows, ``demonstration_share`` of every batch.
    """
    session = session or SessionConfig()
    if not config.residual.squashed:
        raise ConfigError("residual_offpolicy needs a bounded correction: residual.squashed=true")
    torch.manual_seed(run.seed)
    policy = ResidualPolicy(base, config.residual).to(device_of(base))
    policy.actor.requires_grad_(True)
    proposal = CorrectionProposal(policy, config.anchor)
    behaviour = CorrectionBehaviour(policy, proposal, run.seed)
    core = OffPolicyCore(policy.state_size, proposal.noise_size, proposal, config.core, run.seed)
    capacity, shares = {"online": config.core.replay_capacity}, {"online": 1.0}
    if demonstrations is not None:
        share = config.demonstration_share
        if not 0 < share < 1:
            raise ConfigError(f"demonstration_share must be between 0 and 1, got {share}")
        capacity["demonstrations"] = demonstrations.num_frames
        shares = {"online": 1 - share, "demonstrations": share}
    replay = make_replay(policy.state_size, proposal.noise_size, capacity, run.seed, device=core.device)
    discount = config.core.discount
    if demonstrations is not None:
        rows = NStepRows(demonstrations.num_episodes, config.n_steps, discount)
        add_demonstrations(replay, demonstrations, behaviour, rows, config.decision.penalty)
    env = env_factory(num_envs=config.lanes)
    try:
        rows = NStepRows(config.lanes, config.n_steps, discount)
        seed = session.training_seed(run.seed)
        collector = StepCollector(env, behaviour, config.decision, seed, Guard(run.path), rows)
        learner = OffPolicyLearner(policy, collector, core, replay, shares, config.block)
        return run_session(learner, env_factory, run, session)
    finally:
        env.close()
