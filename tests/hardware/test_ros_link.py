"""ROS 2 links and processes over a real graph: every peer is a process of its own, and every wait has an end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")

from hardware.ros.context import check, free_domain, prepare_environment
from hardware.ros.link import Endpoint, RosExecutorLink, RosOperatorLink, RosPolicyLink
from hardware.ros.processes import Supervisor
from hardware.transport import ExecutorLink, ExecutorStatus, PolicyLink
from robot_rl.core.errors import HardwareError, RobotRLError
from robot_rl.core.robot import StampedObservation
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.core.teleop import OperatorEvent, OperatorInput

pytestmark = [pytest.mark.ros, pytest.mark.timeout(60)]
ROOT = Path(__file__).resolve().parents[2]
SPEC = Spec(
    {"state": ArraySpec((3,), names=("x", "y", "z"), unit="m"), "images.front": ArraySpec((48, 64, 3), "uint8")},
    ArraySpec((2,)),
    50.0,
)


@pytest.fixture(scope="module", autouse=True)
def domain():
    """A domain of our own on this machine only, inherited by child processes."""
    saved = dict(os.environ)
    number = free_domain()
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    prepare_environment(number)
    yield number
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture
def children():
    """Start Python code as child processes; whatever still runs afterwards is killed."""
    started = []

    def start(code, *arguments):
        command = [sys.executable, "-c", code, *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.002)


ECHO_POLICY = """
import numpy as np
from hardware.ros.link import RosPolicyLink
from robot_rl.core.policy import ActionChunk
link = RosPolicyLink()
link.wait_for_robot(20)
for _ in range(2000):
    seen = link.receive_observation(0.05)
    if seen is not None:
        first = [seen.values["state"].sum(), seen.values["images.front"].mean()]
        link.send_chunk(ActionChunk(np.full((4, 2), first, np.float32), seen.seq, seen.stamp, np.ones((4, 2))))
"""


def test_observation_and_chunk_round_trip_between_processes(children):
    children(ECHO_POLICY)
    link = RosExecutorLink(SPEC)
    try:
        assert isinstance(link, ExecutorLink)
        got = {}
        deadline = time.monotonic() + 20.0
        seq = 0
        while len(got) < 20 and time.monotonic() < deadline:
            image = np.full((48, 64, 3), seq % 251, np.uint8)
            state = np.array([seq, 0.5, -0.25], np.float32)
            link.send_observation(StampedObservation({"state": state, "images.front": image}, seq, time.monotonic()))
            time.sleep(0.02)
            while (chunk := link.poll_chunk()) is not None:
                got[chunk.observation_seq] = (chunk, time.monotonic())
            seq += 1
        assert len(got) >= 20
        for number, (chunk, when) in got.items():
            np.testing.assert_allclose(chunk.actions, np.tile([number + 0.25, number % 251], (4, 1)), rtol=1e-6)
            np.testing.assert_array_equal(chunk.policy_actions, np.ones((4, 2)))
            assert 0 < when - chunk.observation_stamp < 1.0
        assert link.endpoint.rejected == 0
        assert time.monotonic() - link.chunk_received < 1.0
    finally:
        link.close()


LATE_EXECUTOR = """
import time
from hardware.ros.link import RosExecutorLink
from robot_rl.core.spec import ArraySpec, Spec
start = time.monotonic()
link = RosExecutorLink(Spec({"state": ArraySpec((3,))}, ArraySpec((2,)), 50.0))
while not link.poll_estop() and time.monotonic() - start < 10:
    time.sleep(0.001)
