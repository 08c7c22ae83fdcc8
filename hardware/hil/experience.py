"""Turns what the executor executed into episodes to learn from.

It hangs where the recorder hangs, at the end of every policy step, so that what is learned from is what was executed:
through the arbiter, the chunk player and the safety chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hardware.control.arbiter import Mode
from hardware.recording.recorder import ACTOR_CODES, ExecutedStep, Recorder
from robot_rl.core.spec import Spec

_IDLE_SECONDS = 1.0
"""Seconds for which nobody may write before the steps around are no longer consecutive."""


@dataclass
class Episode:
    """Steps of one episode, ready for a learner."""

    arrays: dict[str, np.ndarray]
    """``observation.<key>`` (F, …), ``action`` (F, A), ``actor`` (F,) int8, ``success`` (F,) bool, ``keep`` (F,) bool
    (whether it is known what follows) and ``ends`` (S,) int64, the ends of its stretches of consecutive steps."""
    success: bool
    """Verdict of the task, the operator or the classifier."""
    takeovers: int
    """Times that the operator took over."""

    @property
    def steps(self) -> int:
        """Number F of steps."""
        return len(self.arrays["actor"])

    @property
    def human_steps(self) -> int:
        """Steps in which the operator drove."""
        return int((self.arrays["actor"] == ACTOR_CODES["human"]).sum())


class Experience:
    """Collects executed steps and delivers whole episodes.

    The stored action is the operator's executed command where the operator drove, and the executed command wherever
    the policy did not drive alone (ALIGN, HOLD). Where it did, it is the policy's own action: what the safety chain
    makes of an action belongs to the world that the policy learns to act in.
    """

    def __init__(
        self, spec: Spec, deliver: Callable[[Episode], None], paused: Callable[[], bool] = lambda: False
    ) -> None:
        """Deliver episodes of a robot with ``spec``; steps while ``paused`` are passed over."""
        self._spec, self._deliver, self._paused = spec, deliver, paused
        self._period = 1.0 / spec.rate_hz
        self._idle_limit = max(1, round(_IDLE_SECONDS * spec.rate_hz))
        self._steps: list[ExecutedStep] = []
        self._ends: list[int] = []
        self._waiting: list[ExecutedStep] = []
        self._idle = 0

    def add(self, step: ExecutedStep) -> None:
        """Take in one executed step."""
        if self._paused():
            self._cut()
            return
        # Images would fill the memory, and nothing here looks at them.
        step = replace(step, observation={key: step.observation[key] for key in self._spec.observation})
        last = (self._waiting or self._steps or [None])[-1]
        if last is not None and abs(step.stamp - last.stamp - self._period) > 0.5 * self._period:
            self._cut()  # the operator pressed stop, or steps were lost
        if step.writer == "none":
            # Holding for a moment belongs to the episode, waiting for somebody does not.
            self._idle += 1
            if self._idle <= self._idle_limit:
                self._waiting.append(step)
            else:
                self._cut()
            return
        self._idle = 0
        self._steps += [*self._waiting, step]
        self._waiting.clear()

    def end_episode(self, success: bool | None) -> None:
        """Deliver what was added since the last episode; ``success`` None counts as none."""
        self._cut()
        steps, ends = self._steps, self._ends
        self._steps, self._ends = [], []
        if steps:
            self._deliver(self._pack(steps, ends, bool(success)))

    def discard(self) -> None:
        """Forget what was added since the last episode."""
        self._steps, self._ends, self._waiting = [], [], []

    def _cut(self) -> None:
        """End the present stretch of consecutive steps."""
        self._waiting.clear()
        if self._steps and (not self._ends or self._ends[-1] < len(self._steps)):
            self._ends.append(len(self._steps))

    def _pack(self, steps: list[ExecutedStep], ends: list[int], success: bool) -> Episode:
        actor = np.array([ACTOR_CODES[step.writer] for step in steps], np.int8)
        keep, succeeded = np.ones(len(steps), bool), np.zeros(len(steps), bool)
        keep[np.array(ends) - 1] = False
        if success:
            # What follows the last step of a success needs no value. A mark that comes late marks the last step too.
            keep[-1] = succeeded[-1] = True
        arrays = {
            f"observation.{key}": np.stack([step.observation[key] for step in steps]) for key in self._spec.observation
        }
        arrays |= {
            "action": np.stack([_stored(step) for step in steps]).astype(np.float32),
            "actor": actor,
            "success": succeeded,
            "keep": keep,
            "ends": np.array(ends, np.int64),
        }
        human = actor == ACTOR_CODES["human"]
        return Episode(arrays, success, int(human[0]) + int((human[1:] & ~human[:-1]).sum()))


def _stored(step: ExecutedStep) -> np.ndarray:
    """Return the action (A,) of a step as a learner sees it."""
    alone = step.mode is Mode.AUTO and step.writer == "policy"
    return step.policy_action if alone else step.action


class Sinks:
    """Where executed steps go: to be learned from, and to the recording if there is one."""

    def __init__(self, experience: Experience, recorder: Recorder | None) -> None:
        self._experience, self._recorder = experience, recorder

    def add(self, step: ExecutedStep) -> None:
        """Take in one executed step."""
        self._experience.add(step)
        if self._recorder is not None:
            self._recorder.add(step)

    def end_episode(self, success: bool | None = None) -> None:
        """End the episode with a verdict."""
        self._experience.end_episode(success)
        if self._recorder is not None:
            self._recorder.end_episode(success)

    def discard(self) -> None:
        """Forget the present episode: neither learned from nor recorded."""
        self._experience.discard()
        if self._recorder is not None:
            self._recorder.discard()

    def start(self) -> None:
        """Record again."""
        if self._recorder is not None:
            self._recorder.start()

    def pause(self) -> None:
        """Record no more; learning goes on."""
        if self._recorder is not None:
            self._recorder.pause()

    def status(self) -> dict[str, Any]:
        """Return the recording's status."""
        return {} if self._recorder is None else self._recorder.status()
