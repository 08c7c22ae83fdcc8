"""Managed nodes: transitions, parameters with descriptions and ranges, ends in order; camera node."""

import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")

from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import DescribeParameters, SetParameters

from hardware.cameras.rig import build_camera
from hardware.ros.endpoint import Endpoint
from hardware.ros.lifecycle import ManagedConfig, ManagedNode, run_managed_node
from hardware.ros.link import RosOperatorLink
from hardware.ros.parameters import Range, parse_flags, settings_of
from robot_rl.core.errors import ConfigError, HardwareError, RobotRLError, UnknownNameError
from robot_rl.core.teleop import OperatorEvent, OperatorInput

pytestmark = [pytest.mark.ros, pytest.mark.timeout(240), pytest.mark.usefixtures("ros_domain")]
PATIENCE = 90.0
ROOT = Path(__file__).resolve().parents[2]
T = Transition


@pytest.fixture
def start():
    """Start a node's module as a child process; whatever still runs afterwards is killed."""
    started = []

    def run(module, *arguments):
        command = [sys.executable, "-m", f"hardware.ros.{module}", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_until(condition, what, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.005)


class Manager:
    """Calls the services of one node, as ``ros2 lifecycle`` and ``ros2 param`` do."""

    def __init__(self, endpoint, name):
        endpoint.start()
        kinds = {
            "change_state": ChangeState,
            "set_parameters": SetParameters,
            "describe_parameters": DescribeParameters,
            "get_state": GetState,
        }
        self.clients = {one: endpoint.node.create_client(kind, f"{name}/{one}") for one, kind in kinds.items()}
        self.met = False

    def _meet(self):
        """Wait for the services, once; a node that ends by itself has none to wait for."""
        for one, client in self.clients.items():
            assert client.wait_for_service(PATIENCE), f"there is no service {one}"
        # A node may see a service before the service sees it, and then no answer comes. Peers learn of our clients in
        # the order in which they were made: once the last one is answered, all are.
        deadline = time.monotonic() + PATIENCE
        answer = self.clients["get_state"].call_async(GetState.Request())
        while not answer.done():
            assert time.monotonic() < deadline, "no answer"
            time.sleep(0.5)
            answer = answer if answer.done() else self.clients["get_state"].call_async(GetState.Request())
        self.met = True

    def call(self, service, request):
        if not self.met:
            self._meet()
        answer = self.clients[service].call_async(request)
        wait_until(answer.done, f"an answer of {service}")
        return answer.result()

    def change(self, transition):
        request = ChangeState.Request(transition=Transition(id=transition))
        return self.call("change_state", request).success

    def state(self):
        return self.call("get_state", GetState.Request()).current_state.id

    def set(self, **values):
        from rclpy.parameter import Parameter

        request = SetParameters.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        )
        return self.call("set_parameters", request).results


@dataclass(frozen=True)
class Settings(ManagedConfig):
    """Settings of the node under test."""

    speed: Annotated[float, Range(0.1, 2.0)] = 1.0
    """How fast."""
    count: Annotated[int, Range(1)] = 3
    """How many."""
    names: tuple[str, ...] = ()
    """Which."""


class Log:
    """A work that writes down what happens to it."""

    def __init__(self):
        self.said = []
        self.fails = ""
        self.threads = set()

    def make(self, config, endpoint):
        from std_msgs.msg import Bool

        self._note(f"configure {config.speed:g}")
        endpoint.publisher(Bool, "log", 1)
        return self

    def start(self):
        self._note("start")

    def run(self, stop):
        self._note("run")
        if "run" not in self.fails:
            assert stop.wait(PATIENCE)
            time.sleep(0.05)
        self._note("rest")

    def close(self):
        self._note("close")

    def _note(self, what):
        self.threads.add(threading.current_thread())
        self.said.append(what)
        if self.fails and self.fails in what:
            raise HardwareError(f"no {self.fails}")


@contextmanager
def served(log, given=None, arguments=None):
    """A managed node with ``log`` as its work, served by a thread that stands for a process's main thread."""
    endpoint = Endpoint("worker", arguments=arguments, managed=True)
    client = Endpoint("client")
    node = ManagedNode(endpoint, Settings, log.make, given or {})
    thread = threading.Thread(target=node.serve)
    thread.start()
    try:
        yield node, Manager(client, "/robot_rl/worker"), thread
    finally:
        node.interrupt()
        thread.join(PATIENCE)
        client.close()
        endpoint.close()
        assert not thread.is_alive()


