"""The expert of point-goal navigation: a planner with the full map that errs on purpose and recovers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sim.planner import smooth_reference
from sim.pursuit import PurePursuit, PursuitParameters, wrap_angle

if TYPE_CHECKING:
    from sim.tasks.navigate import Navigate


class PlannerExpert:
    """Follows a smooth path planned with the full map; with noise it errs in bursts and recovers from them.

    A perfect expert never shows what to do off the path. Now and then (every 4 s on average at noise 1) this one errs:
    half of the time it adds a random offset to its command for up to 1.5 s, half of the time it heads straight for the
    goal for up to 4 s, which is the mistake of whoever does not know the map. Then it is led back, and plans again
    where it has strayed. `label` gives what it should have done, so that demonstrations show recoveries, not errors.
    """

    def __init__(self, env: Navigate, noise: float, seed: int) -> None:
        """Read ``env``'s state; ``noise`` scales the rate of the errors and the offsets, ``seed`` decides them."""
        self.env, self.noise = env, noise
        _, high = env.spec.action.bounds()
        self._pursuit = PurePursuit(env.num_envs, PursuitParameters(speed=high[0], turn_rate=high[1]))
        self._rng = np.random.default_rng(seed)
        self._intended = np.zeros((env.num_envs, 2))
        self._planned_seed = np.full(env.num_envs, -1, np.int64)
        self._distance: np.ndarray | None = None
        self._offset = np.zeros((env.num_envs, 2))
        self._greedy = np.zeros(env.num_envs, bool)
        self._remaining = np.zeros(env.num_envs, np.int64)

    def act(self) -> np.ndarray:
        """Return actions (N, A) for the present state; plans for lanes whose episode has begun."""
        env = self.env
        fresh = (env.episode_seed != self._planned_seed) | (env.elapsed == 0)
        self._begin(np.flatnonzero(fresh))
        clearance = self._clearance(env.position)
        command, strayed = self._pursuit.act(env.position, env.heading, clearance)
        if (strayed > 0.25).any():
            self._plan(np.flatnonzero(strayed > 0.25))
            command, _ = self._pursuit.act(env.position, env.heading, clearance)
        self._intended = command
        return self._disturb(command) if self.noise > 0.0 else command

    def label(self) -> np.ndarray:
        """Return what the last `act` would have returned without noise (N, A): the actions to learn from."""
        return self._intended

    def _begin(self, lanes: np.ndarray) -> None:
        env = self.env
        if self._distance is None:
            self._distance = np.stack([found.world.distance for found in env.scenes])
        for lane in lanes:
            self._distance[lane] = env.scenes[lane].world.distance
        self._plan(lanes)
        self._planned_seed[:] = env.episode_seed
        self._remaining[lanes] = 0

    def _plan(self, lanes: np.ndarray) -> None:
        for lane in lanes:
            cost_to_go = self.env.scenes[lane].comfortable()
            self._pursuit.set_reference(lane, smooth_reference(cost_to_go, self.env.position[lane].copy()))

    def _disturb(self, command: np.ndarray) -> np.ndarray:
        """Return ``command`` (N, A) with the present errors, and begin new ones."""
        env, count = self.env, len(command)
        begin = (self._remaining <= 0) & (self._rng.random(count) < self.noise / (4.0 * env.spec.rate_hz))
        greedy = self._rng.random(count) < 0.5
        steps = np.where(greedy, self._rng.integers(10, 41, count), self._rng.integers(5, 16, count))
        offset = self._rng.normal(size=(count, 2)) * np.array([0.3, 1.5]) * min(self.noise, 1.5)
        self._offset[begin], self._greedy[begin], self._remaining[begin] = offset[begin], greedy[begin], steps[begin]
        # It errs, but comes to its senses before it hits something: a collision teaches nothing.
        ahead = env.position + 0.1 * np.stack([np.cos(env.heading), np.sin(env.heading)], axis=-1)
        clearance = self._clearance(ahead)
        self._remaining[clearance < 0.26] = 0
        wrong = np.where(self._greedy[:, None], self._straight_to_goal(), command + self._offset)
        wrong[:, 0] *= np.clip(clearance / self._pursuit.parameters.slow_clearance, 1 / 3, 1.0)
        active = self._remaining > 0
        self._remaining -= 1
        return np.where(active[:, None], wrong, command)

    def _straight_to_goal(self) -> np.ndarray:
        """Return actions (N, A) of someone who sees no walls."""
        env, parameters = self.env, self._pursuit.parameters
        offset = env.goal - env.position
        error = wrap_angle(np.arctan2(offset[:, 1], offset[:, 0]) - env.heading)
        turn = np.clip(parameters.turn_gain * error, -parameters.turn_rate, parameters.turn_rate)
        return np.stack([parameters.speed * np.clip(np.cos(error), 0.0, 1.0), turn], axis=-1)

    def _clearance(self, points: np.ndarray) -> np.ndarray:
        """Return (N,) metres from one point per lane (N, 2) to obstacles, from the lanes' distance fields."""
        assert self._distance is not None
        row, column = self.env.scenes[0].world.cell(points)
        return self._distance[np.arange(len(points)), row, column]
