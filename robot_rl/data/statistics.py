"""Statistics per episode and over all episodes, with the names and shapes that LeRobot gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Statistics = dict[str, np.ndarray]
"""``min``, ``max``, ``mean``, ``std`` of the shape of one sample, and ``count`` (1,)."""

PARTS = ("min", "max", "mean", "std", "count")
_IMAGE_SIDE = 150


def measure(values: np.ndarray) -> Statistics:
    """Return the statistics of ``values`` (T, …) over frames; a scalar column (T,) counts as (T, 1)."""
    values = values[:, None] if values.ndim == 1 else values
    numbers = values.astype(np.float64)
    keep = bool if values.dtype == bool else np.int64 if values.dtype.kind in "iu" else np.float64
    return {
        "min": values.min(axis=0).astype(keep),
        "max": values.max(axis=0).astype(keep),
        "mean": numbers.mean(axis=0),
        "std": numbers.std(axis=0),
        "count": np.array([len(values)], np.int64),
    }


class ImageStatistics:
    """Statistics per colour channel, scaled to [0, 1], over the coarsened images of one episode."""

    def __init__(self) -> None:
        self._count = self._pixels = 0
        self._low, self._high = np.full(3, 255), np.zeros(3, int)
        self._sum, self._squares = np.zeros(3), np.zeros(3)

    def add(self, image: np.ndarray) -> None:
        """Take in one image (H, W, 3) uint8."""
        step = max(1, max(image.shape[:2]) // _IMAGE_SIDE)
        pixels = image[::step, ::step].reshape(-1, 3)
        self._count, self._pixels = self._count + 1, self._pixels + len(pixels)
        self._low, self._high = np.minimum(self._low, pixels.min(axis=0)), np.maximum(self._high, pixels.max(axis=0))
        wide = pixels.astype(np.float32)
        self._sum += wide.sum(axis=0, dtype=np.float64)
        self._squares += np.einsum("pc,pc->c", wide, wide, dtype=np.float64)

    def result(self) -> Statistics:
        """Return the statistics, each (3, 1, 1), and ``count`` (1,), the number of images."""
        mean = self._sum / self._pixels
        deviation = np.sqrt(np.maximum(self._squares / self._pixels - mean**2, 0.0))
        parts = {"min": self._low, "max": self._high, "mean": mean, "std": deviation}
        scaled = {name: (part / 255.0).reshape(3, 1, 1) for name, part in parts.items()}
        return {**scaled, "count": np.array([self._count], np.int64)}


def merge(left: Statistics | None, right: Statistics) -> Statistics:
    """Return the statistics of two disjoint sets of frames together (parallel variance, Chan et al. 1979)."""
    if left is None:
        return right
    n, m = float(left["count"][0]), float(right["count"][0])
    total = n + m
    delta = right["mean"] - left["mean"]
    variance = (n * left["std"] ** 2 + m * right["std"] ** 2) / total + delta**2 * n * m / total**2
    return {
        "min": np.minimum(left["min"], right["min"]),
        "max": np.maximum(left["max"], right["max"]),
        "mean": left["mean"] + delta * m / total,
        "std": np.sqrt(variance),
        "count": left["count"] + right["count"],
    }


def to_json(statistics: Mapping[str, Statistics]) -> dict[str, Any]:
    """Return the content of ``meta/stats.json``."""
    return {name: {part: found[part].tolist() for part in PARTS} for name, found in statistics.items()}


def from_row(row: Mapping[str, Any], names: list[str]) -> dict[str, Statistics]:
    """Return the statistics of one row of ``meta/episodes``."""
    return {name: {part: np.asarray(row[f"stats/{name}/{part}"]) for part in PARTS} for name in names}
