"""One writer per robot: a second process is refused with the holder's name, and a dead one holds nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
from deployment_rig import Rig

from hardware.control.executor import Executor, ExecutorConfig
from hardware.control.lease import RobotLease, resource_of
from hardware.robots.fake import FakeRobot, FaultyRobot
from hardware.transport import InProcessTransport
from robot_rl.core.errors import HardwareError
from robot_rl.core.robot import RobotState
from robot_rl.core.teleop import OperatorEvent

HOLDER = """
import sys, time
from pathlib import Path
from hardware.control.lease import RobotLease
sys.argv = ["/usr/bin/robot-rl", "deploy"]
lease = RobotLease("arm at /dev/ttyACM0", Path({directory!r}))
print("held", flush=True)
time.sleep(60)
"""


class Arm(FakeRobot):
    """A robot that another process could command too."""

    resource = "arm at the test bench"


@pytest.fixture
def leases(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "robot_rl-leases"


def executor(robot):
    return Executor(robot, InProcessTransport(quiet=True).executor, ExecutorConfig())


def test_a_second_process_is_refused_with_the_holders_name_until_the_first_is_gone(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(directory=str(tmp_path))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(HardwareError, match=rf"controlled by 'robot-rl deploy' \(process {holder.pid}, since "):
            RobotLease("arm at /dev/ttyACM0", tmp_path)
        RobotLease("arm at /dev/ttyACM1", tmp_path).release()
        os.kill(holder.pid, signal.SIGSTOP)  # one that hangs still holds the robot ...
        with pytest.raises(HardwareError, match="is controlled by"):
            RobotLease("arm at /dev/ttyACM0", tmp_path)
        holder.kill()  # ... and one that was killed does not
        holder.wait(10.0)
        RobotLease("arm at /dev/ttyACM0", tmp_path).release()
    finally:
        holder.kill()
        holder.wait(10.0)


def test_two_executors_of_one_robot(leases):
    first, second = executor(Arm()), executor(FaultyRobot(Arm()))
    first.connect()
    with pytest.raises(HardwareError, match="arm at the test bench is controlled by"):
        second.connect()
    assert second.robot.robot.commands == []
    assert list(leases.glob("arm_at_the_test_bench.lock"))
    first.shut_down()
    second.connect()
    second.shut_down()
    second.shut_down()


def test_a_robot_that_does_not_connect_is_given_back(leases):
    class Dead(Arm):
        def connect(self):
            raise HardwareError("no answer")

    with pytest.raises(HardwareError, match="no answer"):
        executor(Dead()).connect()
    living = executor(Arm())
    living.connect()
    living.shut_down()


def test_robots_inside_this_process_need_no_lease():
    assert resource_of(FakeRobot()) == resource_of(FaultyRobot(FakeRobot())) == ""
    first, second = executor(FakeRobot()), executor(FakeRobot())
    first.connect()
    second.connect()


def test_a_driver_is_known_by_its_device():
    @dataclass
    class Config:
        port: str = "/dev/null"

    class Servo(FakeRobot):
        config = Config()

    assert resource_of(FaultyRobot(Servo())) == resource_of(Servo()) == "/dev/null"


def test_two_drivers_of_different_kinds_do_not_share_a_device(leases, tmp_path):
    (tmp_path / "arm").symlink_to("/dev/null")

    class Servo(FakeRobot):
        config = type("Config", (), {"port": "/dev/null"})()

    class OtherServo(FakeRobot):
        config = type("Config", (), {"port": str(tmp_path / "arm")})()

    first, second = executor(Servo()), executor(OtherServo())
    first.connect()
    with pytest.raises(HardwareError, match=rf"^/dev/null is controlled by .* \(process {os.getpid()}, since"):
        second.connect()
    assert second.robot.commands == []
    first.shut_down()
    second.connect()
    second.shut_down()


COMMANDER = """
import sys, time
sys.argv = ["/usr/bin/robot-rl", "deploy"]
from hardware.control.executor import Executor
from hardware.robots.fake import FakeRobot
from hardware.transport import InProcessTransport

class Arm(FakeRobot):
    resource = "arm at the test bench"

