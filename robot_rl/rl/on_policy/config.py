"""Settings of the on-policy core."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from robot_rl.rl.on_policy.anchor import AnchorConfig


@dataclass(frozen=True)
class OnPolicyConfig:
    """Settings of the on-policy core."""

    rollout_steps: int = 64
    """Decisions per lane and iteration (more in lanes where episodes end inside a decision)."""
    stagger: bool = False
    """Begin with lanes out of step: their first episodes reach the time limit at different times, so that a roll-out
    holds all phases of an episode. For long episodes that only a time limit ends."""
    epochs: int = 10
    """Passes over a roll-out."""
    minibatches: int = 8
    """Optimiser steps per pass."""
    discount: float = 0.99
    """Discount per decision, or per control step where a method's ``decision.clock`` says so."""
    gae_lambda: float = 0.95
    """Advantage estimation's lambda (arXiv 1506.02438)."""
    timeout: Literal["final", "current", "terminal", "mask"] = "final"
    """What follows a time limit: the value of the final observation; that of the last decision's own (rsl_rl);
    nothing, as if the task had ended; or the decision is left out (Brax)."""
    loss: Literal["clip", "aspo", "bpo"] = "clip"
    """PPO's clipped ratio (arXiv 1707.06347); the same for good decisions and a trust region for bad ones (arXiv
    2602.02481); or bounded-ratio regression with a median critic (arXiv 2604.18578)."""
    clip: float = 0.2
    """Clip range of the ratio; for aspo and bpo the distance of their optimum from 1."""
    bpo_temperature: float = 1e-3
    """Difference from the median, in units of the scaled return, below which bpo's optimum is soft."""
    normalize: Literal["rollout", "minibatch", "none"] = "rollout"
    """Over what advantages get zero mean and unit deviation; bpo does not normalise."""
    target_kl: float = 0.05
    """An iteration's passes stop when the estimated KL exceeds this; 0 never stops."""
    schedule: Literal["cosine", "linear", "constant", "adaptive"] = "cosine"
    """Step sizes over the budget: a cosine to a tenth, a line to zero, constant, or adapted to ``schedule_kl``."""
    schedule_kl: float = 0.01
    """KL per update that the adaptive schedule aims at (rsl_rl's rule)."""
    actor_learning_rate: float = 6e-4
    """Adam's step size for the actor."""
    critic_learning_rate: float = 1e-3
    """Adam's step size for the critic; follows the same schedule."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus, for methods that have an entropy."""
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    """Penalty on leaving the base policy."""
    max_grad_norm: float = 1.0
    """Gradients of actor and critic are each clipped to this norm."""
    warmup_iterations: int = 1
    """First iterations that train the critic alone."""
    scale_rewards: bool = True
    """Divide rewards by the running deviation of the discounted return, so that values are of order one."""
    value_hidden: tuple[int, ...] = (256, 256)
    """Widths of the critic's hidden layers."""
