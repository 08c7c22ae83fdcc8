"""The recorder process over a real graph: every message of topics of any quality of service, and a sound end."""

import array
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")

from deployment_rig import WanderingPolicy
from rosbags.rosbag2 import Reader

from hardware.cli.record import Convert, Info, Run, run
from hardware.launching.plan import LaunchFile
from hardware.policy_process import PolicyServer
from hardware.recording.recorder import ACTOR_CODES
from hardware.ros.endpoint import Endpoint, quality
from hardware.ros.link import RosOperatorLink, RosPolicyLink
from robot_rl.core.errors import DataError
from robot_rl.core.teleop import OperatorEvent, OperatorInput
from robot_rl.data.bag.bag import open_bag
from robot_rl.data.bag.recover import recover
from robot_rl.data.dataset import open_dataset

pytestmark = [pytest.mark.ros, pytest.mark.timeout(240), pytest.mark.usefixtures("ros_domain")]
PATIENCE = 90.0
ROOT = Path(__file__).resolve().parents[2]
AGES = ("max_state_age=5.0", "max_camera_age=5.0")
"""Generous: a machine that runs other programs beside these tests may stall any thread for a moment."""


@pytest.fixture
def endpoint():
    found = Endpoint("robot", namespace="robot")
    found.start()
    yield found
    found.close()


@pytest.fixture
def record(tmp_path):
    """Start a recorder process; whatever still runs afterwards is killed."""
    started = []

    def start(*arguments):
        log = (tmp_path / "recorder.log").open("w")
        command = [sys.executable, "-m", "hardware.ros.recorder_node", "--out", str(tmp_path / "run"), *arguments]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_until(condition, what, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)


def met(endpoint):
    """Return whether each of the endpoint's publishers has one subscription, its own middleware says."""
    return all(publisher.get_subscription_count() == 1 for publisher in endpoint._publishers)


def only_weak(endpoint, topic):
    """Return whether the one subscription of a topic asks for no reliability."""
    found = endpoint.node.get_subscriptions_info_by_topic(topic)
    return [one.qos_profile.reliability.short_key for one in found] == ["best_effort"]


