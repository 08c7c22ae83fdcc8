"""A scripted, imperfect operator for simulated tasks: watches, takes over, corrects, hands back.

It stands where a person's device stands: `poll` returns motions and wishes, and all that follows (inbox, arbiter,
re-anchoring, safety chain) is what a person gets. It sees what a person sees, the scene and the console's status, and
does as HIL-SERL advises (arXiv 2410.21845): let the policy try, see to it that one episode in three succeeds, help
where it is stuck, and give back soon.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hardware.control.arbiter import Mode
from hardware.transport import ExecutorStatus
from robot_rl.core.bridge import EnvRobot
from robot_rl.core.errors import CapabilityError
from robot_rl.core.teleop import OperatorEvent, OperatorInput


@dataclass(frozen=True)
class OperatorHabits:
    """How a scripted operator works; times are in seconds."""

    corrects: bool = True
    """Take over; otherwise only enable the robot and reset what has stopped."""
    one_in: int = 3
    """Help so that at least one episode in this many succeeds, and leave the others to the policy; 1 helps in all."""
    noise: float = 0.3
    """Size of the operator's errors: habit, misjudgement and a drifting hand, as a share of those of the expert whose
    demonstrations are collected by default."""
    delay: float = 0.1
    """From seeing to moving."""
    grace: float = 1.0
    """Time that the policy is given, from the start or a hand-back, before it is judged."""
    patience: float = 1.0
    """Time without progress after which the policy counts as stuck."""
    least_gain: float = 0.03
    """Progress in this time below which it is stuck, in [0, 1]."""
    setback: float = 0.15
    """Loss of progress that shows that it heads the wrong way."""
    enough: float = 0.55
    """Progress made by the operator after which the policy gets another chance."""
    longest: float = 4.0
    """Longest time at the controls."""
    gain: float = 0.5
    """Share of the wanted motion that is asked for in one policy step; a person does not jump to the aim."""


class ScriptedOperator:
    """An operator for one simulated robot, by the task's own expert and measure of progress."""

    def __init__(
        self,
        robot: EnvRobot,
        status: Callable[[], ExecutorStatus | None],
        habits: OperatorHabits | None = None,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take a seat.

        Args:
            robot: simulated robot, whose task has an expert and says how far it has got.
            status: newest status of the executor, as a console shows it.
            habits: how the operator works.
            seed: seed of the operator's errors.
            clock: monotonic time in seconds.

        Raises:
            CapabilityError: the task lacks what it takes.
        """
        self.habits = habits or OperatorHabits()
        env: Any = getattr(robot, "env", None)
        if env is None or (self.habits.corrects and not (hasattr(env, "make_expert") and hasattr(env, "progress"))):
            raise CapabilityError("the scripted operator needs a simulated task with make_expert() and progress()")
        self._robot, self._env, self._status, self._now = robot, env, status, clock
        self._expert = env.make_expert(noise=self.habits.noise, seed=seed) if self.habits.corrects else None
        self._rate = float(robot.spec.rate_hz)
        self._size = robot.spec.action.size
        self._seen: deque[np.ndarray] = deque(maxlen=1 + self._steps(self.habits.delay))
        self._progress: deque[float] = deque(maxlen=1 + self._steps(self.habits.patience))
        self._motion = np.zeros(self._size)
        self._seq, self._next, self._epoch = 0, -np.inf, -1
        self._mode, self._since, self._gained_from = "", 0.0, 0.0
        self._asked = -np.inf
        self._helping = False
        self.takeovers = 0
        """Times that the operator took over."""

    def connect(self) -> None:
        """Nothing to open."""

    def disconnect(self) -> None:
        """Nothing to close."""

    def poll(self) -> OperatorInput:
        """Return the operator's motion and wishes; eyes and hands work at the policy's rate."""
        now = self._now()
        events: tuple[OperatorEvent, ...] = ()
        if now >= self._next - 1e-9:
            self._next = now + 1.0 / self._rate
            events = self._decide(now)
        self._seq += 1
        driving = self._mode == Mode.HUMAN.value
        return OperatorInput(now, self._seq, driving, self._motion.copy(), events, "scripted")

    def _decide(self, now: float) -> tuple[OperatorEvent, ...]:
        status = self._status()
        mode = "" if status is None else status.mode
        if mode != self._mode:
            self._mode, self._since = mode, now
        if self._epoch != self._robot.epoch:
            self._epoch, self._since = self._robot.epoch, now
            lately = self._robot.outcomes[1 - self.habits.one_in :] if self.habits.one_in > 1 else []
            self._helping = self.habits.corrects and not any(lately)
            self._progress.clear()
            self._seen.clear()
        self._motion = np.zeros(self._size)
        waited = now - self._since
        if self._expert is not None:
            self._look()
        if mode == Mode.HUMAN.value:
            return self._drive(status, waited)
        if mode in (Mode.AUTO.value, Mode.ALIGN.value):
            return self._watch(waited)
        return self._attend(mode, status, waited, now)

    def _look(self) -> None:
        """See the scene: what the expert would do now, and how far things have got."""
        assert self._expert is not None
        wanted, progress = self._robot.inspect(lambda: (self._expert.act(), self._env.progress()))  # type: ignore[union-attr]
        self._seen.append(wanted[self._robot.lane])
        self._progress.append(float(progress[self._robot.lane]))

    def _watch(self, waited: float) -> tuple[OperatorEvent, ...]:
        """Judge the policy at work."""
        habits = self.habits
        if not self._helping or waited < habits.grace or len(self._progress) < (self._progress.maxlen or 0):
            return ()
        stuck = self._progress[-1] - self._progress[0] < habits.least_gain
        astray = max(self._progress) - self._progress[-1] > habits.setback
        if not (stuck or astray):
            return ()
        self._gained_from = self._progress[-1]
        self.takeovers += 1
        return (OperatorEvent.TAKE_OVER,)

    def _drive(self, status: ExecutorStatus | None, waited: float) -> tuple[OperatorEvent, ...]:
        """Move towards what the expert wanted a moment ago, or give back."""
        habits = self.habits
        helped = bool(self._progress) and self._progress[-1] - self._gained_from >= habits.enough
        fresh = len(self._progress) < 3  # a new scene: what was wrong is gone
        if helped or fresh or waited >= habits.longest:
            return (OperatorEvent.HAND_BACK,)
        if status is None or not self._seen or not status.speed:
            return ()
        speed = np.maximum(np.array(status.speed), 1e-9)
        missing = self._seen[0] - np.array(status.command)
        self._motion = np.clip(habits.gain * missing * self._rate / speed, -1.0, 1.0)
        return ()

    def _attend(self, mode: str, status: ExecutorStatus | None, waited: float, now: float) -> tuple[OperatorEvent, ...]:
        """Get a robot going that waits for somebody."""
        if status is None or waited < 0.5 or now - self._asked < 0.5:
            return ()
        self._asked = now
        wish = {Mode.STOPPED.value: OperatorEvent.RESET, Mode.IDLE.value: OperatorEvent.ENABLE}
        return (wish.get(mode, OperatorEvent.HAND_BACK),)

    def _steps(self, seconds: float) -> int:
        return max(1, round(seconds * self._rate))