def test_a_node_goes_through_its_states_in_the_main_thread():
    log = Log()
    with served(log, {"autostart": False}) as (node, manager, thread):
        assert manager.state() == State.PRIMARY_STATE_UNCONFIGURED
        assert manager.set(speed=0.5)[0].successful
        refused = manager.set(speed=5.0)[0]
        assert not refused.successful
        assert "range" in refused.reason
        assert manager.change(T.TRANSITION_CONFIGURE)
        assert manager.state() == State.PRIMARY_STATE_INACTIVE
        assert "clean it up first" in manager.set(speed=1.5)[0].reason
        assert not manager.change(T.TRANSITION_CONFIGURE), "it is configured already"
        assert manager.change(T.TRANSITION_ACTIVATE)
        assert manager.state() == State.PRIMARY_STATE_ACTIVE
        assert manager.change(T.TRANSITION_DEACTIVATE)
        assert log.said == ["configure 0.5", "start", "run", "rest"], "it rests before the transition is over"
        assert manager.change(T.TRANSITION_ACTIVATE)
        assert manager.change(T.TRANSITION_DEACTIVATE)
        assert node.endpoint.node.count_publishers("log") == 1
        assert manager.change(T.TRANSITION_CLEANUP)
        assert node.endpoint.node.count_publishers("log") == 0
        assert manager.state() == State.PRIMARY_STATE_UNCONFIGURED
        assert manager.set(speed=2.0)[0].successful
        assert manager.change(T.TRANSITION_CONFIGURE)
        assert log.said[4:] == ["start", "run", "rest", "close", "configure 2"]
        assert manager.change(T.TRANSITION_INACTIVE_SHUTDOWN)
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a node that was shut down ends its process"
        assert log.said[-1] == "close"
        assert log.threads == {thread}
        assert node.error is None


def test_autostart_interruption_and_shutdown_while_active():
    log = Log()
    with served(log) as (node, manager, thread):
        wait_until(lambda: "run" in log.said, "the start by itself")
        assert manager.state() == State.PRIMARY_STATE_ACTIVE
        node.interrupt()
        thread.join(PATIENCE)
        assert log.said == ["configure 1", "start", "run", "rest", "close"]
    log = Log()
    with served(log) as (_, manager, thread):
        wait_until(lambda: "run" in log.said, "the start by itself")
        assert manager.change(T.TRANSITION_ACTIVE_SHUTDOWN)
        thread.join(PATIENCE)
        assert log.said[-2:] == ["rest", "close"]


@pytest.mark.parametrize("fails", ["configure", "start", "run"])
def test_a_failure_ends_a_node_that_starts_itself(fails):
    log = Log()
    log.fails = fails
    with served(log) as (node, _, thread):
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert str(node.error) == f"no {fails}"
        assert ("close" in log.said) == (fails != "configure")


def test_a_managed_node_that_fails_may_be_asked_again(caplog):
    log = Log()
    with served(log, {"autostart": False}) as (_, manager, _):
        log.fails = "configure"
        assert not manager.change(T.TRANSITION_CONFIGURE)
        assert manager.state() == State.PRIMARY_STATE_UNCONFIGURED
        wait_until(lambda: "no configure" in caplog.text, "the reason in the log")
        log.fails = "start"
        assert manager.change(T.TRANSITION_CONFIGURE)
        assert not manager.change(T.TRANSITION_ACTIVATE)
        assert manager.state() == State.PRIMARY_STATE_INACTIVE
        log.fails = ""
        assert manager.change(T.TRANSITION_ACTIVATE)


def test_an_impossible_transition_does_not_end_the_io_thread():
    log = Log()
    with served(log, {"autostart": False}) as (_, manager, _):
        assert not manager.change(T.TRANSITION_ACTIVATE)
        assert not manager.change(99)
        assert manager.change(T.TRANSITION_CONFIGURE), "it still listens"


def test_parameters_are_described_and_bounded(tmp_path):
    file = tmp_path / "worker.yaml"
    file.write_text("/**:\n  ros__parameters: {speed: 2, names: [a, b]}\n")
    arguments = ["--ros-args", "--params-file", str(file)]
    with served(Log(), {"autostart": False, "count": 7}, arguments) as (node, manager, _):
        request = DescribeParameters.Request(names=["speed", "count", "autostart"])
        speed, count, autostart = manager.call("describe_parameters", request).descriptors
        assert speed.description == "How fast."
        assert (speed.floating_point_range[0].from_value, speed.floating_point_range[0].to_value) == (0.1, 2.0)
        assert count.integer_range[0].from_value == 1
        assert "lifecycle" in autostart.description
        parameters = node.endpoint.node
        assert parameters.get_parameter("speed").value == 2.0, "a whole number is a number"
        assert parameters.get_parameter("count").value == 7
        assert parameters.get_parameter("names").value == ["a", "b"]
    for wrong, error in (("speed:=3.0", ConfigError), ("count:=two", ConfigError), ("sped:=1.0", UnknownNameError)):
        endpoint = Endpoint("worker", arguments=["--ros-args", "-p", wrong], managed=True)
        try:
            with pytest.raises(error):
                ManagedNode(endpoint, Settings, Log().make, {})
        finally:
            endpoint.close()
    with pytest.raises(ConfigError, match=r"count is 0, expected 1 or more"):
        settings_of(Settings)["count"].typed(0)
    assert list(settings_of(Settings)) == ["autostart", "speed", "count", "names"]
    given, rest = parse_flags(Settings, ["--no-autostart", "--speed", "0.5", "--ros-args", "-r", "a:=b"], "worker")
    assert given == {"autostart": False, "speed": 0.5}
    assert rest == ["--ros-args", "-r", "a:=b"]


