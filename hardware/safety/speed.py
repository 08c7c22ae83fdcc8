"""The speed of points of the robot: a profile such as ``manual_reduced`` bounds it for the tool and the elbows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from robot_rl.core.errors import ConfigError

MANUAL_REDUCED = 0.25
"""Speed in m/s of the tool and the elbows while somebody may stand beside the robot, after ISO 10218-1."""
_ROUNDING = 1e-9
"""Share of the limit that counts as rounding."""


class PointSpeed:
    """Bounds how fast points move from one command to the next."""

    def __init__(self, limit: float, dt: float, positions: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
        """Set the limit.

        Args:
            limit: speed in m/s.
            dt: seconds between commands.
            positions: where the points are, (T, P, 3) in metres, at commands (T, A); without it the first three
                elements of a command are the position of the only point.

        Raises:
            ConfigError: the limit is not positive.
        """
        if not limit > 0:
            raise ConfigError(f"a speed limit must be positive, got {limit:g} m/s")
        self.limit, self._step, self._positions = limit, limit * dt, positions
        self.start = np.zeros(0)
        """(A,) the command before the path that is judged."""

    def share(self, position: np.ndarray, command: np.ndarray) -> float:
        """Return which share of the motion from ``position`` (A,) to ``command`` (A,) is permitted, in (0, 1]."""
        largest = float(self._steps(np.stack([position, command])).max())
        return 1.0 if largest <= self._step * (1 + _ROUNDING) else self._step / largest

    def excess(self, commands: np.ndarray, permitted: float = 0.0) -> float:
        """Return by how many metres per tick a point is too fast on the way through ``commands`` (T, A)."""
        largest = float(self._steps(np.concatenate([self.start[None], commands])).max())
        if not np.isfinite(largest):
            raise ValueError("forward kinematics returned a value that is not finite")
        return largest - self._step * (1 + _ROUNDING)

    def _steps(self, commands: np.ndarray) -> np.ndarray:
        """Return how far each point goes from each command to the next (T - 1, P)."""
        places = commands[:, None, :3] if self._positions is None else self._positions(commands)
        steps: np.ndarray = np.linalg.norm(np.diff(places, axis=0), axis=-1)
        return steps
