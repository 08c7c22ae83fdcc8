"""The contract suite of robots: ``check_robot(lambda: MyRobot(...))`` on a robot, an emulator or a simulated lane.

The robot moves: by ``step`` around where it stands, and back. Each check raises `AssertionError` with a sentence that
says which rule was broken.
"""

from __future__ import annotations

import builtins
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from robot_rl.core.errors import HardwareError, RobotRLError
from robot_rl.core.robot import Robot, RobotState, StampedObservation, StopKind

RobotFactory = Callable[[], Robot]
"""Builds the robot, not connected."""


def check_robot(
    factory: RobotFactory,
    *,
    step: float = 0.02,
    tolerance: float = 0.01,
    patience: float = 5.0,
    max_age: float = 0.5,
) -> None:
    """Check every rule of `robot_rl.core.robot.Robot` on the robot that ``factory`` makes.

    Args:
        factory: builds the robot, not connected; called once.
        step: how far each element of the command is moved, as a share of its range.
        tolerance: largest difference of a place that must be reached, as a share of the range.
        patience: seconds in which the robot must follow.
        max_age: largest age in seconds of a measurement.
    """
    robot = factory()
    check_before_connecting(robot)
    with nobody_asked():
        robot.connect()
    try:
        check_measurements(robot, max_age)
        check_holding(robot, tolerance, patience)
        check_commands(robot, step, tolerance, patience)
        check_stops(robot, step, tolerance, patience)
    finally:
        robot.disconnect()
    check_disconnected(robot)
    with nobody_asked():
        robot.connect()
    try:
        assert robot.state() is RobotState.READY, f"connected again, the state is {robot.state()}"
        check_measurements(robot, max_age)
    finally:
        robot.disconnect()


def check_before_connecting(robot: Robot) -> None:
    """Spec and limits are known, and nothing that needs the robot pretends to work."""
    assert isinstance(robot, Robot), f"{type(robot).__name__} lacks a member of Robot"
    action = robot.spec.action
    for name in ("low", "high", "velocity", "acceleration"):
        shape = np.shape(getattr(robot.limits, name))
        assert shape == action.shape, f"limits.{name} has shape {shape}, the action has {action.shape}"
    assert (robot.limits.low < robot.limits.high).all(), "a limit leaves no room: low >= high"
    assert robot.spec.observation, "the spec names no observation"
    assert robot.spec.rate_hz > 0, "the spec states no rate"
    check_disconnected(robot)


def check_disconnected(robot: Robot) -> None:
    """A robot without a connection says so, by one-line errors and stops that are not confirmed."""
    assert robot.state() is RobotState.DISCONNECTED, f"without a connection the state is {robot.state()}"
    hold = np.clip(np.zeros(robot.spec.action.shape), robot.limits.low, robot.limits.high)
    for name, call in (
        ("observe", robot.observe),
        ("hold_command", robot.hold_command),
        ("command", lambda: robot.command(hold)),
    ):
        message = refusal(call)
        assert message is not None, f"{name}() works without a connection"
        assert "\n" not in message, f"the error of {name}() has more than one line: {message!r}"
    for kind in StopKind:
        assert robot.stop(kind) is False, f"stop({kind.value}) was confirmed without a connection"
    robot.disconnect()


def check_measurements(robot: Robot, max_age: float = 0.5) -> None:
    """Observations fit the spec, are fresh, and their stamps and numbers never run backwards."""
    seen = robot.observe()
    for _ in range(10):
        time.sleep(0.02)
        check_observation(robot, seen)
        age = seen.age(time.monotonic())
        assert -0.005 <= age <= max_age, f"the measurement is {age:.3f} s old, permitted are {max_age:g} s"
        following = robot.observe()
        assert following.seq >= seen.seq, f"the number of the observation fell from {seen.seq} to {following.seq}"
        assert following.stamp >= seen.stamp, "a stamp ran backwards"
        seen = following
    deadline = time.monotonic() + max_age
    begun = seen.seq
    while seen.seq == begun and time.monotonic() < deadline:
        time.sleep(0.005)
        seen = robot.observe()
    assert seen.seq > begun, f"no new measurement within {max_age:g} s"


def check_observation(robot: Robot, seen: StampedObservation) -> None:
    """One observation has the keys, shapes and element types of the spec."""
    differing = set(seen.values) ^ set(robot.spec.observation)
    assert not differing, f"observations differ from the spec by {sorted(differing)}"
    for key, spec in robot.spec.observation.items():
        value = seen.values[key]
        assert value.shape == spec.shape, f"'{key}' has shape {value.shape}, the spec says {spec.shape}"
        assert value.dtype == spec.dtype, f"'{key}' is {value.dtype}, the spec says {spec.dtype}"
        assert value.dtype.kind != "f" or np.isfinite(value).all(), f"'{key}' holds a value that is not finite"
        assert not spec.is_image or key in seen.stamps, f"the image '{key}' has no stamp of its own"


