"""The jerk limit: third differences stay inside it, whatever is asked, and a stop inside every limit stays possible."""

import logging

import numpy as np
import pytest
from deployment_rig import smooth_path

from hardware.safety import arithmetic
from hardware.safety.chain import SafetyChain, Situation
from hardware.safety.flags import flag_names
from hardware.safety.jerk import JerkLimiter
from hardware.safety.surroundings import Guards
from hardware.safety.workspace import Workspace
from robot_rl.core.errors import ConfigError
from robot_rl.core.robot import Limits, StampedObservation

DT = 0.01


def limits(size=3, jerk=100.0):
    one = np.ones(size)
    return Limits(-one, one, one, 5 * one, jerk * one)


def situation(**changes):
    return Situation(0.0, StampedObservation({}, 0, 0.0), **{"writer": "policy", **changes})


def random_limits(rng, size):
    acceleration = 10 ** rng.uniform(-1, 2, size)
    return Limits(
        *(-rng.uniform(0, 3, size), rng.uniform(0.01, 3, size), 10 ** rng.uniform(-2, 1, size), acceleration),
        acceleration * 10 ** rng.uniform(-0.5, 3, size),
    )


@pytest.mark.parametrize("kind", ["uniform", "walk", "extremes"])
def test_random_commands_and_stops_keep_every_limit(kind):
    """300 commands of 400 axes, which are independent: 1.2e5 elements of random limits per kind."""
    rng, size = np.random.default_rng(7), 400
    bounds = random_limits(rng, size)
    chain = SafetyChain(bounds, DT)
    place, step, change = chain.command.copy(), np.zeros(size), np.zeros(size)
    target = place.copy()
    for _ in range(300):
        if kind == "uniform":
            target = rng.uniform(-6, 6, size)
        elif kind == "walk":
            target = target + rng.normal(0, 0.02, size)
        else:
            target = rng.choice([-1e12, -1.0, 0.0, 1.0, 1e12, 5e-324], size)
        command = chain.filter(None if rng.random() < 0.05 else target, situation()).command
        new = command - place
        turn = new - step
        assert np.isfinite(command).all()
        assert ((command >= bounds.low) & (command <= bounds.high)).all()
        assert (np.abs(new) <= bounds.velocity * DT).all()
        assert (np.abs(turn) <= bounds.acceleration * DT**2).all()
        assert (np.abs(turn - change) <= bounds.jerk * DT**3).all()
        place, step, change = command, new, turn
    for _ in range(3000):
        chain.filter(None, situation())
        if not chain.moving:
            break
    assert not chain.moving
    assert chain.counts["post_check_failed"] == chain.counts["exception"] == 0


def test_the_bound_of_the_way_that_braking_takes_is_never_too_small_and_not_much_too_large():
    rng, size = np.random.default_rng(0), 20_000
    surge = 10 ** rng.uniform(-3, 0, size)
    most = surge * 10 ** rng.uniform(-0.7, 2, size)
    fastest = most * 10 ** rng.uniform(-0.5, 2, size)
    one = np.ones(size)
    limiter = JerkLimiter(Limits(-1e8 * one, 1e8 * one, fastest / DT, most / DT**2, surge / DT**3), DT)
    first_step, first_change = fastest * rng.uniform(-1, 1, size), most * rng.uniform(-1, 1, size)
    step, change, place, farthest = first_step, first_change, np.zeros(size), np.zeros(size)
    for _ in range(1000):
        change = arithmetic.braking_change(step, change, limiter._limits)
        step = step + change
        place = place + step
        farthest = np.maximum(farthest, place)
        if not step.any():
            break
    assert not step.any()
    bound, peak = limiter.reach(first_step, first_change)
    assert (farthest <= bound * (1 + 1e-9) + 1e-12).all()
    forwards = (first_change >= 0) & (peak > 0)
    assert ((bound - farthest)[forwards] <= 2 * peak[forwards] + 1e-9).all()


def test_the_place_of_rest_is_where_the_braking_path_ends_or_a_little_beyond():
    rng = np.random.default_rng(2)
    chain = SafetyChain(limits(), DT)
    for _ in range(200):
        command = chain.filter(rng.uniform(-1, 1, 3), situation()).command
        motion = chain._motion
        target, _ = motion.limit(rng.uniform(-1, 1, 3))
        step = target - command
        end, rest = motion.braking_path(target)[-1], motion.rest_after(target)
        away = np.sign(step) * (rest - end)
        same = np.sign(end - target) == np.sign(step)  # those that do not swing back
        assert (away[same] >= -1e-12).all()
        change = np.sign(step) * (step - motion.step)
        speeding = same & (change >= 0)
        peak = motion.reach(np.abs(step), change)[1]
        assert (away[speeding] <= 2 * peak[speeding] + 1e-9).all()


