"""The on-policy core: collect, estimate advantages, update; methods plug in as an `OnPolicyActor`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import VecEnv
from robot_rl.rl.critics import StateValue
from robot_rl.rl.episodes import EpisodeStatistics
from robot_rl.rl.guard import Guard
from robot_rl.rl.ratios import OnPolicyActor, Trace, clipped_surrogate, divergence
from robot_rl.rl.state import optimizer_tensors, restore_optimizer


@dataclass(frozen=True)
class OnPolicyConfig:
    """Settings of the on-policy core."""

    rollout_steps: int = 64
    """Decisions per lane and iteration."""
    epochs: int = 10
    """Passes over a roll-out."""
    minibatches: int = 8
    """Optimiser steps per pass."""
    discount: float = 0.99
    """Discount per decision."""
    gae_lambda: float = 0.95
    """Advantage estimation's lambda (arXiv 1506.02438)."""
    clip: float = 0.2
    """Clip range of the ratio."""
    target_kl: float = 0.05
    """An iteration's passes stop when the estimated KL exceeds this; 0 never stops."""
    actor_learning_rate: float = 6e-4
    """Adam's step size for the actor; follows a cosine down to a tenth."""
    critic_learning_rate: float = 1e-3
    """Adam's step size for the critic; follows the same cosine."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 1.0
    """Gradients of actor and critic are each clipped to this norm."""
    warmup_iterations: int = 1
    """First iterations that train the critic alone."""
    scale_rewards: bool = True
    """Divide rewards by the running deviation of the discounted return, so that values are of order one."""
    value_hidden: tuple[int, ...] = (256, 256)
    """Widths of the critic's hidden layers."""


@dataclass
class Rollout:
    """T decisions of N lanes."""

    trace: Trace
    """Each (T, N, …)."""
    reward: Tensor
    """(T, N)."""
    terminated: Tensor
    """(T, N) float: 1 where nothing of value follows."""
    truncated: Tensor
    """(T, N) float: 1 where a time limit cut the episode."""
    next_input: dict[int, tuple[Tensor, Tensor]]
    """By step: lanes (n,) cut by a time limit there, and the critic's inputs (n, F) for the states after them."""
    last_input: Tensor
    """(N, F): the critic's input for the state after the last step."""


def advantages(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    discount: float,
    gae_lambda: float,
) -> Tensor:
    """Return generalised advantage estimates (T, N) (arXiv 1506.02438).

    All arguments are (T, N). ``next_value`` is the value of the state that follows within the same episode: after a
    time limit that of the final observation. Termination zeroes it; either end stops the sum.
    """
    result = torch.zeros_like(reward)
    following = torch.zeros_like(reward[0])
    delta = reward + discount * next_value * (1 - terminated) - value
    for t in range(len(reward) - 1, -1, -1):
        following = delta[t] + discount * gae_lambda * (1 - terminated[t]) * (1 - truncated[t]) * following
        result[t] = following
    return result


class RewardScale:
    """Running deviation of the discounted return of N lanes, by which rewards are divided."""

    def __init__(self, num_lanes: int, discount: float) -> None:
        self.discount = discount
        self.moments = np.zeros(3)
        """Count, mean and summed squared deviation of the returns seen."""
        self._returns = np.zeros(num_lanes)

    def add(self, reward: np.ndarray, done: np.ndarray) -> None:
        """Take in one step's rewards (N,) and ends (N,) bool."""
        self._returns = self._returns * self.discount + reward
        count, mean, squared = self.moments
        total, batch = count + len(reward), self._returns
        shift = batch.mean() - mean
        squared += batch.var() * len(batch) + shift**2 * count * len(batch) / total
        self.moments = np.array([total, mean + shift * len(batch) / total, squared])
        self._returns[done] = 0

    @property
    def factor(self) -> float:
        """What to multiply rewards by; 1 until the returns vary."""
        deviation = math.sqrt(self.moments[2] / max(self.moments[0], 1))
        return 1 / deviation if deviation > 1e-6 else 1.0


