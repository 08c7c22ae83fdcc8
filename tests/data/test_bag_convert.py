"""Recordings of topics become data sets: by their times, in one rhythm, with what is wrong named and left out."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from robot_rl.core.errors import ConfigError, DataError, RobotRLError, UnknownNameError
from robot_rl.data.bag.bag import open_bag
from robot_rl.data.bag.check import check_bag
from robot_rl.data.bag.definitions import schema_of
from robot_rl.data.bag.images import decode_image
from robot_rl.data.bag.streams import Stream, describe, find_events
from robot_rl.data.bag.to_dataset import Handling, convert_bag
from robot_rl.data.bag.topic_map import draft_topic_map, parse_topic_map, read_topic_map
from robot_rl.data.dataset import open_dataset

TYPES = get_typestore(Stores.ROS2_JAZZY)
JOINT_STATE, IMAGE, FLOATS = "sensor_msgs/msg/JointState", "sensor_msgs/msg/Image", "std_msgs/msg/Float64MultiArray"
COMPRESSED, BOOL = "sensor_msgs/msg/CompressedImage", "std_msgs/msg/Bool"
EPOCH = 1_700_000_000_000_000_000
MAP = {
    "rate_hz": 20,
    "tolerance": 0.03,
    "task": "wave",
    "observation": {
        "state": {"topic": "/joints", "field": "position", "names": ["b", "a"], "unit": "rad"},
        "images.front": {"topic": "/camera", "tolerance": 0.06},
    },
    "action": {"topic": "/command", "field": "data", "unit": "rad", "tolerance": 0.06},
}


def header(ns):
    time = TYPES.types["builtin_interfaces/msg/Time"](*divmod(int(ns), 1_000_000_000))
    return TYPES.types["std_msgs/msg/Header"](time, "base")


def joints(t, stamp, value=None):
    value = np.sin(t) if value is None else value
    position = np.array([value, 2 * value])
    return TYPES.types[JOINT_STATE](header(stamp), ["a", "b"], position, np.zeros(0), np.zeros(0))


def image(t, stamp, level=None):
    pixels = np.full((24, 32, 3), int(20 + 40 * t) % 256 if level is None else level, np.uint8)
    pixels[:, :8] = (250, 10, 10)
    return TYPES.types[IMAGE](header(stamp), 24, 32, "rgb8", 0, 96, pixels.ravel())


def floats(values):
    layout = TYPES.types["std_msgs/msg/MultiArrayLayout"]([], 0)
    return TYPES.types[FLOATS](layout, np.asarray(values, np.float64))


@dataclass
class Story:
    """What happens in a recording of joints (100 Hz), a camera (30 Hz) and commands (50 Hz)."""

    seconds: float = 4.0
    storage: str = "mcap"
    header_shift: dict = field(default_factory=dict)
    """Function of t that moves the clock of a topic, by topic (s)."""
    silent: dict = field(default_factory=dict)
    """(first, last) time without messages, by topic (s)."""
    frozen: dict = field(default_factory=dict)
    """(first, last) time of equal messages, by topic (s)."""
    command: object = staticmethod(lambda t: np.cos(t))
    delay: float = 0.002
    clock: int = EPOCH
    """What headers say at t = 0 (ns)."""
    extra: list = field(default_factory=list)
    """(t, topic, type, message) beside these."""


def write(root: Path, story: Story) -> Path:
    events = []
    for topic, rate, kind, make in (
        ("/joints", 100, JOINT_STATE, joints),
        ("/camera", 30, IMAGE, image),
        ("/command", 50, FLOATS, None),
    ):
        first, last = story.silent.get(topic, (np.inf, np.inf))
        frozen = story.frozen.get(topic, (np.inf, np.inf))
        for k in range(int(story.seconds * rate) + 1):
            t = k / rate
            if first < t < last:
                continue
            shown = frozen[0] if frozen[0] < t < frozen[1] else t
            stamp = story.clock + round((t + story.header_shift.get(topic, lambda t: 0.0)(t)) * 1e9)
            message = floats([story.command(t)]) if make is None else make(shown, stamp)
            events.append((t, topic, kind, message))
    plugin = StoragePlugin.MCAP if story.storage == "mcap" else StoragePlugin.SQLITE3
    with Writer(root, version=9, storage_plugin=plugin) as writer:
        connections = {}
        for t, topic, kind, message in sorted(events + story.extra, key=lambda event: event[0]):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=TYPES)
            received = EPOCH + round((t + story.delay) * 1e9)
            writer.write(connections[topic], received, TYPES.serialize_cdr(message, kind))
    return root


def changed(**changes):
    return parse_topic_map({**json.loads(json.dumps(MAP)), **changes})


def convert(tmp_path, story, topic_map=None, **options):
    bag = open_bag(write(tmp_path / "bag", story))
    return convert_bag(bag, topic_map or parse_topic_map(MAP), tmp_path / "data", **options)


def kinds(faults):
    return {(fault.kind, fault.topic) for fault in faults}


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_strangers_recording_becomes_a_data_set_with_values_by_their_times(tmp_path, storage):
    done = convert(tmp_path, Story(storage=storage))
    assert (done.episodes, done.faults, sum(done.left_out.values())) == (1, [], 0)
    dataset = open_dataset(tmp_path / "data")
    assert dataset.tasks == ["wave"]
    assert dataset.spec.rate_hz == 20
    assert dataset.spec.observation["state"].names == ("b", "a")
    assert dataset.spec.observation["state"].unit == "rad"
    frames = dataset.load()
    assert frames.num_frames == done.frames == 81
    t = frames.extras["stamp"].ravel() - EPOCH * 1e-9
    np.testing.assert_allclose(np.diff(t), 0.05, atol=1e-5)
    # The last joint state before an instant, in the order of the map; the first command after it.
    k = np.floor(t * 100 + 1e-3) / 100
    np.testing.assert_allclose(frames.observation["state"], np.stack([2 * np.sin(k), np.sin(k)], 1), atol=1e-5)
    command = np.ceil(t * 50 - 1e-3) / 50
    np.testing.assert_allclose(frames.action[:, 0], np.cos(command), atol=1e-5)
    pictures = dataset.images("images.front", 0)
    levels = (20 + 40 * np.floor(t * 30 + 1e-3) / 30).astype(int)
    assert np.abs(pictures[:, 12, 20, 0].astype(int) - levels).max() <= 4
    assert pictures[10, 12, 2, 0] > 200 > 60 > pictures[10, 12, 2, 2], "red comes first"
    assert json.loads((tmp_path / "data" / "meta" / "recording.json").read_text())["frames"] == 81


def test_a_frozen_camera_is_named_and_left_out_or_kept(tmp_path):
    story = Story(frozen={"/camera": (1.5, 2.5)})
    done = convert(tmp_path / "drop", story)
    assert kinds(done.faults) == {("frozen", "/camera")}
    assert done.faults[0].start == pytest.approx(1.5, abs=0.05)
    assert done.faults[0].end == pytest.approx(2.5, abs=0.05)
    assert done.left_out["/camera is frozen"] == pytest.approx(20, abs=2)
    assert done.episodes == 2
    kept = convert(tmp_path / "keep", story, handling=Handling(frozen="keep"))
    assert kinds(kept.faults) == {("frozen", "/camera")}, "kept, and named all the same"
    assert (kept.episodes, kept.frames) == (1, 81)


def test_a_still_sensor_of_a_robot_at_rest_is_not_frozen(tmp_path):
    story = Story(frozen={"/joints": (1.0, 3.0)}, command=lambda t: np.cos(np.clip(t, 0, 1.0) + max(t - 3.0, 0)))
    assert convert(tmp_path, story).faults == []


@pytest.mark.parametrize("shift", [5.0, -5.0])
def test_a_clock_jump_is_named_and_cuts_the_recording(tmp_path, shift):
    story = Story(header_shift={topic: lambda t: shift * (t > 2.0) for topic in ("/joints", "/camera")})
    done = convert(tmp_path, story)
    assert kinds(done.faults) == {("clock_jump", "/joints"), ("clock_jump", "/camera")}
    assert f"{'forward' if shift > 0 else 'back'} by 5.0" in done.faults[0].text
    assert done.faults[0].start == pytest.approx(2.0, abs=0.05)
    assert done.episodes == 2
    assert 75 <= done.frames <= 81


def test_one_jumping_clock_can_be_overruled_by_the_times_of_receipt(tmp_path):
    story = Story(header_shift={"/camera": lambda t: 3.0 * (t > 2.0)})
    assert convert(tmp_path / "drop", story).frames < 45
    kept = convert(tmp_path / "keep", story, handling=Handling(jumps="keep"))
    assert kinds(kept.faults) == {("clock_jump", "/camera")}
    assert kept.frames == pytest.approx(80, abs=1)


def test_receipt_that_goes_back_and_forth_never_asks_for_an_image_again(tmp_path):
    from robot_rl.data.bag.mcap_writer import McapWriter

    write(tmp_path / "bag", Story())
    bag = open_bag(tmp_path / "bag")
    writer = McapWriter(tmp_path / "shaken.mcap")
    numbers = {name: writer.add_channel(name, schema_of(topic.type)) for name, topic in bag.topics.items()}
    for k, one in enumerate(bag.messages()):
        writer.write(numbers[one.topic], one.log_time + (k % 7 == 0) * 400_000_000, one.data)
    writer.finish()
    done = convert_bag(
        open_bag(tmp_path / "shaken.mcap"), parse_topic_map(MAP), tmp_path / "data", handling=Handling(jumps="keep")
    )
    assert done.frames > 40
    assert {kind for kind, _ in kinds(done.faults)} >= {"clock_jump"}


def test_a_clock_that_differs_is_named_and_can_be_aligned(tmp_path):
    story = Story(header_shift={"/camera": lambda t: -40.0})
    with pytest.raises(DataError, match="no frame is left"):
        convert(tmp_path / "header", story)
    observation = {**MAP["observation"], "images.front": {"topic": "/camera", "tolerance": 0.06, "stamp": "aligned"}}
    assert convert(tmp_path / "aligned", story, changed(observation=observation)).frames == 81


def test_headers_of_a_monotonic_clock_go_with_topics_that_have_none(tmp_path):
    done = convert(tmp_path, Story(clock=123_000_000_000))
    assert (done.frames, done.faults) == (81, [])
    assert open_dataset(tmp_path / "data").load().extras["stamp"].ravel()[0] == pytest.approx(123.0, abs=0.02)


def test_dropped_messages_are_counted_and_their_frames_left_out_or_kept(tmp_path):
    story = Story(silent={"/camera": (1.99, 2.51)})
    done = convert(tmp_path / "drop", story)
    assert kinds(done.faults) == {("dropped", "/camera")}
    assert "16 messages are missing" in done.faults[0].text
    assert done.left_out["nothing from /camera within 0.06 s"] == pytest.approx(10, abs=1)
    assert done.episodes == 2
    kept = convert(tmp_path / "keep", story, handling=Handling(dropped="keep"))
    assert (kept.episodes, kept.frames) == (1, 81)


def test_what_is_no_number_is_named_and_left_out(tmp_path):
    done = convert(tmp_path, Story(command=lambda t: np.nan if 1.99 < t < 2.05 else np.cos(t)))
    assert kinds(done.faults) == {("not_finite", "/command")}
    assert done.left_out["/command is not finite"] >= 1
    assert np.isfinite(open_dataset(tmp_path / "data").load().action).all()
    assert done.episodes == 2


def test_marks_make_episodes_and_short_pieces_are_left_out(tmp_path):
    bool_type = TYPES.types[BOOL]
    marks = [(0.5, True), (2.0, False), (2.2, True), (2.5, False), (2.6, True)]
    story = Story(extra=[(t, "/episode", BOOL, bool_type(value)) for t, value in marks])
    done = convert(tmp_path, story, changed(episodes={"topic": "/episode", "field": "data"}))
    assert done.episodes == 2
    assert done.left_out["shorter than min_seconds"] == pytest.approx(6, abs=1)
    lengths = open_dataset(tmp_path / "data").load().episode_lengths
    assert lengths.tolist() == pytest.approx([30, 28], abs=1)


def test_compressed_images_are_decoded_and_a_damaged_one_ends_an_episode(tmp_path):
    rng = np.random.default_rng(0)
    extra = []
    for k in range(121):
        pixels = cv2.GaussianBlur(rng.integers(0, 255, (24, 32, 3), np.uint8), (5, 5), 0)
        data = cv2.imencode(".jpg" if k % 2 else ".png", pixels)[1].ravel()
        if k == 60:
            data = data[:40]
        message = TYPES.types[COMPRESSED](header(EPOCH + round(k / 30 * 1e9)), "jpeg", data)
        extra.append((k / 30, "/small", COMPRESSED, message))
    observation = {"images.small": {"topic": "/small", "tolerance": 0.06, "size": [12, 16]}}
    done = convert(tmp_path, Story(extra=extra), changed(observation=observation))
    assert kinds(done.faults) == {("not_decodable", "/small")}
    assert done.left_out["image not decodable"] == 1
    assert done.episodes == 2
    assert open_dataset(tmp_path / "data").spec.observation["images.small"].shape == (12, 16, 3)


def test_sources_are_laid_end_to_end_and_extras_come_along(tmp_path):
    action = [MAP["action"], {"topic": "/joints", "field": "position[0]", "unit": "m", "frame": "base"}]
    extras = {"reward": {"topic": "/command", "field": "data", "tolerance": 0.06}}
    topic_map = changed(action=action, extras=extras, actor="expert")
    convert(tmp_path, Story(seconds=2.0), topic_map)
    dataset = open_dataset(tmp_path / "data")
    frames = dataset.load()
    assert dataset.spec.action.unit == "rad,m"
    np.testing.assert_allclose(frames.extras["reward"].ravel(), frames.action[:, 0], atol=1e-6)
    t = frames.extras["stamp"].ravel() - EPOCH * 1e-9
    np.testing.assert_allclose(frames.action[:, 1], np.sin(np.ceil(t * 100 - 1e-3) / 100), atol=1e-5)
    assert set(frames.extras["actor"].ravel()) == {2}
    more = Story(seconds=3.0)
    done = convert_bag(open_bag(write(tmp_path / "more", more)), topic_map, tmp_path / "data", append=True)
    assert done.episodes == 1
    assert open_dataset(tmp_path / "data").num_episodes == 2
    reports = [json.loads((tmp_path / "data" / "meta" / f"recording{n}.json").read_text()) for n in ("", "_2")]
    assert [one["frames"] for one in reports] == [41, 61]
    assert reports[1]["topic_map"]["actor"] == "expert"


@pytest.mark.parametrize(("numbers", "expected"), [(list(range(1, 41)), set()), (list(range(1, 400, 10)), set())])
def test_numbers_that_do_not_count_by_one_tell_nothing(numbers, expected):
    stream = Stream("/topic")
    for k, number in enumerate(numbers):
        stream.add(k, k * 10**7, k * 10**7, number, False)
    assert {fault.kind for fault in describe(stream, 0, [], find_events(stream))} == expected


def test_a_message_that_its_publisher_numbered_is_missed_even_without_a_rhythm():
    stream = Stream("/topic")
    for k, number in enumerate([1, 2, 3, 6, 7, 8]):
        stream.add(k, 10**9 * k * k, 10**9 * k * k, number, False)
    (fault,) = describe(stream, 0, [], find_events(stream))
    assert (fault.kind, fault.text) == ("dropped", "2 messages are missing in 5.000 s")


def test_a_recording_is_checked_without_a_map(tmp_path):
    jump = {"/joints": lambda t: -0.5 * (t > 3.0)}
    story = Story(frozen={"/camera": (0.5, 1.5)}, silent={"/joints": (2.0, 2.1)}, header_shift=jump)
    faults, unread = check_bag(open_bag(write(tmp_path / "bag", story)))
    assert kinds(faults) == {("frozen", "/camera"), ("dropped", "/joints"), ("clock_jump", "/joints")}
    assert unread == []


def test_the_draft_is_a_map_that_works(tmp_path):
    bag = open_bag(write(tmp_path / "bag", Story(seconds=2.0)))
    (tmp_path / "map.yaml").write_text(draft_topic_map(bag))
    done = convert_bag(bag, read_topic_map(tmp_path / "map.yaml"), tmp_path / "data")
    assert done.frames == 41
    spec = open_dataset(tmp_path / "data").spec
    assert set(spec.observation) == {"joints", "images.camera"}
    assert spec.action.size == 1


@pytest.mark.parametrize(
    ("encoding", "channels", "expected"),
    [("rgb8", 3, (9, 8, 7)), ("bgr8", 3, (7, 8, 9)), ("mono8", 1, (9, 9, 9)), ("bgra8", 4, (7, 8, 9))],
)
def test_raw_images_become_rgb_whatever_their_encoding_and_row_length(encoding, channels, expected):
    rows = np.zeros((4, 5 * channels + 3), np.uint8)
    rows[:, : 5 * channels] = np.tile([9, 8, 7, 255][:channels], 5)
    message = {"height": 4, "width": 5, "step": rows.shape[1], "encoding": encoding, "data": rows.ravel()}
    found = decode_image(message)
    assert found.shape == (4, 5, 3)
    assert tuple(found[2, 3]) == expected


def png(height, width):
    start = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return np.frombuffer(start + bytes(64), np.uint8)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"height": 4, "width": 4, "step": 8, "encoding": "16UC1", "data": np.zeros(32, np.uint8)}, "encoding '16UC1'"),
        ({"height": 4, "width": 4, "step": 12, "encoding": "rgb8", "data": np.zeros(5, np.uint8)}, "5 bytes"),
        ({"height": 1 << 31, "width": 1 << 31, "step": 0, "encoding": "rgb8", "data": np.zeros(0, np.uint8)}, "claims"),
        ({"height": "4", "width": 4, "step": 12, "encoding": "rgb8", "data": np.zeros(48, np.uint8)}, "definition"),
        ({"format": "png", "data": "text"}, "definition"),
        ({"format": "png", "data": png(60_000, 60_000)}, "60000x60000 pixels"),
        ({"format": "gif", "data": np.frombuffer(b"GIF89a" + bytes(40), np.uint8)}, "neither a JPEG nor a PNG"),
    ],
)
def test_images_that_lie_are_refused(message, text):
    with pytest.raises(DataError, match=text):
        decode_image(message)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rate": 20}, "Did you mean 'rate_hz'"),
        ({"rate_hz": 0}, "rate_hz is 0"),
        ({"observation": {"state": {"topic": "/joints", "feild": "position"}}}, "Did you mean 'field'"),
        ({"action": {"topic": "/command", "field": "data", "hold": "prev"}}, "Did you mean 'previous'"),
        ({"action": []}, "'action' is empty"),
        ({"observation": "state"}, "expected names with values"),
        ({"extras": {"rewards": {"topic": "/r", "field": "data"}}}, "Did you mean 'reward'"),
    ],
)
def test_a_wrong_map_is_one_line_that_says_where(tmp_path, changes, text):
    (tmp_path / "map.yaml").write_text(yaml.safe_dump({**MAP, **changes}))
    with pytest.raises(ConfigError, match=text) as caught:
        read_topic_map(tmp_path / "map.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"action": {"topic": "/comand", "field": "data"}}, "Did you mean '/command'"),
        ({"action": {"topic": "/command", "field": "dat"}}, "Did you mean 'data'"),
        ({"action": {"topic": "/command", "field": "data[3]"}}, "has 1 elements"),
        ({"action": {"topic": "/command"}}, "says no field of '/command'"),
        ({"action": {"topic": "/camera"}}, "an image is an observation"),
        ({"action": {"topic": "/joints", "field": "position", "names": ["c"]}}, "has no element 'c'; it has: a, b"),
        ({"action": {"topic": "/joints", "field": "name"}}, "not made of numbers"),
    ],
)
def test_a_map_that_does_not_fit_the_recording_is_one_line(tmp_path, changes, text):
    with pytest.raises(RobotRLError, match=text):
        convert(tmp_path, Story(seconds=0.5), changed(**changes))
    assert not (tmp_path / "data").exists()


def test_yaml_that_wants_objects_makes_none(tmp_path):
    (tmp_path / "map.yaml").write_text("!!python/object/apply:os.system ['touch hacked']")
    with pytest.raises(ConfigError, match="is no plain YAML"):
        read_topic_map(tmp_path / "map.yaml")
    with pytest.raises(UnknownNameError):
        parse_topic_map({**MAP, "actor": "robot"})


def test_frames_are_at_the_instants_of_a_topic_and_a_new_number_is_a_new_episode(tmp_path):
    """Steps that jitter by 9 ms, told when they are over: each frame has its own, and the image that it saw."""
    rng, extra = np.random.default_rng(0), []
    for k in range(60):
        t = 0.1 + 0.05 * k + rng.uniform(-0.009, 0.009)
        number = 1 + (k >= 25)
        names, values = ["action/0", "actor", "safety_flags", "episode"], np.array([k, k % 2, 4 * k, number], float)
        stamp = EPOCH + round(t * 1e9)
        step = TYPES.types[JOINT_STATE](header(stamp), names, values, np.zeros(0), np.zeros(0))
        extra += [(t + 0.11, "/executed", JOINT_STATE, step), (t, "/seen", IMAGE, image(t, stamp, level=4 * k))]

    def of(*names):
        return {"topic": "/executed", "field": "position", "names": list(names), "tolerance": 0.02}

    wanted = {
        "observation": {"images.front": {"topic": "/seen", "tolerance": 0.02}, "state": MAP["observation"]["state"]},
        "action": of("action/0"),
        "extras": {"actor": of("actor"), "safety_flags": of("safety_flags")},
        "episodes": of("episode"),
        "instants": "/executed",
    }
    done = convert(tmp_path, Story(extra=extra), changed(**wanted))
    assert (done.episodes, done.frames) == (2, 60)
    assert kinds(done.faults) == set(), "a step that is told late is no other clock"
    dataset = open_dataset(tmp_path / "data")
    frames = dataset.load()
    np.testing.assert_array_equal(frames.action[:, 0], np.arange(60))
    np.testing.assert_array_equal(frames.extras["actor"].ravel(), np.arange(60) % 2)
    np.testing.assert_array_equal(frames.extras["safety_flags"].ravel(), 4 * np.arange(60))
    assert frames.episode_ends.tolist() == [25, 60]
    levels = np.concatenate([dataset.images("images.front", number)[:, 12, 20, 0] for number in range(2)])
    assert np.abs(levels.astype(int) - 4 * np.arange(60)).max() <= 1
    with pytest.raises(UnknownNameError, match="instants"):
        changed(instants="/exeucted")


def test_topics_that_are_only_named_like_an_executors_get_an_ordinary_draft(tmp_path):
    text = TYPES.types["std_msgs/msg/String"]
    extra = [
        (0.1, "/r/robot_spec", "std_msgs/msg/String", text(said)) for said in ("[1]", "no JSON", '{"rate_hz": "x"}')
    ]
    extra += [(0.2, f"/r/{name}", JOINT_STATE, joints(0.2, EPOCH)) for name in ("executed", "observation")]
    for number in range(3):
        chosen = [extra[number], *extra[3:]]
        drafted = yaml.safe_load(draft_topic_map(open_bag(write(tmp_path / str(number), Story(0.5, extra=chosen)))))
        assert "instants" not in drafted
        assert drafted["action"]["topic"] == "/command"
