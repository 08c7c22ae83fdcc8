import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from robot_rl.core.errors import DataError
from robot_rl.data import compact as module
from robot_rl.data.compact import compact
from robot_rl.data.dataset import open_dataset
from robot_rl.data.store import EpisodeWriter


def content(root):
    dataset = open_dataset(root)
    assert dataset.warnings == []
    frames = dataset.load()
    levels = [dataset.images("images.front", i).mean(axis=(1, 2, 3)) for i in range(dataset.num_episodes)]
    return frames, np.concatenate(levels)


def test_compaction_keeps_every_number_and_image(tmp_path, record):
    root = tmp_path / "set"
    record(root, lengths=(7, 5, 9, 4))
    before, images = content(root)
    stats = json.loads((root / "meta/stats.json").read_text())
    done = compact(root)
    assert (done.files_before, done.files_after) == (4 * 3 + 3, 6)
    assert done.bytes_after < done.bytes_before
    after, same = content(root)
    np.testing.assert_array_equal(after.action, before.action)
    np.testing.assert_array_equal(after.observation["keypoint"], before.observation["keypoint"])
    np.testing.assert_array_equal(after.episode_ends, before.episode_ends)
    assert {name: value.tolist() for name, value in after.extras.items()} == {
        name: value.tolist() for name, value in before.extras.items()
    }
    np.testing.assert_array_equal(same, images)
    assert json.loads((root / "meta/stats.json").read_text()) == stats
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_recording_goes_on_after_compaction(tmp_path, record):
    root = tmp_path / "set"
    record(root, lengths=(3, 4))
    compact(root)
    record(root, lengths=(5,), seed=1, append=True)
    assert (root / "data/chunk-000/file-001.parquet").exists()
    before, _ = content(root)
    compact(root)
    after, images = content(root)
    np.testing.assert_array_equal(after.action, before.action)
    assert len(images) == 12


def test_what_the_data_set_does_not_list_is_carried_over(tmp_path, record):
    root = tmp_path / "set"
    record(root, lengths=(3, 4))
    strange = ("README.md", ".git/objects/ab", "meta/notes/day.md", "videos/observation.images.rear/chunk-000/file.mp4")
    for name in strange:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "raw").symlink_to("../gone")
    compact(root)
    assert [(root / name).read_text() for name in strange] == list(strange)
    assert (root / "raw").readlink().name == "gone"
    assert len(list(root.glob("data/*/*.parquet"))) == 1
    assert not (root / ".recording").exists()


def test_a_link_that_leads_out_of_the_data_set_is_not_written_through(tmp_path, record):
    root = tmp_path / "set"
    record(root, lengths=(3, 4))
    (root / "data").rename(tmp_path / "elsewhere")
    (root / "data").symlink_to("../elsewhere")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    with pytest.raises(DataError, match="move that away"):
        compact(root)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_size_limits_split_files(tmp_path, record):
    root = tmp_path / "set"
    record(root, lengths=(3, 4, 5))
    compact(root, data_megabytes=1e-6, video_megabytes=1e-6)
    assert len(list(root.glob("data/*/*.parquet"))) == 3
    assert pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").num_rows == 3
    content(root)


def test_killed_compaction_changes_nothing(tmp_path, record, monkeypatch):
    root = tmp_path / "set"
    record(root, lengths=(3, 4))
    before, _ = content(root)

    def die(*_):
        raise KeyboardInterrupt

    for step in ("_verify", "_swap", "join_videos"):
        monkeypatch.setattr(module, step, die)
        with pytest.raises(KeyboardInterrupt):
            compact(root)
        monkeypatch.undo()
        np.testing.assert_array_equal(content(root)[0].action, before.action)
    compact(root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_between_the_two_renames_the_message_says_what_to_do(tmp_path, record):
    record(tmp_path / "set", lengths=(3,))
    (tmp_path / "set").rename(tmp_path / "set.before-compact")
    with pytest.raises(DataError, match=r"rename 'set\.before-compact' back to 'set'"):
        open_dataset(tmp_path / "set")


def test_refusals(tmp_path, record, spec, human_data):
    root = tmp_path / "set"
    record(root, lengths=(3,))
    with EpisodeWriter(root, spec, append=True), pytest.raises(DataError, match="recording into it; cannot compact"):
        compact(root)
    with pytest.raises(DataError, match=r"only LeRobot v3\.0 data sets can be compacted"):
        compact(human_data("lerobot_gr1_picknplace"))
