"""The safety chain: what it passes, what it limits, and that a stop is always possible."""

import dataclasses
import logging

import numpy as np
import pytest
from deployment_rig import smooth_path
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.safety.arithmetic import braking_step
from hardware.safety.chain import SafetyChain, SafetyConfig, Situation
from hardware.safety.flags import SafetyFlag, flag_names
from hardware.safety.motion import MotionLimiter
from hardware.safety.surroundings import Guards
from hardware.safety.workspace import Workspace
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.robot import Limits, StampedObservation

DT = 0.01


def limits(size=3, span=1.0, velocity=1.0, acceleration=5.0):
    one = np.ones(size)
    return Limits(-span * one, span * one, velocity * one, acceleration * one)


def situation(now=0.0, **changes):
    observation = changes.pop("observation", StampedObservation({}, 0, now))
    return Situation(now, observation, **{"writer": "policy", "command_stamp": now, **changes})


def random_limits(rng, size):
    low, high = -rng.uniform(0, 3, size), rng.uniform(0.01, 3, size)
    return Limits(low, high, 10 ** rng.uniform(-2, 1, size), 10 ** rng.uniform(-1, 2, size))


@pytest.mark.parametrize("kind", ["uniform", "walk", "extremes"])
def test_a_hundred_thousand_random_commands_stay_inside_every_limit(kind):
    """Each of 34 robots of seven axes and random limits is sent 1000 commands: with three kinds more than 10^5."""
    rng, count, size = np.random.default_rng(7), 1000, 7
    for _ in range(34):
        bounds = random_limits(rng, size)
        chain = SafetyChain(bounds, DT)
        if kind == "uniform":
            targets = rng.uniform(-6, 6, (count, size))
        elif kind == "walk":
            targets = chain.command + rng.normal(0, 0.02, (count, size)).cumsum(axis=0)
        else:
            targets = rng.choice([-1e12, -1.0, 0.0, 1.0, 1e12, 5e-324], (count, size))
        # At rest before the first of them.
        now = situation()
        commands = np.array([chain.command] * 2 + [chain.filter(target, now).command for target in targets])
        steps = np.diff(commands, axis=0)
        assert np.isfinite(commands).all()
        assert ((commands >= bounds.low) & (commands <= bounds.high)).all()
        assert (np.abs(steps) <= bounds.velocity * DT).all()
        assert (np.abs(np.diff(steps, axis=0)) <= bounds.acceleration * DT**2).all()
        # Never faster than both the wish and the motion before.
        wishes = np.abs(targets - commands[1:-1])
        assert (np.abs(steps[1:]) <= np.maximum(wishes, np.abs(steps[:-1])) + 1e-12).all()
        assert chain.counts["post_check_failed"] == chain.counts["exception"] == 0


def test_jumps_to_the_ends_of_the_range_never_need_the_post_check():
    """400 axes at 1 kHz: what rounds in each of hundreds of braking ticks may not add up to a broken limit."""
    rng, size, tick = np.random.default_rng(5), 400, 0.001
    one = np.ones(size)
    bounds = Limits(-rng.uniform(0.5, 1.5, size), rng.uniform(0.5, 1.5, size), 2 * one, rng.choice([2.0, 5.0], size))
    chain = SafetyChain(bounds, tick)
    commands = [chain.command, chain.command]
    for k in range(7000):
        if k in (0, 1500, 4000):
            target = rng.choice([-4.0, 4.0], size)
        stop = 4800 <= k < 5500  # on the way to the last ends
        commands.append(chain.filter(None if stop else target, situation()).command)
    steps = np.diff(commands, axis=0)
    assert (np.abs(np.diff(steps, axis=0)) <= bounds.acceleration * tick**2).all()
    assert (commands[-1] == np.where(target > 0, bounds.high, bounds.low)).mean() > 0.95, "they do go to the end"
    assert chain.counts["post_check_failed"] == 0


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ticks=st.integers(1, 60))
def test_a_stop_is_reachable_from_every_state(seed, ticks):
    rng = np.random.default_rng(seed)
    bounds = random_limits(rng, 8)
    chain = SafetyChain(bounds, DT)
    for _ in range(ticks):
        chain.filter(rng.uniform(-6, 6, 8), situation())
    speed, acceleration = np.abs(chain._motion.step) / DT, bounds.acceleration
    needed = int(np.ceil((speed / (acceleration * DT)).max())) + 1
    step = chain._motion.step
    for _ in range(needed):
        before = chain.command
        chain.filter(None, situation())
        new = chain.command - before
        assert (np.abs(new) <= np.abs(step) + 1e-15).all()
        assert (np.abs(new - step) <= acceleration * DT**2).all()
        step = new
    assert not chain.moving
    assert chain.counts["post_check_failed"] == 0


