"""Collects with a behaviour and updates the off-policy core, so many updates per environment step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from robot_rl.core.policy import Policy
from robot_rl.data.replay import Replay
from robot_rl.rl.collector import Collector
from robot_rl.rl.off_policy import OffPolicyCore

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
        self.policy: Any = policy
        self.collector, self.core, self.replay = collector, core, replay
        self.shares, self.block = shares, block
        self._owed = 0.0

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
            while self._owed >= 1:
                slices = min(int(self._owed), _LARGEST_BLOCK)
                self._owed -= slices
                metrics |= self.core.update(self.replay.sample(slices, config.batch_size, self.shares))
            metrics["updates"] = float(self.core.updates)
        self.started(ready)
        return metrics | self.collector.episodes.recent()

    def started(self, learning: bool) -> None:
        """Tell the behaviour whether learning has begun; before that it may act by its prior."""
        behaviour = self.collector.behaviour
        if hasattr(behaviour, "learning"):
            behaviour.learning = learning

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return what `restore` needs, the replay included."""
        tensors, numbers = self.core.state()
        rows, cursors = self.replay.state()
        return {**tensors, **rows}, {**numbers, **cursors, "steps": self.steps, "owed": self._owed}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Continue from `state`; the lanes start new episodes."""
        self.core.restore(tensors, numbers)
        self.replay.restore(tensors, numbers)
        self.collector.steps, self._owed = int(numbers["steps"]), numbers["owed"]
        self.collector.restart(self.collector.first_seed + self.steps)
