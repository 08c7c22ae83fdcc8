"""The safety chain: the last thing between any command and the robot, on by default.

Stages run in this order, and each names and counts what it did (`SafetyFlag`): 1 finite, shape, dtype; 2 ages of the
command, the state, each camera and the operator; 3 the arbiter's writer; 4 the emergency stop; 5 position range with
braking distance; 6 velocity, acceleration, jerk and tracking error; 7 workspace and the speed of points; 8 singular
configurations; 9 distances of the robot to itself and to obstacles; 10 forces; 11 post-check. Whatever is wrong, the
answer is the same: brake within the limits of acceleration and jerk, then hold. An exception in any stage is such an
answer too.

A command may be replaced within its tick (`SafetyChain.replace`). Why that keeps the limits: they bound the sequence of
*effective* commands, one per tick, the last one sent in it. The replacement is filtered by all stages from the state
that held before the tick's command, so it could have been that command; the next tick starts from it, so the replaced
one leaves no trace. Both commands being possible successors of the same state, they differ by at most ``2 A dt^2`` per
element, and both keep the position range, the workspace and the braking distance: for a robot that follows its newest
command this is a detour within one tick's reach, never a motion out of bounds. If the robot misses the replacement, it
is where the replaced command led, one such difference from what the chain believes; a missed command of a tick leaves
more (``V dt``). What would brake or stop replaces nothing: the next tick answers it, as always. Only an emergency stop
does not wait for that (`SafetyChain.stop`): the brake is a permitted successor of the state before the tick, too.

This is software on a general-purpose computer and no certified safety function.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from hardware.safety.arithmetic import lags
from hardware.safety.flags import MOTION_LIMITS, SafetyFlag, flag_names
from hardware.safety.forces import ForceMonitor
from hardware.safety.jerk import JerkLimiter
from hardware.safety.motion import MotionLimiter, MotionState
from hardware.safety.surroundings import Guards, Surroundings
from hardware.safety.workspace import Workspace
from robot_rl.core.errors import HardwareError
from robot_rl.core.robot import Limits, StampedObservation

logger = logging.getLogger(__name__)
_LIMITERS = frozenset(flag_names(MOTION_LIMITS))
_AHEAD = 0.02
"""Seconds by which a stamp may lie in the future before its clock counts as broken."""
_FEW = 20
"""Numbers that are quicker asked one by one than by numpy."""
_ROUNDING = 1e-9
"""Metres outside the workspace that count as rounding."""


@dataclass(frozen=True)
class SafetyConfig:
    """What the safety chain tolerates."""

    max_command_age: float = 1.0
    """Largest age in seconds of the observation that the policy's present command was planned from."""
    max_state_age: float = 0.1
    """Largest age of the robot's measurement in seconds."""
    max_camera_age: float = 0.25
    """Largest age of any camera's image in seconds."""
    max_operator_age: float = 0.25
    """Largest time without a sign of life from the operator who drives, in seconds."""
    tracking_seconds: float = 0.5
    """The robot may lag behind its command by what the velocity limit covers in this time; 0 switches the check off."""
    tracking_ticks: int = 5
    """Consecutive ticks of too large a lag that count as a tracking error."""


@dataclass
class Situation:
    """What the chain judges besides the command itself."""

    now: float
    """Monotonic time in seconds."""
    observation: StampedObservation
    """The robot's newest measurement."""
    writer: str = "none"
    """Who wrote the command: ``policy``, ``human`` or ``none``."""
    command_stamp: float = 0.0
    """When the observation behind the command was made (policy), or the operator's last sign of life (human)."""
    estop: bool = False
    """Whether an emergency stop is latched."""
    measured: np.ndarray | None = None
    """(A,) where the robot is, in the units of the command; None where the command is not a position."""


@dataclass
class Verdict:
    """What leaves the chain."""

    command: np.ndarray
    """(A,) to send: finite and inside every limit."""
    flags: int = 0
    """`SafetyFlag` bits of what intervened."""


