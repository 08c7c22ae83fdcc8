"""Push-T agrees with the published environment: geometry, coverage, initial states, replay; and its expert works."""

import warnings

import numpy as np
import pytest

from sim.tasks import tee
from sim.tasks.push_t import make


@pytest.fixture(scope="module")
def published():
    """Return gym_pusht's environment."""
    pytest.importorskip("gym_pusht")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gym_pusht.envs.pusht import PushTEnv

    env = PushTEnv(obs_type="state")
    env.reset(seed=0)
    return env


def test_coverage_and_keypoints_equal_the_published_ones(published):
    rng = np.random.default_rng(0)
    scale = np.repeat([[0.0], [0.05], [0.3], [1.0]], 40, axis=0)
    poses = np.array(tee.GOAL_POSE) + scale * rng.normal(size=(160, 3)) * [60, 60, 2]
    ours = tee.keypoints(poses)
    covered = tee.coverage(ours)
    for pose, corners, share in zip(poses, ours, covered, strict=True):
        published.block.angle = pose[2]
        published.block.position = tuple(pose[:2])
        assert np.allclose(published.get_keypoints(published._block_shapes), corners, atol=1e-9)
        assert share == pytest.approx(published._get_coverage(), abs=1e-9)
    assert np.allclose(covered[:40], 1.0)
    assert covered[120:].min() < 0.1


def test_coverage_survives_coinciding_edges():
    goal = np.array(tee.GOAL_POSE)
    for error in ([0, 0, 0], [1e-12, 0, 0], [0, 0, 1e-13], [0, -1e-9, 1e-9], [0, 0, 2 * np.pi]):
        assert tee.coverage(tee.keypoints(goal[None] + error))[0] == pytest.approx(1.0, abs=1e-8)
    shifted = goal + 30 * np.array([np.cos(goal[2]), np.sin(goal[2]), 0])
    # Sliding by a stem's width along the bar leaves three quarters of the bar and nothing of the stem.
    assert tee.coverage(tee.keypoints(shifted[None]))[0] == pytest.approx(2700 / tee.AREA)


def test_episodes_start_as_the_published_ones(published):
    env = make(4, threads=1)
    states = env.reset(20)["state"]
    for lane in range(4):
        published.reset(seed=20 + lane)
        expected = published.get_obs()
        assert np.allclose(states[lane], expected, atol=1e-4)


def test_the_same_pushes_move_the_block_as_in_the_published_environment(published):
    """Forty steps through the block: pusher within a pixel, block within a few."""
    env = make(1, threads=1)
    observation = env.reset(3)
    state, _ = published.reset(seed=3)
    direction = state[2:4] - state[:2]
    for t in range(40):
        action = state[:2] + direction * min(1.2, t / 20)
        state_now, *_ = published.step(action)
        observation = env.step(np.clip(action, 0, 512)[None]).observation
    assert np.linalg.norm(state_now[2:4] - state[2:4]) > 20
    assert np.allclose(observation["state"][0, :2], state_now[:2], atol=1.0)
    assert np.allclose(observation["state"][0, 2:4], state_now[2:4], atol=6.0)


def test_observations_describe_one_scene():
    env = make(2, threads=1)
    env.reset(0)
    for _ in range(5):
        step = env.step(np.full((2, 2), 300.0))
    observation = step.observation
    assert np.array_equal(observation["agent_pos"], observation["state"][:, :2])
    corners = tee.keypoints(observation["state"][:, 2:].astype(float)).reshape(2, 16)
    assert np.allclose(observation["environment_state"], corners, atol=1e-3)
    angle = observation["state"][:, 4]
    assert ((angle >= 0) & (angle < 2 * np.pi + 1e-6)).all()


def test_shaped_reward_is_the_published_one():
    env = make(8, threads=1, reward="shaped")
    env.reset(0)
    expert = env.make_expert()
    for _ in range(60):
        step = env.step(expert.act())
        assert np.allclose(step.reward, np.minimum(step.info["coverage"] / 0.95, 1.0))
        assert np.array_equal(step.terminated, step.info["coverage"] > 0.95)


def test_expert_solves_the_task():
    env = make(16, threads=1)
    env.reset(500)
    expert = env.make_expert(noise=1.0, seed=0)
    solved = np.zeros(16, bool)
    for _ in range(200):
        solved |= env.step(expert.act()).terminated
    assert solved.mean() > 0.9