def test_every_node_of_ours_describes_its_parameters():
    from hardware.ros import camera_node, console_node, executor_node, policy_node, recorder_node, teleop_node

    for module in (camera_node, console_node, executor_node, policy_node, recorder_node, teleop_node):
        (config,) = [
            one
            for name, one in vars(module).items()
            if name.endswith("NodeConfig") and one.__module__ == module.__name__
        ]
        for setting in settings_of(config).values():
            assert setting.text.endswith((".", "…")), f"{config.__name__}.{setting.name}"
            if setting.range is not None:
                setting.typed(setting.default)


def test_a_node_process_with_a_wrong_setting_ends_with_one_line(capsys):
    assert run_managed_node("worker", Settings, Log().make, ["--speed", "9"]) == 1
    assert capsys.readouterr().err == "error: speed is 9, expected 0.1 to 2\n"


def test_executor_process_under_a_manager(start):
    """Inactive it moves nothing, and what was pressed meanwhile counts for nothing; deactivated it holds."""
    options = ["--robot-options", "size=2", "--robot-options", "rate_hz=50.0"]
    process = start(
        *("executor_node", "--no-autostart", "--robot", "fake", *options),
        *("--executor-options", "realtime_priority=0"),
        # Whoever drives here sends no further sign of life: only the transition ends that.
        *("--executor-options", "operator_timeout=600.0", "--executor-options", "max_state_age=10.0"),
    )
    operator = RosOperatorLink()
    try:
        manager = Manager(operator.endpoint, "/robot_rl/executor")
        assert manager.state() == State.PRIMARY_STATE_UNCONFIGURED
        assert manager.change(T.TRANSITION_CONFIGURE)
        operator.wait_for_robot(PATIENCE)
        for number in range(5):
            event = (OperatorEvent.ENABLE,)
            operator.send_operator(OperatorInput(time.monotonic(), number, True, np.ones(2, np.float32), event))
        time.sleep(0.3)
        assert operator.status is None, "an inactive executor runs no loop"
        assert manager.change(T.TRANSITION_ACTIVATE)
        wait_until(lambda: operator.status is not None, "the loop")
        time.sleep(0.5)
        assert (operator.status.mode, operator.status.reason) == ("idle", "started")

        def driven():
            event = (OperatorEvent.ENABLE if operator.status.mode == "idle" else OperatorEvent.TAKE_OVER,)
            operator.send_operator(OperatorInput(time.monotonic(), 9, True, np.ones(2, np.float32), event))
            time.sleep(0.02)
            return operator.status.mode == "human"

        wait_until(driven, "the operator's control")
        assert manager.change(T.TRANSITION_DEACTIVATE)
        wait_until(lambda: operator.status.mode != "human", "the stop")
        assert (operator.status.mode, operator.status.reason) == ("hold", "shutdown")
        assert manager.change(T.TRANSITION_ACTIVATE), "again, with a robot connected anew"
        wait_until(lambda: operator.status.reason == "started", "the second loop, at rest")
        operator.set_estop(True)
        wait_until(lambda: operator.status.mode == "stopped", "the emergency stop")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    finally:
        operator.close()


def test_camera_process_publishes_a_film(start, tmp_path):
    """A film's frames arrive, stamped by this machine's clock, and again when the node is activated again."""
    from sensor_msgs.msg import Image

    from hardware.ros.convert import from_header, from_image
    from hardware.ros.endpoint import quality
    from robot_rl.data.video import VideoWriter

    with VideoWriter(tmp_path / "film.mp4", 20.0, 48, 64) as film:
        for number in range(20):
            film.add(np.full((48, 64, 3), 12 * number, np.uint8))
    options = [f"source={tmp_path / 'film.mp4'}", "width=64", "height=48", "rate_hz=50.0"]
    process = start("camera_node", *(part for one in options for part in ("--camera-options", one)))
    viewer = Endpoint("viewer")
    seen = []
    try:
        viewer.subscribe(Image, "camera/image_raw", seen.append, quality(8))
        manager = Manager(viewer, "/robot_rl/camera")
        wait_until(lambda: len(seen) >= 10, "images")
        assert manager.change(T.TRANSITION_DEACTIVATE)
        time.sleep(1.0)  # what was sent before has arrived
        count = len(seen)
        time.sleep(0.5)
        assert len(seen) == count, "an inactive camera is silent"
        for message in seen:
            stamp, _ = from_header(message.header)
            assert 0 <= time.monotonic() - stamp < PATIENCE
            assert message.header.frame_id.startswith("camera#")
        levels = {round(from_image(message)[..., 0].mean() / 12) for message in seen}
        assert len(levels) >= 5
        assert levels <= set(range(20))
        assert manager.change(T.TRANSITION_ACTIVATE)
        wait_until(lambda: len(seen) > count + 3, "more images")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    finally:
        viewer.close()


def test_camera_process_names_what_is_missing(start):
    process = start("camera_node", "--camera-options", "source=/nowhere.mp4")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("error: the camera '/nowhere.mp4' cannot be opened")
    with pytest.raises(RobotRLError, match="Did you mean 'opencv'"):
        build_camera("camera", {"kind": "opencvv"})
