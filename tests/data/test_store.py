import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from robot_rl.core.errors import DataError, SpecMismatchError, UnknownNameError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data import durable, lerobot_schema
from robot_rl.data.check import check_dataset
from robot_rl.data.dataset import open_dataset
from robot_rl.data.store import ACTORS, EpisodeWriter, standard_extras


def test_what_is_recorded_is_read_back(tmp_path, record, spec):
    recorded = record(tmp_path / "set", lengths=(7, 5, 9))
    dataset = open_dataset(tmp_path / "set")
    frames = dataset.load()
    assert dataset.warnings == []
    assert dataset.spec == spec
    assert dataset.tasks == ["push"] * 3
    assert dataset.actor_names == ACTORS
    assert frames.episode_ends.tolist() == [7, 12, 21]
    for row, (observation, action) in enumerate(recorded):
        np.testing.assert_array_equal(frames.action[row], action)
        np.testing.assert_array_equal(frames.observation["state"][row], observation["state"])
        np.testing.assert_array_equal(frames.observation["keypoint"][row], observation["keypoint"])
    assert dataset.images("images.front", 1).shape == (5, 32, 48, 3)
    assert dataset.image("images.front", 2, 4).mean() == pytest.approx(100, abs=2)
    np.testing.assert_allclose(frames.extras["reward"][7:12], [0, 0.5, 1, 1.5, 2])
    assert set(frames.extras["actor"]) == {ACTORS.index("human")}
    assert np.flatnonzero(frames.extras["success"]).tolist() == [11]
    assert np.flatnonzero(frames.extras["done"]).tolist() == [6, 11, 20]
    np.testing.assert_allclose(frames.extras["timestamp"][7:12], np.arange(5) / 10, atol=1e-6)


def test_append_continues(tmp_path, record):
    record(tmp_path / "set", lengths=(4, 3))
    first = open_dataset(tmp_path / "set").load()
    record(tmp_path / "set", lengths=(6,), seed=1, append=True)
    dataset = open_dataset(tmp_path / "set")
    assert dataset.warnings == []
    assert dataset.num_episodes == 3
    np.testing.assert_array_equal(dataset.load(episodes=[0, 1]).action, first.action)
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
    np.testing.assert_allclose(stats["action"]["mean"], dataset.load().action.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["action"]["std"], dataset.load().action.std(0), atol=1e-6)
    assert stats["action"]["count"] == [13]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate_hz": 20.0}, "rate 10 Hz against 20 Hz"),
        ({"action": ArraySpec((3,))}, r"action: shape \(2,\) against \(3,\)"),
        ({"observation": {"state": ArraySpec((3,), unit="m")}}, "unit 'm,m,rad' against 'm'"),
        ({"observation": {"state": ArraySpec((3,))}}, "observation 'keypoint' is missing"),
    ],
)
def test_append_refuses_another_spec(tmp_path, record, spec, change, message):
    record(tmp_path / "set", lengths=(4,))
    with pytest.raises(SpecMismatchError, match=message):
        EpisodeWriter(tmp_path / "set", replace(spec, **change), append=True)
    wider = Spec({**spec.observation, "goal": ArraySpec((2,))}, spec.action, spec.rate_hz)
    with pytest.raises(SpecMismatchError, match="observation 'goal' is missing"):
        EpisodeWriter(tmp_path / "set", wider, append=True)
    with pytest.raises(SpecMismatchError, match="extras reward, done, success, actor against done, success, stamp"):
        EpisodeWriter(tmp_path / "set", spec, append=True, extras={"stamp": ArraySpec((1,), "float64")})
    assert open_dataset(tmp_path / "set").num_episodes == 1


