import numpy as np
import pytest

from robot_rl.core.errors import ConfigError
from robot_rl.core.registry import make_env
from robot_rl.core.testing import check_vec_env
from robot_rl.data.frames import Frames
from sim.tasks.navigate import (
    BEAMS,
    GOAL_TOLERANCE,
    LIDAR_RANGE,
    MINIMUM_LENGTH,
    ROBOT_RADIUS,
    WHEEL_BASE,
    make,
    mirrored,
    scene,
    success_weighted_path_length,
)
from sim.worlds import TEST_SEED_START, RoomParameters

BARE = RoomParameters(width=6.0, height=5.0, rooms=(1, 1), furniture=(0, 0), boxes=4)


def place(env, x: float, y: float, yaw: float) -> None:
    env.qpos[:] = (x, y, yaw)
    env.qvel[:] = 0.0
    env.batch.forward()
    env._previous[:] = env.position


def wall_distance(x: float, y: float, angle: np.ndarray) -> np.ndarray:
    """Distance along rays to the inner sides of the walls of a bare 6 m x 5 m room."""
    thickness = BARE.wall_thickness
    cosine, sine = np.cos(angle), np.sin(angle)
    with np.errstate(divide="ignore"):
        along_x = np.where(cosine > 0, BARE.width - thickness - x, x - thickness) / np.abs(cosine)
        along_y = np.where(sine > 0, BARE.height - thickness - y, y - thickness) / np.abs(sine)
    return np.minimum(along_x, along_y)


def test_contract():
    check_vec_env(lambda num_envs, **options: make(num_envs, worlds=8, threads=1, **options))


def test_is_registered_with_both_rewards():
    env = make_env("navigate", 2, reward="shaped", threads=1)
    assert env.spec.observation["lidar"].shape == (BEAMS,)
    with pytest.raises(ConfigError, match="Available: sparse, shaped"):
        make_env("navigate", 2, reward="dense")


def test_lidar_against_an_analytic_room():
    env = make(1, parameters=BARE, worlds=1, threads=1)
    env.reset(0)
    for x, y, yaw in ((3.0, 2.5, 0.0), (1.1, 4.2, 0.7), (4.9, 0.8, -2.9)):
        place(env, x, y, yaw)
        angle = yaw - np.pi + np.arange(BEAMS) * (2 * np.pi / BEAMS)
        seen = env.observe()
        np.testing.assert_allclose(seen["lidar"][0], wall_distance(x, y, angle), atol=1e-5)
        np.testing.assert_allclose(seen["nearness"][0], 1.0 / wall_distance(x, y, angle), atol=1e-5)


def test_lidar_sees_what_the_map_holds():
    """Along every beam there is free space on the map up to the range that was read, and a box behind it."""
    env = make(4, threads=1)
    lidar = env.reset(TEST_SEED_START)["lidar"]
    for lane in range(4):
        world = env.scenes[lane].world
        angle = env.heading[lane] - np.pi + np.arange(BEAMS) * (2 * np.pi / BEAMS)
        ray = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        assert (lidar[lane] < LIDAR_RANGE).any()
        hit = lidar[lane] < LIDAR_RANGE
        ends = env.position[lane] + lidar[lane][:, None] * ray
        np.testing.assert_allclose(world.clearance(ends)[hit], 0.0, atol=1e-5)
        for share in np.linspace(0, 0.99, 40):
            assert (world.clearance(env.position[lane] + share * lidar[lane][:, None] * ray) > 0).all()


def test_goal_observation_by_hand():
    env = make(1, parameters=BARE, worlds=1, threads=1)
    env.reset(0)
    place(env, 2.0, 2.0, np.pi / 2)
    env.goal[0] = (4.0, 2.0)
    env.qvel[0] = (0.0, 0.3, 0.5)
    np.testing.assert_allclose(env.observe()["goal"][0], [2.0, 0.0, -1.0, 0.0, -2.0, 0.3, 0.5], atol=1e-6)


