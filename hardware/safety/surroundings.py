"""Stages 7, 8 and 9 at work: the largest part of a motion after which the robot can still stop where it may be."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hardware.safety.flags import SafetyFlag
from hardware.safety.motion import MotionLimiter
from hardware.safety.speed import PointSpeed
from hardware.safety.workspace import Workspace
from robot_rl.core.errors import ConfigError

if TYPE_CHECKING:
    from hardware.safety.clearance import Clearance
    from hardware.safety.singularity import Singularity


class Space(Protocol):
    """Where the robot may be."""

    def excess(self, commands: np.ndarray, permitted: float = 0.0) -> float:
        """Return by how much the worst of ``commands`` (T, A) is outside; not positive if all are inside.

        It may end with the first that is outside by more than ``permitted``.
        """


@dataclass(frozen=True)
class Guards:
    """What the chain is told about the robot and what is around it; each is left out where it is None."""

    speed: PointSpeed | None = None
    """How fast tool and elbows may move."""
    workspace: Workspace | None = None
    """Where the tool may be."""
    singularity: Singularity | None = None
    """Where the robot can no longer move every way, where the command is the joints' positions."""
    clearance: Clearance | None = None
    """What must stay apart, where the command is the joints' positions."""


class Surroundings:
    """Keeps what ``motion`` permits slow, inside the workspace, off singularities, and apart from obstacles."""

    def __init__(self, motion: MotionLimiter, guards: Guards) -> None:
        """Join them; raises `ConfigError` if a stop takes longer than can be looked ahead every tick."""
        watched = any(getattr(guards, one.name) is not None for one in fields(guards))
        if watched and motion.braking_ticks > motion.most_ticks:
            raise ConfigError(
                f"a stop from the velocity limit takes {motion.braking_ticks} ticks of {motion.dt:g} s, and what keeps "
                f"the robot off its surroundings looks {motion.most_ticks} ahead: lower the velocity limit or the tick "
                "rate, or raise the limits of acceleration and jerk"
            )
        self._motion, self._guards = motion, guards
        self._outside: dict[int, float] = {}

    def limit(self, command: np.ndarray) -> tuple[np.ndarray, int]:
        """Return what is permitted of the next ``command`` (A,), and the flags of what limited it.

        What a stage leaves is judged by those before it once more, so that none undoes another's work.
        """
        guards, position = self._guards, self._motion.position
        self._outside.clear()
        flags, judged = 0, tuple[Space, ...]()
        if guards.speed is not None:
            guards.speed.start, judged = position, (guards.speed,)
            share = guards.speed.share(position, command)
            command, limited = self._keep_inside(command, judged, SafetyFlag.SPEED_LIMITED, share)
            flags |= limited
        if guards.workspace is not None:
            judged = (guards.workspace, *judged)
            command, limited = self._keep_inside(command, judged, SafetyFlag.WORKSPACE_LIMITED)
            flags |= limited
        if guards.singularity is not None:
            judged = (guards.singularity, *judged)
            if not guards.singularity.far_from(self._motion.rest_after(command)):
                share = guards.singularity.share(position, command)
                command, limited = self._keep_inside(command, judged, SafetyFlag.SINGULARITY_LIMITED, share)
                flags |= limited
        if guards.clearance is not None:
            command, limited = self._keep_apart(command, guards.clearance, judged)
            flags |= limited
        return command, flags

    def _keep_inside(
        self, command: np.ndarray, spaces: tuple[Space, ...], flag: int, share: float = 1.0
    ) -> tuple[np.ndarray, int]:
        """Return ``command`` (A,) if the robot can stop inside the ``spaces`` after it, else the largest part of it.

        At most ``share`` of it, as far as the motion's limits permit that.
        """
        if share >= 1.0 and self._stays_inside(command, spaces):
            return command, 0
        return self._largest_part(command, spaces, share), flag

    def _largest_part(self, command: np.ndarray, spaces: tuple[Space, ...], share: float = 1.0) -> np.ndarray:
        """Return the largest part of the motion, in quarters, after which the robot can still stop inside.

        Full braking is always permitted: it is the rest of a braking path that was checked one tick ago.
        """
        motion = self._motion
        if share < 1.0:
            low, high = motion.window()
            step = np.minimum(np.maximum(share * (command - motion.position), low), high)
            slower = motion.bounded(motion.position + step)
            if motion.permits(slower) and self._stays_inside(slower, spaces):
                return slower
        braking = motion.brake()
        found, part = braking, 0.5
        for change in (0.25, 0.0):  # half of it, and then three quarters or one
            partly = braking + share * part * (command - braking)
            permitted = motion.permits(partly) and self._stays_inside(partly, spaces)
            if permitted:
                found = partly
            part += change if permitted else -change
        return found

    def _keep_apart(
        self, command: np.ndarray, clearance: Clearance, judged: tuple[Space, ...]
    ) -> tuple[np.ndarray, int]:
        """Stage 9: the motion itself, one that slides along what is near, or the largest part after which it can stop.

        All of them are judged alike, together with what was ``judged`` before, so that none need be trusted.
        """
        if self._stays_inside(command, (clearance,)):
            return command, 0
        motion = self._motion
        spaces: tuple[Space, ...] = (clearance, *judged)
        low, high = motion.window()
        aside = clearance.slide(motion.position, command - motion.position, low, high, motion.largest_change)
        if aside is not None:
            aside = motion.bounded(motion.position + aside)
            if motion.permits(aside) and self._stays_inside(aside, spaces):
                return aside, SafetyFlag.CLEARANCE_LIMITED
        return self._largest_part(command, spaces), SafetyFlag.CLEARANCE_LIMITED

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
