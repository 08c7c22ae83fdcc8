"""Recordings on disk: sound ones are read as by others, cut ones are rescued, hostile ones are one-line errors."""

import itertools
import os
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_typestore

from robot_rl.core.errors import DataError, RobotRLError, UnknownNameError
from robot_rl.data.bag import mcap_format as mcap
from robot_rl.data.bag.bag import open_bag
from robot_rl.data.bag.definitions import gather, schema_of, shipped_text, shipped_texts, standard_types
from robot_rl.data.bag.mcap_format import Schema
from robot_rl.data.bag.mcap_reader import McapReader
from robot_rl.data.bag.mcap_writer import McapWriter
from robot_rl.data.bag.messages import MessageType, extract, numbers, parse_definitions
from robot_rl.data.bag.metadata import read_metadata
from robot_rl.data.bag.recover import recover, write_metadata

TYPES = get_typestore(Stores.ROS2_JAZZY)
STRING = "std_msgs/msg/String"
TIME = 1_700_000_000_000_000_000
ROOT = Path(__file__).resolve().parents[2]


def string(text):
    data = text.encode() + b"\0"
    return b"\0\1\0\0" + struct.pack("<I", len(data)) + data


def write(path, count=500, compression="zstd", chunk_bytes=4000, finish=True, topics=2):
    rng = np.random.default_rng(0)
    writer = McapWriter(path, compression=compression, chunk_bytes=chunk_bytes)
    channels = [writer.add_channel(f"/topic_{i}", schema_of(STRING)) for i in range(topics)]
    for k in range(count):
        data = string(f"{k} " + rng.bytes(40).hex())
        writer.write(channels[k % topics], TIME + k * 1_000_000, data, TIME + k * 1_000_000 - 500, k // topics + 1)
    if finish:
        writer.finish()
    else:
        writer.flush()
        writer.abandon()
    return writer


def texts(path, **options):
    kind = MessageType(STRING, standard_types(STRING))
    return [kind.decode(message.data)["data"] for message in McapReader(path, **options).messages()]


# ---- sound files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_other_readers_agree_with_what_was_written(tmp_path, compression):
    writer = write(tmp_path / "a.mcap", compression=compression)
    write_metadata(tmp_path, writer, {"dropped": "{}"}, "jazzy")
    ours = texts(tmp_path / "a.mcap")
    assert [int(one.split()[0]) for one in ours] == list(range(500))
    with (tmp_path / "a.mcap").open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()], validate_crcs=True)
        decoded = list(reader.iter_decoded_messages())
        assert [one[3].data for one in decoded] == ours
        assert [(one[2].sequence, one[2].log_time - one[2].publish_time) for one in decoded[:3]] == [
            (1, 500),
            (1, 500),
            (2, 500),
        ]
        statistics = reader.get_summary().statistics
        assert (statistics.message_count, statistics.message_start_time) == (500, TIME)
        # The index serves readers that look for one topic in a span of time.
        span = {"starting_at": TIME + 100_000_000, "ending_before": TIME + 110_000_000}
        some = list(reader.iter_messages(topics=["/topic_1"], **span))
        assert len(some) == 5
    with Reader(tmp_path) as reader:
        assert {one.topic: one.msgcount for one in reader.connections} == {"/topic_0": 250, "/topic_1": 250}
        assert [TYPES.deserialize_cdr(raw, one.msgtype).data for one, _, raw in reader.messages()] == ours
    bag = open_bag(tmp_path)
    assert {name: topic.count for name, topic in bag.topics.items()} == {"/topic_0": 250, "/topic_1": 250}
    assert sum(1 for _ in bag.messages({"/topic_1"})) == 250
    assert bag.metadata.duration == 499_000_000


def test_lz4_chunks_of_strangers_are_read(tmp_path):
    from mcap.writer import CompressionType, Writer

    with (tmp_path / "a.mcap").open("wb") as file:
        writer = Writer(file, chunk_size=2000, compression=CompressionType.LZ4)
        writer.start("ros2", "somebody")
        schema = writer.register_schema(STRING, "ros2msg", b"string data")
        channel = writer.register_channel("/topic", "cdr", schema)
        for k in range(200):
            writer.add_message(channel, TIME + k, string(f"text {k}"), TIME + k)
        writer.finish()
    assert texts(tmp_path / "a.mcap") == [f"text {k}" for k in range(200)]