def check_holding(robot: Robot, tolerance: float, patience: float) -> None:
    """The hold command is within the limits and moves nothing."""
    assert robot.state() is RobotState.READY, f"connected, the state is {robot.state()}"
    hold = np.asarray(robot.hold_command())
    assert hold.shape == robot.spec.action.shape, f"hold_command() has shape {hold.shape}"
    room = tolerance * (robot.limits.high - robot.limits.low)
    inside = (hold >= robot.limits.low - room) & (hold <= robot.limits.high + room)
    assert inside.all(), f"hold_command() is beyond the limits: {hold}"
    robot.command(np.clip(hold, robot.limits.low, robot.limits.high))
    time.sleep(min(0.2, patience))
    moved = np.abs(robot.hold_command() - hold)
    assert (moved <= 2 * room).all(), f"commanding hold_command() moved the robot by {moved}"


def check_commands(robot: Robot, step: float, tolerance: float, patience: float) -> None:
    """The robot goes where it is sent, says what was really sent, and refuses what is no command."""
    size = robot.spec.action.size
    hold = robot.hold_command()
    broken = hold.copy()
    broken[-1] = np.nan
    for wrong, what in ((np.zeros(size + 1), "a wrong shape"), (broken, "NaN")):
        message = refusal(lambda wrong=wrong: robot.command(wrong))  # type: ignore[misc]
        assert message is not None, f"a command with {what} was accepted"
        assert "\n" not in message, f"the error about {what} has more than one line: {message!r}"
    low, high = np.asarray(robot.limits.low, float), np.asarray(robot.limits.high, float)
    target = _target(robot, hold, step)
    sent = robot.command(target)
    assert np.allclose(sent, target, atol=1e-3 * float(np.max(high - low))), f"sent {sent} instead of {target}"
    _follow(robot, target, tolerance, patience)
    beyond = target.copy()
    beyond[0] = high[0] + 0.05 * (high[0] - low[0])
    assert robot.command(beyond)[0] <= high[0] + 1e-9, "a command beyond the limits was reported as sent"
    robot.command(np.clip(hold, low, high))
    _follow(robot, np.clip(hold, low, high), tolerance, patience)


def check_stops(robot: Robot, step: float, tolerance: float, patience: float) -> None:
    """A confirmed stop is a standstill, also amid a motion, and the robot takes commands afterwards."""
    room = tolerance * (robot.limits.high - robot.limits.low)
    hold = np.clip(robot.hold_command(), robot.limits.low, robot.limits.high)
    for kind in (StopKind.HOLD, StopKind.CONTROLLED):
        robot.command(_target(robot, hold, step))
        confirmed = robot.stop(kind)
        assert confirmed is True, f"stop({kind.value}) was not confirmed"
        before = robot.hold_command()
        time.sleep(0.2)
        moved = np.abs(robot.hold_command() - before)
        assert (moved <= room).all(), f"after a confirmed stop({kind.value}) the robot moved by {moved}"
        assert robot.state() is RobotState.READY, f"after stop({kind.value}) the state is {robot.state()}"
        robot.command(hold)
        _follow(robot, hold, tolerance, patience)


def refusal(call: Callable[[], Any]) -> str | None:
    """Return the message of the error that a user can mend which ``call`` raises; None if it raises none."""
    try:
        call()
    except RobotRLError as error:
        return str(error)
    return None


def fails_within(robot: Robot, seconds: float) -> HardwareError:
    """Return the error that observing ``robot`` ends in within ``seconds``; `AssertionError` if it never does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            robot.observe()
        except HardwareError as error:
            return error
        time.sleep(0.005)
    raise AssertionError(f"the robot still gives observations after {seconds:g} s")


@contextmanager
def nobody_asked() -> Iterator[None]:
    """Let every question at the terminal fail while the block runs: connecting must not wait for a person."""

    def ask(*_: object) -> str:
        raise AssertionError("connect() asked a question at the terminal")

    class Silent:
        def fileno(self) -> int:
            raise OSError("connect() reads standard input")

        read = readline = readlines = __iter__ = ask

    kept, asked = sys.stdin, builtins.input
    sys.stdin, builtins.input = Silent(), ask
    try:
        yield
    finally:
        sys.stdin, builtins.input = kept, asked


def _target(robot: Robot, hold: np.ndarray, step: float) -> np.ndarray:
    """Return a command ``step`` of the range away from ``hold`` (A,), towards the middle of the range."""
    low, high = np.asarray(robot.limits.low, float), np.asarray(robot.limits.high, float)
    direction = np.where(hold <= (low + high) / 2, 1.0, -1.0)
    return np.clip(hold + direction * step * (high - low), low, high)


def _follow(robot: Robot, target: np.ndarray, tolerance: float, patience: float) -> None:
    """Wait until the robot measures that it is at ``target`` (A,): for rates, that it stands again once stopped."""
    rates = np.array([unit.strip().endswith("/s") for unit in _units(robot)])
    room = tolerance * (robot.limits.high - robot.limits.low)
    deadline = time.monotonic() + patience
    while True:
        gap = np.where(rates, 0.0, np.abs(robot.hold_command() - target))
        if (gap <= room).all():
            return
        assert time.monotonic() < deadline, f"{patience:g} s after the command {target} the robot is off by {gap}"
        time.sleep(0.01)
        robot.command(target)


def _units(robot: Robot) -> list[str]:
    units = robot.spec.action.unit.split(",")
    return units * robot.spec.action.size if len(units) == 1 else units
