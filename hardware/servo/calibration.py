"""The calibration of a servo arm: a file that says which servo is which joint, and how it is mounted.

    family: feetech
    joints:
      shoulder_pan: {id: 1, model: 777, offset: -1204, sign: 1, low: -1.9, high: 1.9}

At 0 rad a joint is where it was in the middle pose of the calibration. ``offset`` is kept in the servo; drivers compare
it with the file when they connect, so that the file of another arm is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from hardware.servo.bus import ServoBus
from hardware.servo.family import MIDDLE, TURN, Family, family_of
from robot_rl.core.errors import ConfigError, DataError, HardwareError

RADIANS = 2 * math.pi / TURN
"""Radians per position."""


@dataclass(frozen=True)
class Joint:
    """One servo of an arm."""

    id: int
    """Address on the bus."""
    model: int
    """Model number that it reports."""
    offset: int
    """Offset kept in the servo, in positions."""
    sign: int
    """1, or -1 where the joint turns against its servo."""
    low: float
    """Lowest angle in rad."""
    high: float
    """Highest angle in rad."""

    def angle(self, position: int) -> float:
        """Return the angle in rad, in (-pi, pi], of a position."""
        return self.sign * ((position - MIDDLE + TURN // 2) % TURN - TURN // 2) * RADIANS

    def position(self, angle: float, near: int = MIDDLE) -> int:
        """Return the position of ``angle`` in rad, in the turn in which the position ``near`` is."""
        turn = (near - MIDDLE + TURN // 2) // TURN * TURN
        return round(MIDDLE + turn + self.sign * angle / RADIANS)


@dataclass(frozen=True)
class Calibration:
    """All joints of an arm, in the order of its action."""

    family: Family
    """Kind of the servos."""
    joints: Mapping[str, Joint]
    """Joints by name."""

    def save(self, path: Path) -> None:
        """Write the file; an old one is replaced as a whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {name: asdict(joint) for name, joint in self.joints.items()}
        text = yaml.safe_dump({"family": self.family.name, "joints": rows}, sort_keys=False, default_flow_style=None)
        beside = path.with_suffix(path.suffix + ".new")
        beside.write_text(f"# Calibration of a servo arm; angles in rad. Written by robot-rl robot calibrate.\n{text}")
        beside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read the file; raises `DataError` naming what is missing or wrong."""
        try:
            content = yaml.safe_load(Path(path).read_text())
        except FileNotFoundError as error:
            raise ConfigError(f"no calibration '{path}': make one with robot-rl robot calibrate") from error
        except (OSError, yaml.YAMLError) as error:
            raise DataError(f"calibration '{path}' cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict) or not isinstance(content.get("joints"), dict) or not content["joints"]:
            raise DataError(f"calibration '{path}' holds no 'joints'")
        family = family_of(str(content.get("family")))
        joints = {str(name): _joint(str(name), row, path) for name, row in content["joints"].items()}
        taken = [joint.id for joint in joints.values()]
        if len(set(taken)) != len(taken):
            raise DataError(f"calibration '{path}' gives one id to several joints: {sorted(taken)}")
        return cls(family, joints)

    def require(self, bus: ServoBus) -> None:
        """Raise `HardwareError` unless the servos on ``bus`` are those of this calibration."""
        ids = {joint.id: name for name, joint in self.joints.items()}
        absent = [f"{name} (id {servo})" for servo, name in ids.items() if not bus.ping(servo)]
        if absent:
            answering = ", ".join(str(servo) for servo in ids if f"{ids[servo]} (id {servo})" not in absent)
            raise HardwareError(
                f"no servo answers for {', '.join(absent)} on '{bus.port}'; there are: {answering or 'none'}; look at "
                "power, cables and baud rate"
            )
        for name, joint in self.joints.items():
            for register, expected in (("model", joint.model), ("offset", joint.offset)):
                found = bus.read(joint.id, register)
                if found != expected:
                    raise HardwareError(
                        f"{register} of {name} (id {joint.id}) is {found}, the calibration says {expected}: it is of "
                        "another arm, or the servo was changed; calibrate anew"
                    )


def _joint(name: str, row: Any, path: Path) -> Joint:
    wanted = {"id": int, "model": int, "offset": int, "sign": int, "low": float, "high": float}
    if not isinstance(row, dict) or set(row) != set(wanted):
        raise DataError(f"calibration '{path}': joint '{name}' needs exactly {', '.join(wanted)}")
    for key, kind in wanted.items():
        good = isinstance(row[key], (int, float) if kind is float else int) and not isinstance(row[key], bool)
        if not good or not math.isfinite(row[key]):
            raise DataError(f"calibration '{path}': {key} of joint '{name}' is {row[key]!r}")
    joint = Joint(*(kind(row[key]) for key, kind in wanted.items()))
    if joint.sign not in (-1, 1) or not 0 <= joint.id <= 252:
        raise DataError(f"calibration '{path}': joint '{name}' needs sign 1 or -1 and an id of 0 to 252")
    if not -math.pi <= joint.low < joint.high <= math.pi:
        raise DataError(f"calibration '{path}': joint '{name}' needs -pi <= low < high <= pi")
    return joint
