"""Stage 8: slows the robot down on its way to a configuration in which its tool can no longer move every way.

The measure is the condition number of the tool's Jacobian: how many times faster the joints must be for the tool's
worst direction than for its best. As in MoveIt Servo, a motion that raises it is scaled by a share that falls linearly
from 1 at one threshold to 0 at a second one; a motion that lowers it is left alone.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from hardware.safety.model import RobotModel
from robot_rl.core.errors import ConfigError

_SINGULAR = 1e-9
"""Smallest singular value below which the condition number counts as infinite."""


class Singularity:
    """Where the robot becomes singular; commands are joint positions."""

    def __init__(self, robot: RobotModel, slow: float = 17.0, stop: float = 30.0) -> None:
        """Set the thresholds; the defaults are those of MoveIt Servo.

        Args:
            robot: model with the tool.
            slow: condition number from which motions that raise it are slowed down.
            stop: condition number that no command, nor the stop after it, exceeds.

        Raises:
            ConfigError: the thresholds are not 1 <= slow < stop.
        """
        if not 1.0 <= slow < stop:
            raise ConfigError(f"singularity thresholds need 1 <= slow < stop, got {slow:g} and {stop:g}")
        self.robot, self.slow, self.stop = robot, slow, stop
        self._recent: deque[tuple[bytes, float]] = deque(maxlen=3)

    def condition(self, command: np.ndarray) -> float:
        """Return the largest over the smallest singular value of the tool's Jacobian at ``command`` (A,).

        Fewer than six joints span fewer directions: the smallest singular value is then that of what they span.
        """
        largest, smallest = self.robot.tool_gains(command)
        if not (math.isfinite(largest) and math.isfinite(smallest)):
            raise ValueError("the Jacobian holds a value that is not finite")
        return largest / smallest if smallest > _SINGULAR else math.inf

    def far_from(self, rest: np.ndarray) -> bool:
        """Return whether a stop that ends at ``rest`` (A,) leads through nothing that need be slowed down.

        On the short way there the number does not rise above the threshold and fall again.
        """
        return self.robot.surely_even(rest, self.slow) or self._recall(rest) <= self.slow

    def share(self, position: np.ndarray, command: np.ndarray) -> float:
        """Return which share of the motion from ``position`` (A,) to ``command`` (A,) is permitted, in [0, 1]."""
        there = self._recall(command)
        if there <= self.slow or there <= self._recall(position):
            return 1.0
        return max(0.0, (self.stop - there) / (self.stop - self.slow))

    def excess(self, commands: np.ndarray, permitted: float = 0.0) -> float:
        """Return by how much the worst condition number of a path of ``commands`` (T, A) exceeds ``stop``.

        The whole path is judged only where its beginning or its end is beyond ``slow``.
        """
        worst = max(self._recall(commands[0]), self._recall(commands[-1]))
        if worst > self.slow and worst <= self.stop + permitted:
            worst = max(worst, *(self.condition(one) for one in commands[1:-1]), -math.inf)
        return worst - self.stop

    def _recall(self, command: np.ndarray) -> float:
        """Return `condition`, computed once for a command that several questions are asked about."""
        asked = command.tobytes()
        for place, value in self._recent:
            if place == asked:
                return value
        value = self.condition(command)
        self._recent.append((asked, value))
        return value