class OnPolicyLearner:
    """Improves an `OnPolicyActor` in N lanes by clipped policy-gradient updates."""

    def __init__(
        self, actor: OnPolicyActor, env: VecEnv, config: OnPolicyConfig, seed: int = 0, guard: Guard | None = None
    ) -> None:
        self.actor, self.env, self.config = actor, env, config
        self.guard = guard or Guard()
        self.steps, self.iterations = 0, 0
        self.episodes = EpisodeStatistics(env.num_envs)
        self.reward_scale = RewardScale(env.num_envs, config.discount)
        self.value: StateValue | None = None
        self._generator = torch.Generator().manual_seed(seed)
        self._seed = seed
        self._observation = env.reset(seed)
        self._actor_optimizer = torch.optim.Adam(actor.parameters(), lr=config.actor_learning_rate, eps=1e-5)
        self._pending: dict[str, Tensor] = {}

    @property
    def policy(self) -> Any:
        """The policy being improved."""
        return self.actor.policy

    def iterate(self, fraction: float) -> dict[str, float]:
        """Collect one roll-out and update on it; ``fraction`` of the budget is spent."""
        rollout = self.collect()
        metrics = self.update(rollout, fraction)
        self.iterations += 1
        return metrics | self.episodes.recent()

    def collect(self) -> Rollout:
        """Play ``rollout_steps`` decisions in every lane."""
        trace: Trace = {}
        shape = (self.config.rollout_steps, self.env.num_envs)
        reward, terminated, truncated = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
        next_input = {}
        for t in range(shape[0]):
            actions = self.actor.act(self._observation)
            if not trace:
                trace = {k: v.new_empty(shape[0], *v.shape) for k, v in self.actor.trace.items()}
            for key, rows in self.actor.trace.items():
                trace[key][t] = rows
            step = self.env.step(actions)
            self.guard.check(self.steps, {"reward": step.reward, **_named(step.observation)}, action=actions)
            self.steps += self.env.num_envs
            self.episodes.add(step)
            self.reward_scale.add(step.reward, step.done)
            reward[t] = torch.from_numpy(np.asarray(step.reward, np.float32))
            terminated[t] = torch.from_numpy(step.terminated.astype(np.float32))
            truncated[t] = torch.from_numpy(step.truncated.astype(np.float32))
            if step.truncated.any():
                lanes = torch.from_numpy(np.flatnonzero(step.truncated))
                next_input[t] = (lanes, self.actor.look_ahead(step.final_observation)[lanes])
            if step.done.any():
                self.actor.reset(step.done)
            self._observation = step.observation
        return Rollout(trace, reward, terminated, truncated, next_input, self.actor.look_ahead(self._observation))

    def update(self, rollout: Rollout, fraction: float) -> dict[str, float]:
        """Improve actor and critic on ``rollout``; returns metrics."""
        config = self.config
        trace = {key: rows.flatten(0, 1) for key, rows in rollout.trace.items()}
        critic_input = self.actor.critic_input(trace)
        value, optimizer = self._critic(critic_input.shape[-1])
        value_before, advantage = self._advantages(rollout, critic_input, value)
        target = (advantage + value_before).flatten()
        advantage = advantage.flatten()
        explained = 1 - (target - value_before.flatten()).var() / target.var().clamp_min(1e-8)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        with torch.no_grad():
            # Never the behaviour's own log-density: old and new come from the same code.
            old_score = self.actor.score(trace)
        self._set_learning_rate(fraction, optimizer)
        train_actor = self.iterations >= config.warmup_iterations
        sums: dict[str, float] = {"value_loss": 0.0, "policy_loss": 0.0, "kl": 0.0, "clipped": 0.0, "entropy": 0.0}
        count, first, stop = 0, True, False
        for _ in range(config.epochs):
            order = torch.randperm(len(advantage), generator=self._generator)
            for rows in order.chunk(config.minibatches):
                part = {key: values[rows] for key, values in trace.items()}
                value_loss = 0.5 * (value(critic_input[rows]) - target[rows]).square().mean()
                self._descend(optimizer, value_loss, "value loss", value.parameters())
                sums["value_loss"] += value_loss.item()
                count += 1
                if not train_actor or stop:
                    continue
                log_ratio = self.actor.score(part) - old_score[rows]
                if first:
                    _require_unit_ratio(log_ratio)
                    first = False
                with torch.no_grad():
                    kl = divergence(log_ratio).item()
                if config.target_kl and kl > config.target_kl:
                    stop = True
                    continue
                clip = self.actor.inner_clip(config.clip)
                loss = clipped_surrogate(log_ratio, advantage[rows], self.actor.inner_weight(), clip)
                entropy = self.actor.entropy(part)
                total = loss - config.entropy_weight * entropy
                self._descend(self._actor_optimizer, total, "policy loss", self.actor.parameters())
                sums["policy_loss"] += loss.item()
                sums["entropy"] += entropy.item()
                sums["kl"] = kl
                sums["clipped"] += (log_ratio.detach().exp() - 1).abs().gt(clip).float().mean().item()
        metrics = {key: total if key == "kl" else total / count for key, total in sums.items()}
        return metrics | {"explained_variance": explained.item(), "reward": rollout.reward.mean().item()}

    @torch.no_grad()
    def _advantages(self, rollout: Rollout, critic_input: Tensor, value: StateValue) -> tuple[Tensor, Tensor]:
        """Return values (T, N) before the update and advantages (T, N)."""
        before = value(critic_input).view_as(rollout.reward)
        following = torch.cat([before[1:], value(rollout.last_input)[None]])
        for t, (lanes, final) in rollout.next_input.items():
            following[t, lanes] = value(final)
        scale = self.reward_scale.factor if self.config.scale_rewards else 1.0
        reward, ends = rollout.reward * scale, (rollout.terminated, rollout.truncated)
        discount, gae_lambda = self.config.discount, self.config.gae_lambda
        return before, advantages(reward, before, following, *ends, discount, gae_lambda)

    def _critic(self, size: int) -> tuple[StateValue, torch.optim.Optimizer]:
        """Return the critic and its optimiser, made at the first update, when the size of its input is known."""
        if self.value is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                self.value = StateValue(size, self.config.value_hidden)
            lr = self.config.critic_learning_rate
            self._value_optimizer = torch.optim.Adam(self.value.parameters(), lr=lr, eps=1e-5)
            if self._pending:
                self._restore_critic(self._pending)
                self._pending = {}
        return self.value, self._value_optimizer

    def _set_learning_rate(self, fraction: float, optimizer: torch.optim.Optimizer) -> None:
        factor = 0.1 + 0.45 * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))
        rates = ((self._actor_optimizer, "actor_learning_rate"), (optimizer, "critic_learning_rate"))
        for target, name in rates:
            for group in target.param_groups:
                group["lr"] = factor * getattr(self.config, name)

    def _descend(self, optimizer: torch.optim.Optimizer, loss: Tensor, name: str, parameters: Any) -> None:
        self.guard.check(self.steps, {name: loss})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        optimizer.step()

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return tensors and numbers from which `restore` continues; the policy is saved on its own."""
        tensors = {f"actor.{i}": p.detach() for i, p in enumerate(self.actor.parameters())}
        tensors |= optimizer_tensors("actor_optimizer", self._actor_optimizer)
        if self.value is not None:
            tensors |= {f"value.{name}": p for name, p in self.value.state_dict().items()}
            tensors |= optimizer_tensors("value_optimizer", self._value_optimizer)
        tensors["generator"] = self._generator.get_state()
        tensors["reward_moments"] = torch.from_numpy(self.reward_scale.moments)
        return tensors, {"steps": self.steps, "iterations": self.iterations}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Continue from what `state` returned; the lanes start new episodes."""
        with torch.no_grad():
            for i, parameter in enumerate(self.actor.parameters()):
                parameter.copy_(tensors[f"actor.{i}"])
        restore_optimizer("actor_optimizer", self._actor_optimizer, tensors)
        self._pending = {k: v for k, v in tensors.items() if k.startswith("value")}
        self._generator.set_state(tensors["generator"])
        self.reward_scale.moments = tensors["reward_moments"].numpy()
        self.steps, self.iterations = int(numbers["steps"]), int(numbers["iterations"])
        self._observation = self.env.reset(self._seed + self.steps)
        self.actor.reset(np.ones(self.env.num_envs, bool))

    def _restore_critic(self, tensors: dict[str, Tensor]) -> None:
        assert self.value is not None
        prefix = "value."
        self.value.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        restore_optimizer("value_optimizer", self._value_optimizer, tensors)


def _require_unit_ratio(log_ratio: Tensor) -> None:
    """Before the first optimiser step new and old scores are the same numbers, up to the order of a sum."""
    worst = log_ratio.detach().abs().max().item()
    if not worst < 1e-3:
        raise AssertionError(
            f"the ratio is not 1 before the first step (log-ratio {worst:.3g}): something moved between "
            "scoring and updating, such as a normaliser, dropout or a time grid"
        )


def _named(observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"observation '{key}'": value for key, value in observation.items()}
