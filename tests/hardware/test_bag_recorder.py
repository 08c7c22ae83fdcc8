"""The recorder never waits for the disk, survives a kill, stops before the disk is full, and says what it lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rosbags.rosbag2 import Reader

from hardware.cli.record import Convert, Info, Recover, run
from hardware.recording.bag_recorder import BagConfig, BagRecorder
from robot_rl.core.errors import ConfigError, DataError, HardwareError, UnknownNameError
from robot_rl.data.bag.bag import open_bag
from robot_rl.data.bag.recover import recover

STRING = "std_msgs/msg/String"
FOREVER = {"sec": 9223372036, "nsec": 854775807}
QOS = {
    "history": "unknown",
    "depth": 0,
    "reliability": "reliable",
    "durability": "volatile",
    "deadline": FOREVER,
    "lifespan": FOREVER,
    "liveliness": "automatic",
    "liveliness_lease_duration": FOREVER,
    "avoid_ros_namespace_conventions": False,
}
ROOT = Path(__file__).resolve().parents[2]
HELLO = b"\0\1\0\0\6\0\0\0hello\0"


def test_a_recording_is_a_bag_with_its_proper_name_only_when_finished(tmp_path):
    recorder = BagRecorder(tmp_path / "run", distribution="jazzy")
    assert recorder.path.name == "run_0.mcap.part"
    first = recorder.add_topic("/first", STRING, [QOS])
    for k in range(100):
        recorder.add(first, HELLO, log_time=10**18 + k, sequence=k + 1)
    late = recorder.add_topic("/late", STRING)
    recorder.add(late, HELLO, log_time=10**18 + 200)
    recorder.close()
    recorder.close()
    assert sorted(os.listdir(tmp_path / "run")) == ["metadata.yaml", "run_0.mcap"]
    assert recorder.to_json()["messages"] == {"/first": 100, "/late": 1}
    with Reader(tmp_path / "run") as reader:
        assert {one.topic: one.msgcount for one in reader.connections} == {"/first": 100, "/late": 1}
        assert reader.ros_distro == "jazzy"
    assert not recorder.add(first, HELLO)
    assert recorder.dropped == {"/first": 1}


def test_messages_that_never_came_are_counted_by_their_numbers(tmp_path, caplog):
    recorder = BagRecorder(tmp_path / "run")
    topic = recorder.add_topic("/topic", STRING)
    for sequence in (7, 8, 11, 12, 1, 2, 4):  # the publisher started again after 12
        recorder.add(topic, HELLO, sequence=sequence)
    recorder.close()
    assert recorder.lost == {"/topic": 3}
    assert "/topic" in caplog.text
    assert json.loads(open_bag(tmp_path / "run").metadata.custom["lost"]) == {"/topic": 3}


def test_a_slow_disk_drops_messages_by_name_and_never_holds_up_the_robot(tmp_path, caplog):
    recorder = BagRecorder(tmp_path / "run", BagConfig(queue_megabytes=1))
    topic = recorder.add_topic("/camera", STRING)
    gate = threading.Event()
    write = recorder._writer.write
    recorder._writer.write = lambda *message: (gate.wait(), write(*message))[1]
    begun = time.monotonic()
    taken = sum(recorder.add(topic, HELLO + bytes(100_000)) for _ in range(50))
    assert time.monotonic() - begun < 1.0
    gate.set()
    recorder.close()
    assert 9 <= taken <= 12
    assert recorder.dropped["/camera"] == 50 - taken
    assert recorder.written == {"/camera": taken}
    assert "dropped" in caplog.text


def test_a_disk_that_is_nearly_full_ends_the_recording_with_everything_kept(tmp_path, monkeypatch):
    with pytest.raises(HardwareError, match="MB left, less than"):
        BagRecorder(tmp_path / "full", BagConfig(keep_free_megabytes=10**9))
    recorder = BagRecorder(tmp_path / "run")
    topic = recorder.add_topic("/topic", STRING)
    for _ in range(10):
        assert recorder.add(topic, HELLO)
    monkeypatch.setattr(recorder, "_free", lambda: 5_000_000)
    deadline = time.monotonic() + 20
    while recorder.path.suffix == ".part" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert recorder.stopped == "the disk is nearly full: 5 MB left"
    assert not recorder.add(topic, HELLO)
    recorder.close()
    assert open_bag(tmp_path / "run").topics["/topic"].count == 10
    assert "nearly full" in open_bag(tmp_path / "run").metadata.custom["stopped"]


def test_a_failing_disk_ends_the_recording_and_leaves_whole_chunks(tmp_path):
    recorder = BagRecorder(tmp_path / "run", BagConfig(chunk_kilobytes=1))
    topic = recorder.add_topic("/topic", STRING)
    append, calls = recorder._writer._append, []

    def fail(data):
        calls.append(len(data))
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        append(data)

    recorder._writer._append = fail
    for _ in range(2000):
        recorder.add(topic, HELLO)
    recorder.close()
    assert "No space left" in recorder.stopped
    rescue = recover(tmp_path / "run")
    assert rescue.lost_bytes == 0
    assert rescue.counts["/topic"] > 20


def test_every_chunk_is_brought_to_the_disk_and_the_whole_file_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []

    def spied(name):
        real = getattr(os, name)

        def call(file, *arguments):
            where = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else str(file)
            done.append((name, Path(where).name, os.fstat(file).st_size if isinstance(file, int) else 0))
            return real(file, *arguments)

        monkeypatch.setattr(os, name, call)

    for name in ("fdatasync", "fsync", "replace"):
        spied(name)
    recorder = BagRecorder(tmp_path / "run", BagConfig(chunk_seconds=0.01))
    topic = recorder.add_topic("/topic", STRING)
    for count in range(1, 4):
        recorder.add(topic, HELLO)
        deadline = time.monotonic() + 20
        while True:
            kept = done[-1][1:] if done else ()
            written = recorder.written["/topic"] == count and not recorder._writer.pending
            if written and kept == ("run_0.mcap.part", recorder.size):
                break
            assert time.monotonic() < deadline, f"chunk {count} was not brought to the disk"
            time.sleep(0.002)
    done.clear()
    recorder.close()
    size = recorder.path.stat().st_size
    (named,) = [number for number, call in enumerate(done) if call[:2] == ("replace", "run_0.mcap.part")]
    assert ("fsync", "run_0.mcap.part", size) in done[:named], "all of it, before it is called finished"
    assert [call[:2] for call in done[named + 1 :]].count(("fsync", "run")) >= 1, "and the name as well"


def test_a_directory_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        BagRecorder(tmp_path)
    with pytest.raises(DataError, match="cannot be written"):
        BagRecorder(tmp_path / "notes.txt" / "run")
    with pytest.raises(ConfigError, match="chunk_seconds"):
        BagConfig(chunk_seconds=0)


KILLED = """
import sys, time
from hardware.recording.bag_recorder import BagRecorder
recorder = BagRecorder(sys.argv[1])
small, large = recorder.add_topic("/small", "std_msgs/msg/String"), recorder.add_topic("/large", "std_msgs/msg/String")
number, now = 0, time.time_ns()
while True:
    number += 1
    before, now = now, time.time_ns()
    recorder.add(small, b"\\0\\1\\0\\0" + number.to_bytes(8, "little"), now, sequence=number)
    if number % 20 == 0:
        recorder.add(large, b"\\0\\1\\0\\0" + bytes(300_000), now)
    sys.stdout.write(f"{number} {now} {now - before}\\n")
    sys.stdout.flush()
    time.sleep(0.002)
