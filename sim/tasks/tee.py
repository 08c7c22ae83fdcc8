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


_KX, _KY = KEYPOINTS.T.copy()
_LOW, _HIGH = RECTANGLES[:, :2].T.reshape(2, 1, 2, 1), RECTANGLES[:, 2:].T.reshape(2, 1, 2, 1)
_HEIGHT = _HIGH[1] - _LOW[1]
_NEXT = np.array([1, 2, 3, 0, 5, 6, 7, 4])
"""The corner that follows each corner round bar and stem, counter-clockwise in the block's frame."""


def rotate(points: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rotate points (K, 2) by each angle (N,) in radians; returns (N, K, 2)."""
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x, y = points[:, 0], points[:, 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


def keypoints(pose: np.ndarray) -> np.ndarray:
    """Return the keypoints (N, 8, 2) in the arena of blocks at poses (N, 3)."""
    cos, sin = np.cos(pose[:, 2])[:, None], np.sin(pose[:, 2])[:, None]
    points = np.empty((len(pose), 8, 2))
    points[..., 0] = cos * _KX - sin * _KY + pose[:, :1]
    points[..., 1] = sin * _KX + cos * _KY + pose[:, 1:2]
    return points


def coverage(corners: np.ndarray, goal: tuple[float, float, float] = GOAL_POSE) -> np.ndarray:
    """Return the share (N,) of the goal's area that blocks with keypoints ``corners`` (N, 8, 2) cover, in [0, 1].

    Exact: in the goal's frame the goal is two axis-aligned rectangles, and the area of a polygon inside
    ``[x0, x1] x [y0, y1]`` is, by Green's theorem, the sum over its edges of the integral of ``clamp(y, y0, y1) - y0``
    over the part of the edge with x in ``[x0, x1]``. Unlike clipping it has no special case for touching edges.
    """
    cos, sin = np.cos(goal[2]), np.sin(goal[2])
    dx, dy = corners[..., 0] - goal[0], corners[..., 1] - goal[1]
    area = _area_inside(cos * dx + sin * dy, cos * dy - sin * dx)
    return np.minimum(np.maximum(area * (1.0 / AREA), 0.0), 1.0)


def _area_inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the area (N,) inside `RECTANGLES` of bars and stems with corners ``x`` and ``y``, each (N, 8)."""
    n = len(x)
    next_x, next_y = x.take(_NEXT, axis=1), y.take(_NEXT, axis=1)
    dx = next_x - x
    # An edge along y has no area below it; its slope does not matter.
    dx[np.abs(dx) < 1e-12] = np.inf
    slope = (next_y - y) / dx
    ends = np.empty((2, n, 2, 8))
    ends[0], ends[1] = x[:, None], next_x[:, None]
    np.minimum(np.maximum(ends, _LOW[0], out=ends), _HIGH[0], out=ends)
    # Heights (2, N, 2, 8) of the clipped edges' two ends above the rectangles' lower sides.
    heights = ends * slope[:, None]
    heights += (y - slope * x)[:, None] - _LOW[1]
    clamped = np.maximum(heights, 0.0)
    np.minimum(clamped, _HEIGHT, out=clamped)
    rise = heights[1] - heights[0]
    # The integral of clamp(t, 0, height) over t from 0 to each end.
    heights -= 0.5 * clamped
    heights *= clamped
    flat = np.abs(rise) < 1e-6
    rise[flat] = 1.0
    mean = (heights[1] - heights[0]) / rise
    np.copyto(mean, clamped[0], where=flat)
    # Counter-clockwise polygons run right to left along their top: the sum is negative.
    mean *= ends[0] - ends[1]
    return mean.reshape(n, 16).sum(axis=1)
