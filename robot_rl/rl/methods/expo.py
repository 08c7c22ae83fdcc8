"""EXPO: a frozen expressive policy, a small learned edit, and a critic that picks on the fly (arXiv 2507.07986).

In the paper the base goes on imitating, so that better actions of the replay become its own. Here it stays frozen, and
nothing is reached but what its samples and one edit of them reach.
"""

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


def _choice() -> BestOfConfig:
    # An edit four times as wide falls below the base for the first thousands of decisions, however small it starts.
    return BestOfConfig(
        candidates=16, edits=8, edit_scale=0.05, edit_steps=2, choose_by="min", choose_members=2, sample_steps=4
    )


def _core() -> OffPolicyConfig:
    return OffPolicyConfig(
        critics=4,
        subset=2,
        actor_every=2,
        entropy_backup=False,
        initial_temperature=0.02,
        updates_per_step=0.15,
        start_steps=6_000,
        replay_capacity=100_000,
    )


@dataclass(frozen=True)
class ExpoConfig:
    """Settings of EXPO."""

    lanes: int = 64
    """Environments stepped at once."""
    demonstration_share: float = 0.5
    """Share of demonstrations in a batch, where there are any."""
    block: int = 8
    """Control steps of every lane between updates."""
    history: int = 0
    """Newest observations that critic and edit see; 0 for as many as the base."""
    choice: BestOfConfig = field(default_factory=_choice)
    """Candidates, edits, and how members of the target critic choose, in acting and for the backup."""
    backup_candidates: int = 4
    """Chunks of the base, each in its edited form as well, that the backup chooses among, at most; 0 for as many as
    acting."""
    decision: DecisionConfig = field(default_factory=lambda: DecisionConfig(penalty=1.0))
    """Reward and discount of a chunk."""
    core: OffPolicyConfig = field(default_factory=_core)
    """The off-policy core; its actor is the edit. The default target entropy is that of edits of this scale."""


def finetune(
    base: Policy,
    env_factory: Callable[..., VecEnv],
    config: ExpoConfig,
    run: Run,
    *,
    session: SessionConfig | None = None,
    demonstrations: Frames | None = None,
) -> Policy:
    """Learn to edit and to choose ``base``'s chunks; return the best policy found, which is also saved in ``run``.

    Args:
        base: stochastic chunked policy; stays as it is.
        env_factory: ``env_factory(num_envs=…) -> VecEnv`` for the task.
        config: settings.
        run: run directory, which is continued if it holds a learner's state.
        session: budget and evaluation.
        demonstrations: a second source of decisions.
    """
    if not config.choice.edits:
        raise ConfigError("EXPO needs choice.edits >= 1; without edits it is the method 'qchunk'")
    torch.manual_seed(run.seed)
    policy, behaviour, core = make_best_of(
        base, config.choice, config.core, "target", run.seed, config.history, config.backup_candidates
    )
    session = session or SessionConfig()
    return run_off_policy(policy, behaviour, core, env_factory, config, run, session, demonstrations)
