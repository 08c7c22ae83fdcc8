"""Success, return and length of the episodes that end while learning."""

from __future__ import annotations

from collections import deque

import numpy as np

from robot_rl.core.env import Step


class EpisodeStatistics:
    """Keeps the last ``window`` episodes of N lanes."""

    def __init__(self, num_lanes: int, window: int = 200) -> None:
        self._returns, self._lengths = np.zeros(num_lanes), np.zeros(num_lanes, np.int64)
        self._ended: deque[tuple[bool, float, int]] = deque(maxlen=window)
        self.total = 0
        """Episodes that have ended."""

    def add(self, step: Step) -> None:
        """Take in one control step of all lanes."""
        self._returns += step.reward
        self._lengths += 1
        done = step.done
        if not done.any():
            return
        success = step.info.get("success", np.zeros(len(done), bool))
        for lane in np.flatnonzero(done):
            self._ended.append((bool(success[lane]), float(self._returns[lane]), int(self._lengths[lane])))
        self.total += int(done.sum())
        self._returns[done], self._lengths[done] = 0, 0

    @property
    def last_return(self) -> float:
        """Undiscounted return of the episode that ended last."""
        return self._ended[-1][1]

    def recent(self) -> dict[str, float]:
        """Return mean ``success``, ``return`` and ``length`` of the latest episodes, and how many ended in all."""
        if not self._ended:
            return {"episodes": 0.0}
        success, returns, lengths = (float(np.mean(column)) for column in zip(*self._ended, strict=True))
        return {"success": success, "return": returns, "length": lengths, "episodes": float(self.total)}