def test_directories_are_not_overwritten(tmp_path, record, spec):
    record(tmp_path / "set", lengths=(4,))
    with pytest.raises(DataError, match="already holds a data set; append to it"):
        EpisodeWriter(tmp_path / "set", spec)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="exists and is no data set"):
        EpisodeWriter(tmp_path / "other", spec, append=True)
    with EpisodeWriter(tmp_path / "new", spec), pytest.raises(DataError, match="another process is recording"):
        EpisodeWriter(tmp_path / "new", spec, append=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file; a data set is a directory"):
        EpisodeWriter(tmp_path / "file", spec)
    with pytest.raises(DataError, match="needs the control rate"):
        EpisodeWriter(tmp_path / "x", replace(spec, rate_hz=0.0))


def test_frames_must_fit_the_spec(tmp_path, spec):
    observation = {key: np.zeros(array.shape, array.dtype) for key, array in spec.observation.items()}
    with EpisodeWriter(tmp_path / "set", spec) as writer:
        with pytest.raises(DataError, match="there is no frame to save"):
            writer.save_episode()
        with pytest.raises(UnknownNameError, match="Did you mean 'reward'"):
            writer.add(observation, np.zeros(2), rewards=1.0)
        writer.add(observation, np.zeros(2), reward=1.0)
        with pytest.raises(DataError, match="extra 'reward' is missing; this recording has: done, reward, success"):
            writer.add(observation, np.zeros(2))
        with pytest.raises(DataError, match="extra 'stamp' was not declared"):
            writer.add(observation, np.zeros(2), reward=1.0, stamp=0.0)
        with pytest.raises(DataError, match=r"action has shape \(3,\), expected \(2,\)"):
            writer.add(observation, np.zeros(3), reward=1.0)
        with pytest.raises(DataError, match="observation 'state' is missing"):
            writer.add({"keypoint": observation["keypoint"]}, np.zeros(2), reward=1.0)
        with pytest.raises(DataError, match="image of float64, expected uint8"):
            writer.add({**observation, "images.front": np.zeros((32, 48, 3))}, np.zeros(2), reward=1.0)
        writer.save_episode()
    assert open_dataset(tmp_path / "set").num_frames == 1


def test_standard_extras_and_actor_names(tmp_path, spec):
    spec = spec.select(("state",))
    values = {"reward": 1, "actor": "expert", "policy_action": [0.5, -0.5], "intervention": True, "safety_flags": 5}
    assert {*values, "stamp"} == set(standard_extras(spec))
    with EpisodeWriter(tmp_path / "set", spec) as writer:
        with pytest.raises(UnknownNameError, match="Unknown actor 'robot'"):
            writer.add({"state": np.zeros(3)}, np.zeros(2), **{**values, "actor": "robot", "stamp": 0.0})
        writer.add({"state": np.zeros(3)}, np.zeros(2), **values, stamp=12.5)
        writer.save_episode(success=True, task="lift")
    dataset = open_dataset(tmp_path / "set")
    extras = dataset.load().extras
    assert {name: extras[name].tolist() for name in values if name != "policy_action"} == {
        "reward": [1.0],
        "actor": [2],
        "intervention": [True],
        "safety_flags": [5],
    }
    assert extras["policy_action"].tolist() == [[0.5, -0.5]]
    assert extras["stamp"].tolist() == [12.5]
    assert extras["success"].tolist() == [True]
    assert dataset.tasks == ["lift"]


def test_unsaved_and_discarded_episodes_leave_nothing(tmp_path, spec, record):
    record(tmp_path / "set", lengths=(4,))
    observation = {key: np.zeros(array.shape, array.dtype) for key, array in spec.observation.items()}
    with EpisodeWriter(tmp_path / "set", spec, append=True) as writer:
        for _ in range(2):
            writer.add(observation, np.zeros(2), reward=0.0, actor="human")
            writer.discard_episode()
        writer.add(observation, np.zeros(2), reward=0.0, actor="human")
    assert open_dataset(tmp_path / "set").num_episodes == 1
    assert not (tmp_path / "set" / ".recording").exists()


def test_chunks_roll_over(tmp_path, record, monkeypatch):
    monkeypatch.setattr(lerobot_schema, "CHUNK_SIZE", 2)
    record(tmp_path / "set", lengths=(2, 2, 2, 2, 2))
    assert (tmp_path / "set/data/chunk-002/file-000.parquet").exists()
    assert open_dataset(tmp_path / "set").load().num_frames == 10


@pytest.mark.parametrize("failing", range(6))
def test_a_full_disk_costs_one_episode(tmp_path, record, spec, monkeypatch, failing):
    """Whichever write fails, the episode is either whole or not there, and recording can go on."""
    record(tmp_path / "set", lengths=(4, 3))
    writer = EpisodeWriter(tmp_path / "set", spec, append=True)
    observation = {key: np.zeros(array.shape, array.dtype) for key, array in spec.observation.items()}
    writer.add(observation, np.zeros(2), reward=0.0, actor="human")
    calls = iter(range(100))
    original = os.replace

    def full(source, target):
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    monkeypatch.setattr(durable.os, "replace", full)
    message = None
    try:
        writer.save_episode()
    except DataError as error:
        message = str(error)
    monkeypatch.undo()
    whole = open_dataset(tmp_path / "set").num_episodes
    if message is not None:
        assert "No space left on device" in message
        assert ("is saved, but the totals" in message) == (whole == 3)
    writer.add(observation, np.ones(2), reward=0.0, actor="human")
    writer.save_episode()
    writer.close()
    dataset = open_dataset(tmp_path / "set")
    assert dataset.num_episodes == whole + 1
    assert dataset.warnings == []
    assert not [finding for finding in check_dataset(dataset, "all") if finding.level == "error"]
    assert dataset.load().action[-1].tolist() == [1.0, 1.0]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data import durable
from robot_rl.data.store import EpisodeWriter

SPEC = Spec({"state": ArraySpec((3,)), "images.front": ArraySpec((32, 48, 3), "uint8")}, ArraySpec((2,)), 10.0)
replace = os.replace


def record(root, kill_at):
    calls = 0

    def dying(source, target):
        nonlocal calls
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        replace(source, target)

    durable.os.replace = dying
    writer = EpisodeWriter(root, SPEC, task="push")
    for episode in range(3):
        for step in range(3 + episode):
            image = np.full((32, 48, 3), 20 + step, np.uint8)
            writer.add({"state": np.full(3, episode), "images.front": image}, np.full(2, step), reward=0.0)
        writer.save_episode()
        Path(f"{root}.saved").write_text(str(episode + 1))


for kill_at in map(int, sys.argv[2:]):
    child = os.fork()
    if child == 0:
        record(Path(sys.argv[1]) / str(kill_at), kill_at)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_killing_a_recording_leaves_every_finished_episode_readable(tmp_path):
    """The recording process is killed before each of the moves of a save, in its first episode and later."""
    moves = [str(n) for n in range(13)]
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), *moves], check=True, timeout=120)
    spec = Spec({"state": ArraySpec((3,)), "images.front": ArraySpec((32, 48, 3), "uint8")}, ArraySpec((2,)), 10.0)
    reached = set()
    for kill_at in moves:
        root, saved = tmp_path / kill_at, tmp_path / f"{kill_at}.saved"
        promised = int(saved.read_text()) if saved.exists() else 0
        if not (root / "meta/info.json").exists():
            assert promised == 0
            EpisodeWriter(root, spec).close()
            continue
        dataset = open_dataset(root)
        assert promised <= dataset.num_episodes <= promised + 1
        reached.add(dataset.num_episodes)
        if dataset.num_episodes:
            findings = check_dataset(dataset, "all")
            assert not [finding for finding in findings if finding.level == "error"]
            assert dataset.load().episode_lengths.tolist() == [3, 4, 5][: dataset.num_episodes]
        before = dataset.num_episodes
        with EpisodeWriter(root, spec, append=True) as writer:
            image = np.zeros((32, 48, 3), np.uint8)
            writer.add({"state": np.zeros(3), "images.front": image}, np.full(2, 9.0), reward=0.0)
            writer.save_episode()
        dataset = open_dataset(root)
        assert dataset.num_episodes == before + 1
        assert dataset.warnings == []
        assert dataset.load().action[-1, 0] == 9.0
        assert len(list(root.glob("data/*/*.parquet"))) == before + 1
    assert reached >= {0, 1, 2}