def test_large_messages_have_chunks_of_their_own_and_small_ones_share(tmp_path):
    writer = McapWriter(tmp_path / "a.mcap", chunk_bytes=1000)
    channel = writer.add_channel("/topic", schema_of(STRING))
    sizes = [writer.size]
    for text in ("a" * 200, "b" * 200, "c" * 5000, "d" * 200):
        writer.write(channel, TIME, string(text))
        sizes.append(writer.size)
    assert [b > a for a, b in itertools.pairwise(sizes)] == [False, False, True, True]
    writer.finish(tmp_path / "b.mcap")
    assert not (tmp_path / "a.mcap").exists()
    assert [one[0] for one in texts(tmp_path / "b.mcap")] == list("abcd")


def test_metadata_are_those_of_rosbag2_version_9(tmp_path):
    writer = write(tmp_path / "a.mcap")
    write_metadata(tmp_path, writer, {"lost": "{}"}, "jazzy")
    content = yaml.safe_load((tmp_path / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert content["version"] == 9
    assert content["storage_identifier"] == "mcap"
    assert content["relative_file_paths"] == ["a.mcap"]
    assert content["message_count"] == 500 == content["files"][0]["message_count"]
    assert content["ros_distro"] == "jazzy"
    assert "&id" not in (tmp_path / "metadata.yaml").read_text()
    assert read_metadata(tmp_path).custom == {"lost": "{}"}


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [True, False])
def test_cdr_is_decoded_as_others_encode_it(order):
    types = TYPES.types
    head = types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](7, 8), "odd")
    point = types["trajectory_msgs/msg/JointTrajectoryPoint"]
    span = types["builtin_interfaces/msg/Duration"](1, 5)
    points = [point(np.array([1.0, 2.0]), np.zeros(0), np.array([3.0]), np.zeros(0), span) for _ in range(2)]
    message = types["trajectory_msgs/msg/JointTrajectory"](head, ["a", "bcd"], points)
    name = "trajectory_msgs/msg/JointTrajectory"
    data = TYPES.serialize_cdr(message, name, little_endian=order)
    kind = MessageType(name, standard_types(name))
    decoded = kind.decode(data)
    assert kind.stamp(data) == 7_000_000_008
    assert decoded["joint_names"] == ["a", "bcd"]
    assert numbers(decoded, "points[1].positions").tolist() == [1.0, 2.0]
    assert numbers(decoded, "points[0].accelerations[0]").tolist() == [3.0]
    assert numbers(decoded, "points[0].time_from_start").tolist() == [1.0, 5.0]
    with pytest.raises(UnknownNameError, match="Did you mean 'positions'"):
        extract(decoded, "points[0].position")
    with pytest.raises(DataError, match="2 elements"):
        extract(decoded, "points[2].positions")


@pytest.mark.parametrize("name", sorted(name for name in shipped_texts() if name in TYPES.fielddefs))
def test_shipped_definitions_are_those_of_ros(name):
    def tell(item):
        kind, detail = item
        if kind.name == "BASE":
            return detail[0]
        if kind.name == "NAME":
            return detail
        inner, size = detail
        return (tell(inner), size if kind.name == "ARRAY" else -1)

    alias = {"octet": "byte"}
    mine = [
        (one.name, one.base if one.count is None else (one.base, one.count))
        for one in parse_definitions(name, shipped_text(name))[name]
    ]
    theirs = [(field, tell(item)) for field, item in TYPES.fielddefs[name][1]]

    def plain(kind):
        base, count = kind if isinstance(kind, tuple) else (kind, None)
        base = alias.get(base, base)
        return ("uint8" if base in ("byte", "char") else base, count)

    assert [(field, plain(kind)) for field, kind in mine] == [(field, plain(kind)) for field, kind in theirs]


def test_definitions_bring_what_they_need():
    text = gather("nav_msgs/msg/Odometry", shipped_text)
    types = parse_definitions("nav_msgs/msg/Odometry", text)
    assert {"nav_msgs/msg/Odometry", "std_msgs/msg/Header", "geometry_msgs/msg/Quaternion"} <= set(types)
    with pytest.raises(DataError, match="no definition of the message type 'my_msgs/msg/Thing'"):
        schema_of("my_msgs/msg/Thing")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("A a", "contains itself"),
        ("B b\n" + "=" * 80 + "\nMSG: p/B\nA a", "contains itself"),
        ("uint8[0] nothing", "without elements"),
        ("import os", "is missing"),
        ("__import__('os') x", "is no field"),
        ("Missing m", "definition of 'p/msg/Missing' is missing"),
        ("wstring w", "wstring"),
        ("uint8 x\n" * 5000, "5000 fields"),
        ("x" * 2_000_000, "2000000 characters"),
    ],
)
def test_definitions_of_strangers_are_bounded_and_run_nothing(text, error):
    with pytest.raises(DataError, match=error):
        MessageType("p/msg/A", parse_definitions("p/msg/A", text))