def test_safe_commands_pass_bit_for_bit():
    """20,000 of them: random smooth paths of seven axes, inside limits that are hardly wider than each path needs."""
    rng = np.random.default_rng(3)
    for _ in range(40):
        path = smooth_path(rng, DT, 2)
        steps = np.diff(path, axis=0, prepend=path[:1])
        turns = np.diff(steps, axis=0, prepend=0 * steps[:1])
        spare = 1.0001
        fastest, brake = spare * np.abs(steps).max(axis=0), spare * np.abs(turns).max(axis=0)
        # From where each step begins, it and the braking ones after it, d, d - u, d - 2u, ..., must fit.
        sizes = np.abs(steps)
        ticks = np.floor(sizes / brake)
        needed = np.sign(steps) * ((ticks + 1) * sizes - brake * ticks * (ticks + 1) / 2)
        ends = path - steps + spare * needed
        low, high = (np.minimum(path, ends).min(axis=0), np.maximum(path, ends).max(axis=0))
        chain = SafetyChain(Limits(low, high, fastest / DT, brake / DT**2), DT)
        chain.anchor(path[0])
        for target in path:
            verdict = chain.filter(target, situation())
            assert verdict.flags == 0
            assert (verdict.command == target).all()
        assert not chain.counts


@pytest.mark.parametrize(("what", "name"), [("velocity", "velocity_limited"), ("acceleration", "acceleration_limited")])
def test_a_path_that_breaks_one_limit_by_a_hundredth_does_not_pass(what, name):
    path = 0.3 * (1 - np.cos(1.3 * np.arange(500) * DT))[:, None] * np.ones(3)
    steps = np.diff(path, axis=0, prepend=path[:1])
    needs = {"velocity": np.abs(steps).max() / DT, "acceleration": np.abs(np.diff(steps, axis=0)).max() / DT**2}
    chain = SafetyChain(limits(3, **(needs | {what: needs[what] / 1.01})), DT)
    for target in path:
        chain.filter(target, situation())
    assert chain.counts[name] > 0


def test_float32_commands_are_not_changed_by_the_conversion():
    chain = SafetyChain(limits(), DT)
    target = np.array([0.0001, -0.0002, 0.0003], np.float32)
    assert (chain.filter(target, situation()).command.astype(np.float32) == target).all()


def test_a_jump_is_walked_to_without_overshoot():
    chain = SafetyChain(limits(1), DT)
    commands = np.array([chain.filter(np.array([0.5]), situation()).command[0] for _ in range(200)])
    assert commands.max() <= 0.5
    assert commands[-1] == pytest.approx(0.5)
    fastest = 0.5 / 1.0 + 1.0 / 5.0  # trapezoid: distance / V + V / A
    assert np.argmax(commands > 0.4999) * DT <= fastest + 5 * DT


def test_braking_step_is_the_largest_one_that_still_stops():
    brake, room = np.full(6, 0.001), np.array([0.0, 1e-5, 0.001, 0.0015, 0.1, 2.0])
    first = braking_step(room, brake)
    travelled, step = first.copy(), first.copy()
    for _ in range(100):
        step = np.maximum(step - brake, 0)
        travelled += step
    np.testing.assert_allclose(travelled, room, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (np.array([0.0, np.nan, 0.0]), "action_not_finite"),
        (np.array([np.inf, 0.0, 0.0]), "action_not_finite"),
        (np.zeros(2), "action_malformed"),
        (np.array(["a", "b", "c"]), "action_malformed"),
        ([0.0, 0.0, 0.0], "action_malformed"),
    ],
)
def test_a_bad_command_brakes_in_the_same_tick(target, name, caplog):
    chain = SafetyChain(limits(), DT)
    for k in range(20):
        chain.filter(np.full(3, 0.0002 * k * k), situation())
    step = chain._motion.step.copy()
    verdict = chain.filter(target, situation())
    assert name in flag_names(verdict.flags)
    assert name in caplog.text
    assert (np.abs(chain._motion.step) < np.abs(step)).all()
    assert chain.counts[name] == 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"command_stamp": -2.0}, "command_stale"),
        ({"command_stamp": 5.0}, "command_stale"),
        ({"observation": StampedObservation({}, 0, -0.2)}, "state_stale"),
        ({"observation": StampedObservation({}, 0, 0.0, {"images.front": -0.5})}, "camera_stale"),
        ({"writer": "human", "command_stamp": -0.5}, "operator_lost"),
        ({"writer": "none"}, "no_writer"),
        ({"estop": True}, "emergency_stop"),
        ({"observation": StampedObservation({"state": np.array([np.nan])}, 0, 0.0)}, "observation_not_finite"),
    ],
)
def test_whatever_is_old_or_not_permitted_brakes_and_is_named(changes, name, caplog):
    chain = SafetyChain(limits(), DT)
    verdict = chain.filter(np.full(3, 0.0001), situation(**changes))
    assert flag_names(verdict.flags) == [name]
    assert caplog.messages == [f"safety: {name} (1 so far)"]
    assert (verdict.command == 0).all()


def test_a_robot_that_does_not_follow_is_a_fault_after_some_ticks():
    chain = SafetyChain(limits(), DT, SafetyConfig(tracking_seconds=0.1, tracking_ticks=3))
    stuck = np.array([0.5, 0.0, 0.0])
    flags = [chain.filter(np.zeros(3), situation(measured=stuck)).flags for _ in range(3)]
    assert [flag_names(f) for f in flags] == [[], [], ["tracking_error"]]
    assert chain.filter(np.zeros(3), situation(measured=np.full(3, np.nan))).flags & SafetyFlag.TRACKING_ERROR