@dataclass
class SafetyChain:
    """Filters one command per tick of ``dt`` seconds; remembers the last one."""

    limits: Limits
    """What a command may be."""
    dt: float
    """Tick in seconds."""
    config: SafetyConfig = field(default_factory=SafetyConfig)
    """Tolerances."""
    guards: Guards = field(default_factory=Guards)
    """What stages 7 to 9 know of the robot and its surroundings."""
    resting: np.ndarray | None = None
    """(A,) bool: elements that are rates (a base's speed) and rest at zero."""
    forces: ForceMonitor | None = None
    """Limits of measured forces, torques and currents."""

    def __post_init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """Ticks on which each intervention happened, by name."""
        limiter = MotionLimiter if self.limits.jerk is None else JerkLimiter
        self._motion = limiter(_inside(self.limits, self.guards.workspace), self.dt, self.resting)
        self._surroundings = Surroundings(self._motion, self.guards)
        allowed = np.asarray(self.limits.velocity, float) * self.config.tracking_seconds
        self._lag_allowed = np.where(self._motion.resting, -1.0, allowed)  # rates are not followed
        self._lagging = 0
        self._before: tuple[MotionState, int] | None = None
        self._origin: MotionState | None = None
        self._flags = 0
        self._logged: dict[str, float] = {}

    @property
    def command(self) -> np.ndarray:
        """(A,) the last command that left the chain."""
        return self._motion.position

    @property
    def previous(self) -> np.ndarray:
        """(A,) the command before the last one: what a replacement follows."""
        before: np.ndarray = self._motion.position if self._before is None else self._before[0].position
        return before

    @property
    def moving(self) -> bool:
        """Whether the commanded motion has not yet come to rest."""
        return self._motion.moving

    @property
    def step(self) -> np.ndarray:
        """(A,) displacement from the command before to the last one."""
        return self._motion.step

    @property
    def largest_change(self) -> np.ndarray:
        """(A,) by how much `step` may change per tick."""
        return self._motion.largest_change

    def anchor(self, command: np.ndarray) -> None:
        """Start from ``command`` (A,) at rest, on connecting or after a reset of the scene.

        Raises:
            HardwareError: it is not (A,) finite numbers: nothing that follows it could be checked.
        """
        command = np.asarray(command, float)
        if command.shape != self.command.shape or not _finite(command):
            raise HardwareError(f"the robot does not say where it is: {command.tolist()}")
        self._motion.anchor(command)
        self._lagging = 0
        self._before = self._origin = None

    def filter(self, target: np.ndarray | None, situation: Situation) -> Verdict:
        """Return what may be sent instead of ``target`` (A,); None asks for a stop and a hold."""
        flags = 0
        self._origin = self._motion.save()
        self._before = (self._origin, self._lagging)
        try:
            flags = self._forces(situation)
            command, flags = self._decide(target, situation, flags)
        except Exception:
            logger.exception("safety chain: exception; the robot brakes")
            command, flags = self._last_resort(), flags | SafetyFlag.EXCEPTION
        self._motion.commit(command)
        self._flags = int(flags)
        if flags:
            self.note(flags, situation.now)
        return Verdict(command, int(flags))

    def replace(self, target: np.ndarray, situation: Situation) -> Verdict | None:
        """Filter ``target`` (A,) as if it had been given to the last `filter`, whose command it replaces.

        Returns:
            What may be sent in place of this tick's command, or None, with nothing changed, where that must stay: it is
            the answer to a fault, it has been replaced already, ``target`` would be braked, or nothing was filtered
            since `anchor`. The module's docstring says why a replacement is safe.
        """
        if self._before is None or self._flags & ~MOTION_LIMITS:
            return None
        motion, after = self._motion, (self._motion.save(), self._lagging)
        before, self._lagging = self._before
        motion.restore(before)
        try:
            command, flags = self._decide(target, situation)
        except Exception:
            logger.exception("safety chain: exception; the tick's command stays")
            flags = SafetyFlag.EXCEPTION
        if flags & ~MOTION_LIMITS:
            motion.restore(after[0])
            self._lagging = after[1]
            return None
        motion.commit(command)
        self._before = None
        if flags & ~self._flags:
            self.note(flags & ~self._flags, situation.now)  # the others of this tick are counted already
        return Verdict(command, int(flags))

    def stop(self, now: float) -> Verdict:
        """Brake at once: replace the command of the present tick, or the one that replaced it, by a brake.

        It is the brake that would have followed the state before the tick; with nothing filtered since `anchor`, the
        command stays.
        """
        motion = self._motion
        if self._origin is not None:
            after = motion.save()
            motion.restore(self._origin)
            command = self._last_resort()
            if motion.violations(command):
                motion.restore(after)
            else:
                motion.commit(command)
        self._before = self._origin = None
        self._flags |= SafetyFlag.EMERGENCY_STOP
        self.note(SafetyFlag.EMERGENCY_STOP, now)
        return Verdict(motion.position, SafetyFlag.EMERGENCY_STOP)

    def note(self, flags: int, now: float) -> None:
        """Count ``flags``, and name each in the log at most once per second."""
        for name in flag_names(flags):
            self.counts[name] += 1
            if now - self._logged.get(name, -np.inf) >= 1.0:
                self._logged[name] = now
                level = logging.INFO if name in _LIMITERS else logging.WARNING
                logger.log(level, "safety: %s (%d so far)", name, self.counts[name])

    def _decide(self, target: np.ndarray | None, situation: Situation, flags: int = 0) -> tuple[np.ndarray, int]:
        motion = self._motion
        flags |= self._ages(situation) | self._tracking(situation)
        if situation.estop:
            flags |= SafetyFlag.EMERGENCY_STOP
        if target is not None:
            flags |= self._well_formed(target)
            if situation.writer == "none":
                flags |= SafetyFlag.NO_WRITER
        if target is None or flags:
            command = motion.brake()
        else:
            command, flags = motion.limit(np.asarray(target, np.float64))
            command, outside = self._surroundings.limit(command)
            flags |= outside
        broken = motion.violations(command) | self._leaves_workspace(command)
        if broken:
            flags |= SafetyFlag.POST_CHECK_FAILED
            logger.error("safety post-check: %s", ", ".join(flag_names(broken)))
            command = self._last_resort()
        return command, flags

    def _well_formed(self, target: np.ndarray) -> int:
        """Stage 1."""
        if not isinstance(target, np.ndarray) or target.dtype.kind not in "fiu" or target.shape != self.command.shape:
            return SafetyFlag.ACTION_MALFORMED
        return 0 if _finite(target) else SafetyFlag.ACTION_NOT_FINITE

    def _ages(self, situation: Situation) -> int:
        """Stage 2. A stamp ahead of our clock is as useless as an old one."""
        config, now, observation = self.config, situation.now, situation.observation
        flags = 0
        if not -_AHEAD <= now - observation.stamp <= config.max_state_age:
            flags |= SafetyFlag.STATE_STALE
        for value in observation.values.values():
            if value.dtype.kind == "f" and not _finite(value):
                flags |= SafetyFlag.OBSERVATION_NOT_FINITE
        for stamp in observation.stamps.values():
            if not -_AHEAD <= now - stamp <= config.max_camera_age:
                flags |= SafetyFlag.CAMERA_STALE
        age = now - situation.command_stamp
        if situation.writer == "policy" and not -_AHEAD <= age <= config.max_command_age:
            flags |= SafetyFlag.COMMAND_STALE
        if situation.writer == "human" and not -_AHEAD <= age <= config.max_operator_age:
            flags |= SafetyFlag.OPERATOR_LOST
        return flags

    def _tracking(self, situation: Situation) -> int:
        """Stage 6, second half: the measured state against the last command."""
        if situation.measured is None or self.config.tracking_seconds <= 0:
            return 0
        measured = np.asarray(situation.measured, np.float64)
        if measured.shape != self.command.shape:
            raise ValueError(
                f"the robot is measured at {measured.shape} elements, and commanded at {self.command.shape}"
            )
        lagging = lags(self.command, measured, self._lag_allowed)
        self._lagging = self._lagging + 1 if lagging else 0
        return SafetyFlag.TRACKING_ERROR if self._lagging >= self.config.tracking_ticks else 0

    def _forces(self, situation: Situation) -> int:
        """Stage 10. It comes first, once per tick, because its answer is a stop."""
        if self.forces is None or not self.forces.exceeded(situation.observation.values):
            return 0
        return SafetyFlag.FORCE_EXCEEDED

    def _leaves_workspace(self, command: np.ndarray) -> int:
        """Stage 11, for stage 7: return its flag if ``command`` (A,) is outside, and farther than the last command.

        Full braking is permitted wherever it leads: nothing stops sooner.
        """
        workspace = self.guards.workspace
        if workspace is None or (excess := workspace.excess(command[None])) <= _ROUNDING:
            return 0
        if excess <= workspace.excess(self.command[None]) + _ROUNDING or np.array_equal(command, self._motion.brake()):
            return 0
        return SafetyFlag.WORKSPACE_LIMITED

    def _last_resort(self) -> np.ndarray:
        """Brake if that keeps the limits, else repeat the last command."""
        try:
            command = self._motion.brake()
            if np.isfinite(command).all() and not self._motion.violations(command):
                return command
        except Exception:
            logger.exception("safety chain: braking failed too; the last command is repeated")
        return self._motion.position


def _finite(values: np.ndarray) -> bool:
    """Return whether all ``values`` are finite."""
    if values.size <= _FEW:
        return all(map(math.isfinite, values.ravel().tolist()))
    return np.count_nonzero(np.isfinite(values)) == values.size


def _inside(limits: Limits, workspace: Workspace | None) -> Limits:
    """Narrow Cartesian limits to the workspace's box, so that motion along its walls stays possible."""
    if workspace is None or workspace.kinematics is not None or workspace.low is None or workspace.high is None:
        return limits
    low, high = np.array(limits.low, float), np.array(limits.high, float)
    low[:3], high[:3] = np.maximum(low[:3], workspace.low), np.minimum(high[:3], workspace.high)
    return replace(limits, low=low, high=high)
