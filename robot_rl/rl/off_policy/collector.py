"""Collects transitions of decisions, each lane on its own clock: one per planned chunk, or one per control step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robot_rl.core.env import Observation, Step, VecEnv
from robot_rl.core.errors import CapabilityError
from robot_rl.core.spec import Spec
from robot_rl.data.frames import Frames
from robot_rl.data.replay import Replay
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.episodes import EpisodeStatistics
from robot_rl.rl.guard import Guard
from robot_rl.rl.off_policy.n_step import NStepRows
from robot_rl.rollout.player import History, PolicyRunner


class Behaviour(ABC):
    """What acts while learning; the chunk player calls `plan` for the lanes that are due, and reads off `record`."""

    spec: Spec
    obs_steps: int
    horizon: int
    execute_steps: int
    closed_loop = False
    every_step = False
    """Whether every control step is a decision, recorded by `refine`; otherwise a planned chunk is one."""
    n_steps = 1
    """Decisions that a stored row spans, at most: so many of them a sparse reward travels back per update."""
    extra_fields: Mapping[str, tuple[int, ...]] = {}
    """Shapes of what the method stores per decision besides `FIELDS`: ``name`` is read off the decision's own record,
    ``next_<name>`` off that of the decision that follows, or off `successor` where the episode ends."""
    record: dict[str, Tensor]
    """Rows of the latest decisions: ``state`` and ``action`` as the critic takes them, and what ``extra_fields`` names,
    each (b, …)."""

    @property
    def decision_steps(self) -> int:
        """Control steps that a decision takes."""
        return 1 if self.every_step else self.execute_steps

    @abstractmethod
    def plan(self, history: Observation) -> np.ndarray:
        """Return exploring chunks (b, H, A); set `record`, unless `every_step`."""

    def state(self, history: Observation) -> Tensor:
        """Return the critic's states (b, S) for a history (each (b, T, …)); `successor` asks for them by default."""
        raise NotImplementedError

    def action(self, chunks: np.ndarray) -> Tensor:
        """Return the critic's actions (b, D) for executed chunks (b, decision_steps, A) in the units of the spec.

        `demonstrated` asks for them by default.

        Raises:
            CapabilityError: the method's actions cannot be told from what was executed.
        """
        raise CapabilityError(f"{type(self).__name__} cannot tell its actions from what was executed")

    def successor(self, history: Observation, upcoming: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return what a decision's ``next_…`` fields hold where nothing is decided any more: ``state``, and more.

        Args:
            history: of the last observation, each (b, T, …).
            upcoming: (b, A) what the chunk under way would have gone on with; None without one.
        """
        return {"state": self.state(history)}

    def demonstrated(self, history: Observation, chunks: np.ndarray) -> dict[str, Tensor]:
        """Return the record (each (b, …)) of decisions that executed the given ``chunks`` (b, decision_steps, A).

        The rows are the frames of one episode, in order.
        """
        return self.successor(history) | {"action": self.action(chunks)}

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return ``actions`` unchanged."""
        return actions

    def seed(self, seed: int) -> None:
        """Refuse: what explores is seeded where it is made."""
        raise CapabilityError("a behaviour is seeded when it is made")


class PriorBehaviour(Behaviour):
    """Acts with a policy that is its own base until learning begins: also where it is evaluated or saved till then."""

    policy: Any
    """Its ``config.prior`` says that it is the base."""

    @property
    def learning(self) -> bool:
        """Whether what is learned acts."""
        return not self.policy.config.prior

    @learning.setter
    def learning(self, learning: bool) -> None:
        if learning != self.learning:
            self.policy.config = replace(self.policy.config, prior=not learning)


FIELDS = ("state", "action", "reward", "next_state", "terminated", "truncated", "exponent", "weight")
"""Fields of every stored decision."""
_NEXT = "next_"


class Collector:
    """Steps N lanes with a `Behaviour` and stores every finished decision in a replay."""

    def __init__(
        self,
        env: VecEnv,
        behaviour: Behaviour,
        config: DecisionConfig,
        seed: int,
        guard: Guard | None = None,
        discount: float | None = None,
    ) -> None:
        """Start episodes in all lanes; ``discount`` is the core's: `DecisionConfig.factor` and `NStepRows` say when."""
        self.env, self.behaviour, self.config = env, behaviour, config
        self.guard = guard or Guard()
        self.steps = 0
        """Control steps taken, over all lanes."""
        self.episodes = EpisodeStatistics(env.num_envs)
        self.first_seed = seed
        self._factor = config.factor(discount, behaviour.decision_steps)
        self._joined = NStepRows(env.num_envs, behaviour.n_steps, discount)
        self._runner = PolicyRunner(behaviour, env.num_envs)
        self._keys = tuple(behaviour.spec.observation)
        self._history = History(behaviour.obs_steps, self._keys)
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Start new episodes in every lane; decisions under way are dropped."""
        lanes = self.env.num_envs
        self._observation = self.env.reset(seed)
        self.guard.check_reset(self.steps, self._observation)
        self._fresh = np.ones(lanes, bool)
        self._runner.reset(self._fresh)
        self._open = np.zeros(lanes, bool)
        self._reward, self._length = np.zeros(lanes, np.float32), np.zeros(lanes, np.int64)
        self._rows: dict[str, Tensor] = {}
        self._joined.clear()

    def collect(self, replay: Replay, control_steps: int, source: str = "online") -> int:
        """Take ``control_steps`` in every lane; returns the number of decisions stored."""
        stored = 0
        for _ in range(control_steps):
            history = self._history.add(self._observation, self._fresh)
            actions = self._runner.step(self._observation)
            decided = np.ones_like(self._open) if self.behaviour.every_step else self._runner.planned
            if decided.any():
                stored += self._begin(replay, source, decided)
            step = self.env.step(actions)
            self.guard.check_step(self.steps, step, actions)
            self.steps += self.env.num_envs
            self.episodes.add(step)
            self._reward += self._factor**self._length * step.reward
            self._length += 1
            if step.done.any():
                stored += self._end(replay, source, step, history)
            self._fresh = step.done
            self._observation = step.observation
        return stored

    def _begin(self, replay: Replay, source: str, decided: np.ndarray) -> int:
        """Close the open decisions of the lanes that decided anew, and open the next ones."""
        record = self.behaviour.record
        own = _own(self.behaviour)
        if not self._rows:
            self._rows = {k: record[k].new_zeros(self.env.num_envs, *record[k].shape[1:]) for k in own}
        closing = decided & self._open
        stored = 0
        if closing.any():
            among = torch.from_numpy(closing[decided])
            stored = self._store(replay, source, closing, {k: v[among] for k, v in record.items()}, False, False)
        rows = torch.from_numpy(decided)
        for name in own:
            self._rows[name][rows] = record[name]
        self._open[decided] = True
        self._reward[decided], self._length[decided] = 0, 0
        return stored

    def _end(self, replay: Replay, source: str, step: Step, history: Observation) -> int:
        """Close the decisions of lanes whose episode ended, each with its own last observation."""
        done = step.done
        final = {
            key: np.concatenate([history[key][done, 1:], step.final_observation[key][done][:, None]], axis=1)
            for key in self._keys
        }
        ends = step.terminated[done], step.truncated[done]
        # Where a new plan would be due the old chunk's continuation stands for it: a plan would cost as much again.
        successor = self.behaviour.successor(final, self._runner.player.peek()[done, 0])
        stored = self._store(replay, source, done, successor, *ends)
        self._open[done] = False
        self._runner.reset(done)
        return stored

    def _store(
        self,
        replay: Replay,
        source: str,
        lanes: np.ndarray,
        successor: dict[str, Tensor],
        terminated: np.ndarray | bool,
        truncated: np.ndarray | bool,
    ) -> int:
        count = int(lanes.sum())
        rows = torch.from_numpy(lanes)
        length = self._length[lanes]
        values = {
            **{name: values[rows] for name, values in self._rows.items()},
            **_following(self.behaviour, successor),
            "reward": self._reward[lanes] - np.float32(self.config.penalty),
            "terminated": np.full(count, terminated),
            "truncated": np.full(count, truncated),
            "exponent": length if self.config.clock == "step" else np.ones(count, np.float32),
            "weight": np.ones(count, np.float32),
        }
        if self.behaviour.n_steps > 1:
            values = self._joined.push(rows.nonzero().flatten(), _tensors(values))
        count = len(values["weight"])
        if count:
            replay.add(source, values)
        return count


def _own(behaviour: Behaviour) -> tuple[str, ...]:
    """Name the fields that are read off a decision's own record."""
    return ("state", "action", *(name for name in behaviour.extra_fields if not name.startswith(_NEXT)))


def _following(behaviour: Behaviour, record: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the ``next_…`` fields of decisions that are followed by ``record``."""
    extra = [name for name in behaviour.extra_fields if name.startswith(_NEXT)]
    return {name: record[name.removeprefix(_NEXT)] for name in ("next_state", *extra)}


def _tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return rows as float32 tensors on the processor, where `NStepRows` joins them."""
    return {name: torch.as_tensor(column, dtype=torch.float32, device="cpu") for name, column in values.items()}


def make_replay(
    state_size: int,
    action_size: int,
    capacity: dict[str, int],
    seed: int,
    extra_fields: Mapping[str, tuple[int, ...]] | None = None,
    device: str | torch.device = "cpu",
) -> Replay:
    """Allocate a replay on ``device`` for decisions with the fields `FIELDS` and those that the method adds."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(FIELDS, ())
    shapes |= {"state": (state_size,), "action": (action_size,), "next_state": (state_size,)}
    shapes |= extra_fields or {}
    return Replay(shapes, capacity, seed, device)


def add_demonstrations(
    replay: Replay,
    frames: Frames,
    behaviour: Behaviour,
    config: DecisionConfig,
    source: str = "demonstrations",
    keep: np.ndarray | None = None,
    discount: float | None = None,
) -> int:
    """Store the decisions of ``frames``, one starting at every frame, or at those of ``keep`` (F,); returns how many.

    The core's ``discount`` is needed where rewards are discounted, or rows span several decisions.

    A demonstration without a ``reward`` extra earns 1 on its last frame, if its ``success`` extra does not deny it,
    and ends there by termination; one that did not succeed ends by truncation.
    """
    count, steps = 0, behaviour.decision_steps
    factor = config.factor(discount, steps) ** np.arange(steps)
    for episode in range(frames.num_episodes):
        part = frames.episode(episode)
        length = part.stop - part.start
        succeeded = bool(frames.extras["success"][part][-1]) if "success" in frames.extras else True
        reward = np.zeros(length, np.float32)
        reward[-1] = float(succeeded)
        if "reward" in frames.extras:
            reward = np.asarray(frames.extras["reward"][part], np.float32).reshape(length)
        start = np.arange(length)
        stop = np.minimum(start + steps, length)
        frame = np.minimum(start[:, None] + np.arange(steps), length - 1)
        inside = start[:, None] + np.arange(steps) < length
        record = behaviour.demonstrated(_windows(frames, part, behaviour), frames.action[part][frame])
        after = torch.from_numpy(np.minimum(stop, length - 1))
        ended = stop == length
        rows = {
            **{name: record[name] for name in _own(behaviour)},
            # The recording keeps no observation after its last action; where the task ended there none is needed.
            **_following(behaviour, {name: values[after] for name, values in record.items()}),
            "reward": ((reward[frame] * inside * factor).sum(1) - config.penalty).astype(np.float32),
            "terminated": ended & succeeded,
            "truncated": ended & (not succeeded),
            "exponent": stop - start if config.clock == "step" else np.ones(length, np.float32),
            "weight": np.ones(length, np.float32),
        }
        if behaviour.n_steps > 1:
            lane, joined = torch.zeros(1, dtype=torch.int64), NStepRows(1, behaviour.n_steps, discount)
            single = _tensors(rows)
            parts = [joined.push(lane, {name: column[t, None] for name, column in single.items()}) for t in start]
            rows = {name: torch.cat([part[name] for part in parts]) for name in single}  # again one row per frame
        if keep is not None:
            rows = {name: values[keep[part]] for name, values in rows.items()}
        kept = len(rows["weight"])
        if kept:
            replay.add(source, rows)
        count += kept
    return count


def _windows(frames: Frames, part: slice, behaviour: Behaviour) -> Observation:
    """Return the history (length, T, …) of every frame of an episode, its first frame repeated before the start."""
    length, steps = part.stop - part.start, behaviour.obs_steps
    index = np.maximum(np.arange(length)[:, None] + np.arange(1 - steps, 1), 0)
    return {key: frames.observation[key][part][index] for key in behaviour.spec.observation}
