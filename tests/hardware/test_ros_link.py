"""ROS 2 links and processes over a real graph: every peer is a process of its own, and every wait has an end."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")

from hardware.ros.context import check, prepare_environment
from hardware.ros.endpoint import Endpoint
from hardware.ros.link import RosExecutorLink, RosOperatorLink, RosPolicyLink
from hardware.ros.processes import SUPERVISOR_VARIABLE, Supervisor
from hardware.transport import ExecutorLink, ExecutorStatus, PolicyLink
from robot_rl.core.errors import HardwareError, RobotRLError
from robot_rl.core.robot import StampedObservation
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.core.teleop import OperatorEvent, OperatorInput

pytestmark = [pytest.mark.ros, pytest.mark.timeout(240), pytest.mark.usefixtures("ros_domain")]
PATIENCE = 90.0
"""Seconds to wait for what must happen: processes take long to start where others compute."""
ROOT = Path(__file__).resolve().parents[2]
SPEC = Spec(
    {"state": ArraySpec((3,), names=("x", "y", "z"), unit="m"), "images.front": ArraySpec((48, 64, 3), "uint8")},
    ArraySpec((2,)),
    50.0,
)


@pytest.fixture
def children():
    """Start Python code, or a module with ``-m``, as child processes; whatever still runs afterwards is killed."""
    started = []

    def start(code, *arguments, stdin=None):
        command = [sys.executable, *([] if code == "-m" else ["-c"]), code, *arguments]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
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
link.wait_for_robot(90)
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
        begun = time.monotonic()
        deadline = begun + PATIENCE
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
        ended = time.monotonic()
        for number, (chunk, when) in got.items():
            state, image = chunk.actions[0]
            np.testing.assert_array_equal(chunk.actions, np.tile([state, image], (4, 1)))
            np.testing.assert_array_equal(chunk.policy_actions, np.ones((4, 2)))
            assert state == pytest.approx(number + 0.25, rel=1e-6)
            # Images are best effort: of one that was lost, the next stands in, and never an older one.
            assert 0 <= (image - number) % 251 < seq - number
            assert begun < chunk.observation_stamp < when <= ended
        assert link.endpoint.rejected == 0
        assert begun < link.chunk_received <= ended
    finally:
        link.close()


LATE_EXECUTOR = """
import time
from hardware.ros.link import RosExecutorLink
from robot_rl.core.spec import ArraySpec, Spec
start = time.monotonic()
link = RosExecutorLink(Spec({"state": ArraySpec((3,))}, ArraySpec((2,)), 50.0))
while not link.poll_estop() and time.monotonic() - start < 60:
    time.sleep(0.001)
