"""Seeded procedural worlds for navigation: boxes, occupancy grid, distance field and reachable space.

A world is (family, parameters, seed) and nothing else: the same three give the same world on every machine. Every
world of a family has the same number of boxes, so that one simulator model serves all lanes through per-lane box poses.

Frame: metres, origin at the map's lower left corner, x to the right, y up; grids are indexed [row (y), column (x)] and
the centre of cell (r, c) is ((c + 0.5) · resolution, (r + 0.5) · resolution), as in a ROS occupancy grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np

from robot_rl.core.errors import ConfigError, UnknownNameError

TEST_SEED_START = 1_000_000
"""Episode seeds from here on are for evaluation; training never draws a world of these seeds."""


@dataclass(frozen=True)
class RoomParameters:
    """A rectangular floor cut into rooms by walls with doors, and furnished with boxes. Lengths in metres."""

    width: float = 10.0
    """Inner extent along x."""
    height: float = 8.0
    """Inner extent along y."""
    rooms: tuple[int, int] = (3, 5)
    """Fewest and most rooms."""
    door_width: tuple[float, float] = (1.0, 1.5)
    """Narrowest and widest door opening."""
    second_door_length: float = 4.5
    """Inner walls at least this long get two doors, so that there are loops and not only a tree of rooms."""
    wall_thickness: float = 0.15
    """Thickness of every wall."""
    furniture: tuple[int, int] = (6, 12)
    """Fewest and most furniture boxes."""
    furniture_side: tuple[float, float] = (0.3, 1.1)
    """Shortest and longest side of a furniture box."""
    clearance: float = 0.3
    """Distance from obstacles that counts as free: the robot's radius and a margin."""
    resolution: float = 0.05
    """Side of a grid cell."""
    boxes: int = 34
    """Number of boxes of every world; those not needed are parked below the floor."""

    def __post_init__(self) -> None:
        walls = 4 + 3 * (self.rooms[1] - 1)
        if walls + self.furniture[1] > self.boxes:
            raise ConfigError(
                f"boxes={self.boxes} cannot hold {walls} walls and {self.furniture[1]} pieces of furniture; "
                f"needed: {walls + self.furniture[1]}"
            )
        if self.rooms[0] < 1 or self.rooms[1] < self.rooms[0]:
            raise ConfigError(f"rooms={self.rooms} is no range of positive numbers")


