"""Franka arms: reflexes, user stop and hand, on objects in the library's place that have its names and parameters."""

import inspect
import time

import numpy as np
import pytest
from driver_benches import EmulatedHand, EmulatedPanda, FrankaBench

from hardware.robots.franka import Franka, FrankaConfig
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.robot import StopKind
from robot_rl.core.robot_testing import fails_within


@pytest.fixture
def bench(tmp_path, request):
    made = FrankaBench(tmp_path, **getattr(request, "param", {}))
    yield made
    made.close()


with_hand = pytest.mark.parametrize("bench", [{"hand": True}], indirect=True)


def eventually(happens, what):
    deadline = time.monotonic() + 10.0
    while not happens():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("mode", "errors", "what"),
    [
        ("kReflex", "[joint_reflex]", r"is in reflex \(\[joint_reflex\]\): look why"),
        ("kUserStopped", "", "held by its user stop"),
        ("kGuiding", "", "guided by hand"),
        ("kOther", "", "unlock its brakes"),
    ],
)
def test_the_robots_own_stops_are_faults_with_their_name(bench, mode, errors, what):
    bench.robot.connect()
    bench.panda.mode, bench.panda.errors = mode, errors
    with pytest.raises(HardwareError, match=what):
        raise fails_within(bench.robot, 3.0)
    bench.robot.disconnect()
    with pytest.raises(HardwareError, match=what):
        bench.robot.connect()


def test_a_reflex_is_cleared_only_if_that_is_asked_for(tmp_path, bench):
    bench.panda.mode, bench.panda.errors = "kReflex", "[cartesian_reflex]"
    with pytest.raises(HardwareError, match="connect with recover=yes"):
        bench.robot.connect()
    assert bench.panda.mode == "kReflex"
    bench.robot = Franka(FrankaConfig(recover=True))
    bench.robot.connect()
    assert bench.panda.mode == "kMove"


def test_a_controller_that_breaks_off_is_a_fault_that_says_why(bench):
    bench.robot.connect()
    bench.panda.broken = "libfranka: Move command aborted:\n communication_constraints_violation"
    assert "aborted: communication_constraints_violation" in str(fails_within(bench.robot, 3.0))


def test_connecting_moves_nothing_and_a_system_without_real_time_is_refused(bench):
    bench.permission = (False, "libfranka: unable to set\n realtime scheduling")
    with pytest.raises(HardwareError, match=r"unable to set realtime scheduling \(real_time=no"):
        bench.robot.connect()
    assert bench.panda.started == 0
    bench.permission = (True, "")
    before = bench.panda.place.copy()
    bench.robot.connect()
    assert bench.panda.enforced == "enforced"
    time.sleep(0.1)
    np.testing.assert_array_equal(bench.robot.hold_command(), before)


def test_settings_beyond_the_robots_own_limits_are_refused_by_name(bench):
    bench.panda.highest[5] = 3.0
    with pytest.raises(HardwareError, match="'high' of joint6 lie beyond the robot's own limits"):
        bench.robot.connect()


def test_a_stop_brings_the_arm_to_rest(bench):
    bench.robot.connect()
    for k in range(20):
        bench.robot.command(bench.panda.place + 0.05 + 0.001 * k)
        time.sleep(0.005)
    assert bench.robot.stop(StopKind.CONTROLLED) is True
    place = bench.robot.hold_command()
    time.sleep(0.1)
    np.testing.assert_allclose(bench.robot.hold_command(), place, atol=0.002)
    assert bench.robot.stop(StopKind.DRIVES_OFF) is False, "its brakes are not ours to close"


@with_hand
def test_the_hand_grasps_when_it_closes_and_follows_the_newest_wish(bench):
    bench.hand.between = 0.03
    bench.robot.connect()
    hold = bench.robot.hold_command()
    assert hold.shape == (8,)
    assert bench.robot.observe().values["state"][7] == np.float32(0.04)
    for width in np.linspace(0.04, 0.0, 9):  # a ramp, as the safety chain makes of a jump
        bench.robot.command(np.append(hold[:7], width))
        time.sleep(0.002)
    eventually(lambda: bench.robot.observe().values["state"][7] == np.float32(0.03), "it holds what is between")
    assert bench.hand.asked == [("grasp", 0.0)], "a ramp is one motion"
    assert bench.robot.hold_command()[7] == 0.0, "holding the robot keeps the grasp"
    bench.robot.command(np.append(hold[:7], 0.08))
    eventually(lambda: bench.robot.observe().values["state"][7] == np.float32(0.08), "it opens")
    assert bench.hand.asked[-1] == ("move", 0.08)


@with_hand
def test_a_hand_that_fails_is_a_fault(bench):
    bench.robot.connect()
    bench.hand.broken = "libfranka gripper: UDP receive: Timeout"
    assert "its hand failed: libfranka gripper: UDP receive" in str(fails_within(bench.robot, 3.0))


def test_what_cannot_work_is_named():
    with pytest.raises(ConfigError, match="seven numbers in 'damping'"):
        Franka(FrankaConfig(damping=(1.0,)))


def test_without_a_robot_the_librarys_error_is_one_line():
    pytest.importorskip("panda_py", reason="pip install 'robot-rl[franka]'")
    with pytest.raises(HardwareError, match=r"127\.0\.0\.1: .*refused"):
        Franka(FrankaConfig(host="127.0.0.1", real_time=False)).connect()


def test_what_stands_for_the_library_has_its_names_and_parameters():
    library = pytest.importorskip("panda_py", reason="pip install 'robot-rl[franka]'")
    from panda_py import controllers, libfranka

    for ours, theirs in ((EmulatedPanda, library.Panda), (EmulatedHand, libfranka.Gripper)):
        for name, function in inspect.getmembers(ours, inspect.isfunction):
            if name.startswith("_"):
                continue
            described = getattr(theirs, name).__doc__
            for parameter in list(inspect.signature(function).parameters)[1:]:
                assert f"{parameter}:" in described, f"{name}({parameter})"
    for name in ("q", "dq", "tau_ext_hat_filtered", "robot_mode", "current_errors", "time"):
        assert hasattr(libfranka.RobotState, name)
    assert {"kReflex", "kUserStopped", "kGuiding"} <= set(libfranka.RobotMode.__members__)
    assert {"kEnforce", "kIgnore"} <= set(libfranka.RealtimeConfig.__members__)
    assert "stiffness:" in controllers.JointPosition.__init__.__doc__
    permitted, why = library.realtime_priority_available()
    assert permitted or why