print("pressed" if link.poll_estop() else "released", flush=True)
link.close()
"""


def test_latched_estop_reaches_a_late_joiner(children):
    operator = RosOperatorLink()
    try:
        operator.set_estop(True)
        time.sleep(0.1)
        output, errors = children(LATE_EXECUTOR).communicate(timeout=PATIENCE)
        assert output.strip() == "pressed", errors
    finally:
        operator.close()


def test_operator_events_estop_reset_and_status():
    executor, operator = RosExecutorLink(SPEC), RosOperatorLink()
    try:
        assert operator.wait_for_robot(PATIENCE) == SPEC
        seen = []

        def drain():
            while (reading := executor.poll_operator()) is not None:
                seen.append(reading)
            return {event for reading in seen for event in reading.events}

        def send(*events):
            motion = np.array([0.5, 0.0], np.float32)
            operator.send_operator(OperatorInput(time.monotonic() - 1e5, len(seen), True, motion, events))

        wait_until(lambda: send() or drain() or seen, PATIENCE, "the first reading")
        assert abs(seen[0].stamp - time.monotonic()) < 5.0, "the receiver stamps the heartbeat"
        send(OperatorEvent.EMERGENCY_STOP)
        wait_until(lambda: executor.poll_estop() and OperatorEvent.EMERGENCY_STOP in drain(), PATIENCE, "the e-stop")
        send(OperatorEvent.RESET)
        released = []
        wait_until(
            lambda: send() or released.append(executor.poll_estop()) or OperatorEvent.RESET in drain(),
            PATIENCE,
            "the reset",
        )
        assert not executor.poll_estop(), "the release must arrive before the reset"
        status = ExecutorStatus("auto", "policy", "", 3, 1.0, False, {"clamp": 1}, {"rate_hz": 50.0})
        wait_until(lambda: executor.publish_status(status) or operator.status == status, PATIENCE, "the status")
    finally:
        executor.close()
        operator.close()


def test_lost_device_falls_silent():
    executor, operator = RosExecutorLink(SPEC), RosOperatorLink()
    motion, got = np.ones(2, np.float32), []
    try:
        operator.wait_for_robot(PATIENCE)

        def received(number):
            while (reading := executor.poll_operator()) is not None:
                got.append(reading.seq)
            return number in got

        def send(number, stamp):
            operator.send_operator(OperatorInput(stamp, number, True, motion))

        wait_until(lambda: send(0, time.monotonic()) or received(0), PATIENCE, "the first reading")
        send(1, 1.0)
        send(2, time.monotonic())
        wait_until(lambda: received(2), PATIENCE, "the reading behind it")
        assert 1 not in got, "the device's own stamp did not advance"
    finally:
        executor.close()
        operator.close()


def test_a_second_executor_or_policy_is_refused():
    from hardware.ros.link import CHUNK
    from robot_rl.data.bag.names import ROBOT_SPEC

    first, policy = RosExecutorLink(SPEC, Endpoint("left_cell")), RosPolicyLink()
    second = RosExecutorLink(SPEC)
    third = None
    try:
        with pytest.raises(
            HardwareError,
            match="another executor publishes '/robot_rl/robot_spec' already, '/robot_rl/left_cell': end it",
        ):
            second.endpoint.require_alone(ROBOT_SPEC, "executor", PATIENCE)
        policy.endpoint.require_alone(CHUNK, "policy process", patience=0.3)
        third = RosPolicyLink()  # of the same name as the policy process that runs
        with pytest.raises(
            HardwareError,
            match="another policy process publishes '/robot_rl/chunk' already, '/robot_rl/policy': end it",
        ):
            third.endpoint.require_alone(CHUNK, "policy process", PATIENCE)
    finally:
        for link in (first, policy, second, third):
            if link is not None:
                link.close()


def test_malformed_messages_are_dropped_and_counted(caplog):
    from sensor_msgs.msg import Joy
    from trajectory_msgs.msg import JointTrajectory

    executor = RosExecutorLink(SPEC)
    stranger = Endpoint("stranger")
    stranger.start()
    try:
        from hardware.ros.endpoint import quality
        from hardware.ros.link import CHUNK, OPERATOR

        send_chunk = stranger.publisher(JointTrajectory, CHUNK, quality(8))
        send_joy = stranger.publisher(Joy, OPERATOR, quality(8))

        def complain():
            send_chunk(JointTrajectory(joint_names=["elbow"]))
            send_joy(Joy())
            return executor.endpoint.rejected >= 4

        wait_until(complain, PATIENCE, "the rejection")
        assert executor.poll_chunk() is None
        assert executor.poll_operator() is None
        assert sum("elbow" in record.message for record in caplog.records) == 1, "one line per cause, not per message"
    finally:
        stranger.close()
        executor.close()


def test_no_message_ends_the_thread_that_hears_the_emergency_stop(caplog):
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
    from std_msgs.msg import String

    from hardware.ros import convert
    from hardware.ros.link import STATUS
    from robot_rl.data.bag.names import ROBOT_SPEC

    spec = SPEC.to_json()
    broken = ["{}", "[" * 100_000, json.dumps({**spec, "rate_hz": None}), json.dumps({**spec, "action": 3})]
    values = [[KeyValue(key="mode", value="{")], [KeyValue(key="mode", value="[" * 100_000)], []]
    entries = [DiagnosticStatus(name=convert.STATUS_NAME, values=one) for one in values]
    messages = [(ROBOT_SPEC, String(data=text)) for text in broken]
    messages += [(STATUS, DiagnosticArray(status=[entry])) for entry in entries]
    endpoint = Endpoint("console")
    link = RosOperatorLink(endpoint)
    try:
        callbacks = {one.topic_name.rpartition("/")[2]: one.callback for one in endpoint.node.subscriptions}
        for _ in range(2):
            for topic, message in messages:
                callbacks[topic](message)
        assert endpoint.rejected == 2 * len(messages)
        causes = [record.message for record in caplog.records if "dropped" in record.message]
        assert len(causes) == len(set(causes)) <= len(messages)
        assert any("KeyError" in cause for cause in causes)
    finally:
        link.close()


def test_policy_link_says_who_is_missing_and_closes_twice():
    link = RosPolicyLink()
    assert isinstance(link, PolicyLink)
    with pytest.raises(HardwareError, match="no executor announced its robot on '/robot_rl/robot_spec'"):
        link.wait_for_robot(0.05)
    assert link.receive_observation(0.01) is None
    link.close()
    link.close()


WRITER = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from hardware.ros.link import RosExecutorLink
from robot_rl.core.robot import StampedObservation
from robot_rl.core.spec import ArraySpec, Spec

reader = int(sys.argv[1])
observation = {"state": ArraySpec((3,)), "images.front": ArraySpec((48, 64, 3), "uint8")}
link = RosExecutorLink(Spec(observation, ArraySpec((2,)), 50.0))
values = {"state": np.zeros(3, np.float32), "images.front": np.zeros((48, 64, 3), np.uint8)}
slowest, seq = 0.0, 0

def send(pause):
    global slowest, seq
    start, seq = time.monotonic(), seq + 1
    link.send_observation(StampedObservation(values, seq, start))
    slowest = max(slowest, time.monotonic() - start)
    time.sleep(pause)

while link.poll_chunk() is None:
    send(0.02)
slowest = 0.0
for delay in np.linspace(0.0, 0.001, 20):
    send(delay)
    os.kill(reader, signal.SIGSTOP)
    for _ in range(10):
        send(0.002)
    os.kill(reader, signal.SIGCONT)
    send(0.005)
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
print(slowest, *(name for name in threads if name.startswith("dds.")), flush=True)
link.close()
"""


