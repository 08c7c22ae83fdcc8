"""The sets of human demonstrations that the project is measured on, and what is irregular in each."""

import numpy as np
import pytest

from robot_rl.data.check import check_dataset
from robot_rl.data.dataset import open_dataset
from robot_rl.data.normalizer import Normalizer
from robot_rl.data.testing import check_reader
from robot_rl.data.windows import WindowSampler


def told(warnings, *parts):
    """Assert that each of ``parts`` is in one of the ``warnings``, and that there are no others."""
    missing = [part for part in parts if not any(part in text for text in warnings)]
    assert not missing, f"{missing} not in {warnings}"
    assert len(warnings) == len(parts), warnings


def checked(dataset, images="none"):
    return [f"{finding.level}: {finding.text}" for finding in check_dataset(dataset, images)]


def test_pusht_replay_buffer(human_data):
    pytest.importorskip("zarr")
    dataset = open_dataset(human_data("pusht_human/pusht_lowdim.zarr.zip"))
    check_reader(dataset)
    told(dataset.warnings, "states no control rate")
    assert (dataset.num_episodes, dataset.num_frames) == (206, 25650)
    frames = dataset.load().remap({"environment_state": "keypoint", "agent_pos": "state[0:2]"})
    assert {key: value.shape[1:] for key, value in frames.observation.items()} == {
        "environment_state": (16,),
        "agent_pos": (2,),
    }
    assert (frames.episode_lengths.min(), frames.episode_lengths.max()) == (49, 246)
    sampler = WindowSampler(frames, obs_steps=2, horizon=16)
    batch = sampler.sample(0, 512)
    assert batch["observation"]["environment_state"].shape == (512, 2, 16)
    normalizer = Normalizer.fit(frames)
    assert normalizer.normalize("action", batch["action"]).abs().max() <= 1.00001


def test_pusht_images(human_data):
    pytest.importorskip("zarr")
    dataset = open_dataset(human_data("pusht_human/pusht_image_50ep.zarr.zip"))
    check_reader(dataset)
    assert (dataset.num_episodes, dataset.num_frames) == (50, 6235)
    assert dataset.spec.observation["img"].is_image


def test_pusht_lerobot(human_data):
    dataset = open_dataset(human_data("pusht_human/lerobot_v3"))
    check_reader(dataset)
    told(dataset.warnings, "robot_type is 'unknown'", "next.success is False in every frame")
    assert dataset.tasks[205] == "Push the T-shaped block onto the T-shaped target."
    texts = checked(dataset)
    assert "note: success is False throughout all 206 episodes" in texts
    assert "warning: done is set before the last frame in 206 of 206 episodes" in texts


def test_pusht_formats_agree(human_data):
    """The same demonstrations from zarr and from LeRobot: numbers, episodes and pictures."""
    pytest.importorskip("zarr")
    lerobot = open_dataset(human_data("pusht_human/lerobot_v3"))
    left = lerobot.load()
    right = open_dataset(human_data("pusht_human/pusht_lowdim.zarr.zip")).load()
    np.testing.assert_array_equal(left.episode_ends, right.episode_ends)
    np.testing.assert_array_equal(left.action, right.action)
    np.testing.assert_allclose(left.observation["state"], right.observation["state"][:, :2], atol=1e-4)
    images = open_dataset(human_data("pusht_human/pusht_image_50ep.zarr.zip"))
    for episode, index in [(0, 0), (7, 33), (49, -1)]:
        film = lerobot.image("image", episode, index).astype(float)
        assert np.abs(film - images.image("img", episode, index)).mean() < 2.0
        # A picture of one frame before or after differs more: access is exact to the frame.
        assert (
            np.abs(film - images.image("img", episode, index - 12)).mean()
            > np.abs(film - images.image("img", episode, index)).mean()
        )


