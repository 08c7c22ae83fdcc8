"""The names of everything that the safety chain can do to a command; the one place where they are listed."""

from __future__ import annotations

from enum import IntFlag


class SafetyFlag(IntFlag):
    """Interventions as a bit set; recorded per step as ``safety_flags`` (int32) and counted by name."""

    ACTION_MALFORMED = 1 << 0
    """Stage 1: the command has the wrong shape or is not numeric."""
    ACTION_NOT_FINITE = 1 << 1
    """Stage 1: the command holds NaN or infinity."""
    COMMAND_STALE = 1 << 2
    """Stage 2: the command was planned from an observation that is too old."""
    STATE_STALE = 1 << 3
    """Stage 2: the robot's own measurement is too old, or its clock runs ahead."""
    CAMERA_STALE = 1 << 4
    """Stage 2: a camera's clock stands still or runs ahead."""
    OPERATOR_LOST = 1 << 5
    """Stage 2: the operator who drives gave no sign of life."""
    NO_WRITER = 1 << 6
    """Stage 3: a command came although the arbiter lets nobody write."""
    EMERGENCY_STOP = 1 << 7
    """Stage 4: the emergency stop is latched."""
    POSITION_LIMITED = 1 << 8
    """Stage 5: slowed or stopped before the end of the command's range."""
    VELOCITY_LIMITED = 1 << 9
    """Stage 6: the command changed too fast."""
    ACCELERATION_LIMITED = 1 << 10
    """Stage 6: the command's velocity changed too fast."""
    TRACKING_ERROR = 1 << 11
    """Stage 6: the robot does not follow its command."""
    WORKSPACE_LIMITED = 1 << 12
    """Stage 7: the motion, or the stop that must remain possible after it, would leave the workspace."""
    POST_CHECK_FAILED = 1 << 13
    """Stage 11: the result of the stages above broke a limit; the robot holds instead."""
    EXCEPTION = 1 << 14
    """A stage raised; the robot holds instead."""
    POLICY_STARVED = 1 << 15
    """No planned action is left (set by the executor)."""
    ROBOT_FAULT = 1 << 16
    """The robot did not answer or refused a command (set by the executor)."""
    OBSERVATION_NOT_FINITE = 1 << 17
    """Stage 2: the robot measured NaN or infinity."""
    REPLACED_WITHIN_TICK = 1 << 18
    """No intervention: a plan that arrived between ticks replaced the tick's command (set by the executor; recorded
    and not counted here)."""
    CLEARANCE_LIMITED = 1 << 19
    """Stage 9: the motion, or the stop that must remain possible after it, would come too near to something."""
    JERK_LIMITED = 1 << 20
    """Stage 6: the command's acceleration changed too fast."""
    SPEED_LIMITED = 1 << 21
    """Stage 7: a point of the robot would move faster than the profile permits."""
    SINGULARITY_LIMITED = 1 << 22
    """Stage 8: slowed or stopped on the way to a singular configuration."""
    FORCE_EXCEEDED = 1 << 23
    """Stage 10: a measured force, torque or current stayed above its limit."""


MOTION_LIMITS = (
    SafetyFlag.POSITION_LIMITED
    | SafetyFlag.VELOCITY_LIMITED
    | SafetyFlag.ACCELERATION_LIMITED
    | SafetyFlag.WORKSPACE_LIMITED
    | SafetyFlag.CLEARANCE_LIMITED
    | SafetyFlag.JERK_LIMITED
    | SafetyFlag.SPEED_LIMITED
    | SafetyFlag.SINGULARITY_LIMITED
)
"""Flags of commands that were limited and obeyed as far as permitted."""
STALENESS = SafetyFlag.COMMAND_STALE | SafetyFlag.STATE_STALE | SafetyFlag.CAMERA_STALE | SafetyFlag.OPERATOR_LOST
"""Flags of stage 2."""
HOLDING_FAULTS = (
    SafetyFlag.ACTION_MALFORMED
    | SafetyFlag.ACTION_NOT_FINITE
    | STALENESS
    | SafetyFlag.OBSERVATION_NOT_FINITE
    | SafetyFlag.POLICY_STARVED
)
"""Flags after which the arbiter holds until somebody takes over or hands back."""
STOPPING_FAULTS = (
    SafetyFlag.TRACKING_ERROR
    | SafetyFlag.POST_CHECK_FAILED
    | SafetyFlag.EXCEPTION
    | SafetyFlag.ROBOT_FAULT
    | SafetyFlag.FORCE_EXCEEDED
)
"""Flags after which the arbiter latches a stop, as after an emergency stop."""


_NAMES = tuple((int(flag), str(flag.name).lower()) for flag in SafetyFlag)


def flag_names(flags: int) -> list[str]:
    """Return the lower-case names of the bits in ``flags``, lowest first."""
    flags = int(flags)  # plain integers: the control loop calls this on every intervention
    return [name for bit, name in _NAMES if flags & bit]


_SENSED = int(SafetyFlag.STATE_STALE | SafetyFlag.CAMERA_STALE | SafetyFlag.OBSERVATION_NOT_FINITE)


def cause_of(flags: int) -> str:
    """Return the name of the bit in ``flags`` that explains the others: the lowest of what was measured, else of all.

    What is planned from a late measurement is as late, and is not to blame for it.
    """
    return flag_names(flags & _SENSED or flags)[0]
