"""HG-DAgger: imitation of what the operator does when taking over (arXiv 1810.02890).

The policy acts, the operator takes over where it goes wrong, and the policy is fitted to demonstrations and corrections
while that goes on. The steps that the policy made itself teach it nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.policy import Policy
from robot_rl.data.frames import Frames, concatenate
from robot_rl.data.windows import WindowSampler
from robot_rl.nets.device import device_of
from robot_rl.rl.off_policy.stream import HUMAN, WAIT, EpisodeStream, ReceivedEpisodes
from robot_rl.rl.state import optimizer_tensors, restore_optimizer
from robot_rl.train.ema import EMA
from robot_rl.train.trainer import step_generator

_CORRECTIONS = "corrections."


@dataclass(frozen=True)
class DaggerConfig:
    """Settings of HG-DAgger."""

    batch_size: int = 256
    """Windows per update."""
    correction_share: float = 0.5
    """Share of corrections in a batch, once there are any; the rest are demonstrations."""
    updates_per_step: float = 1.0
    """Updates per control step of an episode in which the operator took over."""
    learning_rate: float = 3e-4
    """AdamW's step size."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.995
    """Largest decay of the averaged weights, which act."""


class DaggerLearner:
    """Fits a policy that has a ``loss`` to demonstrations and to the corrections that come over a stream."""

    def __init__(
        self, policy: Any, stream: EpisodeStream, config: DaggerConfig, demonstrations: Frames, seed: int = 0
    ) -> None:
        if not hasattr(policy, "loss"):
            raise CapabilityError(f"hg_dagger fits policies that imitate (chunked, gaussian), not {policy.kind}")
        if not 0 < config.correction_share < 1:
            raise ConfigError(f"correction_share must be between 0 and 1, got {config.correction_share}")
        self.stream, self.config, self.seed = stream, config, seed
        self._trained: Any = policy.train().requires_grad_(True)
        self._ema = EMA(policy, config.ema_decay)
        self._optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self._demonstrations = self._windows(demonstrations)
        self._corrections: Frames | None = None
        self._sampler: WindowSampler | None = None
        self.episodes = ReceivedEpisodes()
        self.steps, self.human_steps, self.updates = 0, 0, 0
        self._owed, self._taken = 0.0, -1

    @property
    def policy(self) -> Policy:
        """The averaged policy, which acts."""
        policy: Any = self._ema.module
        return policy

    @property
    def finished(self) -> bool:
        """Whether the actor has gone."""
        return self.stream.ended

    def begin(self) -> None:
        """Let the actor begin."""
        self._publish({})

    def iterate(self, fraction: float) -> dict[str, float]:
        """Take in one episode, and learn if the operator took over in it."""
        if self._taken >= 0:
            self.stream.saved(self._taken)  # the state taken before was written since
            self._taken = -1
        metrics: dict[str, float] = {}
        frames = self.stream.next(WAIT)
        if frames is not None:
            self._take(frames)
            while self._owed >= 1:
                self._owed -= 1
                metrics["loss"] = self._update()
            metrics |= {"updates": float(self.updates), "human_steps": float(self.human_steps)}
            self._publish(metrics | self.episodes.recent())
        return metrics | self.episodes.recent()

    def _take(self, frames: Frames) -> None:
        self.steps += frames.num_frames
        self.episodes.add(frames)
        found = corrections(frames)
        if found is None:
            return
        self.human_steps += found.num_frames
        self._owed += frames.num_frames * self.config.updates_per_step
        self._corrections = found if self._corrections is None else concatenate([self._corrections, found])
        self._sampler = self._windows(self._corrections)

    def _windows(self, frames: Frames) -> WindowSampler:
        policy = self._trained
        keys = list(policy.spec.observation)
        return WindowSampler(frames, policy.obs_steps, policy.horizon, keys, device_of(policy))

    def _update(self) -> float:
        config = self.config
        generator = step_generator(self.seed, self.updates)
        corrected = round(config.correction_share * config.batch_size) if self._sampler is not None else 0
        losses = []
        for sampler, count in ((self._demonstrations, config.batch_size - corrected), (self._sampler, corrected)):
            if sampler is not None and count:
                index = torch.randint(sampler.num_windows, (count,), generator=generator)
                losses.append(self._trained.loss(sampler.batch(index), generator))
        loss = torch.cat(losses).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained.parameters(), config.gradient_clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self._ema.update(self.updates)
        return loss.item()

    def _publish(self, metrics: Mapping[str, float]) -> None:
        facts = {"learned": self.updates > 0, "metrics": dict(metrics), "steps": self.steps}
        self.stream.publish(self._ema.module, facts)

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return what `restore` needs, the corrections included."""
        parts = {"policy": self._trained, "ema": self._ema.module}
        tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
        tensors |= optimizer_tensors("optimizer", self._optimizer)
        if self._corrections is not None:
            kept = {f"observation.{key}": value for key, value in self._corrections.observation.items()}
            kept |= {"action": self._corrections.action, "ends": self._corrections.episode_ends}
            tensors |= {_CORRECTIONS + name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in kept.items()}
        self._taken = self.stream.received
        numbers = {"steps": self.steps, "human_steps": self.human_steps, "updates": self.updates, "owed": self._owed}
        return tensors, {**numbers, **self.stream.numbers()}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Continue from `state`."""
        for name, part in (("policy", self._trained), ("ema", self._ema.module)):
            part.load_state_dict(
                {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            )
        restore_optimizer("optimizer", self._optimizer, tensors)
        kept = {k.removeprefix(_CORRECTIONS): v.numpy() for k, v in tensors.items() if k.startswith(_CORRECTIONS)}
        if kept:
            spec = self._trained.spec
            observation = {key: kept[f"observation.{key}"] for key in spec.observation}
            self._corrections = Frames(observation, kept["action"], kept["ends"], spec)
            self._sampler = self._windows(self._corrections)
        self.steps, self.human_steps = int(numbers["steps"]), int(numbers["human_steps"])
        self.updates, self._owed = int(numbers["updates"]), numbers["owed"]
        self.stream.restore(numbers)


def corrections(frames: Frames) -> Frames | None:
    """Return the stretches in which the operator drove, each as an episode of its own; None where there are none."""
    human = frames.extras["actor"] == HUMAN
    if not human.any():
        return None
    rows = np.flatnonzero(human)
    # A stretch ends where the next human frame is not the next one, or belongs to another part of the recording.
    part = np.searchsorted(frames.episode_ends, rows, side="right")
    last = np.append((np.diff(rows) > 1) | (np.diff(part) > 0), True)
    return replace(
        frames,
        observation={key: value[rows] for key, value in frames.observation.items()},
        action=frames.action[rows],
        episode_ends=np.flatnonzero(last) + 1,
        extras={},
    )
