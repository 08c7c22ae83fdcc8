"""Experience that another process collects: episodes come over a channel, weights go back over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from robot_rl.core.errors import DataError
from robot_rl.core.spec import Spec
from robot_rl.data.frames import Frames
from robot_rl.data.replay import Replay
from robot_rl.rl.channel import Channel, ChannelError, Message
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.off_policy.collector import Behaviour, add_demonstrations
from robot_rl.rl.off_policy.core import OffPolicyCore
from robot_rl.rl.off_policy.learner import OffPolicyLearner

HUMAN = 1
"""Code of the operator in the column ``actor`` of an episode."""
WAIT = 10.0
"""Seconds for which the learner waits for an episode before it looks at its own state."""


class Weights(Protocol):
    """What has the weights that act."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return tensors by name."""


class EpisodeStream:
    """The learner's end of the channel to an actor.

    Episodes are numbered from 0 on over all runs. After a restart the learner says how many it knows (``hello``), and
    the actor sends what is missing; when the state is on disk the learner says up to where (``saved``), and the actor
    forgets what lies before.
    """

    def __init__(self, channel: Channel, spec: Spec) -> None:
        self.channel, self.spec = channel, spec
        self.received = 0
        """Episodes taken in, over all runs."""
        self.version = 0
        """Number of the weights sent last."""
        self.ended = False
        """Whether the actor has gone or asked to end."""
        self._greeted = False

    def numbers(self) -> dict[str, float]:
        """Return what `restore` needs."""
        return {"received": self.received, "version": self.version}

    def restore(self, numbers: Mapping[str, float]) -> None:
        """Continue from `numbers`."""
        self.received, self.version = int(numbers["received"]), int(numbers["version"])

    def publish(self, weights: Weights, facts: Mapping[str, Any]) -> None:
        """Send the weights that act from now on; the first time, say what is known as well."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in weights.state_dict().items()}
        try:
            if not self._greeted:
                self.channel.send("hello", {"received": self.received})
                self._greeted = True
            self.version += 1
            self.channel.send("weights", {"version": self.version, "received": self.received, **facts}, arrays)
        except ChannelError:
            self.ended = True

    def saved(self, received: int) -> None:
        """Tell the actor that the first ``received`` episodes are on disk."""
        try:
            self.channel.send("saved", {"received": received})
        except ChannelError:
            self.ended = True

    def next(self, timeout: float) -> Frames | None:
        """Return the next episode, None if none came; repeated ones are passed over.

        Its extras are ``success`` (F,) bool, ``actor`` (F,) int8 and ``keep`` (F,) bool: whether it is known what
        follows a frame.

        Raises:
            DataError: an episode does not fit the spec, or one is missing.
        """
        try:
            message = None if self.ended else self.channel.receive(timeout)
        except ChannelError:
            self.ended = True
            return None
        if message is None:
            return None
        if message.kind == "end":
            self.ended = True
        if message.kind != "episode":
            return None
        number = int(message.facts["number"])
        if number > self.received:
            raise DataError(f"the actor sent episode {number}, and {self.received} was expected")
        if number < self.received:
            return None
        self.received += 1
        return unpack(message, self.spec)


def unpack(message: Message, spec: Spec) -> Frames:
    """Return the frames of an ``episode`` message.

    Raises:
        DataError: they do not fit ``spec``.
    """
    arrays = message.arrays
    try:
        observation = {key: arrays[f"observation.{key}"] for key in spec.observation}
        action, ends = arrays["action"], arrays["ends"]
        extras = {name: arrays[name] for name in ("success", "actor", "keep")}
    except KeyError as error:
        raise DataError(f"an episode came without {error}") from error
    for key, array in spec.observation.items():
        if observation[key].shape[1:] != array.shape:
            raise DataError(f"observation '{key}' came as {observation[key].shape[1:]}, expected {array.shape}")
    if action.shape[1:] != spec.action.shape or not np.isfinite(action).all():
        raise DataError(f"actions came as {action.shape[1:]}, expected {spec.action.shape}, all of them finite")
    return Frames(observation, action, ends, spec, extras)


class StreamCollector:
    """What an `OffPolicyLearner` collects with where another process acts; see `Collector` for the roles.

    Every step of an episode goes to ``online``; those in which the operator drove go to ``demonstrations`` as well
    (HIL-SERL, arXiv 2410.21845): half of every batch is what people do, corrections included.

    Args:
        stream: where episodes come from.
        behaviour: says what the critic's states and actions are.
        decision: reward and discount of a decision.
        corrections: whether the operator's steps count as demonstrations.
        discount: the core's; needed where rewards are discounted.
    """

    first_seed = 0

    def __init__(
        self,
        stream: EpisodeStream,
        behaviour: Behaviour,
        decision: DecisionConfig,
        corrections: bool = True,
        discount: float | None = None,
    ) -> None:
        self.stream, self.behaviour, self.decision, self.corrections = stream, behaviour, decision, corrections
        self.discount = discount
        self.steps = 0
        """Control steps received."""
        self.human_steps = 0
        """Those in which the operator drove."""
        self.episodes = ReceivedEpisodes()

    def restart(self, seed: int) -> None:
        """Nothing: the scene is the actor's."""

    def collect(self, replay: Replay, control_steps: int) -> int:
        """Wait for the next episode and store it; returns the number of decisions stored."""
        frames = self.stream.next(WAIT)
        if frames is None:
            return 0
        keep = frames.extras["keep"].astype(bool)
        self.steps += frames.num_frames
        self.episodes.add(frames)
        stored = add_demonstrations(replay, frames, self.behaviour, self.decision, "online", keep, self.discount)
        human = keep & (frames.extras["actor"] == HUMAN)
        self.human_steps += int((frames.extras["actor"] == HUMAN).sum())
        if self.corrections and human.any():
            add_demonstrations(replay, frames, self.behaviour, self.decision, "demonstrations", human, self.discount)
        return stored


