"""Pure pursuit: a differential drive follows a reference, in many lanes at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim.planner import path_length


@dataclass(frozen=True)
class PursuitParameters:
    """Pure pursuit for a differential drive, slower near the goal and near obstacles (as Nav2's regulated variant)."""

    speed: float = 0.6
    """Cruising speed in m/s."""
    turn_rate: float = 1.8
    """Largest turn rate in rad/s."""
    lookahead: float = 0.5
    """Distance of the pursued point along the reference in metres."""
    turn_gain: float = 2.5
    """Turn rate per heading error, 1/s."""
    slow_radius: float = 0.5
    """Distance to the goal in metres below which the speed falls linearly, to a third at the goal."""
    slow_clearance: float = 0.5
    """Distance from the base's centre to obstacles in metres below which the speed falls in proportion to it."""


class PurePursuit:
    """Follows one reference per lane: turns to a point ahead on the reference, and drives as far as it faces it."""

    def __init__(self, num_lanes: int, parameters: PursuitParameters, capacity: int = 2048) -> None:
        self.parameters = parameters
        self.points = np.zeros((num_lanes, capacity, 2))
        """(N, P, 2) m: the references; each is padded with its last point."""
        self.last = np.zeros(num_lanes, np.int64)
        """(N,) index of the last point of each reference."""
        self.nearest = np.zeros(num_lanes, np.int64)
        """(N,) index of the point that the lane has come to; never falls."""
        self._spacing = np.full(num_lanes, 0.05)

    def set_reference(self, lane: int, reference: np.ndarray) -> None:
        """Follow ``reference`` (K, 2), points at equal distances, in ``lane`` from its start."""
        count = min(len(reference), self.points.shape[1])
        self.points[lane, :count] = reference[:count]
        self.points[lane, count:] = reference[count - 1]
        self.last[lane], self.nearest[lane] = count - 1, 0
        self._spacing[lane] = max(path_length(reference) / max(len(reference) - 1, 1), 1e-6)

    def act(
        self, position: np.ndarray, heading: np.ndarray, clearance: np.ndarray | float = np.inf
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return commands (N, 2) of (m/s, rad/s) and the distance (N,) in metres from each lane to its reference.

        Args:
            position: (N, 2) m.
            heading: (N,) rad.
            clearance: (N,) metres from the base's centre to obstacles.
        """
        parameters, lanes = self.parameters, np.arange(len(heading))
        window = np.minimum(self.nearest[:, None] + np.arange(24), self.last[:, None])
        offset = self.points[lanes[:, None], window] - position[:, None]
        distance = np.hypot(offset[..., 0], offset[..., 1])
        best = distance.argmin(axis=1)
        self.nearest = window[lanes, best]
        ahead = self.nearest + np.round(parameters.lookahead / self._spacing).astype(np.int64)
        target = self.points[lanes, np.minimum(ahead, self.last)] - position
        error = wrap_angle(np.arctan2(target[:, 1], target[:, 0]) - heading)
        to_goal = np.hypot(*(self.points[lanes, self.last] - position).T)
        slow = np.clip(to_goal / parameters.slow_radius, 1 / 3, 1.0)
        slow = np.minimum(slow, np.clip(clearance / parameters.slow_clearance, 1 / 3, 1.0))
        # Facing more than 60 degrees away it turns on the spot.
        speed = parameters.speed * slow * np.clip((np.cos(error) - 0.5) / 0.45, 0.0, 1.0)
        turn = np.clip(parameters.turn_gain * error, -parameters.turn_rate, parameters.turn_rate)
        return np.stack([speed, turn], axis=-1), distance[lanes, best]


def wrap_angle(angle: np.ndarray) -> np.ndarray:
    """Return ``angle`` in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi
