import hashlib

import numpy as np
import pytest

from robot_rl.core.errors import ConfigError, UnknownNameError
from sim.worlds import (
    TEST_SEED_START,
    RoomParameters,
    distance_field,
    distance_to_boxes,
    generate,
    largest_component,
    rasterise,
    world_seed,
)


def fingerprint(seed: int) -> str:
    return hashlib.sha256(generate("rooms", seed).boxes.tobytes()).hexdigest()


def test_a_seed_is_a_world():
    first, again, other = generate("rooms", 7), generate("rooms", 7), generate("rooms", 8)
    for name in ("boxes", "occupancy", "distance", "reachable"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.boxes, other.boxes)


def test_worlds_do_not_change_between_versions():
    """Results and data sets name worlds by their seed, so a seed must mean the same room for good."""
    boxes = generate("rooms", 1_000_000).boxes
    np.testing.assert_allclose(boxes[:5].sum(axis=0), [24.04788827, 16.51972158, 10.225, 8.66972158, 0.0], atol=1e-7)


def test_parameters_change_the_world_but_not_its_number_of_boxes():
    small = generate("rooms", 3, RoomParameters(width=6.0, height=5.0, rooms=(1, 2)))
    large = generate("rooms", 3)
    assert small.boxes.shape == large.boxes.shape == (RoomParameters().boxes, 5)
    assert small.occupancy.shape == (100, 120)
    assert large.occupancy.shape == (160, 200)


def test_train_and_test_worlds_are_disjoint():
    train = {world_seed(seed, pool) for pool in (0, 1, 256, 2_000_000) for seed in (0, 5, 999_999)}
    test = {world_seed(seed, pool) for pool in (0, 1, 256, 2_000_000) for seed in (TEST_SEED_START, 1_000_199)}
    assert max(train) < TEST_SEED_START <= min(test)
    assert test == {TEST_SEED_START, 1_000_199}
    train_rooms = {fingerprint(seed) for seed in range(150)}
    test_rooms = {fingerprint(seed) for seed in range(TEST_SEED_START, TEST_SEED_START + 150)}
    assert len(train_rooms) == len(test_rooms) == 150
    assert not train_rooms & test_rooms


@pytest.mark.parametrize("seed", range(6))
def test_worlds_are_closed_connected_and_mostly_reachable(seed):
    world = generate("rooms", seed)
    for border in (world.occupancy[0], world.occupancy[-1], world.occupancy[:, 0], world.occupancy[:, -1]):
        assert border.all()
    np.testing.assert_array_equal(largest_component(world.reachable), world.reachable)
    assert (world.distance[world.reachable] > world.parameters.clearance).all()
    assert world.reachable.sum() >= 0.85 * (world.distance > world.parameters.clearance).sum()
    assert world.reachable.mean() > 0.4


def test_distance_field_equals_brute_force():
    rng = np.random.default_rng(0)
    occupancy = rng.random((30, 40)) < 0.02
    occupancy[[0, -1]] = occupancy[:, [0, -1]] = True
    occupied = np.argwhere(occupancy)
    cells = np.argwhere(np.ones_like(occupancy))
    brute = np.sqrt(((cells[:, None] - occupied[None]) ** 2).sum(axis=-1).min(axis=1)).reshape(occupancy.shape) * 0.05
    np.testing.assert_allclose(distance_field(occupancy, 0.05), brute, atol=1e-5)


def test_distance_field_is_bounded_in_an_empty_map():
    assert distance_field(np.zeros((20, 20), bool), 0.1).max() == pytest.approx(1.0)


def test_rasterised_boxes_agree_with_the_exact_distance():
    world = generate("rooms", 11)
    rows, columns = np.indices(world.occupancy.shape)
    exact = world.clearance(world.centre(rows, columns))
    clear = np.abs(exact) > 1e-9
    np.testing.assert_array_equal(world.occupancy[clear], exact[clear] < 0)
    # The grid's distance is from centre to centre: at most one cell diagonal more than to the surface.
    gap = (world.distance - exact)[~world.occupancy]
    assert gap.min() > -1e-5
    assert gap.max() < np.sqrt(2) * world.resolution


def test_distance_to_boxes_by_hand():
    boxes = np.array([[1.0, 1.0, 0.5, 0.25, 0.0], [4.0, 1.0, 0.5, 0.5, np.pi / 4], [0.0, 0.0, 0.0, 0.0, 0.0]])
    points = np.array([[1.0, 2.0], [1.8, 1.65], [1.0, 1.1], [4.0, 2.0], [0.0, 0.0]])
    expected = [0.75, 0.5, -0.15, 1.0 - np.sqrt(0.5), np.hypot(0.5, 0.75)]
    np.testing.assert_allclose(distance_to_boxes(points, boxes), expected, atol=1e-12)
    stacked = np.repeat(boxes[None], len(points), axis=0)
    np.testing.assert_allclose(distance_to_boxes(points, stacked), expected, atol=1e-12)


def test_cell_and_centre_are_inverse():
    world = generate("rooms", 0)
    row, column = world.cell(world.centre(np.array([3, 10]), np.array([7, 199])))
    assert row.tolist() == [3, 10]
    assert column.tolist() == [7, 199]
    assert [int(i) for i in world.cell(np.array([-5.0, 99.0]))] == [159, 0]


def test_rasterise_leaves_out_parked_boxes():
    parameters = RoomParameters(width=1.0, height=1.0, rooms=(1, 1), furniture=(0, 0), boxes=4)
    assert not rasterise(np.zeros((4, 5)), parameters).any()


def test_errors_name_what_is_wrong():
    with pytest.raises(UnknownNameError, match="rooms"):
        generate("roms", 0)
    with pytest.raises(ConfigError, match="needed: 28"):
        RoomParameters(boxes=20)
    with pytest.raises(ConfigError, match="range"):
        RoomParameters(rooms=(0, 1))