def test_hanging_policy_process_does_not_block_the_executor(children):
    """A reader that is suspended at whatever point of its work must not make the writer wait; no memory is shared.

    The writer is a process of its own, since Fast DDS reads its profile only once in the life of a process.
    """
    reader = children(ECHO_POLICY)
    output, errors = children(WRITER, str(reader.pid)).communicate(timeout=2 * PATIENCE)
    slowest, *threads = output.split()
    assert float(slowest) < 0.2, errors
    assert any(name.startswith("dds.udp") for name in threads)
    assert not any(name.startswith("dds.shm") for name in threads)


STEADY_POLICY = """
import threading
import numpy as np
from hardware.policy_process import serve
from hardware.robots.fake import FakeRobot
from hardware.ros.link import RosPolicyLink

class Steady:
    spec = FakeRobot(2, rate_hz=50.0).spec
    obs_steps, horizon, execute_steps, closed_loop = 1, 8, 1, False
    def seed(self, seed): pass
    def refine(self, history, actions): return actions
    def plan(self, history): return history["state"][:, -1:, :] + 0.01 * np.arange(1, 9)[None, :, None]

link = RosPolicyLink()
link.wait_for_robot(90)
serve(Steady(), link, threading.Event())
"""


def test_killed_policy_process_ends_in_a_controlled_stop(children):
    """The executor notices by itself, within its age limit, that nobody plans any more."""
    from hardware.control.arbiter import Mode
    from hardware.control.executor import Executor, ExecutorConfig
    from hardware.robots.fake import FakeRobot

    process = children(STEADY_POLICY)
    robot = FakeRobot(2, rate_hz=50.0)
    link = RosExecutorLink(robot.spec)
    config = ExecutorConfig(
        execute_steps=1, late_steps=3, autostart=True, realtime_priority=0, blend_seconds=0.0, max_state_age=1.0
    )
    executor = Executor(robot, link, config)
    executor.connect()
    stop = threading.Event()
    loop = threading.Thread(target=executor.run, args=(stop,))
    loop.start()
    try:
        wait_until(lambda: executor.arbiter.mode is Mode.AUTO, PATIENCE, "the policy's start")
        time.sleep(0.3)
        process.kill()
        process.wait(PATIENCE)

        def rests():
            held = executor.arbiter.mode is Mode.HOLD and time.monotonic() - executor.arbiter.changes[-1][0] > 0.6
            return held and not np.ptp(robot.commands[-20:], axis=0).any()

        # A busy machine may have starved the policy before, and a late plan resumed it; what counts is the last change.
        wait_until(rests, PATIENCE, "the stop that nobody resumes")
        assert executor.arbiter.changes[-1][1:] == (Mode.HOLD, "policy_starved")
        waited = executor.arbiter.changes[-1][0] - executor.playback.stamp
        # Four steps of 20 ms may be played from the last observation that was answered; ticks may be late.
        assert waited <= 0.1 + executor.lateness.maximum + 0.01 * executor.missed_ticks
        assert executor.safety.counts["policy_starved"] >= 1
    finally:
        stop.set()
        loop.join(5.0)
        executor.shut_down()
        link.close()
    path = robot.effective_commands()
    speed = np.diff(path, axis=0) * config.tick_rate_hz
    assert np.abs(speed).max() > 0.1, "it did move"
    assert np.abs(np.diff(speed, axis=0)).max() * config.tick_rate_hz <= 10.0 + 1e-6, "braked within the limits"
    np.testing.assert_array_equal(path[-1], path[-20], "and it holds")


