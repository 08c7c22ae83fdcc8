"""A leader arm: the robot takes its pose, slowly where it stands elsewhere; its loss is the operator's."""

import os
import time

import numpy as np
import pytest
from deployment_rig import WanderingPolicy
from driver_benches import six_joints

from hardware.control.executor import Executor, ExecutorConfig
from hardware.emulators.servo_bus import ServoBusEmulator
from hardware.policy_process import PolicyServer
from hardware.robots.fake import FakeRobot
from hardware.servo.calibration import Calibration
from hardware.servo.family import DYNAMIXEL, FEETECH
from hardware.teleop.build import build_teleop
from hardware.teleop.keyboard import KeyboardTeleop
from hardware.teleop.leader import LeaderArm, LeaderArmConfig
from hardware.transport import InProcessTransport
from robot_rl.core.errors import ConfigError, HardwareError, UnknownNameError
from robot_rl.core.robot import Limits
from robot_rl.core.teleop import OperatorEvent, Teleop


@pytest.fixture(params=[(DYNAMIXEL, 1190), (FEETECH, 777)], ids=lambda kind: kind[0].name)
def bus(request):
    family, model = request.param
    with ServoBusEmulator(family, model=model) as emulator:
        emulator.servos[3].put("offset", -700)
        emulator.turn(3, 2048 + family.offset_sign * 700)
        yield emulator


@pytest.fixture
def path(tmp_path, bus):
    six_joints(bus.family, bus.servos[1].get("model")).save(tmp_path / "leader.yaml")
    return tmp_path / "leader.yaml"


@pytest.fixture
def leader(bus, path):
    device = LeaderArm(6, LeaderArmConfig(port=bus.port, calibration=path, keyboard=False, dwell=0.3))
    device.connect()
    yield device
    device.disconnect()


def move(bus, device, pose, seconds=0.2):
    """Move the leader by hand to a pose (6,) in rad, and return the last reading."""
    joints = list(Calibration.load(device.config.calibration).joints.values())
    begun = [bus.servos[joint.id].shaft for joint in joints]
    for k in range(1, 21):
        for joint, start, angle in zip(joints, begun, pose, strict=True):
            goal = joint.position(angle) - bus.family.offset_sign * joint.offset
            bus.turn(joint.id, start + (goal - start) * k / 20)
        time.sleep(seconds / 20)
        reading = device.poll()
    return reading


def test_a_pose_becomes_a_command_and_its_motion_a_wish(bus, leader):
    assert isinstance(leader, Teleop)
    assert not any(servo.get("torque") for servo in bus.servos.values()), "it can be moved by hand"
    still = [leader.poll() for _ in range(20) if time.sleep(0.01) is None][-1]
    assert not still.enabled
    assert still.target is None
    assert not still.motion.any()
    pose = np.array([0.5, 0.4, -0.3, 0.2, 0.0, 1.0])
    reading = move(bus, leader, pose)
    assert reading.enabled
    assert reading.motion[0] == pytest.approx(1.0)
    assert reading.motion[2] == pytest.approx(-1.0)
    time.sleep(0.15)
    np.testing.assert_allclose(leader.poll().target, pose, atol=2e-3)
    time.sleep(0.3)
    leader.poll()
    resting = leader.poll()
    assert not resting.enabled
    assert resting.target is None


def test_an_arm_that_answers_no_more_gives_no_signs_of_life(bus, leader):
    move(bus, leader, np.full(6, 0.2))
    bus.silent = set(bus.servos)
    deadline = time.monotonic() + 3.0
    while leader.poll().enabled:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lost = leader.poll()
    time.sleep(0.05)
    assert leader.poll().stamp == lost.stamp
    assert not lost.motion.any()


def test_ranges_of_scaled_joints_are_mapped_onto_each_other(bus, path, tmp_path):
    other = Calibration.load(path)
    joints = {
        n: type(j)(**{**vars(j), "low": -0.1, "high": 1.7}) if n == "gripper" else j for n, j in other.joints.items()
    }
    Calibration(bus.family, joints).save(tmp_path / "follower.yaml")
    settings = {
        "port": bus.port,
        "calibration": str(path),
        "follower": str(tmp_path / "follower.yaml"),
        "keyboard": False,
    }
    device = build_teleop("leader", 6, settings)
    device.connect()
    pose = np.full(6, 0.3)
    move(bus, device, pose)
    time.sleep(0.1)
    shown = device.poll().target
    np.testing.assert_allclose(shown[:5], pose[:5], atol=2e-3)
    assert shown[5] == pytest.approx(-0.1 + (0.3 + 1.5) / 2.7 * 1.8, abs=3e-3)
    device.disconnect()


def test_settings_are_checked(path, bus):
    with pytest.raises(ConfigError, match="has 6 joints, the robot's action 7 elements"):
        build_teleop("leader", 7, {"calibration": str(path)})
    with pytest.raises(UnknownNameError, match="Did you mean 'scaled'"):
        build_teleop("leader", 6, {"calibration": str(path), "scald": []})
    with pytest.raises(ConfigError, match="colour"):
        build_teleop("keyboard", 6, {"colour": 1})
    bus.silent = {1}
    with pytest.raises(HardwareError, match="no servo answers for shoulder_pan"):
        LeaderArm(6, LeaderArmConfig(port=bus.port, calibration=path, keyboard=False)).connect()


def test_the_terminals_event_keys_belong_to_it(bus, path):
    device = LeaderArm(6, LeaderArmConfig(port=bus.port, calibration=path))
    master, slave = os.openpty()
    device._keys = KeyboardTeleop(6, file_descriptor=slave)
    device.connect()
    os.write(master, b"n ")
    time.sleep(0.05)
    assert device.poll().events == (OperatorEvent.ENABLE, OperatorEvent.EMERGENCY_STOP)
    device.disconnect()
    os.close(master)
    os.close(slave)


def test_moving_the_leader_takes_over_and_the_robot_follows_it(bus, leader):
    one = np.ones(6)
    robot = FakeRobot(6, limits=Limits(-1.5 * one, 1.5 * one, 4 * one, 40 * one))
    transport = InProcessTransport(quiet=True)
    server = PolicyServer(WanderingPolicy(robot.spec, speed=0.002), transport.policy)
    transport.on_observation = server.serve_once
    config = ExecutorConfig(execute_steps=4, blend_seconds=0.0, max_state_age=2.0, operator_timeout=1.0)
    executor = Executor(robot, transport.executor, config, teleop=leader)
    executor.connect()
    poll, events = leader.poll, [(OperatorEvent.ENABLE,)]

    def polled():
        reading = poll()
        reading.events = events.pop() if events else ()
        return reading

    leader.poll = polled
    for _ in range(20):
        executor.tick()
        time.sleep(0.01)
    assert executor.arbiter.mode.value == "auto"
    pose = np.array([0.4, 0.3, -0.3, 0.2, 0.1, 0.5])
    joints = list(Calibration.load(leader.config.calibration).joints.values())
    for k in range(1, 60):
        if k <= 20:
            for joint, angle in zip(joints, pose, strict=True):
                bus.turn(joint.id, joint.position(k / 20 * angle) - bus.family.offset_sign * joint.offset)
        executor.tick()
        time.sleep(0.01)
    assert (executor.arbiter.mode.value, executor.arbiter.reason) == ("human", "operator_motion")
    np.testing.assert_allclose(executor.safety.command, pose, atol=5e-3)
    steps = np.abs(np.diff(robot.effective_commands(), axis=0))
    assert steps.max() <= 4 * 0.01 + 1e-9
    executor.shut_down()
