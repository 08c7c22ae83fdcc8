"""Every driver keeps one contract, on the emulator of its robot; and what a robot does wrong comes through as such."""

import itertools
import time

import numpy as np
import pytest
from driver_benches import BENCHES, PATIENCE

from hardware.robots.fake import FakeRobot, FaultyRobot
from hardware.robots.sim import SimRobot
from robot_rl.core.errors import HardwareError
from robot_rl.core.robot import RobotState, StopKind
from robot_rl.core.robot_testing import check_robot, fails_within, refusal

pytestmark = [pytest.mark.ros, pytest.mark.timeout(200)]


@pytest.fixture(params=BENCHES)
def bench(request, tmp_path, ros_domain):
    made = BENCHES[request.param](tmp_path)
    yield made
    made.close()


def test_every_driver_keeps_the_contract_also_behind_the_wrapper_of_faults(bench):
    check_robot(lambda: FaultyRobot(bench.robot))


def test_simulated_robots_keep_the_contract():
    check_robot(lambda: SimRobot("navigate"))


def test_lost_exchanges_are_forgiven_and_silence_is_a_fault_that_says_why(bench):
    robot = bench.robot
    robot.connect()
    hold, before = robot.hold_command(), robot.observe().seq
    bench.hiccup(3)
    deadline = time.monotonic() + PATIENCE
    while robot.observe().seq < before + 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert robot.state() is RobotState.READY
    if bench.counts:
        assert 1 <= robot.failures <= robot.config.max_failures
    bench.silence()
    message = str(fails_within(robot, 15.0))
    assert len(message) > 20
    assert "\n" not in message
    assert refusal(lambda: robot.command(hold)), "a robot that has failed takes no command"
    assert refusal(lambda: robot.stop(StopKind.CONTROLLED)) or robot.stop(StopKind.CONTROLLED) is False


FAULTS = {
    "delay": {"delay": 3},
    "delay_seconds": {"delay_seconds": 0.3},
    "drop": {"drop": 0.5},
    "freeze": {"freeze": True},
    "not_a_number": {"not_a_number": True},
    "jump": {"jump": 0.5},
    "disconnected": {"disconnected": True},
    "deaf": {"deaf": True},
}


@pytest.mark.parametrize("bench", ["fake", "so101"], indirect=True)
def test_every_fault_that_is_injected_shows_and_leaves_with_it(bench):
    robot = FaultyRobot(bench.robot)
    bench.robot.connect()
    behind = []

    def measured():
        """Return what is observed once the robot behind has measured anew, and 12 ms later at least."""
        time.sleep(0.012)
        behind.append(bench.robot.observe().seq)
        deadline = time.monotonic() + PATIENCE
        while bench.robot.observe().seq == behind[-1]:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return robot.observe()

    for _ in range(30):
        measured()
    for name, settings in FAULTS.items():
        clean = robot.observe()
        place = robot.hold_command()
        for key, value in settings.items():
            setattr(robot.faults, key, value)
        time.sleep(0.03)
        if name == "disconnected":
            with pytest.raises(HardwareError, match="injected"):
                robot.observe()
        elif name == "deaf":
            assert robot.stop() is False
        else:
            seen = [measured() for _ in range(20)]
            key = next(k for k, v in clean.values.items() if v.dtype.kind == "f")
            if name == "freeze":
                assert {one.seq for one in seen} == {clean.seq}
            elif name == "drop":
                assert any(a.seq == b.seq for a, b in itertools.pairwise(seen))
            elif name == "delay_seconds":
                assert seen[-1].age(time.monotonic()) >= 0.3
            elif name == "delay":
                assert seen[-1].seq <= behind[-1] - 2
            elif name == "not_a_number":
                assert np.isnan(seen[-1].values[key]).all()
                assert np.isnan(robot.hold_command()).all()
            elif name == "jump":
                assert np.allclose(seen[-1].values[key] - clean.values[key], 0.5, atol=0.05)
                assert np.allclose(robot.hold_command() - place, 0.5, atol=0.05)
        robot.faults = type(robot.faults)()


def test_a_blocked_joint_stays_where_it_was_and_the_others_move():
    robot = FaultyRobot(FakeRobot())
    robot.connect()
    robot.command(np.array([0.1, 0.2, 0.3]))
    robot.faults.stuck_joint = 1
    assert robot.command(np.full(3, 0.5)).tolist() == [0.5, 0.5, 0.5], "the driver does not know"
    assert robot.hold_command().tolist() == [0.5, 0.2, 0.5]
    robot.faults.stuck_joint = None
    robot.command(np.full(3, 0.5))
    assert robot.hold_command().tolist() == [0.5, 0.5, 0.5]
