"""What the safety chain is told besides the robot's own limits."""

from __future__ import annotations

from dataclasses import dataclass, field

from hardware.safety.forces import ForceMonitor
from hardware.safety.surroundings import Guards
from robot_rl.core.robot import Limits


@dataclass(frozen=True)
class Protection:
    """Limits, surroundings and forces for one robot at one rate of ticks; `hardware.safety.settings` makes it."""

    limits: Limits
    """What a command may be: the robot's own limits or tighter ones, perhaps with a limit of the jerk."""
    guards: Guards = field(default_factory=Guards)
    """What stages 7 to 9 know."""
    forces: ForceMonitor | None = None
    """Stage 10."""
