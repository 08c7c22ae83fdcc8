"""Geometry of the Push-T block: corners, keypoints, exact coverage of the goal. Lengths are in pixels of the arena.

The numbers are those of Diffusion Policy's environment (arXiv 2303.04137) as gym_pusht publishes them: a bar of 120 by
30 px and a stem of 30 by 90 px. The block's pose is (x, y, angle) of its origin, the middle of the bar's outer edge.
"""

from __future__ import annotations

import numpy as np

ARENA = 512.0
"""Side of the square arena in pixels."""
PIXEL = 0.001
"""Metres per pixel in our simulation."""
GOAL_POSE = (256.0, 256.0, np.pi / 4)
"""Goal pose of the block: x, y in pixels and angle in radians."""
CENTER_OF_MASS = np.array([0.0, 45.0])
"""Centre of mass in the block's frame in pixels."""
KEYPOINTS = np.array([[-60, 0], [60, 0], [60, 30], [-60, 30], [-15, 30], [15, 30], [15, 120], [-15, 120]], dtype=float)
"""(8, 2) corners of bar and stem in the block's frame, in the order of gym_pusht's ``environment_state``."""
RECTANGLES = np.array([[-60.0, 0.0, 60.0, 30.0], [-15.0, 30.0, 15.0, 120.0]])
"""(2, 4) bar and stem as (low x, low y, high x, high y) in the block's frame."""
AREA = 120.0 * 30.0 + 30.0 * 90.0
"""Area of the block in square pixels."""


def rotate(points: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rotate points (K, 2) by each angle (N,) in radians; returns (N, K, 2)."""
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x, y = points[:, 0], points[:, 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


def keypoints(pose: np.ndarray) -> np.ndarray:
    """Return the keypoints (N, 8, 2) in the arena of blocks at poses (N, 3)."""
    return rotate(KEYPOINTS, pose[:, 2]) + pose[:, None, :2]


def coverage(pose: np.ndarray, goal: tuple[float, float, float] = GOAL_POSE) -> np.ndarray:
    """Return the share (N,) of the goal's area that blocks at poses (N, 3) cover, in [0, 1].

    Exact: in the goal's frame the goal is two axis-aligned rectangles, and the area of a polygon inside
    ``[x0, x1] x [y0, y1]`` is, by Green's theorem, the sum over its edges of the integral of ``clamp(y, y0, y1) - y0``
    over the part of the edge with x in ``[x0, x1]``. Unlike clipping it has no special case for touching edges.
    """
    cos, sin = np.cos(goal[2]), np.sin(goal[2])
    dx, dy = pose[:, 0] - goal[0], pose[:, 1] - goal[1]
    origin = np.stack([cos * dx + sin * dy, cos * dy - sin * dx], axis=-1)
    corners = rotate(KEYPOINTS, pose[:, 2] - goal[2]) + origin[:, None]
    rings = corners[:, _ORDER]
    return np.clip(_area_inside(rings, np.roll(rings, -1, axis=2)) / AREA, 0.0, 1.0)


_ORDER = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
"""Keypoints of bar and stem, each counter-clockwise in the block's frame."""


def _area_inside(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return the area (N,) inside `RECTANGLES` of polygons given by edges from ``start`` to ``end`` (N, 2, 4, 2)."""
    n = len(start)
    start, end = start.reshape(n, 1, 8, 2), end.reshape(n, 1, 8, 2)
    x0, y0, x1, y1 = (RECTANGLES[:, i].reshape(1, 2, 1) for i in range(4))
    ax, ay, bx, by = start[..., 0], start[..., 1], end[..., 0], end[..., 1]
    dx = bx - ax
    slope = (by - ay) / np.where(np.abs(dx) < 1e-12, np.inf, dx)
    left, right = np.clip(ax, x0, x1), np.clip(bx, x0, x1)
    low, high = ay + slope * (left - ax) - y0, ay + slope * (right - ax) - y0
    height = y1 - y0
    rise = high - low
    flat = np.abs(rise) < 1e-6
    mean = (_ramp(high, height) - _ramp(low, height)) / np.where(flat, 1.0, rise)
    mean = np.where(flat, np.clip(0.5 * (low + high), 0.0, height), mean)
    # Counter-clockwise polygons run right to left along their top: the sum is negative.
    return -((right - left) * mean).reshape(n, 16).sum(axis=1)


def _ramp(y: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Return the integral of ``clamp(t, 0, height)`` over t from 0 to ``y``, elementwise."""
    inside = np.clip(y, 0.0, height)
    return inside * (y - 0.5 * inside)
