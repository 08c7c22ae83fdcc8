"""Arms of Universal Robots: the library's client against an emulated controller, and the controller's own stops."""

import dataclasses
import time

import numpy as np
import pytest
from driver_benches import URBench

pytest.importorskip("rtde_receive", reason="pip install 'robot-rl[ur]'")

from hardware.robots.ur import UR, URConfig
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.robot import StopKind
from robot_rl.core.robot_testing import fails_within


@pytest.fixture
def bench(tmp_path):
    made = URBench(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(("bits", "what"), [(4, "a protective stop"), (128, "an emergency stop")])
def test_the_controllers_own_stops_are_faults_with_their_name(bench, bits, what):
    bench.robot.connect()
    bench.tell("safety", bits)
    assert what in str(fails_within(bench.robot, 3.0))
    assert bench.robot.stop() is False
    with pytest.raises(HardwareError, match="teach pendant"):
        bench.robot.command(np.zeros(6))


def test_an_arm_that_is_not_running_is_refused(bench):
    bench.tell("mode", 3)
    time.sleep(0.1)
    with pytest.raises(HardwareError, match="in mode 3, not running"):
        bench.robot.connect()


def test_a_program_that_was_stopped_is_a_fault(bench):
    bench.robot.connect()
    bench.program.running = False
    assert "its program was stopped" in str(fails_within(bench.robot, 3.0))


def test_without_commands_servoing_ends(bench):
    bench.robot = UR(dataclasses.replace(bench.config, command_timeout=0.1))
    bench.robot.connect()
    bench.robot.command(np.full(6, 1.5))
    time.sleep(0.4)
    place = bench.robot.hold_command()
    assert (place < 1.0).all(), "far from the goal: 2 rad/s for a tenth of a second"
    time.sleep(0.1)
    np.testing.assert_allclose(bench.robot.hold_command(), place, atol=1e-6)
    assert bench.program.kicked > 10, "the watchdog is kept happy: the process lives"
    assert np.abs(bench.robot.observe().values["velocity"]).max() < 1e-6


def test_a_stop_that_the_controller_does_not_take_is_not_confirmed(bench):
    bench.robot.connect()
    bench.program.deaf = True
    assert bench.robot.stop(StopKind.HOLD) is False
    bench.program.deaf = False
    assert bench.robot.stop(StopKind.HOLD) is True
    assert bench.robot.stop(StopKind.DRIVES_OFF) is False


def test_what_cannot_work_is_named():
    with pytest.raises(ConfigError, match="needs six numbers"):
        UR(URConfig(low=(0.0,)))
    with pytest.raises(HardwareError, match=r"127\.0\.0\.250: .*[Cc]ould not connect"):
        UR(URConfig(host="127.0.0.250")).connect()
