import numpy as np
import pytest

from robot_rl.core.registry import make_env
from sim.lidar import PlanarLidar
from sim.tasks.navigate import BEAMS, LIDAR_HEIGHT, LIDAR_RANGE

BEAM_ANGLES = np.linspace(-np.pi, np.pi, BEAMS, endpoint=False)


def lidar(*boxes, angles=(0.0,), reach=10.0):
    found = PlanarLidar(1, max(1, len(boxes)), np.array(angles), reach)
    found.place(0, np.array(boxes, float).reshape(-1, 5))
    return found


def ranges(one, x, y, yaw):
    return one.scan(np.array([[x, y, yaw]]), np.zeros(1, np.int64))[0]


def test_every_range_is_that_of_the_simulator_s_own_rays():
    env = make_env("navigate", 16, threads=1)
    env.reset(1_000_000)
    rng, group = np.random.default_rng(0), np.array([1, 0, 0, 0, 0, 0], np.uint8)
    hits = 0
    for _ in range(20):
        env.qpos[:] = rng.uniform((0.2, 0.2, -7.0), (9.8, 7.8, 7.0), (16, 3))  # some of them inside furniture
        angle = env.qpos[:, 2, None] + BEAM_ANGLES
        vector = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=-1)
        origin = np.concatenate([env.qpos[:, None, :2], np.full((16, 1, 1), LIDAR_HEIGHT)], axis=2)
        body = env.model.body("base_link").id
        theirs, _ = env.batch.ray(origin, vector, geomgroup=group, bodyexclude=body)
        theirs = np.where(theirs < 0.0, LIDAR_RANGE, np.minimum(theirs, LIDAR_RANGE))
        np.testing.assert_allclose(env.scan(), theirs, atol=1e-6)
        np.testing.assert_array_equal(env.scan(np.array([3, 11])), env.scan()[[3, 11]])
        hits += (theirs < LIDAR_RANGE).sum()
    assert hits > 0.9 * 20 * 16 * BEAMS


def test_a_beam_meets_the_nearest_side_of_a_turned_box():
    square = (2.0, 0.0, 0.5, 0.5, np.pi / 4)  # a corner towards the sensor
    assert ranges(lidar(square), 0.0, 0.0, 0.0) == pytest.approx(2.0 - np.sqrt(0.5))
    assert ranges(lidar((2.0, 0.0, 0.5, 0.2, 0.0), square), 0.0, 0.0, 0.0) == pytest.approx(2.0 - np.sqrt(0.5))
    assert ranges(lidar((5.0, 0.0, 0.5, 0.2, 0.0), square, angles=(np.pi,)), 0.0, 0.0, 0.0) == 10.0


def test_along_a_side_and_at_a_corner_every_range_is_a_number():
    wall = (0.0, 1.0, 5.0, 0.5, 0.0)
    along = lidar(wall, angles=(0.0, np.pi / 2, -np.pi, -np.pi / 2))
    for y in (0.0, 0.5, 1.0):  # beside it, on its side, inside
        seen = ranges(along, 0.0, y, 0.0)
        assert np.isfinite(seen).all()
        assert ((seen >= 0.0) & (seen <= 10.0)).all()
    assert ranges(along, 0.0, 0.0, 0.0) == pytest.approx([10.0, 0.5, 10.0, 10.0])
    assert ranges(along, 0.0, 1.0, 0.0) == pytest.approx([5.0, 0.5, 5.0, 0.5])


def test_a_new_world_replaces_the_old_one_whole():
    one = PlanarLidar(2, 2, np.zeros(1), 8.0)
    one.place(0, np.array([[2.0, 0.0, 0.5, 0.5, 0.0], [4.0, 0.0, 0.5, 0.5, 0.0]]))
    one.place(1, np.array([[3.0, 0.0, 0.5, 0.5, 0.0]]))
    poses = np.zeros((2, 3))
    np.testing.assert_allclose(one.scan(poses, np.arange(2)), [[1.5], [2.5]])
    one.place(0, np.array([[0.0, 0.0, 0.0, 0.0, 0.0], [6.0, 0.0, 0.5, 0.5, 0.0]]))  # the first is not in use
    np.testing.assert_allclose(one.scan(poses, np.arange(2)), [[5.5], [2.5]])
    one.place(0, np.zeros((2, 5)))
    np.testing.assert_allclose(one.scan(poses, np.array([1, 0])), [[2.5], [8.0]])


def test_what_is_not_there_is_refused():
    one = lidar((2.0, 0.0, 0.5, 0.5, 0.0))
    with pytest.raises(ValueError, match="a lane that is not there"):
        one.scan(np.zeros((1, 3)), np.array([1]))
    with pytest.raises(ValueError, match="do not fit"):
        one.scan(np.zeros((2, 3)), np.zeros(1, np.int64))
