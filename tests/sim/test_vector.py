"""Our environments through Gymnasium's interface, judged by Gymnasium's own checker."""

import warnings

import numpy as np
import pytest

from robot_rl.core.errors import ConfigError, DataError
from robot_rl.core.registry import make_env

gymnasium = pytest.importorskip("gymnasium")


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("push_t", None),
        ("push_t", "state"),
        ("half_cheetah", "state"),
        ("peg_insert", None),
        ("peg_insert", "state"),
        ("navigate", None),
        ("navigate", "lidar"),
    ],
)
def test_one_lane_passes_gymnasiums_checker(task, key):
    from gymnasium.utils.env_checker import check_env

    from sim.vector import GymnasiumEnv

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(minimum|maximum|infinity|normalized|spec|symmetric).*")
        check_env(GymnasiumEnv(make_env(task, 1, threads=1), key), skip_render_check=True)


def test_vector_view_agrees_with_gymnasiums_own_vector_env():
    """The same lanes behind Gymnasium's SyncVectorEnv give the same spaces, observations and infos."""
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    from sim.vector import GymnasiumEnv, GymnasiumVectorEnv

    ours = GymnasiumVectorEnv(make_env("push_t", 2, threads=1))
    theirs = SyncVectorEnv(
        [lambda: GymnasiumEnv(make_env("push_t", 1, threads=1))] * 2, autoreset_mode=AutoresetMode.SAME_STEP
    )
    assert ours.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    for name in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
        assert getattr(ours, name) == getattr(theirs, name)
    first, _ = ours.reset(seed=5)
    other, _ = theirs.reset(seed=5)
    ours.action_space.seed(0)
    for step in range(302):
        for key in first:
            if step < 300:  # a later episode's seed is the next block in ours, the next number in theirs
                assert np.array_equal(first[key], other[key])
        assert first in ours.observation_space
        actions = ours.action_space.sample()
        first, reward, terminated, truncated, infos = ours.step(actions)
        other, reward2, terminated2, truncated2, infos2 = theirs.step(actions)
        assert np.array_equal(terminated, terminated2)
        assert np.array_equal(truncated, truncated2)
        if step < 300:
            assert np.allclose(reward, reward2)
            assert set(infos) == set(infos2)
        if truncated.any():
            assert step == 299
            for lane in range(2):
                for key in first:
                    assert np.array_equal(infos["final_obs"][lane][key], infos2["final_obs"][lane][key])
            assert set(infos["final_info"]) == set(infos2["final_info"])
            assert np.array_equal(infos["final_info"]["coverage"], infos2["final_info"]["coverage"])
    ours.close()
    theirs.close()


def test_vector_view_works_under_gymnasiums_wrappers():
    from gymnasium.wrappers.vector import RecordEpisodeStatistics

    from sim.vector import GymnasiumVectorEnv

    env = RecordEpisodeStatistics(GymnasiumVectorEnv(make_env("push_t", 2, threads=1, reward="shaped"), "state"))
    env.reset(seed=0)
    for _ in range(300):
        *_, infos = env.step(env.action_space.sample())
    assert (infos["episode"]["l"] == 300).all()


def test_wrong_use_is_named():
    from sim.vector import GymnasiumEnv, GymnasiumVectorEnv

    with pytest.raises(DataError, match="no observation 'pixels'; available: agent_pos"):
        GymnasiumVectorEnv(make_env("push_t", 1), "pixels")
    with pytest.raises(ConfigError, match="one lane, got 2"):
        GymnasiumEnv(make_env("push_t", 2))
