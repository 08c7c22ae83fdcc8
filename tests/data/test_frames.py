import numpy as np
import pytest

from robot_rl.core.errors import DataError, SpecMismatchError, UnknownNameError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames, concatenate, parse_source


def test_episodes_are_slices_of_the_flat_arrays(make_frames):
    frames = make_frames([4, 1, 6])
    assert frames.num_episodes == 3
    assert frames.num_frames == 11
    assert frames.episode(1) == slice(4, 5)
    assert frames.episode(-1) == slice(5, 11)
    assert frames.episode_lengths.tolist() == [4, 1, 6]
    with pytest.raises(DataError, match="no episode 3; the data holds 3"):
        frames.episode(3)


def test_arrays_of_another_length_are_refused(make_frames):
    frames = make_frames([4])
    with pytest.raises(DataError, match="action has 3 frames, expected 4"):
        Frames(frames.observation, frames.action[:3], frames.episode_ends, frames.spec)
    with pytest.raises(DataError, match="episode 1 has no frames"):
        Frames(frames.observation, frames.action, [4, 4], frames.spec)


def test_take_keeps_order_and_extras(make_frames):
    frames = make_frames([4, 1, 6], extras=True)
    taken = frames.take([2, 0])
    assert taken.episode_ends.tolist() == [6, 10]
    np.testing.assert_array_equal(taken.action[:6], frames.action[5:])
    np.testing.assert_array_equal(taken.extras["reward"][6:], frames.extras["reward"][:4])
    assert frames.take([]).num_frames == 0


def test_remap_renames_slices_and_flattens(make_frames):
    frames = make_frames([5])
    mapped = frames.remap({"environment_state": "keypoint", "agent_pos": "state[0:2]", "angle": "state[-1]"})
    assert mapped.observation["environment_state"].shape == (5, 8)
    np.testing.assert_array_equal(mapped.observation["agent_pos"], frames.observation["state"][:, :2])
    np.testing.assert_array_equal(mapped.observation["angle"], frames.observation["state"][:, 2:])
    assert mapped.spec.observation["agent_pos"].names == ("x", "y")
    assert mapped.spec.observation["environment_state"].shape == (8,)
    kept = frames.remap({"keypoint": "keypoint[1:]"}, flatten=False)
    assert kept.observation["keypoint"].shape == (5, 4, 1)


def test_remap_slices_bounds_with_the_values():
    spec = Spec({"s": ArraySpec((2, 2), low=(0, 1, 2, 3), high=(4, 5, 6, 7))}, ArraySpec((1,)))
    frames = Frames({"s": np.zeros((2, 2, 2), np.float32)}, np.zeros((2, 1), np.float32), [2], spec)
    assert frames.remap({"a": "s[1]"}).spec.observation["a"] == ArraySpec((2,), low=(1, 3), high=(5, 7))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("stat", UnknownNameError, "Did you mean 'state'"),
        ("state[5:9]", DataError, "empty range: the last axis has 3"),
        ("state[a]", DataError, "expected 'key', 'key\\[2\\]' or 'key\\[0:2\\]'"),
        ("state[]", DataError, "expected 'key'"),
    ],
)
def test_remap_refuses_what_does_not_exist(make_frames, source, error, message):
    with pytest.raises(error, match=message):
        make_frames([3]).remap({"new": source})


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("state", slice(None)),
        ("images.front", slice(None)),
        ("state[:2]", slice(None, 2)),
        ("state[2:]", slice(2, None)),
        ("state[1]", slice(1, 2)),
        ("state[-1]", slice(-1, None)),
        ("state[-2]", slice(-2, -1)),
    ],
)
def test_parse_source(source, part):
    assert parse_source(source) == (source.partition("[")[0], part)


def test_concatenate_joins_and_checks_the_spec(make_frames):
    first, second = make_frames([3, 2], extras=True), make_frames([4], seed=1)
    joined = concatenate([first, second])
    assert joined.episode_ends.tolist() == [3, 5, 9]
    assert joined.extras == {}
    np.testing.assert_array_equal(joined.observation["state"][5:], second.observation["state"])
    with pytest.raises(SpecMismatchError, match="observation 'keypoint' is missing"):
        concatenate([first, second.select(["state"])])
    with pytest.raises(DataError, match="no frames to join"):
        concatenate([])