def on_disk(recording):
    """Return how many messages of each topic a kill would leave now."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            copy = shutil.copytree(recording, Path(scratch) / "copy")
            return recover(copy, copy / "rescued.mcap").counts
        except (OSError, shutil.Error, DataError):
            return {}  # nothing is there yet, or it has just got its name


def messages():
    from sensor_msgs.msg import Image, JointState
    from std_msgs.msg import String

    return JointState, Image, String


def test_everything_is_recorded_with_the_quality_of_service_that_is_offered(tmp_path, endpoint, record):
    joint_state, image, string = messages()
    send_state = endpoint.publisher(joint_state, "joint_states", quality(200))
    send_image = endpoint.publisher(image, "camera", quality(5, reliable=False))
    send_description = endpoint.publisher(string, "description", quality(1, latched=True))
    send_description(string(data="said before anybody listened"))
    topics = ("/robot/joint_states", "/robot/camera", "/robot/description", "/robot/never")
    process = record(*[word for name in topics for word in ("--topics", name)], "--patience", "0.5")
    log = tmp_path / "recorder.log"
    wait_until(lambda: all(endpoint.node.count_subscribers(name) for name in topics[:3]), "the subscriptions")
    wait_until(lambda: "nobody publishes /robot/never" in log.read_text(), "the complaint")
    wait_until(lambda: met(endpoint), "the publishers' hearing of them")
    time.sleep(0.5)
    pixels = array.array("B", bytes(64 * 48 * 3))
    for k in range(200):
        message = joint_state(name=["a", "b"], position=[0.01 * k, 1.0])
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(time.time_ns(), 1_000_000_000)
        send_state(message)
        if k % 10 == 0:
            send_image(image(height=48, width=64, encoding="rgb8", step=192, data=pixels))
        time.sleep(0.005)
    expected = {"/robot/joint_states": 200, "/robot/camera": 20, "/robot/description": 1}
    wait_until(lambda: on_disk(tmp_path / "run") == expected, "the recording of every message")
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    bag = open_bag(tmp_path / "run")
    assert {name: topic.count for name, topic in bag.topics.items()} == expected
    kind = bag.topic("/robot/joint_states").message_type()
    states = [one for one in bag.messages() if one.topic == "/robot/joint_states"]
    assert [kind.decode(one.data)["position"][0] for one in states] == pytest.approx([0.01 * k for k in range(200)])
    assert [one.sequence for one in states] == list(range(1, 201))
    delays = [(one.log_time - kind.stamp(one.data)) * 1e-9 for one in states]
    assert 0 < min(delays) < 0.1
    with Reader(tmp_path / "run") as reader:
        offered = {one.topic: one.ext.offered_qos_profiles[0] for one in reader.connections}
        assert all(one.digest.startswith("RIHS01_") for one in reader.connections)
    assert offered["/robot/camera"].reliability.name == "BEST_EFFORT"
    assert offered["/robot/description"].durability.name == "TRANSIENT_LOCAL"
    assert offered["/robot/joint_states"].reliability.name == "RELIABLE"


def test_a_weaker_publisher_that_comes_later_is_recorded_too_and_a_kill_leaves_all_of_it(tmp_path, endpoint, record):
    string = messages()[2]
    send = endpoint.publisher(string, "words", quality(100))
    process = record("--topics", "/robot/words", "--chunk-seconds", "0.1")
    log = tmp_path / "recorder.log"
    wait_until(lambda: endpoint.node.count_subscribers("/robot/words"), "the subscription")
    send_weak = endpoint.publisher(string, "words", quality(100, reliable=False))
    wait_until(lambda: "subscribed again" in log.read_text(), "the second subscription")
    wait_until(lambda: only_weak(endpoint, "/robot/words") and met(endpoint), "the publishers' hearing of it")
    time.sleep(1.0)
    for k in range(20):
        send(string(data=f"strong {k}"))
        send_weak(string(data=f"weak {k}"))
        time.sleep(0.01)
    wait_until(lambda: on_disk(tmp_path / "run") == {"/robot/words": 40}, "the recording of every message")
    process.kill()
    process.wait()
    recover(tmp_path / "run")
    bag = open_bag(tmp_path / "run")
    kind = bag.topic("/robot/words").message_type()
    words = [kind.decode(one.data)["data"] for one in bag.messages()]
    assert sorted(words) == sorted(f"{how} {k}" for how in ("strong", "weak") for k in range(20))


def test_each_activation_makes_a_recording_of_its_own(tmp_path, endpoint):
    from hardware.ros.recorder_node import RecorderNodeConfig, RecorderWork

    send = endpoint.publisher(messages()[2], "words", quality(10))
    node = Endpoint("recorder", namespace="robot")
    node.start()
    work = RecorderWork(RecorderNodeConfig(out=str(tmp_path / "run"), topics=("words",)), node)
    try:
        for _ in range(2):
            stop = threading.Event()
            work.start()
            thread = threading.Thread(target=work.run, args=(stop,))
            thread.start()
            wait_until(lambda: endpoint.node.count_subscribers("words"), "the subscription")
            while not work.recorder.written.get("/robot/words"):
                send(messages()[2](data="hello"))
                time.sleep(0.05)
            stop.set()
            thread.join(30)
            assert not thread.is_alive()
            wait_until(lambda: not endpoint.node.count_subscribers("words"), "the end of the subscription")
    finally:
        node.close()
    for name in ("run", "run_2"):
        assert open_bag(tmp_path / name).topics["/robot/words"].count > 0


def test_a_message_that_comes_at_once_is_recorded(tmp_path):
    from hardware.ros.recorder_node import BagRecorder, RecorderNodeConfig, TopicRecorder

    class Node:
        resolve_topic_name = staticmethod(lambda name: f"/{name}")
        get_topic_names_and_types = staticmethod(lambda: [("/words", ["std_msgs/msg/String"])])
        get_publishers_info_by_topic = staticmethod(lambda name: [SimpleNamespace(qos_profile=quality(10))])

        @staticmethod
        def create_subscription(kind, name, callback, profile, raw):
            callback(b"\0\1\0\0" + bytes(8), {"received_timestamp": 1, "source_timestamp": 1})

    config = RecorderNodeConfig(out=str(tmp_path / "run"), topics=("words",))
    recorder = BagRecorder(config.out, config.bag())
    TopicRecorder(SimpleNamespace(node=Node()), recorder, config).look()
    recorder.close()
    assert recorder.written == {"/words": 1}


def test_what_has_arrived_is_recorded_at_the_end(tmp_path, endpoint):
    from hardware.ros.recorder_node import BagRecorder, RecorderNodeConfig, TopicRecorder

    send = endpoint.publisher(messages()[2], "words", quality(50))
    node = Endpoint("recorder", namespace="robot")
    node.start()
    busy = threading.Event()
    try:
        config = RecorderNodeConfig(out=str(tmp_path / "run"), topics=("words",))
        recorder = BagRecorder(config.out, config.bag())
        topics = TopicRecorder(node, recorder, config)
        wait_until(lambda: (topics.look(), not topics.missing)[1], "the subscription")
        while not recorder.written.get("/robot/words"):
            send(messages()[2](data="hello"))
            time.sleep(0.05)
        before = recorder.written["/robot/words"]
        node.run_in_thread(busy.wait)
        for _ in range(20):
            send(messages()[2](data="late"))
        endpoint._flush(PATIENCE)
        threading.Timer(0.2, busy.set).start()
        topics.release()
        recorder.close()
        assert recorder.written["/robot/words"] >= before + 20
    finally:
        busy.set()
        node.close()


def test_a_recording_that_never_ran_is_finished_all_the_same(tmp_path):
    from hardware.ros.recorder_node import RecorderNodeConfig, RecorderWork

    work = RecorderWork(RecorderNodeConfig(out=str(tmp_path / "run"), topics=("words",)), None)
    work.start()
    work.close()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metadata.yaml", "run_0.mcap"]


def test_the_profile_for_images_stays_on_this_machine_and_has_room_for_images():
    space = {"dds": "http://www.eprosima.com"}
    root = ElementTree.parse(ROOT / "launch" / "fastdds_images.xml").getroot()
    transports = {
        one.findtext("dds:type", None, space): one for one in root.findall(".//dds:transport_descriptor", space)
    }
    assert set(transports) == {"UDPv4", "SHM"}
    addresses = transports["UDPv4"].findall(".//dds:interfaceWhiteList/dds:address", space)
    assert [one.text for one in addresses] == ["127.0.0.1"]
    assert int(transports["SHM"].findtext("dds:segment_size", None, space)) >= 2**25
    assert root.findtext(".//dds:useBuiltinTransports", None, space) == "false"
    command = [sys.executable, "-m", "robot_rl.cli.main", "ros", "env", "--images"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AMENT", "ROS_", "FAST"))}
    shown = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout
    assert f"FASTRTPS_DEFAULT_PROFILES_FILE={ROOT / 'launch' / 'fastdds_images.xml'}" in shown
    assert "ROS_AUTOMATIC_DISCOVERY_RANGE=SYSTEM_DEFAULT" in shown


CAMERA = """
import array, sys, threading
from hardware.ros.endpoint import Endpoint, quality
from sensor_msgs.msg import Image

