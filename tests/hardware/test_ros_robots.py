"""Arms and bases behind ROS 2 topics, against emulated ones in a process of their own."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
from driver_benches import JOINTS, PATIENCE, ros_arm, ros_base

pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")
pytest.importorskip("nav_msgs", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")

from hardware.control.settings import rate_elements
from hardware.ros.arm import RosArm, RosArmConfig
from hardware.ros.base import RosBase, RosBaseConfig, nearest
from hardware.ros.camera import RosCamera, RosCameraConfig, to_rgb
from robot_rl.core.errors import ConfigError, DataError, HardwareError
from robot_rl.core.robot import RobotState, StopKind

pytestmark = [pytest.mark.ros, pytest.mark.timeout(200), pytest.mark.usefixtures("ros_domain")]
DISCOVERY = 6.0
"""Seconds in which a new node hears of the others even where others compute; who waits in vain waits as long."""
SLOW = {"max_silence": 10.0, "stop_timeout": 10.0}
"""For emulators that may get no processor for a while."""


@pytest.fixture(scope="module")
def arm(ros_domain, tmp_path_factory):
    bench = ros_arm(tmp_path_factory.mktemp("arm"), **SLOW)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def base(ros_domain, tmp_path_factory):
    bench = ros_base(tmp_path_factory.mktemp("base"), **SLOW)
    yield bench
    bench.close()


def test_missing_joints_are_named(arm):
    arm.robot.connect()  # the emulator is up from here on
    arm.robot.disconnect()
    settings = {**vars(arm.config), "joints": ("shoulder", "wrist", "elbow"), "connect_timeout": DISCOVERY}
    robot = RosArm(RosArmConfig(**settings))
    with pytest.raises(HardwareError, match="'/joint_states' lacks wrist; there are: elbow, gripper, shoulder"):
        robot.connect()
    assert robot.state() is RobotState.DISCONNECTED


def test_topics_without_anybody_are_named(arm):
    quick = {**vars(arm.config), "connect_timeout": 0.4}
    with pytest.raises(HardwareError, match="nobody publishes '/elsewhere' in ROS domain"):
        RosArm(RosArmConfig(**{**quick, "state_topic": "/elsewhere"})).connect()
    arm.robot.connect()
    arm.robot.disconnect()
    settings = {**vars(arm.config), "command_topic": "/nobody/here", "connect_timeout": DISCOVERY}
    with pytest.raises(HardwareError, match=r"nobody listens to '/nobody/here': .*list_controllers"):
        RosArm(RosArmConfig(**settings)).connect()


def test_a_second_writer_is_refused_with_the_name_of_the_first(arm, monkeypatch):
    arm.robot.connect()
    monkeypatch.setattr("hardware.ros.driver._DISCOVERY_SECONDS", PATIENCE)
    second = RosArm(arm.config)
    with pytest.raises(HardwareError, match=r"commands' is written by arm_\d+_\d+: there is one writer or none"):
        second.connect()
    arm.robot.disconnect()


def test_a_stop_amid_a_motion_brakes_and_holds(arm):
    robot = arm.robot
    robot.connect()
    start = robot.hold_command()
    for k in range(40):
        robot.command(start + 0.01 * k)  # 1 rad/s
        time.sleep(0.01)
    assert robot.stop(StopKind.CONTROLLED)
    place = robot.hold_command()
    assert (place > start + 0.2).all()
    time.sleep(0.2)
    np.testing.assert_allclose(robot.hold_command(), place, atol=0.006)
    assert robot.stop(StopKind.DRIVES_OFF) is False, "over topics nobody can switch drives off"
    robot.command(start)
    robot.disconnect()


def test_settings_of_arms_are_checked():
    with pytest.raises(ConfigError, match="names of its 'joints'"):
        RosArm(RosArmConfig())
    with pytest.raises(ConfigError, match="needs 3 numbers in 'low', not 0"):
        RosArm(RosArmConfig(joints=JOINTS))
    one = {"joints": ("a",), "max_velocity": (1.0,), "max_acceleration": (1.0,)}
    with pytest.raises(ConfigError, match="not below"):
        RosArm(RosArmConfig(low=(1.0,), high=(1.0,), **one))
    robot = RosArm(RosArmConfig(low=(0.0,), high=(0.4,), unit="m", velocities=True, **one))
    assert robot.spec.observation["velocity"].unit == "m/s"
    assert not rate_elements(robot).any()


def test_the_base_drives_and_its_odometry_tells(base):
    robot = base.robot
    assert rate_elements(robot).all()
    robot.connect()
    begun = robot.observe()
    assert begun.values["scan"].shape == (36,)
    assert begun.values["scan"][9] == 2.0, "the nearest of its share, not the one that hit nothing"
    assert "scan" in begun.stamps
    deadline = time.monotonic() + PATIENCE
    seen = begun.values["odometry"]
    while seen[0] < begun.values["odometry"][0] + 0.15 or seen[3:] != pytest.approx([0.4, 0.5], abs=0.02):
        assert time.monotonic() < deadline, f"it is at {seen}"
        robot.command(np.array([0.4, 0.5]))
        time.sleep(0.02)
        seen = robot.observe().values["odometry"]
    assert seen[2] > 0.05
    assert robot.stop(StopKind.CONTROLLED)
    assert np.abs(robot.observe().values["odometry"][3:]).max() <= 0.02
    assert robot.hold_command().tolist() == [0, 0]
    np.testing.assert_array_equal(robot.command(np.array([9.0, -9.0])), [0.5, -1.0])
    assert robot.stop(StopKind.HOLD)
    robot.disconnect()


def test_a_base_that_takes_the_other_kind_of_twist_is_refused(base):
    base.robot.connect()
    base.robot.disconnect()
    wrong = RosBase(RosBaseConfig(stamped=True, connect_timeout=DISCOVERY))
    with pytest.raises(HardwareError, match=r"'/cmd_vel' is read as geometry_msgs/msg/Twist, not .*TwistStamped"):
        wrong.connect()


def test_settings_of_bases_are_checked():
    with pytest.raises(ConfigError, match="positive max_speed"):
        RosBase(RosBaseConfig(max_speed=0.0))
    assert set(RosBase(RosBaseConfig()).spec.observation) == {"odometry"}


def test_beams_take_the_nearest_and_ignore_what_is_no_distance():
    config = RosBaseConfig(beams=3, scan_range=4.0)
    limits = SimpleNamespace(range_min=0.1, range_max=8.0)
    ranges = np.array([1.0, 0.05, math.nan, math.inf, 9.0, 6.0])
    np.testing.assert_allclose(nearest(ranges, limits, config), [1.0, 4.0, 4.0])
    assert nearest(np.zeros(0), limits, config).tolist() == [4.0] * 3


def test_a_camera_on_a_topic(base):
    camera = RosCamera(RosCameraConfig(width=32, height=24, connect_timeout=PATIENCE, clock="system"))
    camera.connect()
    first = camera.frame()
    deadline = time.monotonic() + PATIENCE
    while camera.frame().seq < first.seq + 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    frame = camera.frame()
    assert frame.image.shape == (24, 32, 3)
    assert frame.image[..., 0].min() >= 200 > 100 > frame.image[..., 1].mean()
    assert -0.001 <= time.monotonic() - frame.stamp < PATIENCE
    assert frame.stamp > first.stamp
    camera.disconnect()
    with pytest.raises(HardwareError, match=r"on '/nothing' gave no image within 0\.3 s"):
        RosCamera(RosCameraConfig(topic="/nothing", connect_timeout=0.3)).connect()


def test_a_publisher_that_repeats_its_image_gives_no_new_frame():
    from builtin_interfaces.msg import Time
    from sensor_msgs.msg import Image

    camera = RosCamera(RosCameraConfig(width=2, height=1))
    message = Image(width=2, height=1, encoding="rgb8", step=6, data=bytes(range(6)))
    message.header.stamp = Time(sec=5)
    camera._receive(message)
    frame = camera.frame()
    camera._receive(message)
    assert camera.frame() is frame
    message.header.stamp = Time(sec=6)
    camera._receive(message)
    assert camera.frame().seq == 1


def test_encodings_of_images():
    def message(encoding, step, data):
        return SimpleNamespace(encoding=encoding, step=step, width=2, height=1, data=bytes(data))

    assert to_rgb(message("bgr8", 6, [1, 2, 3, 4, 5, 6])).tolist() == [[[3, 2, 1], [6, 5, 4]]]
    assert to_rgb(message("rgb8", 8, [1, 2, 3, 4, 5, 6, 0, 0])).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert to_rgb(message("rgba8", 8, [1, 2, 3, 9, 4, 5, 6, 9])).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert to_rgb(message("bgra8", 8, [3, 2, 1, 9, 6, 5, 4, 9])).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert to_rgb(message("mono8", 2, [7, 8])).tolist() == [[[7] * 3, [8] * 3]]
    with pytest.raises(DataError, match="encoding 'yuv422'"):
        to_rgb(message("yuv422", 4, [0] * 4))
    with pytest.raises(DataError, match="expected 1 rows of 6"):
        to_rgb(message("rgb8", 6, [0] * 5))
