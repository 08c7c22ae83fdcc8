"""The post-check: whatever a stage before it lets through, no command that breaks stages 5 to 7 leaves the chain."""

import numpy as np
import pytest
from deployment_rig import Rig

from hardware.safety.chain import SafetyChain, Situation
from hardware.safety.flags import flag_names
from hardware.safety.surroundings import Guards
from hardware.safety.workspace import Workspace
from robot_rl.core.robot import Limits, StampedObservation

DT = 0.01
LIMITS = Limits(-np.ones(3), np.ones(3), np.ones(3), 10 * np.ones(3))
WALL = np.array([[-1.0, 0.0, 0.0, -0.2]])
"""x <= 0.2."""
AHEAD = np.array([0.5 * DT, 0.0, 0.0])


def situation():
    return Situation(0.0, StampedObservation({}, 0, 0.0), "policy")


def moving_chain(guards=None, jerk=None):
    """A chain whose robot moves along x at 0.5 per second."""
    limits = Limits(LIMITS.low, LIMITS.high, LIMITS.velocity, LIMITS.acceleration, jerk)
    chain = SafetyChain(limits, DT, guards=guards or Guards())
    chain.anchor(np.zeros(3))
    while chain.step[0] < 0.5 * DT:
        chain.filter(chain.command + AHEAD, situation())
    chain.counts.clear()
    return chain


@pytest.mark.parametrize("jerk", [None, 500 * np.ones(3)])
@pytest.mark.parametrize(
    ("illegal", "named"),
    [
        ([0.02, 0.0, 0.0], "velocity_limited"),
        ([0.0, 0.0, 0.009], "acceleration_limited"),
        ([1.5, 0.0, 0.0], "position_limited"),
    ],
)
def test_an_illegal_command_of_a_broken_stage_is_braked_counted_and_named(illegal, named, jerk, caplog):
    chain = moving_chain(jerk=jerk)
    brake, position = chain._motion.brake(), chain.command.copy()
    wrong = position + illegal
    chain._motion.limit = lambda target: (wrong, 0)
    verdict = chain.filter(position, situation())
    np.testing.assert_array_equal(verdict.command, brake)
    assert position[0] < verdict.command[0] < position[0] + 0.5 * DT, "slower than before, and not at once"
    assert flag_names(verdict.flags) == ["post_check_failed"]
    assert chain.counts == {"post_check_failed": 1}
    line = next(one.getMessage() for one in caplog.records if "safety post-check" in one.getMessage())
    assert named in line
    assert "safety: post_check_failed (1 so far)" in caplog.text


@pytest.mark.parametrize("model", [False, True])
def test_stages_that_ignore_the_workspace_do_not_get_the_robot_out_of_it(model, caplog):
    workspace = Workspace(planes=WALL, kinematics=(lambda commands: commands[:, :3]) if model else None)
    chain = moving_chain(Guards(workspace=workspace))
    chain._surroundings.limit = lambda command: (command, 0)
    while not chain.counts["post_check_failed"]:
        before = chain.command.copy()
        verdict = chain.filter(before + AHEAD, situation())
    assert 0.2 - 0.5 * DT < before[0] <= 0.2, "it fails with the first command that would be outside"
    assert verdict.command[0] - before[0] < 0.5 * DT, "and brakes"
    while chain.moving:
        assert not chain.filter(None, situation()).flags, "a brake is no failure, wherever it leads"
    assert 0.2 < chain.command[0] <= 0.2 + 0.5**2 / (2 * 10) + 1e-9, "one braking distance at most"
    outside = chain.command.copy()
    for _ in range(20):
        verdict = chain.filter(outside + AHEAD, situation())
        assert "post_check_failed" in flag_names(verdict.flags)
        np.testing.assert_array_equal(verdict.command, outside)
    assert "safety post-check: workspace_limited" in caplog.text
    verdict = chain.filter(outside - [1e-4, 0.0, 0.0], situation())
    assert not verdict.flags, "the way back is free"
    assert verdict.command[0] < outside[0]


def test_a_replacement_that_fails_the_post_check_replaces_nothing():
    chain = moving_chain()
    chain.filter(chain.command + AHEAD, situation())
    command = chain.command.copy()
    chain._motion.limit = lambda target: (target + 5.0, 0)
    assert chain.replace(command, situation()) is None
    np.testing.assert_array_equal(chain.command, command)


def test_the_executor_latches_a_stop_when_the_post_check_fails():
    rig = Rig().start()
    rig.tick(count=10)
    chain = rig.executor.safety
    limit = chain._motion.limit
    chain._motion.limit = lambda target: (chain.command + 0.5, 0)
    before, step = chain.command.copy(), chain.step.copy()
    rig.tick()
    chain._motion.limit = limit
    assert (rig.mode, rig.reason) == ("stopped", "post_check_failed")
    assert (np.abs(chain.command - before) <= np.abs(step)).all()
    np.testing.assert_array_equal(rig.plain.commands[-1], chain.command)
    assert rig.moved(40)[-1] == 0.0