def test_base_drives_as_commanded():
    env = make(1, parameters=BARE, worlds=1, threads=1)
    assert env.model.geom("footprint").size[0] == ROBOT_RADIUS
    assert env.model.site("left_wheel").pos[1] - env.model.site("right_wheel").pos[1] == WHEEL_BASE
    env.reset(0)
    place(env, 2.0, 2.5, 0.0)
    for _ in range(10):
        env.step(np.array([[0.5, 0.0]]))
    assert env.position[0, 0] == pytest.approx(2.5, abs=0.05)
    assert env.position[0, 1] == pytest.approx(2.5, abs=1e-3)
    assert env.path_length[0] == pytest.approx(env.position[0, 0] - 2.0, abs=1e-6)
    goal = env.observe()["goal"][0]
    assert goal[5] == pytest.approx(0.5, abs=0.01)
    for _ in range(10):
        env.step(np.array([[0.0, 1.0]]))
    assert env.observe()["goal"][0, 6] == pytest.approx(1.0, abs=0.02)
    assert env.heading[0] == pytest.approx(1.0, abs=0.2)
    for _ in range(5):
        env.step(env.hold_action())
    np.testing.assert_allclose(env.observe()["goal"][0, 5:], 0.0, atol=0.01)
    # Sideways it has grip: a turn at speed follows the arc instead of drifting outwards.
    for _ in range(20):
        env.step(np.array([[0.5, 1.0]]))
    cosine, sine = np.cos(env.heading[0]), np.sin(env.heading[0])
    assert abs(cosine * env.qvel[0, 1] - sine * env.qvel[0, 0]) < 0.02


def test_collision_ends_the_episode_as_a_failure():
    env = make(2, threads=1)
    env.reset(TEST_SEED_START + 7)
    seeds = env.episode_seed.copy()
    worlds = [found.world for found in env.scenes]
    ended = np.zeros(2, bool)
    for _ in range(300):
        before = env.position.copy()
        step = env.step(np.full((2, 2), (0.6, 0.0)))
        for lane in np.flatnonzero(step.done & ~ended):
            assert step.terminated[lane]
            assert step.info["collision"][lane]
            assert not step.info["success"][lane]
            assert step.reward[lane] == 0.0
            assert step.info["episode_seed"][lane] == seeds[lane]
            # It came as near as its radius, and the contact kept it out.
            assert worlds[lane].clearance(before[lane]) < ROBOT_RADIUS + 0.08
            assert step.final_observation["lidar"][lane].min() > ROBOT_RADIUS - 0.03
        ended |= step.done
        if ended.all():
            break
    assert ended.all()


def test_a_wall_really_stops_the_base():
    env = make(1, parameters=BARE, worlds=1, threads=1)
    env.reset(0)
    place(env, 5.0, 2.5, 0.0)
    env.set_action(np.array([[0.6, 0.0]]))
    env.advance(400)
    assert env.position[0, 0] == pytest.approx(BARE.width - BARE.wall_thickness - ROBOT_RADIUS, abs=0.02)


def test_success_needs_the_tolerance_and_pays_once():
    env = make(1, parameters=BARE, worlds=1, threads=1, reward="sparse")
    env.reset(0)
    place(env, 2.0, 2.5, 0.0)
    env.goal[0] = (2.0 + GOAL_TOLERANCE + 0.3, 2.5)
    rewards = []
    while True:
        step = env.step(np.array([[0.3, 0.0]]))
        rewards.append(step.reward[0])
        if step.done[0]:
            break
        assert step.info["goal_distance"][0] > GOAL_TOLERANCE
    assert step.terminated[0]
    assert step.info["success"][0]
    assert step.info["goal_distance"][0] <= GOAL_TOLERANCE
    assert sum(rewards) == 1.0


