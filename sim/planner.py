"""Planning with the full map: cost to go on a grid, shortest paths and smooth references.

The planner solves for the cost to go from every cell to one goal, so that planning again from anywhere in the same
world is a walk down that field.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robot_rl.core.errors import DataError
from sim.worlds import World

_STEPS = np.array(
    [(r, c) for r in range(-2, 3) for c in range(-2, 3) if max(abs(r), abs(c)) > 0 and np.gcd(r, c) == 1], np.int64
)
"""(16, 2) moves in (rows, columns): the eight neighbours and the knight's moves. With them the length of a straight
line is overestimated by at most 2.8 % (eight neighbours: 8.2 %); pulling the path tight removes most of the rest."""


@dataclass(frozen=True)
class PlannerParameters:
    """How the planner weighs length against clearance. Lengths in metres."""

    spacing: float = 0.1
    """Distance between the nodes of the planning grid; a multiple of the world's resolution."""
    clearance: float = 0.2
    """Smallest distance between path and obstacles: the robot's radius. Where a world's free cells keep at least the
    diagonal of a node's four cells more than this, what is connected there is connected on the planning grid."""
    comfort: float = 0.5
    """Distance from obstacles below which cells cost more."""
    weight: float = 4.0
    """Extra cost per metre at the smallest clearance, falling to 0 linearly at ``comfort``."""


SHORTEST = PlannerParameters(weight=0.0)
"""Path length alone, for metrics and start-goal sampling."""


@dataclass(frozen=True)
class CostToGo:
    """What `plan` returns: the way to one goal from everywhere in a world."""

    world: World
    goal: np.ndarray
    """(2,) m."""
    parameters: PlannerParameters
    value: np.ndarray
    """(rows, columns) float32 on the planning grid: weighted metres to the goal, infinite where unreachable."""
    successor: np.ndarray
    """(rows · columns,) int32: flat index of the next node towards the goal; a node without one points at itself."""

    def node(self, points: np.ndarray) -> np.ndarray:
        """Return the flat index (…,) of the reachable node near each point (…, 2) that is cheapest to go through."""
        rows, columns = self.value.shape
        spacing = self.parameters.spacing
        corner = np.floor(np.asarray(points) / spacing - 0.5).astype(np.int64)
        # The four nodes around the point and a ring of those next to them, for points pushed against an obstacle.
        around = np.array([(r, c) for r in range(-1, 3) for c in range(-1, 3)])
        row = np.clip(corner[..., 1, None] + around[:, 0], 0, rows - 1)
        column = np.clip(corner[..., 0, None] + around[:, 1], 0, columns - 1)
        offset = (np.stack([column, row], -1) + 0.5) * spacing - np.asarray(points)[..., None, :]
        length = np.hypot(offset[..., 0], offset[..., 1])
        # Twice the length: rather a near node than one across a corner.
        cost = self.value[row, column] + 2.0 * length
        best = np.argmin(cost, axis=-1)[..., None]
        return np.take_along_axis(row * columns + column, best, -1)[..., 0]

    def length(self, points: np.ndarray) -> np.ndarray:
        """Return the cost to the goal (…,) from points (…, 2); infinite where none is reachable nearby."""
        node = self.node(points)
        offset = self._position(node) - points
        return self.value.ravel()[node] + np.hypot(offset[..., 0], offset[..., 1])

    def path(self, start: np.ndarray) -> np.ndarray:
        """Return the way from ``start`` (2,) to the goal over nodes, (M, 2) in metres, both ends included.

        Raises:
            DataError: the goal cannot be reached from there.
        """
        node = int(self.node(start))
        if not np.isfinite(self.value.ravel()[node]):
            raise DataError(f"no path from {np.round(start, 2)} to {np.round(self.goal, 2)} in world {self.world.seed}")
        nodes = [node]
        while (following := int(self.successor[node])) != node:
            nodes.append(following)
            node = following
        return np.concatenate([np.asarray(start, float)[None], self._position(np.array(nodes)), self.goal[None]])

    def _position(self, node: np.ndarray) -> np.ndarray:
        row, column = np.divmod(node, self.value.shape[1])
        return (np.stack([column, row], -1) + 0.5) * self.parameters.spacing