def test_types_that_branch_without_end_cost_nothing():
    levels = [f"{'=' * 80}\nMSG: p/T{k}\n" + "\n".join(f"T{k + 1} f{i}" for i in range(8)) for k in range(1, 20)]
    text = "\n".join(["T1 first", *levels, f"{'=' * 80}\nMSG: p/T20\nuint8 leaf"])
    begun = time.monotonic()
    kind = MessageType("p/msg/A", parse_definitions("p/msg/A", text))
    with pytest.raises(DataError, match="is cut"):
        kind.decode(b"\0\1\0\0" + bytes(100))
    assert time.monotonic() - begun < 2.0


@pytest.mark.parametrize(
    ("definition", "data"),
    [
        ("float64[] values", b"\0\1\0\0\xff\xff\xff\xff"),
        ("string text", b"\0\1\0\0\xff\xff\xff\x7fabc"),
        ("string[] texts", b"\0\1\0\0\xff\xff\xff\xff" + bytes(64)),
        ("float64[900000000] values", b"\0\1\0\0" + bytes(64)),
        ("string[900000000] values", b"\0\1\0\0" + bytes(64)),
        ("int64 value", b"\0\1\0\0\1"),
        ("int64 value", b""),
        ("int64 value", b"\0\x0b\0\0" + bytes(16)),
    ],
)
def test_messages_that_lie_about_their_size_are_refused(definition, data):
    kind = MessageType("p/msg/A", parse_definitions("p/msg/A", definition))
    with pytest.raises(DataError, match="a message of p/msg/A"):
        kind.decode(data)


def test_messages_of_very_many_small_parts_are_refused_before_they_fill_the_memory():
    text = f"T[] parts\n{'=' * 80}\nMSG: p/T\nuint8 leaf"
    kind = MessageType("p/msg/A", parse_definitions("p/msg/A", text))
    assert len(kind.decode(struct.pack("<4sI", b"\0\1\0\0", 1000) + bytes(1000))["parts"]) == 1000
    count = 2_000_000
    with pytest.raises(DataError, match=r"a message of p/msg/A has more than the 1000000 values"):
        kind.decode(struct.pack("<4sI", b"\0\1\0\0", count) + bytes(count))


# ---- cut and damaged files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.66, 0.9, 0.999])
def test_a_cut_file_gives_all_that_is_in_it(tmp_path, share):
    write(tmp_path / "whole.mcap", compression="none")
    data = (tmp_path / "whole.mcap").read_bytes()
    end = data.rindex(string("499 ")[8:12])
    cut = tmp_path / "cut.mcap"
    cut.write_bytes(data[: int(share * end)])
    with pytest.raises(DataError, match="record recover"):
        list(open_bag(cut).messages())
    rescue = recover(cut)
    saved = texts(rescue.path)
    assert saved == texts(tmp_path / "whole.mcap")[: len(saved)]
    # Nothing is lost but the message that the cut goes through; the last chunk's others are saved, too.
    messages = data[: int(share * end)].count(b"\0\1\0\0\x54") + data[: int(share * end)].count(b"\0\1\0\0\x53")
    assert len(saved) >= messages - 2
    assert sum(rescue.counts.values()) == len(saved)
    assert rescue.damage
    assert rescue.seconds == pytest.approx((len(saved) - 1) * 1e-3)


def test_an_unfinished_recording_gets_its_name_and_metadata(tmp_path):
    write(tmp_path / "run_0.mcap.part", finish=False)
    with pytest.raises(DataError, match=r"record recover .*run_0.mcap.part"):
        open_bag(tmp_path)
    rescue = recover(tmp_path)
    assert rescue.path == tmp_path / "run_0.mcap"
    assert rescue.lost_bytes == 0
    assert (tmp_path / "run_0.mcap.part").exists(), "the original stays"
    with Reader(tmp_path) as reader:
        assert reader.message_count == 500
    with pytest.raises(DataError, match="exists already"):
        recover(tmp_path / "run_0.mcap.part")


