"""The console over ROS 2: what it sees, what it sends, and its process."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")
pytest.importorskip("viser", reason="the extra 'console' is not installed: pip install 'robot-rl[console]'")

from hardware.console.desk import Desk
from hardware.ros.endpoint import Endpoint
from hardware.ros.link import RosExecutorLink, RosOperatorLink
from hardware.ros.watch import remote_feed
from hardware.transport import ExecutorStatus
from robot_rl.core.robot import StampedObservation
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.core.teleop import OperatorEvent

pytestmark = [pytest.mark.ros, pytest.mark.timeout(200), pytest.mark.usefixtures("ros_domain")]
PATIENCE = 60.0
ROOT = Path(__file__).resolve().parents[2]
SPEC = Spec(
    {"state": ArraySpec((3,)), "images.front": ArraySpec((48, 64, 3), "uint8")}, ArraySpec((2,), unit="m"), 50.0
)


@pytest.fixture
def executor():
    link = RosExecutorLink(SPEC, Endpoint("executor"))
    yield link
    link.close()


def wait_until(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.02)


def test_it_sees_status_and_cameras_and_sends_only_heartbeats(executor):
    link = RosOperatorLink(Endpoint("console"))
    try:
        feed = remote_feed(link)
        assert feed.status()[1] == np.inf
        assert feed.command() is None
        status = ExecutorStatus("human", "human", "operator_takeover", 3, command=[0.5, -0.5], speed=[1.0, 1.0])
        image = np.full((48, 64, 3), 7, np.uint8)

        def seen():
            now = time.monotonic()
            executor.publish_status(status)
            values = {"state": np.zeros(3, np.float32), "images.front": image}
            executor.send_observation(StampedObservation(values, 1, now, {"images.front": now}))
            return feed.status()[0] is not None and feed.observation() is not None

        wait_until(seen, "seeing the executor")
        found, age = feed.status()
        assert (found.mode, found.command) == ("human", [0.5, -0.5])
        assert age < PATIENCE
        np.testing.assert_array_equal(feed.observation().values["images.front"], image)
        assert feed.observation().age(time.monotonic(), "images.front") < PATIENCE
        wait_until(lambda: seen() and feed.command() is not None, "a fresh command")
        wait_until(lambda: feed.command() is None, "a command too old to steer by")

        now = time.monotonic()
        desk = Desk(2, clock=lambda: now)
        desk.hold(1)
        got = []

        def received(least):
            link.send_operator(desk.poll())
            while (reading := executor.poll_operator()) is not None:
                got.append(reading)
            return len(got) >= least

        publishers = link.endpoint._publishers
        wait_until(lambda: all(one.get_subscription_count() for one in publishers), "the executor's listening")
        wait_until(lambda: received(1), "the takeover")
        assert (got[0].source, got[0].enabled) == ("console", True)
        assert got[0].events == (OperatorEvent.TAKE_OVER,)
        now += 1.0
        wait_until(lambda: received(2), "the end of a hold without heartbeats")
        assert (got[1].enabled, got[1].events) == (False, ())
        for _ in range(20):
            received(99)
            time.sleep(0.02)
        assert len(got) == 2, "no heartbeat, no message: silence is what the executor knows a lost operator by"
        desk.ask(OperatorEvent.EMERGENCY_STOP, 2)
        wait_until(lambda: received(3) and executor.poll_estop(), "the stop, on both of its ways")
        assert got[2].events == (OperatorEvent.EMERGENCY_STOP,)
    finally:
        link.close()


def test_its_process_serves_the_page_and_ends_when_asked(executor, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "hardware.ros.console_node", "--port", "8590"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    try:
        wait_until(lambda: "http://127.0.0.1:" in log.read_text() or process.poll() is not None, "the page's address")
        address = next(word for word in log.read_text().split() if word.startswith("http://127.0.0.1:"))
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            assert b"<html" in answer.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_its_process_refuses_a_wider_address_without_a_token(executor):
    command = [sys.executable, "-m", "hardware.ros.console_node", "--host", "0.0.0.0"]
    variables = {name: value for name, value in os.environ.items() if name != "ROBOT_RL_CONSOLE_TOKEN"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert "ROBOT_RL_CONSOLE_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