def test_expert_arrives_in_test_rooms_and_demonstrations_hold_recoveries():
    env = make(20, threads=1)
    for noise, least in ((0.0, 19), (1.0, 18)):
        expert = env.make_expert(noise=noise, seed=0)
        env.reset(TEST_SEED_START + 500)
        outcome = np.full(20, -1)
        figures = np.zeros((2, 20))
        disturbed = 0
        for _ in range(env.max_episode_steps):
            action = expert.act()
            disturbed += int((np.abs(action - expert.label()) > 1e-9).any(axis=1).sum())
            step = env.step(action)
            for lane in np.flatnonzero(step.done & (outcome < 0)):
                outcome[lane] = step.info["success"][lane]
                figures[:, lane] = step.info["shortest_length"][lane], step.info["path_length"][lane]
            if (outcome >= 0).all():
                break
        assert (outcome == 1).sum() >= least
        assert (figures[0] >= MINIMUM_LENGTH - GOAL_TOLERANCE - 0.3).all()
        # The shortest length is one: nothing that arrives has travelled less.
        assert (figures[1] >= figures[0] * 0.98)[outcome == 1].all()
        assert (disturbed > 100) == (noise > 0)
        assert success_weighted_path_length(outcome == 1, *figures) > 0.85


def test_shaped_reward_adds_up_to_the_way_gained():
    env = make(8, threads=1, reward="shaped", worlds=8)
    expert = env.make_expert(noise=0.0)
    env.reset(3)
    way = env._way.copy()
    total, steps, open_lanes = np.zeros(8), np.zeros(8), np.ones(8, bool)
    while open_lanes.any():
        step = env.step(expert.act())
        total[open_lanes] += step.reward[open_lanes]
        steps[open_lanes] += 1
        open_lanes &= ~step.done
    # Everything gained but the last 0.25 m, 5 for the goal, less 0.01 a step.
    np.testing.assert_allclose(total, way - GOAL_TOLERANCE + 5.0 - 0.01 * steps, atol=0.35)


def test_training_shares_worlds_and_testing_does_not():
    env = make(2, worlds=4, threads=1)
    env.reset([1, 5])
    assert env.scenes[0] is env.scenes[1]
    env.reset([TEST_SEED_START, TEST_SEED_START + 4])
    assert env.scenes[0].world.seed != env.scenes[1].world.seed
    assert scene("rooms", RoomParameters(), 2) is scene("rooms", RoomParameters(), 2)


def test_mirrored_demonstrations_are_what_a_mirrored_room_gives():
    env = make(1, parameters=BARE, worlds=1, threads=1)
    env.reset(0)
    seen = {}
    for side in (1.0, -1.0):
        place(env, 2.0, BARE.height / 2 + side * 0.9, side * 0.6)
        env.goal[0] = (4.5, BARE.height / 2 - side * 1.3)
        env.qvel[0] = (0.2, side * 0.1, side * 0.4)
        seen[side] = env.observe()
    frames = Frames(seen[1.0], np.array([[0.3, 0.7]], np.float32), np.array([1]), env.spec)
    both = mirrored(frames)
    assert both.num_episodes == both.num_frames == 2
    for key, value in seen[-1.0].items():
        np.testing.assert_allclose(both.observation[key][1:], value, atol=1e-5)
    np.testing.assert_allclose(both.action, [[0.3, 0.7], [0.3, -0.7]])


def test_success_weighted_path_length():
    success, shortest, travelled = (
        np.array([1, 1, 0, 1]),
        np.array([4.0, 4.0, 4.0, 4.0]),
        np.array([4.0, 8.0, 4.0, 3.0]),
    )
    assert success_weighted_path_length(success, shortest, travelled) == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_renders_the_room_from_above():
    pytest.importorskip("sim.render")
    env = make(1, threads=1)
    env.reset(TEST_SEED_START)
    frame = env.render()
    assert frame.shape == (256, 320, 3)
    assert frame.dtype == np.uint8
    assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 5
