"""A multirotor over MAVLink: nothing is armed unasked, pilots keep what they took, and stops end in hovering."""

import dataclasses
import socket
import time

import numpy as np
import pytest
from driver_benches import MultirotorBench

pytest.importorskip("pymavlink", reason="pip install 'robot-rl[mavlink]'")

from hardware.robots.mavlink import MODES, Multirotor, MultirotorConfig, px4_mode
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.robot import RobotState, StopKind
from robot_rl.core.robot_testing import fails_within


@pytest.fixture
def make(tmp_path):
    made = []

    def start(config=None, **vehicle):
        bench = MultirotorBench(tmp_path, **vehicle)
        bench.robot = Multirotor(dataclasses.replace(bench.config, **(config or {})))
        made.append(bench)
        return bench

    yield start
    for bench in made:
        bench.close()


def fly(bench, command, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        bench.robot.command(np.array(command, float))
        time.sleep(0.02)


@pytest.mark.parametrize("autopilot", [12, 3], ids=["px4", "ardupilot"])
def test_velocities_are_along_the_heading_and_z_points_up(make, autopilot):
    bench = make(autopilot=autopilot)
    vehicle = bench.vehicle
    vehicle.yaw = np.pi / 2  # east
    bench.robot.connect()
    assert vehicle.mode == MODES[autopilot].command
    fly(bench, [0.8, 0.4, 0.3, 0.0], 0.6)
    np.testing.assert_allclose(
        vehicle.velocity, [0.4, 0.8, -0.3], atol=0.05, err_msg="left of east is north, up is -down"
    )
    state = bench.robot.observe().values["state"]
    np.testing.assert_allclose(state[3:6], [0.4, -0.8, 0.3], atol=0.05)
    assert state[2] > 2.0
    assert state[8] == pytest.approx(-np.pi / 2, abs=0.01)
    fly(bench, [0.0, 0.0, 0.0, 0.5], 0.4)
    assert vehicle.yaw_rate == pytest.approx(-0.5, abs=0.05)
    bench.robot.disconnect()
    assert vehicle.mode == MODES[autopilot].hold
    assert vehicle.armed


def test_a_vehicle_that_is_not_armed_is_refused_unless_it_may_be(make):
    bench = make(armed=False, altitude=0.0)
    with pytest.raises(HardwareError, match="is not armed: start its motors by its own remote control"):
        bench.robot.connect()
    assert not bench.vehicle.armed
    assert bench.vehicle.mode != MODES[12].command
    bench.robot = Multirotor(dataclasses.replace(bench.config, allow_arming=True))
    bench.vehicle.refuses = {400}
    with pytest.raises(HardwareError, match="refused arming: denied"):
        bench.robot.connect()
    bench.vehicle.refuses = set()
    bench.robot.connect()
    assert bench.vehicle.armed


def test_old_commands_are_a_standstill(make):
    bench = make()
    bench.robot.connect()
    fly(bench, [0.8, 0.0, 0.0, 0.0], 0.4)
    assert bench.vehicle.velocity[0] > 0.5
    time.sleep(0.8)
    assert np.abs(bench.vehicle.velocity).max() < 0.05
    assert bench.vehicle.mode == MODES[12].command, "the stream goes on"
    assert bench.robot.state() is RobotState.READY


def test_a_pilot_who_takes_over_keeps_the_vehicle(make):
    bench = make()
    bench.robot.connect()
    bench.vehicle.pilot()
    error = fails_within(bench.robot, 2.0)
    assert "its pilot or a failsafe has it" in str(error)
    time.sleep(0.05)
    before = bench.vehicle.setpoints
    time.sleep(0.15)
    assert bench.vehicle.setpoints == before, "it lets go"
    assert bench.robot.stop() is False
    assert bench.robot.stop(StopKind.DRIVES_OFF) is False
    with pytest.raises(HardwareError, match="failsafe"):
        bench.robot.command(np.zeros(4))
    bench.robot.disconnect()
    assert bench.vehicle.mode == MODES[12].hold


def test_motors_that_stop_are_a_fault(make):
    bench = make()
    bench.robot.connect()
    bench.vehicle.kill()
    assert "its motors were stopped" in str(fails_within(bench.robot, 2.0))


def test_a_driver_that_is_gone_leaves_the_vehicle_to_its_failsafe(make):
    bench = make()
    bench.robot.connect()
    bench.robot._ended.set()  # as if the process had ended
    time.sleep(1.0)
    assert bench.vehicle.mode == MODES[12].hold
    bench.robot._flying = False


def test_drives_off_lands_and_is_confirmed_on_the_ground(make):
    bench = make({"stop_timeout": 0.4}, altitude=1.0)
    bench.robot.connect()
    assert bench.robot.stop(StopKind.DRIVES_OFF) is False, "still in the air"
    assert bench.vehicle.mode == MODES[12].land
    assert bench.vehicle.armed, "motors are not cut in the air"
    deadline = time.monotonic() + 4.0
    while not bench.robot.stop(StopKind.DRIVES_OFF):
        assert time.monotonic() < deadline
    assert not bench.vehicle.armed
    assert bench.robot.state() is RobotState.STOPPED
    assert bench.vehicle.place[2] == 0.0


def test_what_answers_must_be_the_vehicle(make):
    bench = make()
    bench.robot.connect()
    link = bench.vehicle.link
    stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    fake = link.local_position_ned_encode(0, 99.0, 0, 0, 0, 0, 0).pack(link)
    host, _, port = bench.config.address.partition(":")
    for _ in range(20):
        stranger.sendto(fake, (host, int(port)))
        stranger.sendto(b"\xfd\x09garbage", (host, int(port)))
        time.sleep(0.005)
        assert bench.robot.observe().values["state"][0] < 1.0
    stranger.close()


def test_what_cannot_work_is_named(make, tmp_path):
    with pytest.raises(ConfigError, match="not of the form host:port"):
        Multirotor(MultirotorConfig(address="14540"))
    bench = make({"connect_timeout": 0.5, "system": 7})
    with pytest.raises(HardwareError, match=r"no heartbeat of system 7 at 127\.0\.0\.1"):
        bench.robot.connect()
    bench = make(autopilot=4)
    with pytest.raises(HardwareError, match="neither PX4"):
        bench.robot.connect()
    bench = make()
    bench.robot.connect()
    with pytest.raises(HardwareError, match="cannot be opened"):
        Multirotor(bench.robot.config).connect()
    bench = make()
    bench.vehicle.refuses = {176}
    with pytest.raises(HardwareError, match="refused the mode for commands: denied"):
        bench.robot.connect()
    assert px4_mode(4, 6) == 0x06040000
