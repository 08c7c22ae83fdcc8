"""Check a robot and its cameras without moving it, and calibrate servo arms."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from hardware.options import parse_options
from hardware.robots.build import build_robot
from hardware.robots.servo_arm import ServoArm
from hardware.servo.bus import ServoBus
from hardware.servo.calibrate import calibrate
from hardware.servo.family import family_of
from robot_rl.core.errors import ConfigError, MissingDependencyError
from robot_rl.core.registry import load
from robot_rl.core.robot import Robot
from robot_rl.train.progress import say


@dataclass(frozen=True)
class Check:
    """Connect a robot, let it hold where it is, and say how often and how fresh its measurements come.

    Its drives are switched on, and it is sent no command but the last stop. The exit status is 1 if something is too
    old for the safety chain.
    """

    robot: Annotated[str, tyro.conf.Positional]
    """Robot by name (`robot-rl list robots`)."""
    config: Path | None = None
    """YAML file of the robot's settings and of its cameras."""
    options: tuple[str, ...] = ()
    """Further settings, each name=value; they win over the file's."""
    seconds: float = 3.0
    """How long to look."""
    max_state_age: float = 0.1
    """Largest age of the measurement in s that is well, as in deploy."""
    max_camera_age: float = 0.25
    """Largest age of an image in s that is well, as in deploy."""


@dataclass(frozen=True)
class Calibrate:
    """Calibrate a servo arm by hand, with its drives off: a middle pose, then every joint through its range."""

    robot: Annotated[str, tyro.conf.Positional]
    """Arm by name: so101 or koch."""
    port: str = "/dev/ttyACM0"
    """Serial device."""
    out: Path = Path("calibration.yaml")
    """File to write."""
    ids: tuple[int, ...] = ()
    """Address of each joint's servo, in order; by default those of the assembly guide."""
    mirrored: tuple[str, ...] = ()
    """Joints that are to turn against their servo."""
    baud: int = 0
    """Bits per second; 0 takes the usual."""


Config = Annotated[Check, tyro.conf.subcommand("check")] | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]


def run(config: Check | Calibrate) -> int:
    """Run one of the sub-commands and return its exit status."""
    actions: dict[type, Any] = {Check: _check, Calibrate: _calibrate}
    return int(actions[type(config)](config))


def _check(config: Check) -> int:
    robot = build_robot(config.robot, parse_options(config.options, "robot option"), config.config)
    for key, spec in robot.spec.observation.items():
        say(f"{key:<16} {spec.shape} {spec.dtype} {spec.unit} {' '.join(spec.names)}".rstrip())
    say(f"{'action':<16} {robot.spec.action.shape} {robot.spec.action.unit} {' '.join(robot.spec.action.names)}")
    robot.connect()
    try:
        problems = _watch(robot, config)
        confirmed = robot.stop()
    finally:
        robot.disconnect()
    say(f"stop {'confirmed' if confirmed else 'NOT CONFIRMED'}", style="green" if confirmed else "bold red")
    for problem in problems:
        say(problem, style="bold red")
    return int(bool(problems) or not confirmed)


def _watch(robot: Robot, config: Check) -> list[str]:
    """Say how often measurement and images come; return what is too old."""
    ages: dict[str, list[float]] = {}
    stamps: dict[str, set[float]] = {}
    end = time.monotonic() + config.seconds
    while (now := time.monotonic()) < end:
        seen = robot.observe()
        for key, stamp in {"measurement": seen.stamp, **seen.stamps}.items():
            ages.setdefault(key, []).append(now - stamp)
            stamps.setdefault(key, set()).add(stamp)
        time.sleep(0.002)
    problems = []
    for key, found in ages.items():
        limit = config.max_state_age if key == "measurement" else config.max_camera_age
        say(f"{key:<16} {len(stamps[key]) / config.seconds:6.1f} Hz, age at most {1e3 * max(found):.1f} ms")
        if max(found) > limit:
            problems.append(f"{key} is up to {max(found):.3f} s old, permitted are {limit:g} s")
    place = np.array2string(robot.hold_command(), precision=3, suppress_small=True)
    say(f"{'place':<16} {place}")
    return problems


def _calibrate(config: Calibrate) -> int:
    arm = load("robots", config.robot)
    if not (isinstance(arm, type) and issubclass(arm, ServoArm) and arm.joint_ids):
        raise ConfigError(f"'{config.robot}' is no servo arm with known joints; those are so101 and koch")
    for package, extra in arm.requires:
        if find_spec(package) is None:
            raise MissingDependencyError(package, extra, "Calibrating")
    ids = config.ids or tuple(arm.joint_ids.values())
    if len(ids) != len(arm.joint_ids) or len(set(ids)) != len(ids):
        raise ConfigError(f"ids {ids} are not one for each of {', '.join(arm.joint_ids)}")
    bus = ServoBus(config.port, family_of(arm.family), config.baud)
    bus.open()
    try:
        say("The drives are switched off: hold the arm, or it sinks.", style="bold yellow")
        found = calibrate(bus, dict(zip(arm.joint_ids, ids, strict=True)), _ask, config.mirrored)
    finally:
        bus.close()
    for name, joint in found.joints.items():
        say(f"{name:<16} id {joint.id}, {joint.low:+.2f} to {joint.high:+.2f} rad, offset {joint.offset}")
    found.save(config.out)
    say(f"Written: {config.out}", style="green")
    return 0


def _ask(text: str) -> None:
    try:
        input(f"{text}, then press Enter. ")
    except EOFError as error:
        raise ConfigError("calibrating needs a person at the terminal") from error
