"""Registers of the servo families, from their makers' control tables.

Both kinds count 4096 positions per turn. `OFFSET` is kept in the servo, so that the middle of a joint's range reads
2048 whatever way the horn was mounted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hardware.servo.protocol import DynamixelProtocol, FeetechProtocol, ServoProtocol
from robot_rl.core.errors import UnknownNameError

TURN = 4096
"""Positions per turn."""
MIDDLE = 2048
"""Position that a calibrated joint has at 0 rad."""


@dataclass(frozen=True)
class Register:
    """Where a number stands in a servo's memory."""

    address: int
    """First byte."""
    size: int
    """Bytes, the lowest first."""
    sign_bit: int | None = None
    """Bit that says that the number is negative; None for a two's complement (or none)."""
    signed: bool = False
    """Whether the number is a two's complement."""

    def pack(self, value: int) -> bytes:
        """Return ``value`` as bytes; `ValueError` if it does not fit."""
        if self.sign_bit is not None:
            if abs(value) >= 1 << self.sign_bit:
                raise ValueError(f"{value} does not fit into {self.sign_bit} bits")
            value = abs(value) | (int(value < 0) << self.sign_bit)
        try:
            return value.to_bytes(self.size, "little", signed=self.signed)
        except OverflowError as error:
            raise ValueError(f"{value} does not fit into {self.size} bytes") from error

    def unpack(self, data: bytes) -> int:
        """Return the number of ``data``; the inverse of `pack`."""
        value = int.from_bytes(data, "little", signed=self.signed)
        if self.sign_bit is not None:
            size = value & ((1 << self.sign_bit) - 1)
            return -size if value >> self.sign_bit & 1 else size
        return value


@dataclass(frozen=True)
class Family:
    """What servos of one kind have in common."""

    name: str
    """``feetech`` or ``dynamixel``."""
    protocol: ServoProtocol
    """How packets are written."""
    baud: int
    """Bits per second that arms of this kind are set up for."""
    models: Mapping[int, str]
    """Model numbers that the registers hold for."""
    registers: Mapping[str, Register]
    """Registers by name; the names are the same in all families."""
    offset_sign: int
    """Whether the offset is added to the measured position (1) or subtracted (-1)."""
    position_mode: int
    """Value of ``mode`` in which a servo goes to its goal position."""
    alarms: Mapping[int, str] = field(default_factory=dict)
    """Bits of an alarm, and what is wrong."""


FEETECH = Family(
    name="feetech",
    protocol=FeetechProtocol(),
    baud=1_000_000,
    models={777: "STS3215", 2825: "STS3250"},
    registers={
        "model": Register(3, 2),
        "offset": Register(31, 2, sign_bit=11),
        "mode": Register(33, 1),
        "torque": Register(40, 1),
        "goal_position": Register(42, 2, sign_bit=15),
        "lock": Register(55, 1),
        "present_position": Register(56, 2, sign_bit=15),
        "present_velocity": Register(58, 2, sign_bit=15),
    },
    offset_sign=-1,
    position_mode=0,
    alarms={1: "wrong voltage", 2: "angle sensor", 4: "too hot", 8: "too much current", 32: "overload"},
)
DYNAMIXEL = Family(
    name="dynamixel",
    protocol=DynamixelProtocol(),
    baud=1_000_000,
    models={1060: "XL430-W250", 1190: "XL330-M077", 1200: "XL330-M288", 1020: "XM430-W350", 1030: "XM430-W210"},
    registers={
        "model": Register(0, 2),
        "mode": Register(11, 1),
        "offset": Register(20, 4, signed=True),
        "torque": Register(64, 1),
        "alarm": Register(70, 1),
        "watchdog": Register(98, 1, signed=True),
        "goal_position": Register(116, 4, signed=True),
        "present_velocity": Register(128, 4, signed=True),
        "present_position": Register(132, 4, signed=True),
    },
    offset_sign=1,
    position_mode=4,  # extended: the single-turn mode permits offsets of a quarter of a turn only
    alarms={1: "wrong voltage", 4: "too hot", 8: "motor encoder", 16: "electrical shock", 32: "overload"},
)
FAMILIES = {family.name: family for family in (FEETECH, DYNAMIXEL)}


def family_of(name: str) -> Family:
    """Return the family called ``name``; raises `UnknownNameError`."""
    if name not in FAMILIES:
        raise UnknownNameError("servo family", name, FAMILIES)
    return FAMILIES[name]