"""
"""Says of every message its number, when it was recorded, and how long after the one before, in nanoseconds."""


def test_a_kill_costs_less_than_half_a_second(tmp_path, capsys):
    bag = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(bag)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = []
    try:
        for line in child.stdout:
            lines.append(line)
            if len(lines) >= 500:
                break
    finally:
        child.send_signal(signal.SIGKILL)
        lines += child.communicate()[0].splitlines(keepends=True)
    said = [[int(word) for word in line.split()] for line in lines if line.endswith("\n")]
    with pytest.raises(DataError, match="robot-rl record recover"):
        open_bag(bag)
    assert run(Recover(bag)) == 0
    shown = capsys.readouterr().out
    assert "/small" in shown
    assert "lost:" in shown
    messages = [one for one in open_bag(bag).messages() if one.topic == "/small"]
    numbers = [int.from_bytes(one.data[4:], "little") for one in messages]
    assert numbers == list(range(1, len(numbers) + 1)), "what is there has no hole"
    # By the recorder's own clock: a machine that held it up for a while held up what writes the chunks as well.
    last = said[-1][1]
    held_up = sum(pause for _, when, pause in said if when > last - 1e9 and pause > 20e6)
    assert last - messages[-1].log_time < 0.5e9 + held_up


def test_what_the_command_says_of_a_recording(tmp_path, capsys):
    recorder = BagRecorder(tmp_path / "run")
    topic = recorder.add_topic("/topic", STRING)
    for k in range(20):
        recorder.add(topic, HELLO, log_time=10**18 + k * 10_000_000, sequence=1 + k + (k > 10))
    recorder.close()
    assert run(Info(tmp_path / "run", draft=tmp_path / "map.yaml")) == 0
    shown = capsys.readouterr().out
    assert "20  /topic  std_msgs/msg/String" in shown
    assert 'lost      {"/topic": 1}' in shown
    assert "rate_hz" in (tmp_path / "map.yaml").read_text()
    assert run(Info(tmp_path / "run", check=True)) == 1
    assert "dropped        /topic: 1 messages are missing" in capsys.readouterr().out
    with pytest.raises(UnknownNameError, match="Did you mean 'frozen'"):
        run(Convert(tmp_path / "run", tmp_path / "data", tmp_path / "map.yaml", keep=("frosen",)))
