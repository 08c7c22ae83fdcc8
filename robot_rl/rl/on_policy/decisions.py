"""Decisions of N lanes, each on its own clock: opened when a lane decides, closed when it decides anew or ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from robot_rl.rl.on_policy.ratios import Trace
from robot_rl.train import distributed


@dataclass
class Rollout:
    """Up to T decisions of N lanes; lanes with fewer are padded. Valid until the next roll-out is collected."""

    trace: Trace
    """Each (T, N, …)."""
    valid: Tensor
    """(T, N) bool: decisions that are complete and may be learned from."""
    filled: Tensor
    """(T, N) bool: those and the decisions still open, which the next roll-out carries on."""
    reward: Tensor
    """(T, N): summed (or discounted) over the control steps of a decision."""
    length: Tensor
    """(T, N): control steps of a decision."""
    terminated: Tensor
    """(T, N) float: 1 where nothing of value follows."""
    truncated: Tensor
    """(T, N) float: 1 where a time limit cut the episode."""
    carried: Tensor
    """(T, N) bool: decisions made before the latest update."""
    last: Tensor
    """(N,): index of each lane's last complete decision if the lane decides next, else -1."""
    last_input: Tensor
    """(N, F): the critic's input for the state after the last step."""
    final: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Time limits: decisions (n,), lanes (n,) and the critic's inputs (n, F) for the states after them."""
    carried_score: Tensor | None = None
    """(N, M): scores of the carried decisions by the parameters that made them."""

    def rows(self, mask: Tensor) -> Trace:
        """Return the trace of the decisions in ``mask`` (T, N), each (B, …), in the order of time, then lane."""
        if bool(mask.all()):
            return {key: values.flatten(0, 1) for key, values in self.trace.items()}
        index = mask.flatten().nonzero().squeeze(-1)
        return {key: v.flatten(0, 1).index_select(0, index.to(v.device)) for key, v in self.trace.items()}