endpoint, end = Endpoint("camera"), threading.Event()
publish = endpoint.publisher(Image, "image", quality(2, reliable=False))
endpoint.start()
threading.Thread(target=lambda: (sys.stdin.read(), end.set()), daemon=True).start()
image = Image(height=480, width=640, encoding="rgb8", step=1920, data=array.array("B", bytes(range(256)) * 3600))
while not end.wait(0.05):
    publish(image)
endpoint.close()
"""
VIEWER = """
import sys, threading
from hardware.ros.endpoint import Endpoint, quality
from sensor_msgs.msg import Image

endpoint, seen = Endpoint("viewer"), threading.Event()
def look(image):
    if not seen.is_set() and bytes(image.data) == bytes(range(256)) * 3600:
        print(image.height, image.width, flush=True)
        seen.set()
endpoint.subscribe(Image, "image", look, quality(2, reliable=False))
endpoint.start()
sys.stdin.read()
endpoint.close()
"""


def test_a_best_effort_image_travels_whole_through_the_profile_for_images():
    """From one process to another, through the memory that they share; the profile is what both of them really use."""
    profile = {
        "FASTRTPS_DEFAULT_PROFILES_FILE": str(ROOT / "launch" / "fastdds_images.xml"),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "SYSTEM_DEFAULT",
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **profile}, **pipes)
        for code in (VIEWER, CAMERA)
    ]
    try:
        assert both[0].stdout.readline() == "480 640\n"
        for one in both:
            assert "/dev/shm/fastrtps_" in Path(f"/proc/{one.pid}/maps").read_text(), "no memory is shared"
        for one in both:
            one.stdin.close()
            assert one.wait(PATIENCE) == 0
    finally:
        for one in both:
            one.kill()
            one.wait()
            one.stdout.close()


@pytest.fixture
def threads():
    """Start functions of a stop event in threads, the newest first told to stop; what they raise is no matter here."""
    started = []

    def start(function):
        stop = threading.Event()
        started.append((stop, threading.Thread(target=function, args=(stop,), daemon=True)))
        started[-1][1].start()
        return stop

    yield start
    for stop, thread in reversed(started):
        stop.set()
        thread.join(30)


def test_what_the_launch_file_records_becomes_the_data_set_that_the_executor_wrote_itself(tmp_path, threads):
    """A policy drives, an operator takes over and judges: actions, actors, flags and images are those executed."""
    from hardware.ros.executor_node import ExecutorNodeConfig, ExecutorWork
    from hardware.ros.recorder_node import RecorderNodeConfig, RecorderWork

    (topics,) = [one for one in LaunchFile(ROOT / "launch" / "record.launch.yaml").arguments() if one.name == "topics"]
    recording = Endpoint("recorder")
    recording.start()
    recorder = RecorderWork(RecorderNodeConfig(str(tmp_path / "bag"), tuple(yaml.safe_load(topics.default))), recording)
    recorder.start()
    end_recording = threads(recorder.run)
    config = ExecutorNodeConfig(
        robot="fake",
        robot_options=("size=2", "rate_hz=20.0", "camera=true"),
        executor_options=("realtime_priority=0", "execute_steps=4", "late_steps=30", "operator_timeout=5.0", *AGES),
        unattended=True,
        record=str(tmp_path / "record"),
    )
    work = ExecutorWork(config, Endpoint("executor"))
    links = [work.link, recording]
    try:
        expected = {f"/robot_rl/{name}" for name in ("observation", "observation/images/front", "executed", "status")}
        wait_until(lambda: expected <= set(recorder.recorder.written), "the subscriptions")
        wait_until(lambda: met(work.link.endpoint), "the publishers' hearing of them")
        policy, operator = RosPolicyLink(), RosOperatorLink()
        links[:0] = [policy, operator]
        policy.wait_for_robot(PATIENCE)
        server = PolicyServer(WanderingPolicy(work.spec, horizon=40), policy)
        threads(lambda stop: [server.serve_once(0.05) for _ in iter(stop.is_set, True)])
        work.start()
        end_work = threads(work.run)
        acted = work.executor.journal.acted
        count = 0

        def drives(writer, steps, *events):
            """Ask once that ``writer`` drives, again where a stalled machine ended it; whether it did for so long."""
            nonlocal count
            count += 1
            human = writer == "human"
            if work.executor.arbiter.writer != writer:
                events += (OperatorEvent.TAKE_OVER if human else OperatorEvent.HAND_BACK,)
            reading = OperatorInput(time.monotonic(), count, human, np.array([0.2 * human, 0.0]), events)
            operator.send_operator(reading)
            time.sleep(0.01)
            return acted[writer] >= steps

        wait_until(lambda: drives("policy", 14), "the policy driving")
        wait_until(lambda: drives("human", 10), "the takeover")
        drives("human", 0, OperatorEvent.SUCCESS)
        judged = acted["human"]
        wait_until(lambda: drives("human", judged + 8), "the next episode")
        end_work.set()
        wait_until(lambda: work.executor is None, "the end of the run")
        end_recording.set()
        wait_until(lambda: (tmp_path / "bag" / "metadata.yaml").exists(), "the end of the recording")
    finally:
        for one in links:
            one.close()
    assert run(Info(tmp_path / "bag", draft=tmp_path / "map.yaml")) == 0
    topic_map = yaml.safe_load((tmp_path / "map.yaml").read_text())
    (tmp_path / "map.yaml").write_text(yaml.safe_dump({**topic_map, "min_seconds": 0.0}))
    assert run(Convert(tmp_path / "bag", tmp_path / "data", tmp_path / "map.yaml")) == 0
    found, own = open_dataset(tmp_path / "data"), open_dataset(tmp_path / "record")
    assert {key: one.shape for key, one in found.spec.observation.items()} == {
        "state": (2,),
        "images.front": (48, 64, 3),
    }
    assert (found.spec.rate_hz, found.spec.action.unit, found.spec.action.names) == (20.0, "m", ())
    frames, truth = found.load(), own.load()
    ours, theirs = (one.extras["stamp"].ravel() for one in (truth, frames))
    rows = np.abs(ours[:, None] - theirs).argmin(axis=0)
    assert np.abs(ours[rows] - theirs).max() < 1e-5, "the very steps"
    assert len(np.unique(rows)) == len(rows) >= 0.5 * len(ours)
    np.testing.assert_allclose(frames.action, truth.action[rows], atol=1e-6)
    np.testing.assert_allclose(frames.observation["state"], truth.observation["state"][rows], atol=1e-6)
    np.testing.assert_allclose(frames.extras["policy_action"], truth.extras["policy_action"][rows], atol=1e-6)
    for name in ("actor", "intervention", "safety_flags"):
        np.testing.assert_array_equal(frames.extras[name], truth.extras[name][rows], name)
    shown, kept = (
        np.concatenate([data.images("images.front", number)[:, 24, 32, 0] for number in range(data.num_episodes)])
        for data in (found, own)
    )
    assert np.abs(shown.astype(int) - kept[rows]).max() <= 2, "the image of the step: the next one is 5 brighter"
    assert set(np.unique(frames.extras["actor"])) >= {ACTOR_CODES["policy"], ACTOR_CODES["human"]}
    assert frames.extras["safety_flags"].any(), "the chain took part"
    begun = np.searchsorted(truth.episode_ends, rows[frames.episode_starts], "right")
    assert set(begun) == {0, 1}, "what is judged ends an episode there as here"
    assert not set(truth.episode_ends - 1) & set(rows) - set(rows[frames.episode_ends - 1]), "none reaches over the end"


@pytest.fixture
def own_signals():
    """The recorder handles signals of the process that it runs in; give them back."""
    saved = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in saved.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals", "endpoint")
def test_errors_of_use_are_one_line(tmp_path, capfd):
    (tmp_path / "mine.txt").write_text("x")
    assert run(Run(tmp_path, topics=("/a",), seconds=0.1)) == 1
    assert "is not empty" in capfd.readouterr().err
    assert run(Run(tmp_path / "run", seconds=0.1)) == 1
    assert "nothing to record" in capfd.readouterr().err
    assert run(Run(tmp_path / "run", everything=True, seconds=0.6)) == 0
    assert json.loads(open_bag(tmp_path / "run").metadata.custom["dropped"]) == {}