class ReceivedEpisodes:
    """Success and intervention rate of the newest episodes."""

    def __init__(self, window: int = 20) -> None:
        self._window = window
        self._ended: list[tuple[float, float]] = []
        self.total = 0

    def add(self, frames: Frames) -> None:
        """Take in one episode."""
        self.total += 1
        row = (float(frames.extras["success"].any()), float((frames.extras["actor"] == HUMAN).mean()))
        self._ended = [*self._ended, row][-self._window :]

    def recent(self) -> dict[str, float]:
        """Return mean ``success`` and ``intervention`` share of the newest episodes, and how many came in all."""
        if not self._ended:
            return {"episodes": 0.0}
        success, intervention = (float(np.mean(column)) for column in zip(*self._ended, strict=True))
        return {"success": success, "intervention": intervention, "episodes": float(self.total)}


class StreamLearner(OffPolicyLearner):
    """The off-policy learner fed by a stream: it updates for every step received, and publishes after that."""

    def __init__(
        self,
        policy: Any,
        collector: StreamCollector,
        core: OffPolicyCore,
        replay: Replay,
        shares: dict[str, float],
        pretrain: int = 0,
    ) -> None:
        """As `OffPolicyLearner`; ``pretrain`` updates on the demonstrations alone come before anything acts."""
        super().__init__(policy, collector, core, replay, shares)  # type: ignore[arg-type]
        self.stream = collector.stream
        self._pretrain, self._taken = pretrain, -1

    @property
    def finished(self) -> bool:
        """Whether the actor has gone."""
        return self.stream.ended

    def begin(self) -> None:
        """Learn from the demonstrations, if nothing has been learned yet, and let the actor begin."""
        left = self._pretrain - self.core.updates
        size = self.core.config.batch_size
        while left > 0:
            self.core.update(self.replay.sample(min(left, 32), size, {"demonstrations": 1.0}))
            left -= 32
        self._publish({})

    def iterate(self, fraction: float) -> dict[str, float]:
        """Take in one episode and make the updates that it earns."""
        if self._taken >= 0:
            self.stream.saved(self._taken)  # the state taken before was written since
            self._taken = -1
        before = self.stream.received
        metrics = super().iterate(fraction)
        metrics["human_steps"] = float(self.collector.human_steps)  # type: ignore[attr-defined]
        if self.stream.received > before:
            self._publish(metrics)
        return metrics

    def _publish(self, metrics: Mapping[str, float]) -> None:
        learned = self.core.updates > 0
        self.stream.publish(self.policy, {"learned": learned, "metrics": dict(metrics), "steps": self.steps})

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return what `restore` needs."""
        tensors, numbers = super().state()
        self._taken = self.stream.received
        human = self.collector.human_steps  # type: ignore[attr-defined]
        return tensors, {**numbers, **self.stream.numbers(), "human_steps": human}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Continue from `state`."""
        super().restore(tensors, numbers)
        self.stream.restore(numbers)
        self.collector.human_steps = int(numbers["human_steps"])  # type: ignore[attr-defined]
