"""The on-policy core: collect decisions, estimate advantages, update; methods plug in as an `OnPolicyActor`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation, VecEnv
from robot_rl.core.errors import CapabilityError
from robot_rl.core.policy import Policy
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.episodes import EpisodeStatistics
from robot_rl.rl.guard import Guard
from robot_rl.rl.on_policy.anchor import Anchor
from robot_rl.rl.on_policy.config import OnPolicyConfig
from robot_rl.rl.on_policy.decisions import Batch, DecisionStore, RewardScale, Rollout
from robot_rl.rl.on_policy.flat_adam import FlatAdam
from robot_rl.rl.on_policy.ratios import (
    OnPolicyActor,
    asymmetric_surrogate,
    bounded_ratio_loss,
    clipped_surrogate,
    divergence,
)
from robot_rl.rl.on_policy.values import Critics
from robot_rl.rl.session import SessionConfig, resumed_seed, run_session
from robot_rl.rl.state import below, reseed
from robot_rl.train import distributed
from robot_rl.train.run import Run

_LEARNING_RATES = (1e-5, 1e-2)


class OnPolicyLearner:
    """Improves an `OnPolicyActor` in N lanes by clipped policy-gradient updates.

    Under `robot_rl.train.distributed` every process has lanes of its own, and all make the same updates.
    """

    data_parallel = True

    def __init__(
        self,
        actor: OnPolicyActor,
        env: VecEnv,
        config: OnPolicyConfig,
        seed: int = 0,
        guard: Guard | None = None,
        decision: DecisionConfig | None = None,
    ) -> None:
        """Create a learner.

        Args:
            actor: the method.
            env: where it acts; not closed by the learner.
            config: settings.
            seed: first episode seed, and seed of critic and minibatches.
            guard: stops at values that are not finite.
            decision: how rewards of control steps become those of decisions; their sum by default.

        Raises:
            CapabilityError: the settings ask for an entropy bonus, and the actor has no entropy; or for lanes out of
                step, and the task has none.
        """
        self.actor, self.env, self.config = actor, env, config
        if config.entropy_weight and type(actor).entropy is OnPolicyActor.entropy:
            raise CapabilityError(f"{type(actor).__name__} has no entropy, so core.entropy_weight must be 0")
        self.decision = decision or DecisionConfig()
        self.guard = guard or Guard()
        self.steps, self.iterations = 0, 0
        self.episodes = EpisodeStatistics(env.num_envs)
        step_discount = self.decision.step_discount(config.discount, actor.decision_steps)
        self.reward_scale = RewardScale(env.num_envs, step_discount)
        self.anchor = Anchor(config.anchor)
        self.critics = Critics(config, seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._seed = seed
        self._observation = self._begin(seed)
        self._store = DecisionStore(env.num_envs, config.rollout_steps + (actor.decision_steps > 1))
        self._carried_score: Tensor | None = None
        self._actor_adam = FlatAdam(actor.parameters(), config.max_grad_norm)
        self._share_policy()
        self._rate_factor = 1.0

    @property
    def policy(self) -> Any:
        """The policy being improved."""
        return self.actor.policy

    def _begin(self, seed: int) -> Observation:
        """Start new episodes in all lanes."""
        observation = self.env.reset(seed)
        self.guard.check_reset(self.steps, observation)
        if self.config.stagger:
            stagger = getattr(self.env, "stagger", None)
            if stagger is None:
                raise CapabilityError("the lanes of this task cannot be put out of step, so core.stagger must be no")
            stagger(seed)
        return observation

    def iterate(self, fraction: float) -> dict[str, float]:
        """Collect one roll-out and update on it; ``fraction`` of the budget is spent."""
        rollout = self.collect()
        metrics = self.update(rollout, fraction)
        self.iterations += 1
        return metrics | self.episodes.recent()

    def collect(self) -> Rollout:
        """Play the control steps of ``rollout_steps`` whole decisions in every lane."""
        actor, store = self.actor, self._store
        factor = self.decision.factor(self.config.discount, actor.decision_steps)
        final = []
        store.begin()
        for _ in range(self.config.rollout_steps * actor.decision_steps):
            actions = actor.act(self._observation)
            store.decide(actor.decided, actor.trace)
            step = self.env.step(actions)
            self.guard.check_step(self.steps, step, actions)
            self.steps += self.env.num_envs * distributed.world()
            done = step.done
            self.episodes.add(step)
            self.reward_scale.add(step.reward - self.decision.penalty * actor.decided, done)
            store.add(step.reward, factor)
            if done.any():
                store.end(step.terminated, step.truncated)
                if step.truncated.any() and self.config.timeout == "final":
                    lanes = np.flatnonzero(step.truncated)
                    index = torch.from_numpy(lanes)
                    final.append((store.slots(lanes), index, actor.look_ahead(step.final_observation)[index]))
                actor.reset(done)
            self._observation = step.observation
        rollout = store.finish(actor.due, actor.look_ahead(self._observation), final)
        rollout.carried_score = self._carried_score
        self._carried_score = self._score_open(rollout)
        return rollout

    @torch.no_grad()
    def _score_open(self, rollout: Rollout) -> Tensor | None:
        """Score the decisions still open by the parameters that made them; (N, M), zero in other lanes."""
        still = rollout.filled & ~rollout.valid
        if not still.any():
            return None
        scores = self.actor.score(rollout.rows(still))
        lanes = still.nonzero()[:, 1].to(scores.device)
        result = scores.new_zeros(self.env.num_envs, scores.shape[1])
        result[lanes] = scores
        if rollout.carried_score is not None:
            older = (still & rollout.carried).any(0).to(scores.device)
            result[older] = rollout.carried_score[older]
        return result

    def update(self, rollout: Rollout, fraction: float) -> dict[str, float]:
        """Improve actor and critic on ``rollout``; returns metrics."""
        config, actor = self.config, self.actor
        batch, metrics = self._prepare(rollout)
        self._set_learning_rate(fraction)
        train_actor = self.iterations >= config.warmup_iterations
        sums = dict.fromkeys(("value_loss", "policy_loss", "kl", "clipped", "entropy", "anchor_kl"), 0.0)
        steps, logged, stop, kl = 0, 0, not train_actor, 0.0
        device, last = batch.advantage.device, min(config.minibatches, len(batch.advantage)) - 1
        weight, clip = actor.inner_weight().to(device), actor.inner_clip(config.clip).to(device)
        for _ in range(config.epochs):
            order = torch.randperm(len(batch.advantage), generator=self._generator).to(device)
            for i, part in enumerate(batch.shuffled(order, config.minibatches)):
                values, loss = self.critics.loss(part)
                if not stop:
                    log_ratio = actor.score(part.trace) - part.old_score
                    if steps == 0:
                        _require_unit_ratio(log_ratio[part.fresh])
                    if actor.log_ratio_limit < math.inf:
                        log_ratio = log_ratio.clamp(-actor.log_ratio_limit, actor.log_ratio_limit)
                    watched = i == last
                    if watched or config.target_kl or config.schedule == "adaptive":
                        kl = distributed.mean(self._divergence(part, log_ratio), len(log_ratio))
                    stop = config.target_kl > 0 and kl > config.target_kl
                if not stop:
                    self._adapt_learning_rate(kl)
                    policy_loss, anchor_kl = self._policy_loss(part, log_ratio, values, weight, clip)
                    sums["policy_loss"] += policy_loss.item()
                    sums["anchor_kl"] += float(anchor_kl)
                    steps += 1
                    if watched:
                        logged += 1
                        sums["clipped"] += _clipped(log_ratio, clip)
                        sums["entropy"] += actor.entropy(part.trace).item()
                sums["value_loss"] += loss.item()
                self._descend(loss if stop else loss + policy_loss, not stop, len(values))
        counts = {"value_loss": config.epochs * (last + 1), "clipped": logged, "entropy": logged, "kl": 1}
        metrics |= {key: total / max(counts.get(key, steps), 1) for key, total in (sums | {"kl": kl}).items()}
        metrics |= {
            "learning_rate": self._rate_factor * config.actor_learning_rate,
            "anchor_weight": self.anchor.weight,
        }
        if steps and self.anchor.weight:
            self.anchor.update(distributed.mean(metrics["anchor_kl"]))
        metrics |= actor.end_iteration(batch.trace, fraction)
        self._share_policy()
        return metrics

    def _policy_loss(
        self, part: Batch, log_ratio: Tensor, values: Tensor, weight: Tensor, clip: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """Return what the actor descends, and the divergence from the base where there is an anchor."""
        config, actor = self.config, self.actor
        if config.loss == "bpo":
            optimum = self.critics.above_median(part)
            loss = bounded_ratio_loss(log_ratio, part.target - values, optimum, weight, clip)
        else:
            advantage = _standardized(part.advantage) if config.normalize == "minibatch" else part.advantage
            surrogate = asymmetric_surrogate if config.loss == "aspo" else clipped_surrogate
            loss = surrogate(log_ratio, advantage, weight, clip)
        if config.entropy_weight:
            loss = loss - config.entropy_weight * actor.entropy(part.trace)
        if not self.anchor.weight:
            return loss, 0.0
        distance = actor.divergence_to_base(part.trace).mean()
        return loss + self.anchor.weight * distance, distance.detach()

    @torch.no_grad()
    def _divergence(self, part: Batch, log_ratio: Tensor) -> float:
        """Return KL(old || new): in closed form where the actor has one and the schedule needs it, else estimated."""
        if part.snapshot:
            return self.actor.divergence_from(part.snapshot, part.trace).mean().item()
        return divergence(log_ratio).item()

    @torch.no_grad()
    def _prepare(self, rollout: Rollout) -> tuple[Batch, dict[str, float]]:
        """Value the roll-out's decisions and score them by the present parameters."""
        config, actor = self.config, self.actor
        trace = rollout.rows(rollout.filled)
        critic_input = actor.critic_input(trace)
        scale = self.reward_scale.factor if config.scale_rewards else 1.0
        before, advantage = self.critics.advantages(rollout, critic_input, self.decision, scale)
        valid = rollout.valid
        if not valid.all():
            kept = valid[rollout.filled].nonzero().squeeze(-1).to(critic_input.device)
            trace = {key: rows.index_select(0, kept) for key, rows in trace.items()}
            critic_input = critic_input.index_select(0, kept)
            before, advantage = before[valid], advantage[valid]
        before, advantage = before.flatten(), advantage.flatten()
        target = advantage + before
        explained = 1 - advantage.var() / target.var().clamp_min(1e-8)
        if config.normalize == "rollout":
            advantage = _standardized(advantage)
        # Never the behaviour's own log-density: old and new come from the same code.
        old_score = actor.score(trace)
        carried = rollout.carried[valid]
        if carried.any() and rollout.carried_score is not None:
            # These were decided before the latest update, and so is their score.
            lanes = (rollout.carried & valid).nonzero()[:, 1]
            old_score[carried.to(old_score.device)] = rollout.carried_score[lanes.to(old_score.device)]
        snapshot = actor.snapshot(trace) if config.schedule == "adaptive" else {}
        device = critic_input.device
        metrics = {"explained_variance": explained.item(), "reward": rollout.reward[valid].mean().item()}
        numbers = advantage.to(device), target.to(device)
        return Batch(trace, critic_input, *numbers, old_score, snapshot, ~carried.to(device)), metrics

    def _set_learning_rate(self, fraction: float) -> None:
        fraction, schedule = min(max(fraction, 0.0), 1.0), self.config.schedule
        if schedule == "cosine":
            self._rate_factor = 0.1 + 0.45 * (1 + math.cos(math.pi * fraction))
        elif schedule == "linear":
            self._rate_factor = 1 - fraction

    def _adapt_learning_rate(self, kl: float) -> None:
        """Shrink the step sizes by 1.5 at twice the KL aimed at, and stretch them below half of it."""
        if self.config.schedule != "adaptive":
            return
        target, rate = self.config.schedule_kl, self.config.actor_learning_rate
        low, high = (bound / rate for bound in _LEARNING_RATES)
        if kl > 2 * target:
            self._rate_factor = max(low, self._rate_factor / 1.5)
        elif 0 < kl < target / 2:
            self._rate_factor = min(high, self._rate_factor * 1.5)

    def _descend(self, loss: Tensor, train_actor: bool, rows: int) -> None:
        """Take one step of the critics, and of the actor if it is part of the loss, a mean over ``rows``."""
        critic_adam = self.critics.adam
        assert critic_adam is not None
        if not math.isfinite(loss.item()):
            self.guard.check(self.steps, {"loss": loss})
        self._actor_adam.zero()
        critic_adam.zero()
        loss.backward()
        distributed.all_reduce_gradients([*critic_adam.parameters, *self._actor_adam.parameters], rows)
        critic_adam.step(self._rate_factor * self.config.critic_learning_rate)
        if train_actor:
            self._actor_adam.step(self._rate_factor * self.config.actor_learning_rate)

    def _share_policy(self) -> None:
        """Give all processes the first one's policy: also what a method trains by itself is then the same."""
        if distributed.world() > 1:
            whole = self.policy.state_dict().values() if isinstance(self.policy, nn.Module) else ()
            distributed.broadcast([*whole, *self.actor.parameters()])

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return tensors and numbers from which `restore` continues; the policy is saved on its own."""
        tensors = {f"actor.{i}": p.detach() for i, p in enumerate(self.actor.parameters())}
        tensors |= {f"method.{name}": value for name, value in self.actor.state().items()}
        tensors |= {f"actor_optimizer.{key}": moment for key, moment in self._actor_adam.state().items()}
        tensors |= self.critics.state()
        tensors["generator"] = self._generator.get_state()
        tensors["reward_moments"] = torch.from_numpy(self.reward_scale.moments)
        numbers = {"steps": self.steps, "iterations": self.iterations, "rate_factor": self._rate_factor}
        return tensors, numbers | {"anchor_weight": self.anchor.weight}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Continue from what `state` returned, with new episodes and exploration; open decisions are dropped."""
        with torch.no_grad():
            for i, parameter in enumerate(self.actor.parameters()):
                parameter.copy_(tensors[f"actor.{i}"])
        self.actor.restore(below("method.", tensors))
        self._actor_adam.restore(below("actor_optimizer.", tensors))
        self.critics.restore(tensors)
        self._generator.set_state(tensors["generator"])
        self.reward_scale.moments = tensors["reward_moments"].numpy()
        self.steps, self.iterations = int(numbers["steps"]), int(numbers["iterations"])
        self._rate_factor = numbers.get("rate_factor", 1.0)
        self.anchor.weight = numbers.get("anchor_weight", self.config.anchor.weight)
        seed = resumed_seed(self._seed, self.steps)
        reseed(seed, self.policy, self.actor)
        self._observation = self._begin(seed)
        self.actor.reset(np.ones(self.env.num_envs, bool))
        self._store.clear()
        self._carried_score = None