class DecisionStore:
    """Storage of the decisions under way, allocated once and reused by every roll-out."""

    def __init__(self, num_lanes: int, capacity: int) -> None:
        self.num_lanes, self.capacity = num_lanes, capacity
        self.trace: Trace = {}
        self._lanes = np.arange(num_lanes)
        self.open = np.zeros(num_lanes, bool)
        """(N,) lanes with a decision that is not complete."""
        self._slot = np.full(num_lanes, -1)
        self._numbers = np.zeros((4, capacity, num_lanes), np.float32)
        self._aligned = True
        self.carried = np.zeros(num_lanes, bool)
        """(N,) lanes whose first decision was made before this roll-out."""

    def clear(self) -> None:
        """Forget everything, decisions under way included."""
        self.open[:] = False
        self.begin()

    def begin(self) -> None:
        """Start a roll-out; decisions still open become the first of it."""
        lanes = np.flatnonzero(self.open)
        kept = self._numbers[:, self._slot[lanes], lanes]
        index = torch.from_numpy(lanes)
        for values in self.trace.values() if len(lanes) else ():
            values[0, index] = values[torch.from_numpy(self._slot[lanes]), index]
        self._numbers[:] = 0
        self._numbers[:, 0, lanes] = kept
        self._slot[:] = -1
        self._slot[lanes] = 0
        self.carried = self.open.copy()
        self._aligned = len(lanes) in (0, self.num_lanes)

    def decide(self, decided: np.ndarray, rows: Trace) -> None:
        """Open a decision in the lanes ``decided`` (N,) bool with trace ``rows`` (n, …); closes the ones before."""
        everywhere = bool(decided.all())
        if not everywhere and not decided.any():
            return
        self._slot[decided] += 1
        self.open |= decided
        if not everywhere:
            self._aligned = False
        self._reserve(int(self._slot.max()) + 1, rows)
        if everywhere and self._aligned:
            for key, values in rows.items():
                self.trace[key][self._slot[0]].copy_(values)
            return
        lanes = np.flatnonzero(decided)
        where = (torch.from_numpy(self._slot[lanes]), torch.from_numpy(lanes))
        for key, values in rows.items():
            self.trace[key][where] = values

    def add(self, reward: np.ndarray, discount: float) -> None:
        """Add one control step's rewards (N,) to the open decisions, times ``discount`` ** (steps so far)."""
        where = self._slot[0] if self._aligned else (self._slot, self._lanes)
        rewards, lengths = self._numbers[0], self._numbers[1]
        rewards[where] += reward if discount == 1 else reward * discount ** lengths[where]
        lengths[where] += 1

    def end(self, terminated: np.ndarray, truncated: np.ndarray) -> None:
        """Close the decisions of lanes (N,) whose episode ended."""
        self._numbers[2, self._slot, self._lanes] = terminated
        self._numbers[3, self._slot, self._lanes] = truncated
        self.open &= ~(terminated | truncated)

    def slots(self, lanes: np.ndarray) -> Tensor:
        """Return the index of the latest decision of ``lanes`` (n,)."""
        return torch.from_numpy(self._slot[lanes])

    def finish(self, due: np.ndarray, last_input: Tensor, final: list[tuple[Tensor, Tensor, Tensor]]) -> Rollout:
        """Close the decisions of lanes that decide next (``due`` (N,) bool) and return the roll-out."""
        self.open &= ~due
        steps = int(self._slot.max()) + 1
        time = np.arange(steps)[:, None]
        filled = time <= self._slot
        valid = time <= self._slot - self.open
        reward, length, terminated, truncated = (torch.from_numpy(part) for part in self._numbers[:, :steps])
        return Rollout(
            trace={key: values[:steps] for key, values in self.trace.items()},
            valid=torch.from_numpy(valid),
            filled=torch.from_numpy(filled),
            reward=reward,
            length=length,
            terminated=terminated,
            truncated=truncated,
            carried=torch.from_numpy((time == 0) & self.carried),
            last=torch.from_numpy(np.where(self.open, -1, self._slot)),
            last_input=last_input,
            final=final,
        )

    def _reserve(self, slots: int, rows: Trace) -> None:
        if not self.trace:
            shape = (self.capacity, self.num_lanes)
            self.trace = {key: v.new_empty(*shape, *v.shape[1:]) for key, v in rows.items()}
        if slots <= self.capacity:
            return
        extra = max(slots, self.capacity + self.capacity // 2) - self.capacity
        self.capacity += extra
        self._numbers = np.concatenate([self._numbers, np.zeros((4, extra, self.num_lanes), np.float32)], axis=1)
        for key, values in self.trace.items():
            self.trace[key] = torch.cat([values, values.new_empty(extra, *values.shape[1:])])


@dataclass
class Batch:
    """What an iteration learns from, B decisions in rows."""

    trace: Trace
    critic_input: Tensor
    advantage: Tensor
    target: Tensor
    old_score: Tensor
    snapshot: Trace
    fresh: Tensor
    """(B,) bool: decided with the present parameters, so that the ratio starts at 1."""

    def shuffled(self, order: Tensor, parts: int) -> Iterator[Batch]:
        """Yield ``parts`` of the rows in the given order."""
        parts = min(parts, len(order))

        def split(rows: Tensor) -> tuple[Tensor, ...]:
            return rows[order].tensor_split(parts)

        def columns(trace: Trace) -> list[Trace]:
            pieces = {key: split(rows) for key, rows in trace.items()}
            return [{key: piece[i] for key, piece in pieces.items()} for i in range(parts)]

        numbers = map(split, (self.critic_input, self.advantage, self.target, self.old_score))
        return map(Batch, columns(self.trace), *numbers, columns(self.snapshot), split(self.fresh))


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
        count, _, squared = distributed.pooled(self.moments)
        deviation = math.sqrt(squared / max(count, 1))
        return 1 / deviation if deviation > 1e-6 else 1.0


def advantages(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    discount: float | Tensor,
    gae_lambda: float,
) -> Tensor:
    """Return generalised advantage estimates (T, N) (arXiv 1506.02438).

    All arguments are (T, N). ``next_value`` is the value of the state that follows within the same episode: after a
    time limit that of the final observation. Termination zeroes it; either end stops the sum. ``discount`` may differ
    from decision to decision, as those that last longer are discounted more.
    """
    result = torch.zeros_like(reward)
    following = torch.zeros_like(reward[0])
    delta = reward + discount * next_value * (1 - terminated) - value
    keep = discount * gae_lambda * (1 - terminated) * (1 - truncated)
    for t in range(len(reward) - 1, -1, -1):
        following = torch.addcmul(delta[t], keep[t], following, out=result[t])
    return result
