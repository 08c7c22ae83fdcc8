"""Calibrating a servo arm by hand: a middle pose, then every joint through its range."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping

from hardware.servo.bus import ServoBus
from hardware.servo.calibration import RADIANS, Calibration, Joint
from hardware.servo.family import MIDDLE, TURN
from robot_rl.core.errors import ConfigError, HardwareError

MARGIN = 0.02
"""Distance in rad that the limits keep from the ends of the range that the joint was moved through."""
LEAST_RANGE = 0.2
"""Range in rad below which a joint was not moved."""


def calibrate(
    bus: ServoBus, joint_ids: Mapping[str, int], wait: Callable[[str], None], mirrored: Collection[str] = ()
) -> Calibration:
    """Return the calibration of the arm on ``bus``, whose drives are switched off and stay so.

    Args:
        bus: open.
        joint_ids: address of each joint, in the order of the action.
        wait: shows what the person is to do, and returns when it is done.
        mirrored: joints that are to turn against their servo.

    Raises:
        ConfigError: ``mirrored`` names a joint that there is not.
        HardwareError: a servo is missing or of an unknown model, or a joint was not moved, or over the servo's turn.
    """
    unknown = set(mirrored) - set(joint_ids)
    if unknown:
        raise ConfigError(f"no joint {', '.join(sorted(unknown))}; there are: {', '.join(joint_ids)}")
    models = _find(bus, joint_ids)
    for servo in joint_ids.values():
        bus.set(servo, "torque", 0)
    wait("Move every joint to the middle of its range")
    offsets = {name: _centre(bus, servo) for name, servo in joint_ids.items()}
    ranges = _record(bus, joint_ids, lambda: wait("Move every joint through its whole range, one after the other"))
    joints = {}
    for name, servo in joint_ids.items():
        sign = -1 if name in mirrored else 1
        ends = sorted(sign * (position - MIDDLE) * RADIANS for position in ranges[servo])
        joints[name] = Joint(servo, models[name], offsets[name], sign, ends[0] + MARGIN, ends[1] - MARGIN)
    still = [name for name, joint in joints.items() if joint.high - joint.low < LEAST_RANGE]
    if still:
        raise HardwareError(f"not moved through a range: {', '.join(still)}; calibrate again")
    over = [name for name, servo in joint_ids.items() if min(ranges[servo]) < 1 or max(ranges[servo]) > TURN - 2]
    if over:
        raise HardwareError(
            f"moved over the end of the servo's turn: {', '.join(over)}; calibrate again from a better middle"
        )
    return Calibration(bus.family, joints)


def _find(bus: ServoBus, joint_ids: Mapping[str, int]) -> dict[str, int]:
    """Return the model number of every joint's servo."""
    absent = [f"{name} (id {servo})" for name, servo in joint_ids.items() if not bus.ping(servo)]
    if absent:
        raise HardwareError(
            f"no servo answers for {', '.join(absent)} on '{bus.port}'; at the addresses 1 to 20 there are: "
            f"{', '.join(map(str, bus.scan())) or 'none'}"
        )
    models = {name: bus.read(servo, "model") for name, servo in joint_ids.items()}
    for name, model in models.items():
        if model not in bus.family.models:
            known = ", ".join(f"{title} ({number})" for number, title in bus.family.models.items())
            raise HardwareError(f"{name} is a servo of model {model}, known are: {known}")
    return models


def _centre(bus: ServoBus, servo: int) -> int:
    """Set a servo's offset so that it reads the middle where it is now; return the offset."""
    family = bus.family
    if bus.read(servo, "mode") != family.position_mode:
        bus.set(servo, "mode", family.position_mode)
    if "lock" in family.registers:
        bus.set(servo, "lock", 0)
    before = bus.read(servo, "offset")
    shaft = bus.read(servo, "present_position") - family.offset_sign * before
    offset = (family.offset_sign * (MIDDLE - shaft) + TURN // 2) % TURN - TURN // 2
    offset = max(offset, 1 - TURN // 2)  # half a turn does not fit; one position beside it does
    bus.set(servo, "offset", offset)
    if "lock" in family.registers:
        bus.set(servo, "lock", 1)
    return offset


def _record(bus: ServoBus, joint_ids: Mapping[str, int], until: Callable[[], None]) -> dict[int, tuple[int, int]]:
    """Return the lowest and highest position of every servo while ``until`` runs, followed over the end of its turn."""
    ended, failures = threading.Event(), []
    servos = list(joint_ids.values())
    seen: dict[int, list[int]] = {servo: [] for servo in servos}

    def watch() -> None:
        silent = 0
        while not ended.is_set():
            try:
                for servo, position in bus.sync_read(servos, "present_position").items():
                    before = seen[servo][-1] if seen[servo] else MIDDLE
                    seen[servo].append(before + (position - before + TURN // 2) % TURN - TURN // 2)
                silent = 0
            except HardwareError as error:
                silent += 1
                if silent > 20:
                    failures.append(error)
                    return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, name="calibration", daemon=True)
    thread.start()
    try:
        until()
    finally:
        ended.set()
        thread.join(2.0)
    if failures:
        raise failures[0]
    return {servo: (min(positions), max(positions)) for servo, positions in seen.items()}
