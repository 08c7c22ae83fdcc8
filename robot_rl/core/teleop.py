"""The contract of operator devices."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

import numpy as np


class OperatorEvent(str, Enum):
    """What an operator can ask for besides moving the robot."""

    TAKE_OVER = "take_over"
    HAND_BACK = "hand_back"
    HOLD = "hold"
    EMERGENCY_STOP = "emergency_stop"
    RESET = "reset"
    ENABLE = "enable"
    SUCCESS = "success"
    FAILURE = "failure"
    RECORD_START = "record_start"
    """Record what is executed from now on."""
    RECORD_STOP = "record_stop"
    """Save the present episode and record no more."""
    RECORD_DISCARD = "record_discard"
    """Forget the present episode."""


@dataclass
class OperatorInput:
    """One reading of an operator device."""

    stamp: float
    """Monotonic time of the reading in seconds: the operator's heartbeat."""
    seq: int
    """Counts readings."""
    enabled: bool
    """Whether the dead-man switch is held (for keyboards: a motion key was pressed within the dwell time)."""
    motion: np.ndarray
    """(A,) velocity wish in [-1, 1] per action element; zeros when neutral."""
    events: tuple[OperatorEvent, ...] = ()
    """What was asked for since the last reading."""
    source: str = ""
    """Name of the device, where an operator has several: the one that drives is the one whose loss counts."""
    target: np.ndarray | None = None
    """(A,) command that the operator shows, in the action's units, by a device that is itself posed (a leader arm); the
    robot goes there no faster than by a full motion wish. None for devices that wish for motion alone."""


@runtime_checkable
class Teleop(Protocol):
    """A keyboard, gamepad, 6-D mouse or leader arm; neutral when it is lost."""

    def connect(self) -> None:
        """Open the device; raises `HardwareError` naming what is missing."""

    def poll(self) -> OperatorInput:
        """Return the newest reading without waiting."""

    def disconnect(self) -> None:
        """Close the device and restore what it changed (terminal modes)."""
