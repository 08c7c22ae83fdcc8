import heapq

import numpy as np
import pytest

from robot_rl.core.errors import DataError
from sim.planner import (
    SHORTEST,
    PlannerParameters,
    path_length,
    plan,
    pull_tight,
    resample,
    shortest_path,
    smooth_reference,
    visible,
)
from sim.pursuit import PurePursuit, PursuitParameters, wrap_angle
from sim.worlds import RoomParameters, World, distance_field, generate, largest_component

SMALL = RoomParameters(width=4.0, height=3.0, rooms=(1, 1), furniture=(0, 0), boxes=4, clearance=0.3)


def small_world(*blocks: tuple[float, float, float, float]) -> World:
    """A 4 m x 3 m map with solid blocks (low x, high x, low y, high y) and a border."""
    occupancy = np.zeros((60, 80), bool)
    occupancy[[0, -1]] = occupancy[:, [0, -1]] = True
    for left, right, low, high in blocks:
        occupancy[round(low / 0.05) : round(high / 0.05), round(left / 0.05) : round(right / 0.05)] = True
    distance = distance_field(occupancy, 0.05)
    return World("test", 0, SMALL, np.zeros((4, 5)), occupancy, distance, largest_component(distance > 0.3))


def brute_force_length(world: World, start: np.ndarray, goal: np.ndarray, clearance: float) -> float:
    """Dijkstra over the visibility graph of all free cells next to a blocked one: any-angle shortest path."""
    free = world.distance > clearance
    blocked = ~free
    corner = np.zeros_like(free)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            corner |= np.roll(blocked, (down, right), (0, 1))
    row, column = np.nonzero(free & corner)
    points = np.concatenate([[start, goal], world.centre(row, column)])
    best, queue, done = {0: 0.0}, [(0.0, 0)], set()
    while queue:
        cost, at = heapq.heappop(queue)
        if at == 1:
            return cost
        if at in done:
            continue
        done.add(at)
        steps = np.linspace(0, 1, 120)[None, :, None]
        lines = points[at] + steps * (points[:, None] - points[at])
        seen = (world.distance[world.cell(lines)] > clearance).all(axis=1)
        for other in np.flatnonzero(seen):
            total = cost + float(np.hypot(*(points[other] - points[at])))
            if total < best.get(int(other), np.inf):
                best[int(other)] = total
                heapq.heappush(queue, (total, int(other)))
    raise AssertionError("no path")


MAPS = {
    "open": (),
    "wall with a gap": ((1.8, 2.0, 0.0, 1.9),),
    "two walls": ((1.1, 1.3, 0.0, 1.9), (2.5, 2.7, 1.1, 3.0)),
    "block": ((1.5, 2.4, 0.9, 2.0),),
}


@pytest.mark.parametrize("name", MAPS)
def test_shortest_path_is_free_and_as_short_as_brute_force(name):
    world = small_world(*MAPS[name])
    start, goal = np.array([0.52, 0.61]), np.array([3.43, 0.58])
    path = shortest_path(plan(world, goal, SHORTEST), start)
    np.testing.assert_allclose(path[0], start)
    np.testing.assert_allclose(path[-1], goal)
    assert world.distance[world.cell(resample(path, 0.01))].min() > SHORTEST.clearance - 1e-6
    brute = brute_force_length(world, start, goal, SHORTEST.clearance)
    assert brute * 0.99 <= path_length(path) <= brute * 1.05


def test_open_map_gives_the_straight_line():
    world = small_world()
    start, goal = np.array([0.5, 0.5]), np.array([3.4, 2.2])
    assert path_length(shortest_path(plan(world, goal), start)) == pytest.approx(np.hypot(*(goal - start)), rel=1e-3)


