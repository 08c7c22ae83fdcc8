"""Q-chunking: a critic of whole chunks picks the best of a frozen policy's samples (QC, arXiv 2507.07969)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from robot_rl.core.env import VecEnv
from robot_rl.core.errors import ConfigError
from robot_rl.core.policy import Policy
from robot_rl.data.frames import Frames
from robot_rl.policies.best_of import BestOfConfig
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.off_policy.best_of import make_best_of
from robot_rl.rl.off_policy.core import OffPolicyConfig
from robot_rl.rl.off_policy.learner import run_off_policy
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run


def _core() -> OffPolicyConfig:
    return OffPolicyConfig(
        reduce="mean", entropy_backup=False, updates_per_step=0.06, start_steps=10_000, replay_capacity=100_000
    )


@dataclass(frozen=True)
class QChunkConfig:
    """Settings of Q-chunking."""

    lanes: int = 64
    """Environments stepped at once."""
    demonstration_share: float = 0.5
    """Share of demonstrations in a batch, where there are any."""
    block: int = 8
    """Control steps of every lane between updates."""
    history: int = 0
    """Newest observations that the critic sees; 0 for as many as the base."""
    choice: BestOfConfig = field(default_factory=lambda: BestOfConfig(candidates=16, sample_steps=4))
    """Candidates and how the online critic chooses among them, in acting and for the backup."""
    backup_candidates: int = 8
    """Chunks of the base that the backup chooses among, at most; fewer cost less and overestimate less. 0 for as many
    as acting."""
    decision: DecisionConfig = field(default_factory=lambda: DecisionConfig(penalty=1.0))
    """Reward and discount of a chunk."""
    core: OffPolicyConfig = field(default_factory=_core)
    """The off-policy core; it has no actor."""


def finetune(
    base: Policy,
    env_factory: Callable[..., VecEnv],
    config: QChunkConfig,
    run: Run,
    *,
    session: SessionConfig | None = None,
    demonstrations: Frames | None = None,
) -> Policy:
    """Learn which of ``base``'s chunks to execute; return the best policy found, which is also saved in ``run``.

    The critic values the chunk that was executed, so that its backup over a chunk's steps has no off-policy bias.

    Args:
        base: stochastic chunked policy; stays as it is.
        env_factory: ``env_factory(num_envs=…) -> VecEnv`` for the task.
        config: settings.
        run: run directory, which is continued if it holds a learner's state.
        session: budget and evaluation.
        demonstrations: a second source of decisions.
    """
    if config.choice.edits:
        raise ConfigError("Q-chunking chooses among the base's own chunks; with edits it is the method 'expo'")
    torch.manual_seed(run.seed)
    policy, behaviour, core = make_best_of(
        base, config.choice, config.core, "online", run.seed, config.history, config.backup_candidates
    )
    session = session or SessionConfig()
    return run_off_policy(policy, behaviour, core, env_factory, config, run, session, demonstrations)
