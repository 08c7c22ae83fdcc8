"""HalfCheetah agrees with Gymnasium's HalfCheetah-v5, step for step, until contacts make rounding errors grow."""

import numpy as np
import pytest

from robot_rl.core.errors import ConfigError
from sim.tasks.half_cheetah import make


def test_steps_equal_those_of_gymnasium():
    gymnasium = pytest.importorskip("gymnasium")
    ours = make(1, threads=1)
    theirs = gymnasium.make("HalfCheetah-v5")
    observation, _ = theirs.reset(seed=3)
    assert np.allclose(observation, ours.reset(3)["state"][0], atol=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(50):
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        observation, reward, _, _, info = theirs.step(action)
        step = ours.step(action[None])
        assert np.allclose(observation, step.observation["state"][0], atol=1e-5)
        assert reward == pytest.approx(step.reward[0], abs=1e-5)
        assert info["x_position"] == pytest.approx(step.info["x_position"][0], abs=1e-5)
    theirs.close()


def test_only_the_time_limit_ends_an_episode():
    env = make(1, threads=1)
    env.reset(0)
    for _ in range(999):
        assert not env.step(np.ones((1, 6))).done[0]
    step = env.step(np.ones((1, 6)))
    assert step.truncated[0]
    assert not step.terminated[0]
    assert not step.info["success"][0]


def test_there_is_no_sparse_reward():
    with pytest.raises(ConfigError, match=r"unknown reward 'sparse'\. Available: dense"):
        make(1, reward="sparse")
