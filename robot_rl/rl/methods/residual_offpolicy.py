"""Residual fine-tuning, off-policy: a small per-step correction on a frozen chunked policy, learned from a replay.

The correction's form is ResiP's (arXiv 2407.16677); the learner is a deterministic actor with fixed exploration noise
(TD3, arXiv 1802.09477) on the ensemble critic of RLPD (arXiv 2302.02948). A learned spread is what breaks such a
correction: before the critic has values to offer, the entropy term alone drives the noise up and the base apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation, VecEnv
from robot_rl.core.errors import ConfigError
from robot_rl.core.policy import Policy
from robot_rl.data.frames import Frames
from robot_rl.nets.device import device_of
from robot_rl.policies.residual import ResidualPolicy, ResidualPolicyConfig
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.off_policy.collector import Behaviour
from robot_rl.rl.off_policy.core import OffPolicyConfig, OffPolicyCore
from robot_rl.rl.off_policy.learner import run_off_policy
from robot_rl.rl.off_policy.proposals import ActionValue, Batch, Proposal
from robot_rl.rl.session import SessionConfig
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
    """Plays the base's chunks with noisy corrections, each of which is a decision."""

    closed_loop = every_step = True

    def __init__(self, policy: ResidualPolicy, proposal: CorrectionProposal, n_steps: int, seed: int) -> None:
        self.policy, self.proposal, self.spec, self.n_steps = policy, proposal, policy.spec, n_steps
        self.obs_steps, self.horizon, self.execute_steps = policy.obs_steps, policy.horizon, policy.execute_steps
        self.record: dict[str, Tensor] = {}
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

    def successor(self, history: Observation, upcoming: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return what the correction sees (b, S) with ``upcoming`` as the base's actions, new plans by default."""
        base = self.policy.plan(history)[:, 0] if upcoming is None else upcoming
        return {"state": self.policy.features(history, base)}

    def demonstrated(self, history: Observation, chunks: np.ndarray) -> dict[str, Tensor]:
        """Return the corrections that turn the base's actions into the demonstrated ones ``chunks`` (b, 1, A).

        The base plays its chunks along the demonstration: it plans every ``execute_steps`` frames, as it does online.
        Corrections beyond what ``scale`` allows are clipped.
        """
        place = np.arange(len(chunks)) % self.execute_steps
        plans = self.policy.plan({key: value[place == 0] for key, value in history.items()})
        base = plans[np.cumsum(place == 0) - 1, place]
        correction = self.policy.correction_of(chunks[:, 0], base).clamp(-1, 1)
        return self.successor(history, base) | {"action": correction}


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
    behaviour = CorrectionBehaviour(policy, proposal, config.n_steps, run.seed)
    core = OffPolicyCore(policy.state_size, proposal.noise_size, proposal, config.core, run.seed)
    return run_off_policy(policy, behaviour, core, env_factory, config, run, session, demonstrations)
