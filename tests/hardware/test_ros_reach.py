"""Who can command over ROS 2: nobody outside the domain, nothing outside this machine; and who learns of an e-stop."""

import gc
import ipaddress
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")

from hardware.control.arbiter import Mode
from hardware.control.executor import Executor, ExecutorConfig
from hardware.robots.fake import FakeRobot
from hardware.ros.endpoint import Endpoint
from hardware.ros.link import RosExecutorLink, RosOperatorLink
from robot_rl.core.teleop import OperatorEvent, OperatorInput

pytestmark = [pytest.mark.ros, pytest.mark.timeout(120), pytest.mark.usefixtures("ros_domain")]
PATIENCE = 60.0
ROOT = Path(__file__).resolve().parents[2]
ROBOT = FakeRobot(2, rate_hz=50.0)
LOOPBACK = ipaddress.ip_address("127.0.0.1")


def wait_until(condition, what, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.005)


COMMANDER = """
import sys, time
import numpy as np
from hardware.ros.convert import to_trajectory
from hardware.ros.endpoint import Endpoint, quality
from hardware.ros.link import CHUNK, RosOperatorLink
from robot_rl.core.policy import ActionChunk
from robot_rl.core.teleop import OperatorEvent, OperatorInput
from trajectory_msgs.msg import JointTrajectory

link = RosOperatorLink(Endpoint("commander", domain_id=int(sys.argv[1])))
chunk = link.endpoint.publisher(JointTrajectory, CHUNK, quality(8))
print("up", flush=True)
for number in range(100000):
    link.send_operator(OperatorInput(time.monotonic(), number, True, np.ones(2), (OperatorEvent.EMERGENCY_STOP,)))
    chunk(to_trajectory(ActionChunk(np.ones((4, 2), np.float32), number, 0.0), ["action/0", "action/1"], 50.0))
    time.sleep(0.02)
"""


@pytest.fixture
def commander():
    """Start a process that sends everything that commands, in the given domain."""
    started = []

    def start(number):
        process = subprocess.Popen([sys.executable, "-c", COMMANDER, str(number)], cwd=ROOT, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_peers_outside_the_domain_cannot_command(commander, ros_domain, new_domain):
    """The same process is heard at once in our domain, and never in the next one: the silence is no accident."""
    link = RosExecutorLink(ROBOT.spec)
    try:
        stranger = commander(new_domain())
        time.sleep(2.0)
        assert stranger.poll() is None
        assert (link.poll_chunk(), link.poll_operator(), link.poll_estop()) == (None, None, False)
        assert link.endpoint.node.count_publishers("chunk") == 0
        commander(ros_domain)
        wait_until(link.poll_estop, "the emergency stop of a peer inside")
        wait_until(lambda: link.poll_chunk() is not None, "the chunk of a peer inside")
        wait_until(lambda: link.poll_operator() is not None, "the operator's input of a peer inside")
    finally:
        link.close()


def test_nothing_outside_this_machine_can_send_to_our_processes():
    """Every socket is bound to the loopback address, but for the multicast group in which peers announce themselves."""
    before = own_sockets()
    endpoint = Endpoint("listener")
    link = RosExecutorLink(ROBOT.spec, endpoint)
    try:
        opened = own_sockets() - before
        assert {kind for kind, _, _ in opened} == {"udp"}, f"a socket of another kind is open: {opened}"
        addresses = {address for _, address, _ in opened if not address.is_multicast}
        assert addresses == {LOOPBACK}, f"a socket is open to other machines: {opened}"
    finally:
        link.close()


@pytest.mark.parametrize("managed", [False, True])
def test_a_closed_endpoint_gives_its_sockets_back_at_once(managed):
    """Without waiting for the garbage collector: what lingers stays visible to others and takes one of 16 places."""
    before = own_sockets()
    gc.disable()
    try:
        endpoint = Endpoint("short_lived", managed=managed)
        assert own_sockets() - before
        endpoint.close()
        assert not own_sockets() - before
    finally:
        gc.enable()


def own_sockets():
    """The sockets of this process that are bound: {(kind, address, port)}, of kind udp, udp6, tcp or tcp6."""
    inodes = set()
    for one in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(one)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for kind in ("udp", "udp6", "tcp", "tcp6"):
        table = Path("/proc/self/net") / kind
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            address, port = fields[1].split(":")
            words = bytes.fromhex(address)  # of 32 bits in the order of this machine
            packed = b"".join(words[start : start + 4][::-1] for start in range(0, len(words), 4))
            if fields[9] in inodes and int(port, 16):
                found.add((kind, ipaddress.ip_address(packed), int(port, 16)))
    return found


@pytest.mark.parametrize(
    ("family", "address", "kind"),
    [
        (socket.AF_INET, "0.0.0.0", "tcp"),
        (socket.AF_INET, "127.0.0.1", "udp"),
        (socket.AF_INET6, "::", "tcp6"),
        (socket.AF_INET6, "::1", "udp6"),
    ],
)
def test_a_socket_of_any_kind_would_be_seen(family, address, kind):
    """What `own_sockets` says of DDS is worth something: it sees what the process opens itself."""
    before = own_sockets()
    with socket.socket(family, socket.SOCK_STREAM if kind.startswith("tcp") else socket.SOCK_DGRAM) as opened:
        opened.bind((address, 0))
        if kind.startswith("tcp"):
            opened.listen()
        assert own_sockets() - before == {(kind, ipaddress.ip_address(address), opened.getsockname()[1])}


def test_an_executor_that_starts_later_learns_of_a_pressed_emergency_stop():
    """The topic is latched: the stop holds before anything else arrives, and until reset and enable follow."""
    operator = RosOperatorLink()
    link = None
    try:
        operator.send_operator(OperatorInput(time.monotonic(), 0, True, np.zeros(2), (OperatorEvent.EMERGENCY_STOP,)))
        time.sleep(0.3)  # nobody is there to hear it
        link = RosExecutorLink(ROBOT.spec)
        joined = time.monotonic()
        wait_until(link.poll_estop, "the latched stop")
        assert time.monotonic() - joined < 10.0
        executor = Executor(FakeRobot(2, rate_hz=50.0), link, ExecutorConfig(realtime_priority=0, autostart=True))
        executor.connect()
        executor.tick()
        assert (executor.arbiter.mode, executor.arbiter.reason) == (Mode.STOPPED, "emergency_stop")
        executor.shut_down()
    finally:
        operator.close()
        if link is not None:
            link.close()


def test_a_console_that_starts_does_not_release_what_another_pressed():
    first, link = RosOperatorLink(Endpoint("first")), RosExecutorLink(ROBOT.spec)
    second = None
    try:
        first.set_estop(True)
        wait_until(link.poll_estop, "the stop")
        second = RosOperatorLink(Endpoint("second"))

        def heard():
            second.send_operator(OperatorInput(time.monotonic(), 0, True, np.zeros(2)))
            return link.poll_operator() is not None

        wait_until(heard, "the second console's reading")
        assert link.poll_estop()
    finally:
        for one in (first, second, link):
            if one is not None:
                one.close()
