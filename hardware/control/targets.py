"""What whoever may write wants the robot to do next."""

from __future__ import annotations

import numpy as np

from hardware.control.arbiter import DRIVEN, Arbiter, Mode
from hardware.control.operator import OperatorInbox
from hardware.control.playback import Playback
from hardware.control.settings import ExecutorConfig, rate_elements
from hardware.safety.arithmetic import braking_step
from hardware.safety.chain import SafetyChain
from hardware.safety.flags import SafetyFlag
from robot_rl.core.robot import Robot


class Targets:
    """Turns the policy's plan or the operator's wish into the command wanted at a tick; the safety chain is next."""

    def __init__(
        self,
        robot: Robot,
        config: ExecutorConfig,
        arbiter: Arbiter,
        playback: Playback,
        operator: OperatorInbox,
        safety: SafetyChain,
    ) -> None:
        self.anchor = np.zeros(robot.spec.action.size)
        """(A,) the command from which the policy is blended in."""
        self.human: np.ndarray | None = None
        """(A,) what the operator wanted at the last tick; None where the operator did not drive."""
        self.resting = rate_elements(robot)
        """(A,) bool: elements that are rates and rest at zero."""
        self._arbiter, self._playback, self._operator, self._safety = arbiter, playback, operator, safety
        self._dt, self._timeout = safety.dt, config.operator_timeout
        self.speed = np.where(self.resting, 0.0, config.human_speed * np.asarray(robot.limits.velocity, float))
        """(A,) speed of a full operator deflection, in the action's units per second; zero for rates."""
        self._rate = config.human_speed * np.maximum(np.abs(robot.limits.low), np.abs(robot.limits.high))

    def begin_blend(self) -> None:
        """Blend from the last command, or from zero where the command is a rate."""
        self.anchor = np.where(self.resting, 0.0, self._safety.command)

    def wanted(self, now: float, phase: int, last: np.ndarray) -> tuple[np.ndarray | None, float, int]:
        """Return the command (A,) wanted by the writer after ``last``, its stamp, and a flag if the policy has none."""
        self.human = None
        if self._arbiter.mode is Mode.HUMAN:
            self.human = self._driven()
            reading = self._operator.reading
            return self.human, -np.inf if reading is None else reading.stamp, 0
        if self._arbiter.mode not in DRIVEN:
            return None, now, 0
        wanted = self._playback.target(phase, last)
        if wanted is None:
            return None, now, SafetyFlag.POLICY_STARVED
        share = self._arbiter.blend(now + self._dt)
        if share < 1.0:
            wanted = self.anchor + share * (wanted - self.anchor)
        return wanted, self._playback.stamp, 0

    def _driven(self) -> np.ndarray:
        """Return the operator's command (A,): the last one, moved within the acceleration limit.

        It moves at the wished speed, or towards the command that the operator shows as fast as it can stop there: a
        leader arm that stands elsewhere at the takeover draws the robot to itself, and does not throw it.
        """
        motion = self._operator.motion(self._timeout)
        shown = self._operator.target(self._timeout)
        step, change = self._safety.step, self._safety.largest_change
        wish = motion * self.speed * self._dt
        if shown is not None:
            way = shown - self._safety.command
            wish = np.sign(way) * np.minimum(braking_step(np.abs(way), change), self.speed * self._dt)
        wish = np.minimum(np.maximum(wish, step - change), step + change)
        return np.where(self.resting, motion * self._rate, self._safety.command + wish)