def plan(world: World, goal: np.ndarray, parameters: PlannerParameters = SHORTEST) -> CostToGo:
    """Return the cost to go to ``goal`` (2,) from everywhere in ``world``.

    The Bellman equation on the planning grid, relaxed over the whole grid at once until nothing improves: the result
    of Dijkstra's algorithm, in array operations. A move costs its length times one plus the clearance penalty (mean of
    its ends).

    Raises:
        DataError: the goal is not in free space.
    """
    stride = round(parameters.spacing / world.resolution)
    free, penalty = _sample(world, parameters, stride)
    rows, columns = free.shape
    value = np.full((rows + 4, columns + 4), np.inf, np.float32)
    inner = value[2:-2, 2:-2]
    distance = (np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1) + 0.5) * parameters.spacing - goal
    radius = np.hypot(distance[..., 0], distance[..., 1])
    seeds = free & (radius < 1.5 * parameters.spacing)
    if not seeds.any():
        raise DataError(f"goal {np.round(goal, 2)} of world {world.seed} is not in free space")
    inner[seeds] = radius[seeds]
    costs, shifted = [], []
    padded = np.pad(penalty, 2, constant_values=np.inf)
    for down, right in _STEPS:
        window = (slice(2 + down, 2 + down + rows), slice(2 + right, 2 + right + columns))
        length = np.float32(parameters.spacing * np.hypot(down, right))
        costs.append(length * (1 + (penalty + padded[window]) / 2))
        shifted.append(value[window])
    candidate = np.empty_like(penalty)
    previous = np.inf
    finite = float(np.count_nonzero(seeds))
    while True:
        for cost, neighbour in zip(costs, shifted, strict=True):
            np.add(cost, neighbour, out=candidate)
            np.minimum(inner, candidate, out=inner)
        reached = np.isfinite(inner)
        total, count = float(inner[reached].sum(dtype=np.float64)), float(reached.sum())
        if count == finite and total == previous:
            break
        previous, finite = total, count
    return CostToGo(world, np.asarray(goal, float), parameters, inner.copy(), _successors(inner, costs, shifted, seeds))