def run_on_policy(
    actor: OnPolicyActor,
    env_factory: Callable[..., VecEnv],
    lanes: int,
    core: OnPolicyConfig,
    run: Run,
    session: SessionConfig | None = None,
    **learner_options: Any,
) -> Policy:
    """Improve ``actor``'s policy until the budget is spent; the loop of every on-policy method's ``finetune``.

    Args:
        actor: the method, for ``lanes`` lanes.
        env_factory: ``env_factory(num_envs=…) -> VecEnv`` for the task.
        lanes: environments stepped at once.
        core: settings of the core.
        run: run directory, which is continued if it holds a learner's state.
        session: budget and evaluation.
        learner_options: further arguments of `OnPolicyLearner`, such as ``decision``.

    Returns:
        The best policy by validation, which is also saved in ``run``.
    """
    session = session or SessionConfig()
    env = env_factory(num_envs=lanes)
    try:
        seed = session.training_seed(run.seed)
        learner = OnPolicyLearner(actor, env, core, seed, Guard(run.path), **learner_options)
        return run_session(learner, env_factory, run, session)
    finally:
        env.close()


@torch.no_grad()
def _clipped(log_ratio: Tensor, clip: Tensor) -> float:
    return (log_ratio.exp() - 1).abs().gt(clip).float().mean().item()


def _standardized(advantage: Tensor) -> Tensor:
    mean, deviation = distributed.moments(advantage)
    return (advantage - mean) / (deviation + 1e-8)


def _require_unit_ratio(log_ratio: Tensor) -> None:
    """Before the first optimiser step new and old scores are the same numbers, up to the order of a sum."""
    worst = log_ratio.detach().abs().max().item() if len(log_ratio) else 0.0
    if not worst < 1e-3:
        raise AssertionError(
            f"the ratio is not 1 before the first step (log-ratio {worst:.3g}): something moved between "
            "scoring and updating, such as a normaliser, dropout or a time grid"
        )