@dataclass(frozen=True)
class World:
    """One generated world; see the module for frames and grid layout."""

    family: str
    """Name of the generator."""
    seed: int
    """Seed of the generator."""
    parameters: RoomParameters
    """Parameters of the generator."""
    boxes: np.ndarray
    """(B, 5) float64: centre x, centre y, half side along the box's x, along its y (m), yaw (rad). Parked boxes have
    half sides of 0."""
    occupancy: np.ndarray
    """(rows, columns) bool: the cell's centre lies in a box."""
    distance: np.ndarray
    """(rows, columns) float32: distance in metres from the cell's centre to the nearest occupied cell's centre."""
    reachable: np.ndarray
    """(rows, columns) bool: the largest connected part of the cells whose distance exceeds the clearance."""

    @property
    def resolution(self) -> float:
        """Side of a grid cell in metres."""
        return self.parameters.resolution

    def cell(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the (row, column) of points (…, 2), clipped to the map."""
        index = np.floor(np.asarray(points) / self.resolution).astype(np.int64)
        rows, columns = self.occupancy.shape
        return np.clip(index[..., 1], 0, rows - 1), np.clip(index[..., 0], 0, columns - 1)

    def centre(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Return the centres (…, 2) in metres of cells."""
        return (np.stack([column, row], axis=-1) + 0.5) * self.resolution

    def clearance(self, points: np.ndarray) -> np.ndarray:
        """Return the exact distance (…,) in metres from points (…, 2) to the nearest box, negative inside one."""
        return distance_to_boxes(points, self.boxes)


def distance_to_boxes(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the signed distance in metres from points to the nearest of a set of boxes.

    Args:
        points: (…, 2) in metres.
        boxes: (B, 5) as `World.boxes`, or (…, B, 5) with one set per point. Boxes of half sides 0 are left out.

    Returns:
        (…,), positive outside all boxes.
    """
    offset = np.asarray(points)[..., None, :] - boxes[..., :2]
    cosine, sine = np.cos(boxes[..., 4]), np.sin(boxes[..., 4])
    along = np.abs(cosine * offset[..., 0] + sine * offset[..., 1]) - boxes[..., 2]
    across = np.abs(cosine * offset[..., 1] - sine * offset[..., 0]) - boxes[..., 3]
    outside = np.hypot(np.maximum(along, 0.0), np.maximum(across, 0.0))
    signed = outside + np.minimum(np.maximum(along, across), 0.0)
    return np.where(boxes[..., 2] > 0.0, signed, np.inf).min(axis=-1)


def generate(family: str, seed: int, parameters: RoomParameters | None = None) -> World:
    """Return the world (``family``, ``parameters``, ``seed``); raises `UnknownNameError` for an unknown family."""
    if family not in FAMILIES:
        raise UnknownNameError("world family", family, FAMILIES)
    parameters = parameters or RoomParameters()
    rng = np.random.default_rng([_FAMILY_KEYS[family], int(seed)])
    while True:
        boxes = FAMILIES[family](parameters, rng)
        occupancy = rasterise(boxes, parameters)
        distance = distance_field(occupancy, parameters.resolution)
        reachable = largest_component(distance > parameters.clearance)
        # A piece of furniture may close a door: then draw again, from the same stream, so that the seed still decides.
        if reachable.sum() >= 0.85 * (distance > parameters.clearance).sum():
            return World(family, int(seed), parameters, boxes, occupancy, distance, reachable)


def world_seed(episode_seed: int, pool: int) -> int:
    """Return the seed of an episode's world.

    Training episodes share a pool of ``pool`` worlds (0 for a new world per episode), so that worlds and plans are
    computed once; test episodes have a world each. Training seeds stay below, and test seeds above, `TEST_SEED_START`.
    """
    if episode_seed >= TEST_SEED_START or pool == 0:
        return int(episode_seed)
    return int(episode_seed) % min(pool, TEST_SEED_START)


def rasterise(boxes: np.ndarray, parameters: RoomParameters) -> np.ndarray:
    """Return the occupancy (rows, columns) bool of boxes (B, 5): which cells have their centre in a box."""
    resolution = parameters.resolution
    rows, columns = round(parameters.height / resolution), round(parameters.width / resolution)
    occupancy = np.zeros((rows, columns), bool)
    for x, y, half_x, half_y, yaw in boxes[boxes[:, 2] > 0.0]:
        cosine, sine = np.cos(yaw), np.sin(yaw)
        extent_x = abs(cosine) * half_x + abs(sine) * half_y
        extent_y = abs(sine) * half_x + abs(cosine) * half_y
        left, right = _cells(x, extent_x, resolution, columns)
        low, high = _cells(y, extent_y, resolution, rows)
        offset_x = (np.arange(left, right) + 0.5) * resolution - x
        offset_y = ((np.arange(low, high) + 0.5) * resolution - y)[:, None]
        inside = np.abs(cosine * offset_x + sine * offset_y) <= half_x
        inside &= np.abs(cosine * offset_y - sine * offset_x) <= half_y
        occupancy[low:high, left:right] |= inside
    return occupancy


def distance_field(occupancy: np.ndarray, resolution: float) -> np.ndarray:
    """Return the exact Euclidean distance (rows, columns) float32 in metres to the nearest occupied cell's centre.

    The map's border counts as occupied just outside of it, so that the field is bounded in a world without obstacles.
    """
    padded = np.pad(occupancy, 1, constant_values=True)
    cells = cv2.distanceTransform((~padded).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return cells[1:-1, 1:-1] * np.float32(resolution)


def largest_component(mask: np.ndarray) -> np.ndarray:
    """Return the largest 4-connected part of ``mask`` (rows, columns) bool."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    if count <= 1:
        return np.zeros_like(mask)
    sizes = np.bincount(labels.ravel(), minlength=count)
    return labels == 1 + np.argmax(sizes[1:])


def _cells(centre: float, extent: float, resolution: float, count: int) -> tuple[int, int]:
    """Return the first and one past the last cell whose span touches ``centre`` ± ``extent``."""
    first = int(np.floor((centre - extent) / resolution))
    last = int(np.ceil((centre + extent) / resolution))
    return max(first, 0), min(last, count)


@dataclass
class _FloorPlan:
    """Walls and doors under construction."""

    walls: list[tuple[float, float, float, float]] = field(default_factory=list)
    """Boxes without yaw: (low x, high x, low y, high y)."""
    doors: list[tuple[float, float]] = field(default_factory=list)
    """Centres of door openings."""


def _rooms(parameters: RoomParameters, rng: np.random.Generator) -> np.ndarray:
    """Draw a floor of rooms: recursive bisection into rooms, doors in every inner wall, then furniture."""
    plan = _outer_walls(parameters)
    leaves = [(0.0, parameters.width, 0.0, parameters.height)]
    target = int(rng.integers(parameters.rooms[0], parameters.rooms[1] + 1))
    attempts = 0
    while len(leaves) < target and attempts < 30:
        attempts += 1
        areas = np.array([(right - left) * (high - low) for left, right, low, high in leaves])
        chosen = int(np.argmax(areas * rng.uniform(0.7, 1.0, len(areas))))
        halves = _split(leaves[chosen], plan, parameters, rng)
        if halves is not None:
            leaves[chosen : chosen + 1] = halves
    boxes: list[tuple[float, ...]] = [
        ((left + right) / 2, (low + high) / 2, (right - left) / 2, (high - low) / 2, 0.0)
        for left, right, low, high in plan.walls
    ]
    boxes += _furniture(plan, parameters, rng)
    result = np.zeros((parameters.boxes, 5))
    result[: len(boxes)] = boxes
    return result


def _outer_walls(parameters: RoomParameters) -> _FloorPlan:
    width, height, thickness = parameters.width, parameters.height, parameters.wall_thickness
    return _FloorPlan(
        [
            (0.0, width, 0.0, thickness),
            (0.0, width, height - thickness, height),
            (0.0, thickness, 0.0, height),
            (width - thickness, width, 0.0, height),
        ]
    )


Leaf = tuple[float, float, float, float]


def _split(leaf: Leaf, plan: _FloorPlan, parameters: RoomParameters, rng: np.random.Generator) -> list[Leaf] | None:
    """Cut a room (low x, high x, low y, high y) in two by a wall with one or two doors; None where it cannot be."""
    left, right, low, high = leaf
    vertical = bool(right - left > high - low)
    start, end = (left, right) if vertical else (low, high)
    wall_low, wall_high = (low, high) if vertical else (left, right)
    length = wall_high - wall_low
    smallest_room, largest_door = 2.0, parameters.door_width[1]
    if end - start < 2 * smallest_room or length < largest_door + 0.8:
        return None
    inset = max(smallest_room, 0.35 * (end - start))
    at = rng.uniform(start + inset, end - inset)
    # A wall must not end in the opening of a door of an older wall.
    for door in plan.doors:
        on_edge = min(abs(door[vertical] - wall_low), abs(door[vertical] - wall_high)) < 0.3
        if on_edge and abs(door[not vertical] - at) < largest_door / 2 + 0.35:
            return None
    half = parameters.wall_thickness / 2
    spans = [(wall_low, wall_high)]
    if length >= parameters.second_door_length:
        middle = (wall_low + wall_high) / 2
        spans = [(wall_low, middle), (middle, wall_high)]
    solid_from = wall_low
    for span_low, span_high in spans:
        opening = rng.uniform(*parameters.door_width)
        centre = rng.uniform(span_low + 0.3 + opening / 2, span_high - 0.3 - opening / 2)
        plan.walls.append(_wall(vertical, at, half, solid_from, centre - opening / 2))
        plan.doors.append((at, centre) if vertical else (centre, at))
        solid_from = centre + opening / 2
    plan.walls.append(_wall(vertical, at, half, solid_from, wall_high))
    if vertical:
        return [(left, at, low, high), (at, right, low, high)]
    return [(left, right, low, at), (left, right, at, high)]


def _wall(vertical: bool, at: float, half: float, start: float, end: float) -> Leaf:
    return (at - half, at + half, start, end) if vertical else (start, end, at - half, at + half)


def _furniture(plan: _FloorPlan, parameters: RoomParameters, rng: np.random.Generator) -> list[tuple[float, ...]]:
    """Draw boxes at any angle that keep away from doors; they may touch walls and each other."""
    pieces: list[tuple[float, ...]] = []
    doors = np.array(plan.doors).reshape(-1, 2)
    margin = parameters.wall_thickness
    for _ in range(int(rng.integers(parameters.furniture[0], parameters.furniture[1] + 1))):
        half_x, half_y = rng.uniform(*parameters.furniture_side, 2) / 2
        radius = float(np.hypot(half_x, half_y))
        for _ in range(20):
            x, y = rng.uniform([margin, margin], [parameters.width - margin, parameters.height - margin])
            to_doors = np.hypot(doors[:, 0] - x, doors[:, 1] - y)
            if (to_doors > radius + parameters.door_width[1] / 2).all():
                pieces.append((x, y, half_x, half_y, rng.uniform(-np.pi / 2, np.pi / 2)))
                break
    return pieces


FAMILIES: dict[str, Callable[[RoomParameters, np.random.Generator], np.ndarray]] = {"rooms": _rooms}
"""Generators by family name: (parameters, generator) → boxes (B, 5)."""

_FAMILY_KEYS = {"rooms": 1}
"""First word of each family's random stream; never change one, or its worlds change."""