def test_interrupted_executor_process_brakes_holds_and_reports(children, tmp_path):
    children(STEADY_POLICY)
    report = tmp_path / "executor.json"
    operator = RosOperatorLink()
    command = [
        *(sys.executable, "-m", "hardware.ros.executor_node", "--robot", "fake", "--unattended"),
        *("--robot-options", "size=2", "--robot-options", "rate_hz=50.0", "--report", str(report)),
        *("--executor-options", "execute_steps=1", "--executor-options", "realtime_priority=0"),
        *("--executor-options", "late_steps=7", "--executor-options", "max_state_age=5.0"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: operator.status is not None and operator.status.mode == "auto", PATIENCE, "the start")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        found = json.loads(report.read_text())
        assert found["final_stop_confirmed"] is True
        assert found["mode_changes"][-1]["reason"] == "shutdown"
        wait_until(lambda: operator.status.reason == "shutdown", PATIENCE, "the arrival of the last words")
        assert operator.status.mode == "hold"
    finally:
        process.kill()
        operator.close()


def test_operator_process_enables_and_stops_the_robot(children):
    """Keys typed into a terminal reach the executor through the operator's process: enable, then the e-stop."""
    terminal, typist = pty.openpty()
    robot = ["-m", "hardware.ros.executor_node", "--robot", "fake", "--robot-options", "size=2"]
    robot += ["--robot-options", "rate_hz=50.0", "--executor-options", "execute_steps=1"]
    robot += ["--executor-options", "realtime_priority=0", "--executor-options", "max_state_age=5.0"]
    watcher = RosOperatorLink()
    modes = []
    try:
        children(STEADY_POLICY)
        executor = children(*robot)
        wait_until(
            lambda: watcher.status is not None and watcher.status.counters.get("chunks_received"), PATIENCE, "a chunk"
        )
        operator = children("-m", "hardware.ros.teleop_node", "--teleop", "keyboard", stdin=typist)

        def stopped():
            modes.append(watcher.status.mode)
            os.write(terminal, {"idle": b"n", "hold": b"b", "auto": b" "}.get(modes[-1], b""))
            time.sleep(0.05)
            return modes[-1] == "stopped"

        wait_until(stopped, PATIENCE, "the stop")
        assert "auto" in modes
        assert (watcher.status.reason, watcher.status.estop_latched) == ("emergency_stop", True)
        for process in (operator, executor):
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 0, process.stderr.read()
    finally:
        watcher.close()
        os.close(terminal)
        os.close(typist)


def test_policy_for_another_robot_is_refused_by_name(tmp_path, ros_domain):
    from hardware.robots.fake import FakeRobot
    from hardware.ros.processes import RosDeployment, run_ros_deployment
    from robot_rl.policies.checkpoint import save_policy
    from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy

    policy = ChunkedPolicy(FakeRobot(3).spec, ChunkedConfig(width=16, depth=1))
    save_policy(policy, tmp_path / "policy")
    deployment = RosDeployment(
        tmp_path / "policy",
        robot="fake",
        robot_options={"size": 4},
        executor_options={"realtime_priority": 0},
        seconds=20.0,
        log_directory=tmp_path / "logs",
        domain_id=ros_domain,
    )
    with pytest.raises(
        HardwareError, match=r"(?s)policy process .* exit code 1.*does not fit the robot.*\(3,\).*\(4,\)"
    ):
        run_ros_deployment(deployment)
    assert json.loads((tmp_path / "logs" / "executor.json").read_text())["final_stop_confirmed"] is True


def test_pinning_and_tracing_reach_the_policy_process(tmp_path):
    from hardware.ros.processes import RosDeployment, policy_command

    plain = policy_command(RosDeployment(tmp_path))
    assert not {"--pin", "--trace"} & set(plain)
    both = policy_command(RosDeployment(tmp_path, executor_options={"pin": True}, policy_trace=True))
    assert {"--pin", "--trace"} <= set(both)


def test_node_settings_from_flags_parameters_and_defaults(tmp_path):
    from hardware.options import parse_options
    from hardware.ros.executor_node import ExecutorNodeConfig, executor_config, make_robot
    from hardware.ros.node import parse_flags, read_config

    file = tmp_path / "executor.yaml"
    file.write_text("/**:\n  ros__parameters:\n    seconds: 5\n    robot: fake\n    robot_options: [size=2]\n")
    argv = ["--robot", "sim", "--executor-options", "late_steps=3", "--ros-args", "--params-file", str(file)]
    given, ros_arguments = parse_flags(ExecutorNodeConfig, argv, "executor_node")
    endpoint = Endpoint("executor", arguments=ros_arguments)
    try:
        config = read_config(ExecutorNodeConfig, endpoint.node, given)
        assert (config.robot, config.seconds, config.robot_options) == ("sim", 5.0, ("size=2",))
        assert config.executor_options == ("late_steps=3",)
        assert "registry" in endpoint.node.describe_parameter("robot").description
    finally:
        endpoint.close()
    misspelt = Endpoint("executor", arguments=["--ros-args", "-p", "secnds:=1.0"])
    try:
        with pytest.raises(RobotRLError, match="Did you mean 'seconds'"):
            read_config(ExecutorNodeConfig, misspelt.node, {})
    finally:
        misspelt.close()
    assert parse_options(["a=1", "b=true", "c=peg_insert"], "option") == {"a": 1, "b": True, "c": "peg_insert"}
    with pytest.raises(RobotRLError, match="name=value"):
        parse_options(["oops"], "option")
    with pytest.raises(RobotRLError, match="Did you mean 'late_steps'"):
        executor_config(("late_step=3",), False)
    with pytest.raises(RobotRLError, match="expected a int"):
        executor_config(("late_steps=many",), False)
    with pytest.raises(RobotRLError, match=r"'fake'.*colour"):
        make_robot("fake", ("colour=red",))


def test_supervisor_names_the_dead_child_and_escalates(tmp_path):
    stubborn = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    with Supervisor(tmp_path) as supervisor:
        child = supervisor.start("stubborn", [sys.executable, "-c", stubborn])
        wait_until(lambda: "up" in child.log.read_text(), PATIENCE, "the start")
        failing = supervisor.start("policy", [sys.executable, "-c", "raise SystemExit('no such checkpoint')"])
        wait_until(lambda: supervisor.ended() is not None, PATIENCE, "the end")
        assert supervisor.ended() is failing
        assert "policy process" in failing.describe_end()
        assert "exit code 1" in failing.describe_end()
        assert "no such checkpoint" in failing.describe_end()
        supervisor.stop(((signal.SIGINT, 0.2), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)))
    assert child.process.returncode == -signal.SIGTERM
    assert "SIGTERM" in child.describe_end()


def test_a_node_behind_a_shell_starts_while_its_supervisor_lives():
    code = "from hardware.ros.processes import end_with_supervisor; end_with_supervisor(); print('up')"
    command = ["sh", "-c", f'{sys.executable} -c "{code}"; true']
    gone = subprocess.Popen(["true"])
    gone.wait()
    for supervisor, expected in ((os.getpid(), "up\n"), (gone.pid, "")):
        environment = {**os.environ, SUPERVISOR_VARIABLE: str(supervisor)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == expected, done.stderr


def test_environment_check_and_errors(monkeypatch):
    assert check() == []
    monkeypatch.setenv("FASTRTPS_DEFAULT_PROFILES_FILE", "/nowhere/profile.xml")
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "OFF")
    problems = " ".join(check())
    assert "/nowhere/profile.xml" in problems
    assert "OFF" in problems
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    assert "shared memory" in " ".join(check())
    with pytest.raises(RobotRLError, match="1000 is not in"):
        prepare_environment(1000)
