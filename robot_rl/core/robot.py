"""The contract of robots: stamped observations in, bounded commands out, and a stop that says whether it worked."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, runtime_checkable

import numpy as np

from robot_rl.core.spec import Spec


class StopKind(str, Enum):
    """How to stop, after the stop categories of IEC 60204-1."""

    HOLD = "hold"
    """Hold the present position with power on (category 2)."""
    CONTROLLED = "controlled"
    """Brake within the acceleration limits, then hold (category 1); the default."""
    DRIVES_OFF = "drives_off"
    """Remove power (category 0): only where nothing can fall."""


class RobotState(str, Enum):
    """Life cycle of a driver."""

    DISCONNECTED = "disconnected"
    READY = "ready"
    STOPPED = "stopped"
    FAULT = "fault"


@dataclass
class StampedObservation:
    """What a robot measured, and when."""

    values: dict[str, np.ndarray]
    """Observation arrays by key, each of the shape in the robot's spec."""
    seq: int
    """Counts the robot's control steps; grows by one per step."""
    stamp: float
    """Monotonic time of measurement in seconds."""
    stamps: dict[str, float] = field(default_factory=dict)
    """Time of measurement of single keys (cameras), where it differs from ``stamp``."""

    def age(self, now: float, key: str | None = None) -> float:
        """Return the age in seconds at the monotonic time ``now``, of one key or of the whole observation."""
        return now - self.stamps.get(key or "", self.stamp)


@dataclass(frozen=True)
class Limits:
    """What a command may be, per element of the action; every array has shape (A,)."""

    low: np.ndarray
    """Lowest command, in the action's units."""
    high: np.ndarray
    """Highest command."""
    velocity: np.ndarray
    """Largest change of the command per second."""
    acceleration: np.ndarray
    """Largest change of that velocity per second."""
    jerk: np.ndarray | None = None
    """Largest change of that acceleration per second; None for no limit."""


@runtime_checkable
class Robot(Protocol):
    """A robot arm, mobile base or simulated lane; ``spec`` and ``limits`` are known before connecting."""

    spec: Spec
    limits: Limits

    def connect(self) -> None:
        """Open the connection and wait for a first observation; raises `HardwareError` naming what failed."""

    def observe(self) -> StampedObservation:
        """Return the newest observation without waiting for a newer one."""

    def hold_command(self) -> np.ndarray:
        """Return the command (A,) that keeps the robot where it is now."""

    def command(self, action: np.ndarray) -> np.ndarray:
        """Send a command (A,) and return what was really sent after the driver's own limits."""

    def stop(self, kind: StopKind = StopKind.CONTROLLED) -> bool:
        """Stop; return whether the robot confirmed it. Never pretends success."""

    def state(self) -> RobotState:
        """Return the driver's life-cycle state."""

    def disconnect(self) -> None:
        """Stop in a controlled way, then close the connection."""