def test_smooth_motions_pass_bit_for_bit():
    """10,000 commands: random paths of seven axes, whose jerk and acceleration the limits hardly exceed."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        path = smooth_path(rng, DT, 3)  # it starts with neither speed nor acceleration
        steps = np.diff(path, axis=0, prepend=path[:1])
        turns = np.diff(steps, axis=0, prepend=0 * steps[:1])
        surge = 1.0001 * np.abs(np.diff(turns, axis=0, prepend=0 * turns[:1])).max(axis=0)
        most = 1.0001 * np.abs(turns).max(axis=0)
        # Before braking begins, a change is led back to zero, and until then the speed grows.
        fastest = 1.0001 * (np.abs(steps) + turns**2 / (2 * surge)).max(axis=0)
        room = fastest * (fastest / most + 2 * most / surge + 4)
        low, high = path.min(axis=0) - room, path.max(axis=0) + room
        chain = SafetyChain(Limits(low, high, fastest / DT, most / DT**2, surge / DT**3), DT)
        chain.anchor(path[0])
        for target in path:
            verdict = chain.filter(target, situation())
            assert verdict.flags == 0
            assert (verdict.command == target).all()
        assert not chain.counts


@pytest.mark.parametrize(("jerk", "seconds"), [(20.0, 1.5), (100.0, 0.95), (1000.0, 0.8)])
def test_a_jump_is_walked_to_without_overshoot_and_named(jerk, seconds, caplog):
    caplog.set_level(logging.INFO)
    chain = SafetyChain(limits(1, jerk), DT)
    commands, names = [], set()
    for _ in range(200):
        verdict = chain.filter(np.array([0.5]), situation())
        commands.append(verdict.command[0])
        names |= set(flag_names(verdict.flags))
    assert max(commands) <= 0.5
    assert commands[-1] == 0.5
    assert np.argmax(np.array(commands) > 0.499) * DT <= seconds
    assert "jerk_limited" in names
    assert "safety: jerk_limited (1 so far)" in caplog.messages


def test_a_moving_target_is_caught_up_with():
    chain = SafetyChain(limits(1), DT)
    target = 0.3 + 0.4 * np.sin(1.2 * np.arange(300) * DT)
    left = [abs(chain.filter(target[k : k + 1], situation()).command[0] - target[k]) for k in range(300)]
    assert max(left[120:]) == 0.0


def test_who_is_ahead_of_a_moving_target_waits_for_it():
    # Jumps put the command ahead of some of the targets, which then move towards it.
    rng, size = np.random.default_rng(0), 50
    bounds = Limits(*(np.full(size, x) for x in (-3.0, 3.0, 2.0, 15.0, 600.0)))
    time = np.arange(1200)[:, None] * DT
    targets = 0.3 * np.sin(time * rng.uniform(0.5, 1.5, size)) + np.where(time % 2.0 < 1.0, 0.0, 0.2)
    chain = SafetyChain(bounds, DT)
    chain.anchor(targets[0])
    for k, target in enumerate(targets):
        verdict = chain.filter(target, situation())
        if k % 100 >= 50:
            assert (verdict.command == target).all()


def test_the_end_of_the_range_is_reached_and_not_passed():
    chain = SafetyChain(limits(1), DT)
    commands = [chain.filter(np.array([5.0]), situation()).command[0] for _ in range(400)]
    assert max(commands) <= 1.0
    assert commands[-1] > 0.9999


def test_the_workspace_holds_with_it_and_a_replacement_leaves_no_trace():
    rng = np.random.default_rng(1)
    workspace = Workspace(planes=np.concatenate([np.eye(3), np.full((3, 1), -0.2)], axis=1))
    chain = SafetyChain(limits(3), DT, guards=Guards(workspace=workspace))
    place, step, change = chain.command.copy(), np.zeros(3), np.zeros(3)
    for k in range(300):
        if k % 25 == 0:
            target = rng.uniform(-1, 1, 3)
        chain.filter(target, situation())
        if k % 3 == 0:
            chain.replace(rng.uniform(-1, 1, 3), situation())
        new = chain.command - place
        assert workspace.excess(chain.command[None]) <= 1e-12
        assert (np.abs(new - step - change) <= 100 * DT**3).all()
        place, step, change = chain.command, new, new - step
    assert chain.counts["workspace_limited"] > 5
    assert chain.counts["post_check_failed"] == chain.counts["exception"] == 0


def test_rates_come_to_rest_at_zero():
    chain = SafetyChain(limits(2), DT, resting=np.array([True, False]))
    for _ in range(150):
        chain.filter(np.array([0.5, 0.5]), situation())
    for _ in range(150):
        chain.filter(None, situation())
    np.testing.assert_array_equal(chain.command, [0.0, 0.5])
    assert not chain.moving


def test_a_jerk_limit_must_be_positive():
    with pytest.raises(ConfigError, match="positive"):
        SafetyChain(limits(jerk=0.0), DT)