def _sample(world: World, parameters: PlannerParameters, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (free, penalty per metre) on the planning grid, each (rows, columns); infinite penalty if not free."""
    rows, columns = world.occupancy.shape[0] // stride, world.occupancy.shape[1] // stride
    # A node lies on a corner of cells when the stride is even: the least of the four distances is a safe estimate.
    half = stride // 2
    first = max(half - 1, 0) if stride % 2 == 0 else half
    distance = world.distance[first::stride, first::stride][:rows, :columns]
    if stride % 2 == 0:
        for down, right in ((0, 1), (1, 0), (1, 1)):
            other = world.distance[first + down :: stride, first + right :: stride][:rows, :columns]
            distance = np.minimum(distance, other)
    free = distance > parameters.clearance
    span = max(parameters.comfort - parameters.clearance, 1e-9)
    closeness = np.clip((parameters.comfort - distance) / span, 0.0, 1.0)
    return free, np.where(free, parameters.weight * closeness, np.inf).astype(np.float32)


def _successors(value: np.ndarray, costs: list[np.ndarray], shifted: list[np.ndarray], seeds: np.ndarray) -> np.ndarray:
    """Return each node's best neighbour as a flat index (rows · columns,)."""
    rows, columns = value.shape
    own = np.arange(rows * columns).reshape(rows, columns)
    best, successor = np.full(value.shape, np.inf, np.float32), own.copy()
    for (down, right), cost, neighbour in zip(_STEPS, costs, shifted, strict=True):
        candidate = cost + neighbour
        better = candidate < best
        best[better] = candidate[better]
        successor[better] = own[better] + down * columns + right
    stay = seeds | ~np.isfinite(value)
    successor[stay] = own[stay]
    return successor.ravel().astype(np.int32)


def visible(world: World, start: np.ndarray, end: np.ndarray, clearance: float) -> bool:
    """Return whether the straight line between two points (2,) keeps ``clearance`` metres from obstacles."""
    count = max(int(np.ceil(np.hypot(*(end - start)) / (0.5 * world.resolution))), 1)
    points = start + np.linspace(0.0, 1.0, count + 1)[:, None] * (end - start)
    return bool((world.distance[world.cell(points)] > clearance).all())


def pull_tight(world: World, path: np.ndarray, clearance: float) -> np.ndarray:
    """Return ``path`` (M, 2) with every corner left out that can be cut by a straight line at ``clearance`` metres.

    Looks from each kept point for the farthest visible one, by doubling and then halving the step.
    """
    kept, at, last = [0], 0, len(path) - 1
    while at < last:
        good, step = at + 1, 2
        while good < last:
            candidate = min(at + step, last)
            if not visible(world, path[at], path[candidate], clearance):
                break
            good, step = candidate, 2 * step
        bad = min(at + step, last + 1)
        while bad - good > 1:
            middle = (good + bad) // 2
            if visible(world, path[at], path[middle], clearance):
                good = middle
            else:
                bad = middle
        kept.append(good)
        at = good
    return path[kept]


def path_length(path: np.ndarray) -> float:
    """Return the length of a polyline (M, 2) in its own unit."""
    return float(np.hypot(*np.diff(path, axis=0).T).sum())


def shortest_path(cost_to_go: CostToGo, start: np.ndarray) -> np.ndarray:
    """Return the shortest path (M, 2) from ``start`` (2,) that keeps the clearance: the grid's, pulled tight.

    Corners are cut forwards and backwards, because a greedy cut depends on the end that it starts from.
    """
    world, clearance = cost_to_go.world, cost_to_go.parameters.clearance
    # Ends may be closer to an obstacle than nodes are; a line between them must not fail for that.
    path = cost_to_go.path(start)
    ends = world.distance[world.cell(path[[0, -1]])].min()
    clearance = min(clearance, float(ends) - 1e-6)
    tight = pull_tight(world, path, clearance)
    return pull_tight(world, resample(tight, cost_to_go.parameters.spacing)[::-1], clearance)[::-1]


def resample(path: np.ndarray, spacing: float) -> np.ndarray:
    """Return points (K, 2) along the polyline ``path`` (M, 2), about ``spacing`` apart, ends included."""
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    at = np.linspace(0.0, along[-1], max(int(np.ceil(along[-1] / spacing)), 1) + 1)
    return np.stack([np.interp(at, along, path[:, axis]) for axis in range(2)], axis=-1)


def smooth_reference(cost_to_go: CostToGo, start: np.ndarray, spacing: float = 0.05, rounds: int = 60) -> np.ndarray:
    """Return a smooth reference (K, 2) from ``start`` (2,) to the goal at equal distances of about ``spacing`` metres.

    The grid's path is resampled and relaxed towards the mean of its neighbours; a point that would come nearer to an
    obstacle than the planner's clearance and 0.1 m stays where it was.
    """
    world, clearance = cost_to_go.world, cost_to_go.parameters.clearance + 0.1
    path = resample(cost_to_go.path(start), spacing)
    for _ in range(rounds):
        moved = path.copy()
        moved[1:-1] += 0.5 * (0.5 * (path[:-2] + path[2:]) - path[1:-1])
        keep = world.distance[world.cell(moved)] > np.minimum(clearance, world.distance[world.cell(path)] - 1e-6)
        path = np.where(keep[:, None], moved, path)
    return resample(path, spacing)