print("pressed" if link.poll_estop() else "released", flush=True)
link.close()
"""


def test_latched_estop_reaches_a_late_joiner(children):
    operator = RosOperatorLink()
    try:
        operator.set_estop(True)
        time.sleep(0.1)
        output, errors = children(LATE_EXECUTOR).communicate(timeout=20)
        assert output.strip() == "pressed", errors
    finally:
        operator.close()


def test_operator_events_estop_reset_and_status():
    executor, operator = RosExecutorLink(SPEC), RosOperatorLink()
    try:
        assert operator.wait_for_robot(5.0) == SPEC
        seen = []

        def drain():
            while (reading := executor.poll_operator()) is not None:
                seen.append(reading)
            return {event for reading in seen for event in reading.events}

        def send(*events):
            motion = np.array([0.5, 0.0], np.float32)
            operator.send_operator(OperatorInput(-1.0, len(seen), True, motion, events))

        wait_until(lambda: send() or drain() or seen, 5.0, "the first reading")
        assert abs(seen[0].stamp - time.monotonic()) < 5.0, "the receiver stamps the heartbeat"
        send(OperatorEvent.EMERGENCY_STOP)
        wait_until(lambda: executor.poll_estop() and OperatorEvent.EMERGENCY_STOP in drain(), 5.0, "the e-stop")
        send(OperatorEvent.RESET)
        released = []
        wait_until(
            lambda: send() or released.append(executor.poll_estop()) or OperatorEvent.RESET in drain(), 5.0, "the reset"
        )
        assert not executor.poll_estop(), "the release must arrive before the reset"
        status = ExecutorStatus("auto", "policy", "", 3, 1.0, False, {"clamp": 1}, {"rate_hz": 50.0})
        wait_until(lambda: executor.publish_status(status) or operator.status == status, 5.0, "the status")
    finally:
        executor.close()
        operator.close()


def test_malformed_messages_are_dropped_and_counted(caplog):
    from sensor_msgs.msg import Joy
    from trajectory_msgs.msg import JointTrajectory

    executor = RosExecutorLink(SPEC)
    stranger = Endpoint("stranger")
    stranger.start()
    try:
        from hardware.ros.link import CHUNK, OPERATOR, quality

        send_chunk = stranger.publisher(JointTrajectory, CHUNK, quality(8))
        send_joy = stranger.publisher(Joy, OPERATOR, quality(8))

        def complain():
            send_chunk(JointTrajectory(joint_names=["elbow"]))
            send_joy(Joy())
            return executor.endpoint.rejected >= 4

        wait_until(complain, 5.0, "the rejection")
        assert executor.poll_chunk() is None
        assert executor.poll_operator() is None
        assert sum("elbow" in record.message for record in caplog.records) == 1, "one line per cause, not per message"
    finally:
        stranger.close()
        executor.close()


def test_policy_link_says_who_is_missing_and_closes_twice():
    link = RosPolicyLink()
    assert isinstance(link, PolicyLink)
    with pytest.raises(HardwareError, match="no executor announced its robot on '/robot_rl/robot_spec'"):
        link.wait_for_robot(0.05)
    assert link.receive_observation(0.01) is None
    link.close()
    link.close()


def test_hanging_policy_process_does_not_block_the_executor(children):
    """A reader that is stopped in the middle of its work must not make the writer wait."""
    process = children(ECHO_POLICY)
    link = RosExecutorLink(SPEC)
    try:
        values = {"state": np.zeros(3, np.float32), "images.front": np.zeros((48, 64, 3), np.uint8)}

        def exchange():
            link.send_observation(StampedObservation(values, 0, time.monotonic()))
            return link.poll_chunk() is not None

        wait_until(exchange, 20.0, "the first chunk")
        process.send_signal(signal.SIGSTOP)
        slowest = 0.0
        for seq in range(100):
            start = time.monotonic()
            link.send_observation(StampedObservation(values, seq, start))
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.002)
        assert slowest < 0.1
    finally:
        process.kill()
        link.close()


def test_supervisor_names_the_dead_child_and_escalates(tmp_path):
    stubborn = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    with Supervisor(tmp_path) as supervisor:
        child = supervisor.start("stubborn", [sys.executable, "-c", stubborn])
        wait_until(lambda: "up" in child.log.read_text(), 10.0, "the start")
        failing = supervisor.start("policy", [sys.executable, "-c", "raise SystemExit('no such checkpoint')"])
        wait_until(lambda: supervisor.ended() is not None, 10.0, "the end")
        assert supervisor.ended() is failing
        assert "policy process" in failing.describe_end()
        assert "exit code 1" in failing.describe_end()
        assert "no such checkpoint" in failing.describe_end()
        supervisor.stop(((signal.SIGINT, 0.2), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)))
    assert child.process.returncode == -signal.SIGTERM
    assert "SIGTERM" in child.describe_end()


def test_environment_check_and_errors(monkeypatch):
    assert check() == []
    monkeypatch.setenv("FASTRTPS_DEFAULT_PROFILES_FILE", "/nowhere/profile.xml")
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "OFF")
    problems = " ".join(check())
    assert "/nowhere/profile.xml" in problems
    assert "OFF" in problems
    with pytest.raises(RobotRLError, match="1000 is not in"):
        prepare_environment(1000)
