"""Stage 7: a box and planes that a point of the robot must not leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from robot_rl.core.errors import ConfigError

Kinematics = Callable[[np.ndarray], np.ndarray]
"""Forward kinematics: commands (T, A) to positions (T, 3) in metres, in the workspace's frame."""


@dataclass(frozen=True)
class Workspace:
    """Where the tool may be. Without ``kinematics`` the first three elements of the action are its position."""

    low: np.ndarray | None = None
    """(3,) lowest corner of the box in metres; None for no box."""
    high: np.ndarray | None = None
    """(3,) highest corner of the box in metres."""
    planes: np.ndarray | None = None
    """(P, 4): rows (n, d) keep the positions x with n · x >= d; n is a unit vector, d in metres."""
    kinematics: Kinematics | None = None
    """Forward kinematics of actions that are not Cartesian."""

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ConfigError("a workspace box needs both corners, low and high")
        if self.planes is not None and np.shape(self.planes)[1:] != (4,):
            raise ConfigError(f"workspace planes have shape {np.shape(self.planes)}, expected (P, 4)")

    def excess(self, commands: np.ndarray, permitted: float = 0.0) -> float:
        """Return by how many metres the worst of ``commands`` (T, A) is outside; not positive if all are inside."""
        points = commands[:, :3] if self.kinematics is None else self.kinematics(commands)
        worst = -np.inf
        if self.low is not None and self.high is not None:
            worst = max(worst, float((self.low - points).max()), float((points - self.high).max()))
        if self.planes is not None and len(self.planes):
            worst = max(worst, float((self.planes[:, 3] - points @ self.planes[:, :3].T).max()))
        if np.isnan(worst):
            raise ValueError("forward kinematics returned a value that is not finite")
        return worst
