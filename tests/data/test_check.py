from dataclasses import replace

import numpy as np
import pytest

from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.check import check_dataset, check_frames
from robot_rl.data.dataset import open_dataset
from robot_rl.data.store import EpisodeWriter


def found(findings, check):
    return [f"{finding.level}: {finding.text}" for finding in findings if finding.check == check]


def test_sound_data_have_no_findings(make_frames):
    assert check_frames(make_frames([30, 40, 35])) == []


def test_not_finite(make_frames):
    frames = make_frames([30, 40])
    frames.observation["keypoint"][33, 2, 1] = np.nan
    frames.observation["keypoint"][35] = np.inf
    assert found(check_frames(frames), "finite") == [
        "error: 'keypoint' is not finite in 2 frames, first in episode 1, frame 3"
    ]


def test_actions_out_of_bounds(make_frames):
    frames = make_frames([30, 40])
    frames.action[50, 1] = 1.5
    assert found(check_frames(frames), "bounds") == [
        "warning: 'action': 0.7 % of the entries lie outside the spec's bounds (elements 1), "
        "first in episode 1, frame 20"
    ]


def test_constant_elements_are_named(make_frames):
    frames = make_frames([30, 40])
    frames.observation["state"][:, 1:] = 3.0
    assert found(check_frames(frames), "constant") == ["warning: 2 of 3 elements of 'state' are constant: y, angle"]


def test_frozen_sensors(make_frames):
    frames = make_frames([30, 40])
    frames.observation["state"][35:50] = frames.observation["state"][35]
    assert found(check_frames(frames), "frozen") == [
        "note: 'state' repeats itself while actions change in 1 episodes, longest 14 frames in episode 1 from frame 5"
    ]
    frames.observation["keypoint"][35:50] = frames.observation["keypoint"][35]
    texts = found(check_frames(frames), "frozen")
    assert "warning: every observation repeats itself while actions change in 1 episodes" in texts[-1]
    frames.action[35:51] = 0.0
    assert found(check_frames(frames), "frozen") == []


def test_repeated_episodes(make_frames):
    frames = make_frames([30, 40, 30])
    frames.action[70:] = frames.action[:30]
    assert found(check_frames(frames), "repeated") == [
        "warning: 1 of 3 episodes repeat the actions of an earlier one bit for bit: 2 (as 0)"
    ]
    frames.action[99] *= 0.5
    assert found(check_frames(frames), "repeated") == []


def test_times(make_frames):
    frames = make_frames([30, 40])
    time = np.concatenate([np.arange(30), np.arange(40)]) / 10.0
    frames.extras["stamp"] = time.copy()
    assert check_frames(frames) == []
    frames.extras["stamp"] = time * 1.25
    assert found(check_frames(frames), "rate") == ["warning: stamp runs at 8 Hz, the spec says 10 Hz"]
    frames.extras["stamp"] = time + 0.35 * (np.arange(70) >= 45)
    assert found(check_frames(frames), "gap") == [
        "warning: stamp has 1 gaps, the longest 0.45 s at a period of 0.1 s, first before episode 1, frame 15"
    ]
    frames.extras["stamp"] = time.copy()
    frames.extras["stamp"][20] = frames.extras["stamp"][19]
    assert found(check_frames(frames), "time") == [
        "error: stamp does not grow in 1 frames, first in episode 0, frame 20"
    ]


def test_lengths_and_endings(make_frames):
    frames = make_frames([30, 40, 35, 2])
    frames.extras["done"] = np.zeros(107, bool)
    frames.extras["done"][[29, 50, 104, 106]] = True
    frames.extras["success"] = np.zeros(107, bool)
    findings = check_frames(frames)
    assert found(findings, "length") == ["warning: episodes much shorter than the median of 32.5 frames: 3 (2 frames)"]
    assert found(findings, "done") == [
        "warning: done is not set at the end of 1 of 4 episodes",
        "warning: done is set before the last frame in 1 of 4 episodes",
    ]
    assert found(findings, "success") == ["note: success is False throughout all 4 episodes"]


@pytest.mark.parametrize("images", ["sample", "all"])
def test_still_black_and_missing_images(tmp_path, images):
    spec = Spec({"images.front": ArraySpec((32, 32, 3), "uint8")}, ArraySpec((1,)), 10.0)
    levels = {"moving": lambda t: 20 + 8 * t, "still": lambda t: 90, "black": lambda t: 0, "lost": lambda t: 20 + t}
    with EpisodeWriter(tmp_path / "set", spec) as writer:
        for level in levels.values():
            for t in range(20):
                writer.add({"images.front": np.full((32, 32, 3), level(t), np.uint8)}, np.full(1, t / 20))
            writer.save_episode(success=True)
    (tmp_path / "set/videos/observation.images.front/chunk-000/file-003.mp4").unlink()
    findings = check_dataset(open_dataset(tmp_path / "set"), images)
    assert found(findings, "image")[1:] == [
        "warning: episode 1, 'images.front': the camera shows one picture throughout",
        "warning: episode 2, 'images.front': the images looked at are black",
    ]
    assert "file-003.mp4: the file does not exist" in found(findings, "image")[0]
    assert found(findings, "video") == ["error: episode 3: no video file for images.front"]
    assert [finding.level for finding in findings][:2] == ["error", "error"]


def test_too_few_video_frames_are_found(tmp_path, record):
    root = tmp_path / "set"
    record(root, lengths=(9, 4))
    videos = root / "videos/observation.images.front/chunk-000"
    (videos / "file-001.mp4").replace(videos / "file-000.mp4")
    record(tmp_path / "other", lengths=(6,))
    (tmp_path / "other/videos/observation.images.front/chunk-000/file-000.mp4").replace(videos / "file-001.mp4")
    texts = found(check_dataset(open_dataset(root), "all"), "video")
    assert "holds 4 frames, 9 are referred to (images.front, episode 0)" in texts[0]
    assert texts[0].startswith("error")
    assert "holds 6 frames, 4 are referred to (images.front, episode 1)" in texts[1]
    assert texts[1].startswith("warning")


def test_a_damaged_episode_does_not_hide_the_others(tmp_path, record):
    record(tmp_path / "set", lengths=(30, 30, 30))
    path = tmp_path / "set/data/chunk-000/file-001.parquet"
    path.write_bytes(path.read_bytes()[:200])
    counted = []
    findings = check_dataset(open_dataset(tmp_path / "set"), "none", counted.append)
    assert len(found(findings, "file")) == 1
    assert "file-001.parquet" in found(findings, "file")[0]
    assert sum(counted) == 3


def test_unknown_rate_uses_frames(make_frames):
    frames = make_frames([60])
    frames = replace(frames, spec=replace(frames.spec, rate_hz=0.0))
    frames.observation["state"][5:20] = 0.0
    assert check_frames(frames) == []
    frames.observation["state"][5:30] = 0.0
    assert len(found(check_frames(frames), "frozen")) == 1