def test_adroit_pickle_and_hdf5_agree(human_data):
    pytest.importorskip("h5py")
    pickled = open_dataset(human_data("adroit_door_human/door-v0_demos.pickle"))
    check_reader(pickled)
    told(
        pickled.warnings,
        "nothing marks the end of an episode: it ends with its arrays (223 to 300 steps)",
        "5.6 % of the action entries lie outside the bounds [-1, 1] (-1.28 to 1.37)",
        "init_state_dict.qpos differs from the joint angles of the first observation by up to 0.51 rad",
    )
    assert (pickled.num_episodes, pickled.num_frames, pickled.spec.rate_hz) == (25, 6729, 100.0)
    assert any("'action': 5.6 % of the entries lie outside the spec's bounds" in text for text in checked(pickled))
    stored = open_dataset(human_data("adroit_door_human/adroit_door_human.hdf5"))
    check_reader(stored)
    told(stored.warnings, "5.6 % of the action entries", "states no control rate")
    left, right = pickled.load(), stored.load()
    np.testing.assert_array_equal(left.action, right.action)
    np.testing.assert_array_equal(left.observation["state"], right.observation["state"])
    assert stored.splits == {"train": list(range(20)), "valid": list(range(20, 25))}
    assert pickled.initial_state(3)["qpos"].shape == stored.initial_state(3)["qpos"].shape == (30,)
    # The normaliser measures the range instead of trusting the bounds.
    normalizer = Normalizer.fit(left)
    assert float(normalizer.unnormalize("action", normalizer.normalize("action", _tensor(left.action))).max()) > 1.3


def _tensor(array):
    import torch

    return torch.from_numpy(array)


@pytest.mark.parametrize(
    ("name", "frames", "size"),
    [
        ("lift", 412, 7),
        ("stack", 532, 7),
        ("nut_assembly", 1036, 7),
        ("pick_place", 1482, 7),
        ("door", 261, 7),
        ("wipe", 174, 6),
    ],
)
def test_robosuite(human_data, name, frames, size):
    pytest.importorskip("h5py")
    dataset = open_dataset(human_data(f"robosuite_human/original/panda_{name}.hdf5"))
    check_reader(dataset)
    expected = ["20 Hz is measured from the times of the states", "states[0] has time 0.052 s, not 0"]
    if name == "wipe":
        expected.append("3.6 % of the action entries lie outside the bounds [-1, 1] (-1.24 to 0.60)")
    told(dataset.warnings, *expected)
    assert (dataset.num_episodes, dataset.num_frames, dataset.spec.action.shape) == (1, frames, (size,))
    assert dataset.load().extras["joint_torques"].shape == (frames, 7)
    if name == "wipe":
        return
    dataset = open_dataset(human_data(f"robosuite_human/robomimic_style/{name}.hdf5"))
    check_reader(dataset)
    assert dataset.warnings == []
    assert dataset.num_frames == frames
    assert dataset.spec.rate_hz == 20
    loaded = dataset.load()
    assert loaded.observation["robot0_eef_pos"].shape == (frames, 3)
    assert np.flatnonzero(loaded.extras["done"])[0] == frames - 11


def test_g1_bottle(human_data):
    dataset = open_dataset(human_data("lerobot_g1_bottle"))
    told(
        dataset.warnings,
        "feature 'observation.state': names are a list inside a list",
        "feature 'action': names are a list inside a list",
    )
    assert (dataset.version, dataset.num_episodes, dataset.num_frames) == ("v2.1", 10, 2940)
    assert dataset.spec.rate_hz == 30
    assert dataset.spec.action.names[3] == "kLeftElbow"
    frames = dataset.load(episodes=[9])
    assert frames.observation["state"].shape == (frames.num_frames, 26)
    image = dataset.image("images.cam_high", 9, frames.num_frames - 1)
    assert image.shape == (480, 640, 3)
    assert image.std() > 10
    assert not [text for text in checked(dataset, "none") if text.startswith("error")]


def test_gr1_pick_and_place(human_data):
    dataset = open_dataset(human_data("lerobot_gr1_picknplace"))
    told(
        dataset.warnings,
        "data_path 'data/chunk-{episode_index:03d}/episode_{episode_index:06d}.parquet' leads to no file "
        "(the episode index stands where the chunk belongs); found under the standard path",
        "video_path 'videos/chunk-{episode_index:03d}/{video_key}/episode_{episode_index:06d}.mp4' leads to no file",
        "format v2.0 stores no per-episode statistics",
        "camera 'observation.images.egoview' is declared in meta/info.json but has no video file: left out",
        "total_chunks is 0, but there are 1",
        "total_videos is 2, but there are 5",
        "5 episodes list several tasks (episode 0: 'pick the pear from the counter and place it in the plate', "
        "'valid'); the first is taken",
        "split 'train' is 0:100, but there are 5 episodes",
    )
    assert dataset.load().episode_lengths.tolist() == [416, 470, 470, 412, 328]
    assert list(dataset.spec.observation) == ["images.ego_view", "state"]
    assert dataset.image("images.ego_view", 4, 327).shape == (256, 256, 3)
    texts = checked(dataset)
    assert any(text.startswith("warning: 25 of 44 elements of 'action' are constant: motor_7,") for text in texts)
    assert "note: timestamp does not start at 0 but at 0.05 s" in texts
