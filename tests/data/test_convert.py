import numpy as np
import pytest

from robot_rl.core.errors import ConfigError, DataError, SpecMismatchError, UnknownNameError
from robot_rl.data.convert import import_dataset
from robot_rl.data.dataset import open_dataset


def test_import_keeps_everything_by_default(tmp_path, record):
    record(tmp_path / "a", lengths=(4, 6))
    source = open_dataset(tmp_path / "a")
    counted = []
    assert import_dataset(source, tmp_path / "b", advance=counted.append) == 2
    assert counted == [1, 1]
    copy = open_dataset(tmp_path / "b")
    assert copy.spec == source.spec
    assert copy.tasks == source.tasks
    assert copy.warnings == []
    left, right = source.load(), copy.load()
    np.testing.assert_array_equal(left.action, right.action)
    assert set(left.extras) == set(right.extras)
    for name, value in left.extras.items():
        np.testing.assert_array_equal(value, right.extras[name])
        assert value.dtype == right.extras[name].dtype
    assert np.abs(source.images("images.front", 1).astype(int) - copy.images("images.front", 1)).max() <= 3


def test_rename_slice_flatten_and_choice(tmp_path, record):
    record(tmp_path / "a", lengths=(4, 6, 3))
    source = open_dataset(tmp_path / "a")
    rename = {"keypoint": "environment_state", "state[0:2]": "agent_pos"}
    import_dataset(source, tmp_path / "b", keys=[], rename=rename, flatten=True, episodes=[2, 0], task="lift")
    frames = open_dataset(tmp_path / "b").load()
    expected = source.load().take([2, 0])
    assert frames.episode_ends.tolist() == [3, 7]
    assert {key: array.shape for key, array in frames.spec.observation.items()} == {
        "environment_state": (8,),
        "agent_pos": (2,),
    }
    np.testing.assert_array_equal(
        frames.observation["environment_state"], expected.observation["keypoint"].reshape(7, 8)
    )
    np.testing.assert_array_equal(frames.observation["agent_pos"], expected.observation["state"][:, :2])
    assert open_dataset(tmp_path / "b").tasks == ["lift", "lift"]


def test_uneven_times_are_kept_and_missing_verdicts_not_invented(tmp_path, human_data):
    pytest.importorskip("h5py")
    source = open_dataset(human_data("robosuite_human/original/panda_wipe.hdf5"))
    import_dataset(source, tmp_path / "b")
    extras = open_dataset(tmp_path / "b").load().extras
    np.testing.assert_allclose(extras["stamp"], source.load().extras["timestamp"])
    assert extras["joint_torques"].shape == (174, 7)
    assert "success" not in extras


def test_errors(tmp_path, record, make_frames):
    record(tmp_path / "a", lengths=(4,))
    source = open_dataset(tmp_path / "a")
    for options, error, message in [
        ({"rename": {"stat": "x"}}, UnknownNameError, "Did you mean 'state'"),
        ({"keys": ["stat"]}, UnknownNameError, "Did you mean 'state'"),
        ({"rename": {"state": "keypoint"}}, ConfigError, "two observations would be called 'keypoint'"),
        ({"keys": []}, ConfigError, "no observation is left; the source has: state, keypoint"),
        ({"episodes": [7]}, DataError, "no episode 7"),
        ({"episodes": []}, DataError, "no episode to import"),
    ]:
        with pytest.raises(error, match=message):
            import_dataset(source, tmp_path / "b", **options)
    import_dataset(source, tmp_path / "b")
    with pytest.raises(DataError, match="already holds a data set"):
        import_dataset(source, tmp_path / "b")
    import_dataset(source, tmp_path / "b", append=True)
    assert open_dataset(tmp_path / "b").num_episodes == 2
    with pytest.raises(SpecMismatchError, match="observation 'keypoint' is missing"):
        import_dataset(source, tmp_path / "b", keys=["state"], append=True)
    source.spec = make_frames([2]).spec.__class__(source.spec.observation, source.spec.action, 0.0)
    with pytest.raises(DataError, match="states no control rate; give it"):
        import_dataset(source, tmp_path / "c")
