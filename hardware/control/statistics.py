"""Durations kept as a histogram of fixed size, however long a loop runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_LOWEST = 1e-6
_PER_DECADE = 40
_DECADES = 8


class Durations:
    """Durations in seconds in logarithmic bins of 6 % width between 1 µs and 100 s, with exact maximum and count."""

    def __init__(self) -> None:
        self.counts = np.zeros(_DECADES * _PER_DECADE + 1, np.int64)
        self.count = 0
        self.maximum = 0.0

    def add(self, seconds: float) -> None:
        """Add one duration; negative ones count as zero."""
        self.count += 1
        self.maximum = max(self.maximum, seconds)
        place = math.log10(seconds / _LOWEST) * _PER_DECADE if seconds > _LOWEST else 0.0
        self.counts[min(int(place), len(self.counts) - 1)] += 1

    def percentile(self, percent: float) -> float:
        """Return the upper edge of the bin that holds the percentile, in seconds; 0 if there is nothing."""
        if not self.count:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self.counts), percent / 100 * self.count))
        return min(float(_LOWEST * 10 ** ((place + 1) / _PER_DECADE)), self.maximum)

    def summary(self, name: str) -> dict[str, float]:
        """Return ``<name>_p50_ms``, ``<name>_p99_ms`` and ``<name>_max_ms``."""
        return {
            f"{name}_p50_ms": 1e3 * self.percentile(50),
            f"{name}_p99_ms": 1e3 * self.percentile(99),
            f"{name}_max_ms": 1e3 * self.maximum,
        }

    def to_json(self) -> dict[str, Any]:
        """Return count, percentiles in ms, and the occupied bins as (upper edges in ms, counts)."""
        occupied = np.flatnonzero(self.counts)
        edges = 1e3 * _LOWEST * 10 ** ((occupied + 1) / _PER_DECADE)
        return {
            "count": self.count,
            "p50_ms": 1e3 * self.percentile(50),
            "p99_ms": 1e3 * self.percentile(99),
            "max_ms": 1e3 * self.maximum,
            "bins_ms": [round(float(edge), 6) for edge in edges],
            "bin_counts": self.counts[occupied].tolist(),
        }