@pytest.mark.parametrize("measured", [np.zeros(2), np.zeros(4), np.zeros((1, 3))])
def test_a_measurement_of_another_size_is_a_stop(measured):
    chain = SafetyChain(limits(), DT)
    verdict = chain.filter(np.full(3, 0.001), situation(measured=measured))
    assert flag_names(verdict.flags) == ["exception"]
    assert (verdict.command == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_measurements_may_be_of_any_numeric_type(dtype):
    chain = SafetyChain(limits(), DT)
    assert chain.filter(np.full(3, 0.0001), situation(measured=np.zeros(3, dtype))).flags == 0


def test_an_exception_in_a_stage_is_a_stop(caplog):
    def broken(commands):
        raise RuntimeError("no kinematics today")

    chain = SafetyChain(limits(), DT, guards=Guards(workspace=Workspace(-np.ones(3), np.ones(3), kinematics=broken)))
    verdict = chain.filter(np.full(3, 0.0001), situation())
    assert flag_names(verdict.flags) == ["exception"]
    assert (verdict.command == 0).all()
    assert "no kinematics today" in caplog.text


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kinematic=st.booleans())
def test_workspace_planes_and_box_hold_whatever_is_asked(seed, kinematic):
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(3, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    planes = np.concatenate([normals, np.full((3, 1), -0.2)], axis=1)
    kinematics = (lambda commands: commands[:, [1, 2, 0]]) if kinematic else None
    workspace = Workspace(np.full(3, -0.3), np.full(3, 0.3), planes, kinematics)
    chain = SafetyChain(limits(4), DT, guards=Guards(workspace=workspace))
    target = np.zeros(4)
    for k in range(120):
        if k % 20 == 0:
            target = rng.uniform(-1, 1, 4)
        chain.filter(target, situation())
        assert workspace.excess(chain.command[None]) <= 1e-12
    assert chain.counts["post_check_failed"] == chain.counts["exception"] == 0


@pytest.mark.parametrize(("tick", "acceleration"), [(0.002, 2.0), (0.002, 1.0), (0.01, 0.3)])
def test_a_wall_holds_for_a_robot_that_takes_hundreds_of_ticks_to_stop(tick, acceleration, caplog):
    caplog.set_level(logging.INFO)
    workspace = Workspace(planes=np.array([[1.0, 0.0, 0.0, -0.5]]))
    slow = limits(3, span=10.0, acceleration=acceleration)
    chain = SafetyChain(slow, tick, guards=Guards(workspace=workspace))
    chain.anchor(np.array([3.0, 0.0, 0.0]))
    for _ in range(int(8.0 / tick)):
        chain.filter(np.array([-9.0, 0.0, 0.0]), situation())
        assert workspace.excess(chain.command[None]) <= 1e-12
    assert chain.command[0] < 0.51, "it goes up to the wall"
    assert "safety: workspace_limited (1 so far)" in caplog.messages


def test_a_stop_that_cannot_be_looked_ahead_is_refused():
    guards = Guards(workspace=Workspace(-np.ones(3), np.ones(3)))
    SafetyChain(limits(acceleration=0.01), DT)
    with pytest.raises(ConfigError, match=r"takes 1000\d ticks of 0.01 s.* looks 1000 ahead"):
        SafetyChain(limits(acceleration=0.01), DT, guards=guards)
    with pytest.raises(ConfigError, match="looks 400 ahead"):
        SafetyChain(dataclasses.replace(limits(acceleration=0.2), jerk=np.ones(3)), DT, guards=guards)


@pytest.mark.parametrize("place", [np.array([np.nan, 0.0, 0.0]), np.zeros(2)])
def test_a_robot_that_does_not_say_where_it_is_is_not_started_from(place):
    with pytest.raises(HardwareError, match="does not say where it is"):
        SafetyChain(limits(), DT).anchor(place)


def test_rates_brake_to_zero_instead_of_standing_still():
    chain = SafetyChain(limits(2, velocity=2.0, acceleration=50.0), DT, resting=np.array([True, False]))
    for _ in range(100):
        chain.filter(np.array([0.5, 0.5]), situation())
    for _ in range(100):
        chain.filter(None, situation())
    assert chain.command[0] == pytest.approx(0.0, abs=1e-12)
    assert chain.command[1] == pytest.approx(0.5)
    assert not chain.moving


def test_a_start_outside_the_range_moves_only_inwards():
    chain = SafetyChain(limits(1), DT)
    chain.anchor(np.array([1.5]))
    assert chain.filter(np.array([2.0]), situation()).command[0] == 1.5
    previous = 1.5
    for _ in range(200):
        command = chain.filter(np.array([0.0]), situation()).command[0]
        assert command <= previous
        previous = command
    assert previous == pytest.approx(0.0)
    assert all(chain.filter(np.array([3.0]), situation()).command[0] <= 1.0 for _ in range(300))


def test_limits_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="low <= high"):
        MotionLimiter(limits(velocity=0.0), DT)
