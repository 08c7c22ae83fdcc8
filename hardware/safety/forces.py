"""Stage 10: limits of measured forces, torques and currents."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robot_rl.core.errors import ConfigError, UnknownNameError
from robot_rl.core.spec import Spec

logger = logging.getLogger(__name__)
_GROWTH = 1.1
"""By which factor a reading that led to a stop must have grown to stop the robot again before it has been below."""


@dataclass(frozen=True)
class ForceLimit:
    """One limit on elements of an observation."""

    key: str
    """Observation that holds the readings."""
    limit: float
    """Largest permitted reading, in the observation's unit; its magnitude counts."""
    names: tuple[str, ...] = ()
    """Names of the elements, as in the robot's spec; empty for all of them."""
    norm: bool = False
    """Whether the elements are a vector whose length is limited, instead of each by itself."""
    dwell: float = 0.0
    """Seconds for which the limit must be exceeded: longer than a bump that the robot may withstand."""


class ForceMonitor:
    """Watches the readings. A reading above its limit for its dwell stops the robot, once.

    After that it stops it again when the reading has been below the limit in between, or has grown by another tenth: so
    that an operator can, after a reset, lead the robot away from what it presses against.
    """

    def __init__(self, limits: Sequence[ForceLimit], spec: Spec, dt: float) -> None:
        """Find the elements.

        Raises:
            UnknownNameError: the robot does not observe that key or element.
            ConfigError: a limit or a dwell is not a positive number.
        """
        self.limits = tuple(limits)
        self._elements = [_elements(one, spec) for one in self.limits]
        self._ticks = [max(1, round(one.dwell / dt)) for one in self.limits]
        self._above = [0] * len(self.limits)
        self._tolerated = [one.limit for one in self.limits]

    def exceeded(self, values: Mapping[str, np.ndarray]) -> bool:
        """Take one tick's readings and return whether a limit is exceeded now; the log says which."""
        found = False
        for k, one in enumerate(self.limits):
            readings = values[one.key].ravel()[self._elements[k]]
            reading = math.sqrt(float(readings @ readings)) if one.norm else float(np.abs(readings).max())
            if reading <= one.limit:
                self._above[k], self._tolerated[k] = 0, one.limit
                continue
            self._above[k] = self._above[k] + 1 if reading > self._tolerated[k] else 0
            if self._above[k] >= self._ticks[k]:
                what = f"'{one.key}' {' '.join(one.names)}".rstrip()
                logger.warning("safety: %s is %.4g, above its limit of %.4g", what, reading, one.limit)
                self._above[k], self._tolerated[k] = 0, _GROWTH * reading
                found = True
        return found


def _elements(limit: ForceLimit, spec: Spec) -> np.ndarray:
    """Return the indices of the elements that ``limit`` names."""
    if limit.key not in spec.observation:
        raise UnknownNameError("observation", limit.key, spec.observation)
    if not limit.limit > 0 or limit.dwell < 0:
        raise ConfigError(f"the limit on '{limit.key}' needs a positive limit and a dwell of at least 0 s")
    array = spec.observation[limit.key]
    if not limit.names:
        return np.arange(array.size)
    for name in limit.names:
        if name not in array.names:
            raise UnknownNameError(f"element of '{limit.key}'", name, array.names)
    return np.array([array.names.index(name) for name in limit.names])
