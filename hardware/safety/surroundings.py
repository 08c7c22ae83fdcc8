"""Stages 7 and 9 at work: the largest part of a motion after which the robot can still stop where it may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from hardware.safety.flags import SafetyFlag
from hardware.safety.motion import MotionLimiter
from hardware.safety.workspace import Workspace

if TYPE_CHECKING:
    from hardware.safety.clearance import Clearance


class Space(Protocol):
    """Where the robot may be."""

    def excess(self, commands: np.ndarray, permitted: float = 0.0) -> float:
        """Return by how many metres the worst of ``commands`` (T, A) is outside; not positive if all are inside.

        It may end with the first that is outside by more than ``permitted``.
        """


class Surroundings:
    """Keeps what ``motion`` permits inside the workspace, and apart from itself and obstacles."""

    def __init__(self, motion: MotionLimiter, workspace: Workspace | None, clearance: Clearance | None) -> None:
        self._motion, self._workspace, self._clearance = motion, workspace, clearance
        self._outside: dict[int, float] = {}

    def limit(self, command: np.ndarray) -> tuple[np.ndarray, int]:
        """Return what is permitted of the next ``command`` (A,), and the flags of what limited it."""
        self._outside.clear()
        flags = 0
        if self._workspace is not None:
            command, outside = self._keep_inside(command, (self._workspace,), SafetyFlag.WORKSPACE_LIMITED)
            flags |= outside
        if self._clearance is not None:
            command, outside = self._keep_apart(command, self._clearance)
            flags |= outside
        return command, flags

    def _keep_inside(self, command: np.ndarray, spaces: tuple[Space, ...], flag: int) -> tuple[np.ndarray, int]:
        """Stage 7: the largest part of the motion after which the robot can still stop inside the ``spaces``.

        Full braking is always permitted: it is the rest of a braking path that was checked one tick ago.
        """
        if self._stays_inside(command, spaces):
            return command, 0
        braking = self._motion.brake()
        for share in (0.75, 0.5, 0.25):
            partly = braking + share * (command - braking)
            if self._stays_inside(partly, spaces):
                return partly, flag
        return braking, flag

    def _keep_apart(self, command: np.ndarray, clearance: Clearance) -> tuple[np.ndarray, int]:
        """Stage 9: the motion itself, one that slides along what is near, or the largest part after which it can stop.

        All of them are judged alike, together with the workspace, so that what is proposed need not be trusted.
        """
        spaces: tuple[Space, ...] = (clearance,) if self._workspace is None else (clearance, self._workspace)
        if self._stays_inside(command, (clearance,)):
            return command, 0
        motion = self._motion
        low, high = motion.window()
        aside = clearance.slide(motion.position, command - motion.position, low, high, motion.largest_change)
        if aside is not None:
            aside = motion.bounded(motion.position + aside)
            if not motion.violations(aside) and self._stays_inside(aside, spaces):
                return aside, SafetyFlag.CLEARANCE_LIMITED
        return self._keep_inside(command, spaces, SafetyFlag.CLEARANCE_LIMITED)

    def _stays_inside(self, command: np.ndarray, spaces: tuple[Space, ...]) -> bool:
        """Return whether the robot can go to ``command`` (A,) and stop, nowhere farther outside than it is now."""
        path = self._motion.braking_path(command)
        for space in spaces:
            if space.excess(path) > 0.0:
                permitted = self._outside.get(id(space))
                if permitted is None:
                    permitted = self._outside[id(space)] = space.excess(self._motion.position[None])
                if permitted <= 0.0 or space.excess(path, permitted) > permitted:
                    return False
        return True