executor = Executor(Arm(), InProcessTransport(quiet=True).executor)
executor.connect()
print("connected", flush=True)
sys.stdin.readline()
executor.shut_down()
print("over", flush=True)
sys.stdin.readline()
"""


def test_an_executor_of_another_process_keeps_the_robot_until_it_shuts_down(leases):
    environment = {**os.environ, "TMPDIR": str(leases.parent)}
    other = subprocess.Popen(
        [sys.executable, "-c", COMMANDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    mine = executor(Arm())
    try:
        assert other.stdout.readline() == "connected\n"
        refusal = rf"arm at the test bench is controlled by 'robot-rl deploy' \(process {other.pid}, since "
        with pytest.raises(HardwareError, match=refusal):
            mine.connect()
        assert mine.robot.commands == []
        assert mine.robot.state() is RobotState.DISCONNECTED
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "over\n"
        mine.connect()  # while the other process still lives
        mine.shut_down()
    finally:
        other.kill()
        other.communicate(timeout=10.0)


def test_at_every_tick_there_is_one_writer_and_no_command_but_the_chains():
    """Whatever is asked and however it fails: who writes follows from the mode, and nobody else moves the robot."""
    rng = np.random.default_rng(3)
    rig = Rig(faulty=True).start()
    events = [None, *OperatorEvent]
    writers = {"auto": "policy", "align": "policy", "human": "human"}
    before_mode, before_step = rig.mode, np.full(3, np.inf)
    for k in range(1500):
        if k % 40 == 0:
            rig.alive, rig.operator_alive = rng.random() < 0.8, rng.random() < 0.9
            rig.steering = rng.uniform(-1, 1, 3) * (rng.random() < 0.4)
            rig.robot.faults.freeze = rng.random() < 0.1
        before, sent = rig.executor.safety.command.copy(), len(rig.plain.commands)
        event = events[rng.integers(len(events))] if rng.random() < 0.1 else None
        verdict = rig.tick(*([event] if event else []))
        arbiter = rig.executor.arbiter
        assert arbiter.writer == writers.get(rig.mode, "none")
        assert len(rig.plain.commands) == sent + 1
        np.testing.assert_array_equal(rig.plain.commands[-1], verdict.command)
        step = rig.executor.safety.step
        if arbiter.writer == "none" and before_mode == rig.mode:
            assert (np.abs(step) <= np.abs(before_step) + 1e-12).all(), "with no writer the robot only brakes"
        before_mode, before_step = rig.mode, step.copy()
        np.testing.assert_allclose(rig.executor.safety.command - before, step, atol=1e-12)
    assert {"auto", "human", "hold", "stopped", "idle"} <= {mode.value for _, mode, _ in arbiter.changes}


def test_a_device_that_raises_leaves_the_robot_at_rest():
    """An operator's device that fails while it drives: neutral, then held."""

    class Device:
        def __init__(self):
            self.fail, self.motion = False, np.zeros(3)

        def connect(self):
            pass

        def poll(self):
            from robot_rl.core.teleop import OperatorInput

            if self.fail:
                raise OSError("unplugged")
            return OperatorInput(rig.clock.now, 1, True, self.motion, ())

    rig, device = Rig(), Device()
    settings = rig.executor.config
    rig.executor = Executor(rig.robot, rig.transport.executor, settings, teleop=device, clock=rig.clock)
    rig.executor.connect()
    rig.tick(OperatorEvent.ENABLE)
    rig.operator_alive = False
    rig.tick(count=30)
    device.motion = np.ones(3)
    rig.tick(count=10)
    assert rig.mode == "human"
    assert rig.moved(5).max() > 0
    device.fail = True
    rig.tick(count=26)
    assert (rig.mode, rig.reason) == ("hold", "operator_lost")
    assert rig.moved(40)[-1] == 0.0
    rig.tick(count=100)
    assert rig.mode == "hold"


def test_a_robot_on_topics_is_known_by_its_domain(monkeypatch):
    class Base(FakeRobot):
        config = type("Config", (), {"command_topic": "/cmd_vel"})()

    monkeypatch.setenv("ROS_DOMAIN_ID", "7")
    assert resource_of(Base()) == "/cmd_vel in ROS domain 7"


def test_a_lease_is_given_back_however_often_it_is_asked(tmp_path):
    lease = RobotLease("arm", tmp_path)
    lease.release()
    lease.release()
    taken = []

    def race():
        try:
            taken.append(RobotLease("arm", tmp_path))
        except HardwareError:
            time.sleep(0.01)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(taken) == 1
    taken[0].release()