def test_a_process_killed_at_any_time_keeps_its_promise(tmp_path):
    """The same with a real kill from outside, at no particular moment."""
    code = KILLED.split("for kill_at in map")[0].replace("range(3)", "range(10_000)").replace("3 + episode", "3")
    process = subprocess.Popen(
        [sys.executable, "-c", code + "\nrecord(Path(sys.argv[1]), -1)\n", str(tmp_path / "set")]
    )
    saved = tmp_path / "set.saved"
    try:
        for _ in range(3000):
            if process.poll() is not None or (saved.exists() and int(saved.read_text() or 0) >= 3):
                break
            signal.sigtimedwait([], 0.01)
    finally:
        process.kill()
        process.wait()
    promised = int(saved.read_text() or 0)
    dataset = open_dataset(tmp_path / "set")
    assert 3 <= promised <= dataset.num_episodes <= promised + 1
    assert not [finding for finding in check_dataset(dataset, "all") if finding.level == "error"]


def test_layout_equals_a_data_set_written_by_lerobot(tmp_path, human_data):
    """Files, columns, types and statistics of the human Push-T set, which LeRobot wrote, against ours."""
    theirs = human_data("pusht_human/lerobot_v3")
    spec = Spec({"image": ArraySpec((96, 96, 3), "uint8"), "state": ArraySpec((2,))}, ArraySpec((2,)), rate_hz=10.0)
    with EpisodeWriter(tmp_path / "set", spec, task="push") as writer:
        for _ in range(3):
            image = np.zeros((96, 96, 3), np.uint8)
            writer.add({"state": np.zeros(2), "image": image}, np.zeros(2), reward=0.0, success=False)
        writer.save_episode()
    ours = tmp_path / "set"
    files = [path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(path.relative_to(ours) for path in ours.rglob("*") if path.is_file())
    for file in (file for file in files if file.suffix == ".parquet"):
        left, right = pq.read_schema(theirs / file), pq.read_schema(ours / file)
        assert left.names == right.names, file
        assert left.types == right.types, file
        for name in (b"huggingface", b"pandas"):
            assert (name in (left.metadata or {})) == (name in (right.metadata or {})), file
        if b"huggingface" in left.metadata:
            described = [json.loads(part.metadata[b"huggingface"])["info"]["features"] for part in (left, right)]
            assert described[0] == described[1], file
    left, right = (json.loads((root / "meta/info.json").read_text()) for root in (theirs, ours))
    assert set(left) <= set(right)
    assert {k: left[k] for k in ("codebase_version", "data_path", "video_path", "fps", "chunks_size")} == {
        k: right[k] for k in ("codebase_version", "data_path", "video_path", "fps", "chunks_size")
    }
    assert set(left["features"]) == set(right["features"])
    for name, feature in left["features"].items():
        assert feature["dtype"] == right["features"][name]["dtype"], name
        assert feature["shape"] == right["features"][name]["shape"], name
    left, right = (json.loads((root / "meta/stats.json").read_text()) for root in (theirs, ours))
    assert {name: list(part) for name, part in left.items()} == {name: list(part) for name, part in right.items()}
    for name, part in left.items():
        assert np.shape(part["mean"]) == np.shape(right[name]["mean"]), name