def test_cost_to_go_equals_dijkstra():
    """The relaxation over the whole grid is Dijkstra's result, here with a heap over the same moves and costs."""
    world = small_world((1.8, 2.0, 0.0, 1.9), (2.6, 2.9, 1.5, 3.0))
    result = plan(world, np.array([3.5, 0.5]), PlannerParameters())
    from sim.planner import _STEPS, _sample

    free, penalty = _sample(world, result.parameters, 2)
    rows, columns = free.shape
    centre = (np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1) + 0.5) * 0.1
    radius = np.hypot(*(centre - result.goal).transpose(2, 0, 1))
    value = np.full(free.shape, np.inf)
    queue = [(radius[r, c], r, c) for r, c in np.argwhere(free & (radius < 0.15)).tolist()]
    heapq.heapify(queue)
    while queue:
        cost, r, c = heapq.heappop(queue)
        if cost >= value[r, c]:
            continue
        value[r, c] = cost
        for down, right in _STEPS.tolist():
            y, x = r + down, c + right
            if 0 <= y < rows and 0 <= x < columns and free[y, x]:
                step = 0.1 * np.hypot(down, right) * (1 + (penalty[r, c] + penalty[y, x]) / 2)
                heapq.heappush(queue, (cost + step, y, x))
    np.testing.assert_allclose(result.value, value, rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_references_in_rooms_keep_clear_and_reach_the_goal(seed):
    world = generate("rooms", seed)
    rng = np.random.default_rng(seed)
    cells = np.argwhere(world.reachable)
    start, goal = (world.centre(*cells[i]) for i in rng.integers(len(cells), size=2))
    reference = smooth_reference(plan(world, goal, PlannerParameters()), start)
    np.testing.assert_allclose(reference[[0, -1]], [start, goal])
    assert world.clearance(reference).min() > 0.2
    shortest = path_length(shortest_path(plan(world, goal), start))
    assert shortest <= path_length(reference) * 1.001
    steps = np.hypot(*np.diff(reference, axis=0).T)
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.1)


def test_everything_reachable_has_a_path():
    world = generate("rooms", 21)
    cells = np.argwhere(world.reachable)
    result = plan(world, world.centre(*cells[0]))
    assert np.isfinite(result.length(world.centre(cells[:, 0], cells[:, 1]))).all()


def test_length_never_grows_faster_than_one_metre_per_metre():
    world = generate("rooms", 4)
    cells = np.argwhere(world.reachable)
    result = plan(world, world.centre(*cells[len(cells) // 2]))
    points = world.centre(cells[:, 0], cells[:, 1])
    lengths = result.length(points)
    straight = np.hypot(*(points - result.goal).T)
    assert (lengths >= straight - 0.01).all()


def test_unreachable_goals_and_starts_are_errors():
    world = small_world((1.8, 2.0, 0.0, 3.0))
    with pytest.raises(DataError, match="not in free space"):
        plan(world, np.array([1.9, 1.0]))
    with pytest.raises(DataError, match="no path"):
        plan(world, np.array([3.0, 1.0])).path(np.array([0.8, 1.0]))


def test_visible_and_pull_tight():
    world = small_world((1.8, 2.0, 0.0, 1.5))
    low, high = np.array([1.0, 1.0]), np.array([3.0, 1.0])
    assert not visible(world, low, high, 0.2)
    assert visible(world, np.array([1.0, 2.2]), np.array([3.0, 2.2]), 0.2)
    detour = resample(np.array([low, [1.0, 2.3], [3.0, 2.3], high]), 0.1)
    tight = pull_tight(world, detour, 0.2)
    assert path_length(tight) < path_length(detour) - 0.5
    assert len(tight) < 8


def test_pure_pursuit_follows_references_in_every_lane():
    pursuit = PurePursuit(2, PursuitParameters())
    line = resample(np.array([[0.0, 0.0], [3.0, 0.0]]), 0.05)
    corner = resample(np.array([[0.0, 0.0], [1.5, 0.0], [1.5, 1.5]]), 0.05)
    pursuit.set_reference(0, line)
    pursuit.set_reference(1, corner)
    position, heading = np.array([[0.0, 0.2], [0.0, 0.0]]), np.array([0.5, np.pi])
    worst = np.zeros(2)
    for step in range(120):
        command, distance = pursuit.act(position, heading)
        assert (np.abs(command) <= [0.6 + 1e-9, 1.8 + 1e-9]).all()
        assert (command[:, 0] >= 0).all()
        heading = heading + 0.1 * command[:, 1]
        position = position + 0.1 * command[:, :1] * np.stack([np.cos(heading), np.sin(heading)], axis=-1)
        if step > 40:
            worst = np.maximum(worst, distance)
    np.testing.assert_allclose(position, [[3.0, 0.0], [1.5, 1.5]], atol=0.25)
    assert (worst < 0.25).all()


def test_wrap_angle():
    np.testing.assert_allclose(
        wrap_angle(np.array([0.0, 3.5, -3.5, 7.0])), [0.0, 3.5 - 2 * np.pi, 2 * np.pi - 3.5, 7.0 - 2 * np.pi]
    )
