"""The one chunk player: turns planned chunks into one action per control step, in evaluation and in deployment.

NumPy only, so that an onboard computer can run it against a remote policy.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from robot_rl.core.env import Observation
from robot_rl.core.policy import ActionChunk, Policy
from robot_rl.core.realtime import Commitment, RealTimeConfig, require_real_time


class History:
    """The last ``steps`` observations of N lanes; a lane that was reset repeats its first observation."""

    def __init__(self, steps: int, keys: tuple[str, ...]) -> None:
        self.steps, self.keys = steps, keys
        self._frames: Observation = {}

    def add(self, observation: Observation, fresh: np.ndarray) -> Observation:
        """Append ``observation`` (each (N, …)) and return the history (each (N, T, …)), oldest first.

        Args:
            observation: newest observation of every lane.
            fresh: (N,) bool, lanes whose episode starts with this observation.
        """
        for key in self.keys:
            new = observation[key]
            if key not in self._frames:
                self._frames[key] = np.repeat(new[:, None], self.steps, axis=1)
                continue
            frames = self._frames[key]
            frames[:, :-1] = frames[:, 1:]
            frames[:, -1] = new
            if fresh.any():
                frames[fresh] = new[fresh][:, None]
        return self._frames


class ChunkPlayer:
    """Plays chunks for N lanes, each with its own position.

    ``execute_steps`` actions of a chunk are played before a new one is due. A chunk that arrives late is entered at
    the number of actions consumed since its observation, never at an estimated latency.
    """

    def __init__(self, num_lanes: int, horizon: int, execute_steps: int, action_size: int) -> None:
        self.execute_steps = execute_steps
        self._chunks = np.zeros((num_lanes, horizon, action_size), np.float32)
        self._position = np.full(num_lanes, horizon, np.int64)
        self._horizon = horizon

    @property
    def due(self) -> np.ndarray:
        """(N,) bool: lanes that should plan from the present observation."""
        return self._position >= self.execute_steps

    @property
    def starved(self) -> np.ndarray:
        """(N,) bool: lanes that have no action left for the present step."""
        return self._position >= self._horizon

    @property
    def remaining(self) -> np.ndarray:
        """(N,) int: actions of each lane's chunk that were not played yet."""
        return np.maximum(self._horizon - self._position, 0)

    def push(self, lanes: np.ndarray, chunks: np.ndarray, consumed: int = 0) -> None:
        """Replace the chunks of ``lanes`` (n,) int or bool (N,) by ``chunks`` (n, H, A), entered at ``consumed``."""
        self._chunks[lanes] = chunks
        self._position[lanes] = consumed

    def peek(self) -> np.ndarray:
        """Return the rest of every lane's chunk (N, H, A), starting now and padded with its last action."""
        index = np.minimum(self._position[:, None] + np.arange(self._horizon), self._horizon - 1)
        return np.take_along_axis(self._chunks, index[..., None], axis=1)

    def pop(self) -> np.ndarray:
        """Return the action (N, A) of the present step and move on; call only where no lane is starved."""
        index = np.minimum(self._position, self._horizon - 1)
        actions = self._chunks[np.arange(len(index)), index]
        self._position += 1
        return actions

    def reset(self, lanes: np.ndarray) -> None:
        """Forget the chunks of ``lanes`` (bool (N,) or int), so that they are due."""
        self._position[lanes] = self._horizon


class Delays:
    """How many actions are executed while a chunk is planned: the most of the last ten times, counted and never timed.

    The action that plays when the chunk arrives counts too, for it has begun. Until something was counted, the
    ``largest`` number is expected.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._recent: deque[int] = deque(maxlen=10)

    def add(self, consumed: int) -> None:
        """Take in how many steps began between the observation and the arrival of its chunk."""
        self._recent.append(consumed + 1)

    @property
    def expected(self) -> int:
        """Actions to go on with while the next chunk is planned, at least 1 and at most ``largest``."""
        return min(max(self._recent, default=self.largest), self.largest)


class PolicyRunner:
    """Steps a policy through N lanes: history, planning when due, playing, and closed-loop correction.

    Evaluation, collection of fine-tuning data and the policy process of a robot all call `step`, which is what makes
    the same checkpoint and observations give the same actions everywhere. With ``real_time`` a new chunk goes on from
    what is left of the running one.
    """

    def __init__(self, policy: Policy, num_lanes: int, real_time: RealTimeConfig | None = None) -> None:
        self.real_time = real_time or RealTimeConfig()
        require_real_time(policy, self.real_time)
        self.policy = policy
        self.delays = Delays(self.real_time.max_delay)
        self.commitment: Commitment | None = None
        """What the last plan went on from; None if it began anew."""
        self.player = ChunkPlayer(num_lanes, policy.horizon, policy.execute_steps, policy.spec.action.size)
        self._history = History(policy.obs_steps, tuple(policy.spec.observation))
        self._fresh = np.ones(num_lanes, bool)
        self.planned = np.zeros(num_lanes, bool)
        """(N,) bool: lanes for which the last `step` planned a new chunk."""
        self.base_action = np.zeros((num_lanes, policy.spec.action.size), np.float32)
        """(N, A): what the last `step` would have done without the closed-loop correction."""

    def step(self, observation: Observation) -> np.ndarray:
        """Return the actions (N, A) to execute for ``observation`` (each (N, …))."""
        history = self._history.add(observation, self._fresh)
        self._fresh[:] = False
        self.planned = self.player.due.copy()
        if self.planned.any():
            self.player.push(self.planned, self._plan({k: v[self.planned] for k, v in history.items()}))
        self.base_action = self.player.pop()
        if not self.policy.closed_loop:
            return self.base_action
        return self.policy.refine(history, self.base_action)

    def pass_by(self, observation: Observation) -> None:
        """Take in an observation (each (N, …)) whose step is over already: nothing is planned from it."""
        self._history.add(observation, self._fresh)
        self._fresh[:] = False
        self.player.pop()

    def _plan(self, recent: Observation) -> np.ndarray:
        remaining = self.player.remaining[self.planned]
        self.commitment = None
        if self.real_time.method == "off" or not remaining.any():
            return self.policy.plan(recent)
        running = self.player.peek()[self.planned]
        self.commitment = Commitment(running, remaining, self.delays.expected, self.real_time)
        return self.policy.plan(recent, commitment=self.commitment)  # type: ignore[call-arg]

    def reset(self, lanes: np.ndarray) -> None:
        """Start new episodes in ``lanes`` (bool (N,)); their next observation is the first."""
        self.player.reset(lanes)
        self._fresh |= lanes

    def chunk(self, action: np.ndarray, seq: int, stamp: float) -> ActionChunk:
        """Return lane 0's executed ``action`` (A,) followed by the rest of its chunk, for a robot's executor."""
        rest = self.player.peek()[0]
        actions = np.concatenate([action[None], rest[:-1]])
        policy_actions = np.concatenate([self.base_action[:1], rest[:-1]])
        return ActionChunk(actions, seq, stamp, policy_actions)