def test_a_hole_costs_its_chunks_and_no_others(tmp_path):
    write(tmp_path / "whole.mcap")
    whole = texts(tmp_path / "whole.mcap")
    data = bytearray((tmp_path / "whole.mcap").read_bytes())
    chunks = [match for match in range(len(data) - 60) if data[match] == 6 and data[match + 41 : match + 45] == b"zstd"]
    data[chunks[3] - 20 : chunks[3] + 30] = bytes(50)  # the frame of one chunk
    data[chunks[6] + 100] ^= 0xFF  # the content of another
    (tmp_path / "hole.mcap").write_bytes(data)
    rescue = recover(tmp_path / "hole.mcap", tmp_path / "saved.mcap")
    saved = texts(tmp_path / "saved.mcap")
    assert len(whole) - 110 < len(saved) < len(whole)
    assert saved[-1] == whole[-1]
    assert [int(one.split()[0]) for one in saved] == sorted(int(one.split()[0]) for one in saved)
    assert len(rescue.damage) == 2
    assert rescue.lost_bytes > 0


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_is_an_error_or_messages_and_nothing_else(tmp_path, seed):
    write(tmp_path / "whole.mcap", count=200)
    data = bytearray((tmp_path / "whole.mcap").read_bytes())
    rng = np.random.default_rng(seed)
    for _ in range(int(rng.integers(1, 30))):
        data[int(rng.integers(8, len(data)))] = int(rng.integers(256))
    path = tmp_path / "damaged.mcap"
    path.write_bytes(data[: int(rng.integers(len(data) // 2, len(data) + 1))])
    for count in (lambda: len(list(open_bag(path).messages())), lambda: sum(recover(path).counts.values())):
        found, lines = 0, 0
        try:
            found = count()
        except RobotRLError as error:
            lines = str(error).count("\n")
        assert (found <= 200, lines) == (True, 0)


# ---- hostile files ---------------------------------------------------------------------------------------------------


def mcap_with(*records):
    return mcap.MAGIC + mcap.record(mcap.HEADER, mcap.text("ros2"), mcap.text("")) + b"".join(records)


def chunk(size, stored, compression="zstd", length=None):
    head = mcap.CHUNK_HEAD.pack(0, 0, size, 0) + mcap.text(compression)
    return mcap.record(mcap.CHUNK, head, struct.pack("<Q", len(stored) if length is None else length), stored)


def zstd_that_claims(size):
    """A frame header that states ``size`` as its content."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + b"\1\0\0"


HOSTILE = {
    "empty": b"",
    "text": b"hello world, this is no recording at all",
    "magic only": mcap.MAGIC,
    "giant record": mcap_with(mcap.PREFIX.pack(mcap.CHUNK, 1 << 62)),
    "long record": mcap_with(mcap.PREFIX.pack(mcap.SCHEMA, 1 << 29)),
    "giant chunk": mcap_with(chunk(1 << 50, b"abc")),
    "bomb": mcap_with(chunk(1 << 27, zstd_that_claims(1 << 40))),
    "lie in a chunk": mcap_with(chunk(10, b"0123456789", "", 1 << 60)),
    "unknown compression": mcap_with(chunk(10, b"0123456789", "\x1b[31mrar")),
    "giant string": mcap_with(mcap.record(mcap.CHANNEL, b"\0\0\0\0\xff\xff\xff\xff")),
    "message of no channel": mcap_with(mcap.record(mcap.MESSAGE, mcap.MESSAGE_HEAD.pack(9, 0, 0, 0))),
    "short message": mcap_with(mcap.record(mcap.MESSAGE, b"\0\0")),
    "end of time": mcap_with(
        mcap.channel_record(0, mcap.Channel("/a", 0)),
        mcap.record(mcap.MESSAGE, mcap.MESSAGE_HEAD.pack(0, 0, (1 << 64) - 1, 0)),
    ),
    "no UTF-8": mcap_with(mcap.record(mcap.SCHEMA, b"\1\0" + struct.pack("<I", 2) + b"\xff\xfe" + bytes(8))),
    "opcode zero": mcap_with(bytes(200)),
    "sqlite header": b"SQLite format 3\0" + bytes(500),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line_errors(tmp_path, name):
    path = tmp_path / "bag.mcap"
    path.write_bytes(HOSTILE[name])
    for action in (lambda: list(open_bag(path).messages()), lambda: recover(path)):
        with pytest.raises(RobotRLError) as caught:
            action()
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\x1b" not in str(caught.value)


def test_a_bomb_is_not_unpacked(tmp_path):
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    path = tmp_path / "bomb.mcap"
    path.write_bytes(mcap_with(chunk(1000, bomb)))
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
from robot_rl.data.bag.mcap_reader import McapReader
print(len(list(McapReader({str(path)!r}).messages())))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "MemoryError" not in result.stderr
    assert "DataError" in result.stderr or result.stdout == "0\n"


def rosbag(tmp_path, **changes):
    write_metadata(tmp_path, write(tmp_path / "a.mcap"), {})
    content = yaml.safe_load((tmp_path / "metadata.yaml").read_text())
    content["rosbag2_bagfile_information"].update(changes)
    (tmp_path / "metadata.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"relative_file_paths": ["../../../etc/passwd"]}, "outside of the recording"),
        ({"relative_file_paths": ["/etc/passwd"]}, "outside of the recording"),
        ({"relative_file_paths": ["b.mcap"]}, "'b.mcap' is missing"),
        ({"relative_file_paths": []}, "is missing"),
        ({"topics_with_message_count": 3}, "no metadata of rosbag2"),
        ({"compression_format": "zstd", "compression_mode": "FILE"}, "ros2 bag convert"),
    ],
)
def test_metadata_of_strangers_are_not_trusted(tmp_path, changes, error):
    with pytest.raises(DataError, match=error) as caught:
        open_bag(rosbag(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def laughs():
    lines = ["a0: &a0 [x, x]"] + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 30)]
    return "\n".join([*lines, "rosbag2_bagfile_information: *a29"])


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch hacked']", laughs(), "[" * 5000, "a: {", "\0", "- " * 9000]
)
def test_metadata_that_want_objects_or_all_memory_get_neither(tmp_path, text):
    rosbag(tmp_path)
    (tmp_path / "metadata.yaml").write_text(text)
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"YAML|no metadata") as caught:
        open_bag(tmp_path)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 10
    assert not Path("hacked").exists()


def database(path, *statements):
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    return path


TOPICS = "CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT, type TEXT, serialization_format TEXT)"
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT 1, x, x, x FROM c"


def test_a_database_that_computes_is_refused(tmp_path):
    path = database(tmp_path / "a.db3", TOPICS, f"CREATE VIEW messages(topic_id, timestamp, data, id) AS {ENDLESS}")
    with pytest.raises(DataError, match="no tables 'topics' and 'messages'"):
        open_bag(path)


def test_a_database_of_nonsense_is_refused_and_never_written(tmp_path):
    path = database(
        tmp_path / "a.db3",
        TOPICS,
        "CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id, timestamp, data)",
        "INSERT INTO topics VALUES (1, '/topic', 'std_msgs/msg/String', 'cdr')",
        "INSERT INTO messages VALUES (1, 1, 'now', 'text')",
    )
    before = path.read_bytes()
    os.chmod(path, 0o444)
    bag = open_bag(path)
    with pytest.raises(DataError, match="no row of time and bytes"):
        list(bag.messages())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.db3"]


def test_a_cut_database_and_one_that_was_not_closed_are_refused(tmp_path):
    statements = [TOPICS, "CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id, timestamp, data)"]
    statements += [f"INSERT INTO messages VALUES ({k}, 1, {k}, zeroblob(3000))" for k in range(50)]
    statements += ["INSERT INTO topics VALUES (1, '/topic', 'std_msgs/msg/String', 'cdr')"]
    path = database(tmp_path / "a.db3", *statements)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="truncated or damaged"):
        list(open_bag(path).messages())
    path.write_bytes(data)
    (tmp_path / "a.db3-wal").write_bytes(b"x")
    with pytest.raises(DataError, match="was not closed"):
        open_bag(path)


def test_names_cannot_write_to_the_terminal(tmp_path):
    writer = McapWriter(tmp_path / "a.mcap")
    writer.write(writer.add_channel("/\x1b[2Jtopic\n", Schema("p/msg/A\x07", "ros2msg", b"uint8 x")), TIME, string(""))
    writer.finish()
    (topic,) = open_bag(tmp_path / "a.mcap").topics.values()
    assert (topic.name, topic.type) == ("/?[2Jtopic?", "p/msg/A?")


def test_messages_of_other_encodings_are_named(tmp_path):
    writer = McapWriter(tmp_path / "a.mcap")
    writer.write(writer.add_channel("/topic", None, encoding="json"), TIME, b"{}")
    writer.finish()
    with pytest.raises(DataError, match=r"topic '/topic': its messages are encoded as 'json'"):
        open_bag(tmp_path / "a.mcap").topic("/topic").message_type()
    with pytest.raises(UnknownNameError, match="Did you mean '/topic'"):
        open_bag(tmp_path / "a.mcap").topic("/topics")
