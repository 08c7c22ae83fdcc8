"""Plays the policy's chunks at the control rate: which action is due now, by count of steps and never by guesswork.

The executor numbers policy steps; an observation is sent with its step, and the chunk that comes back says for which
step its first action is meant. A chunk that arrives late is entered at the number of steps consumed since. This uses
the same `ChunkPlayer` as evaluation.
"""

from __future__ import annotations

import numpy as np

from robot_rl.core.errors import ConfigError
from robot_rl.core.policy import ActionChunk
from robot_rl.rollout.player import ChunkPlayer

FLUSH_GAP = 1000
"""Steps by which the count jumps when the queue is flushed: more than any horizon, so that the policy plans anew."""
_LANE = np.zeros(1, np.int64)
_ROUNDING = 1e-6
"""Seconds by which a stamp may change on its way through messages."""


class Playback:
    """One robot's queue of planned actions.

    ``execute_steps`` actions of a chunk are due before the next chunk should be there (1 for a policy that corrects
    its actions at every step), and ``late_steps`` more may be played if it is late; then the policy is `starved`.
    """

    def __init__(
        self, action_size: int, ticks_per_step: int, execute_steps: int, late_steps: int, interpolation: str
    ) -> None:
        if interpolation not in ("hold", "linear"):
            raise ConfigError(f"interpolation must be 'hold' or 'linear', got '{interpolation}'")
        if execute_steps < 1 or late_steps < 0 or ticks_per_step < 1:
            raise ConfigError("execute_steps and ticks_per_step must be at least 1, late_steps at least 0")
        self.step = -1
        """Number of the present policy step."""
        self.stamp = -np.inf
        """Monotonic time of the observation behind the present action."""
        self._size, self._ticks, self._linear = action_size, ticks_per_step, interpolation == "linear"
        self._playable = execute_steps + late_steps
        self._player: ChunkPlayer | None = None
        self._length = 0
        self._chunk_step = -1
        self._since = -np.inf
        self._action: np.ndarray | None = None
        self._before = np.zeros(action_size)
        self._start_tick = 0

    def advance(self) -> None:
        """Go to the next policy step."""
        if self._player is not None and self._action is None and not self.starved:
            self._player.pop()
        self.step += 1
        self._action, self._start_tick = None, 0

    def flush(self, now: float, restart: bool) -> None:
        """Forget all chunks and refuse those from observations before ``now``.

        ``restart`` begins a new episode (the policy forgets its history); otherwise the count of steps jumps, so that
        the policy plans anew from the history it has. Either takes effect with the present step's observation.
        """
        self.step = 0 if restart else self.step + FLUSH_GAP
        self._since, self._player, self._action = now, None, None

    @property
    def starved(self) -> bool:
        """Whether no action may be played in the present step."""
        return self._player is None or self.step - self._chunk_step >= min(self._playable, self._length)

    def accept(self, chunk: ActionChunk, tick: int) -> str:
        """Take a chunk in and return ``""``, or the reason for which it is discarded.

        Args:
            chunk: what the policy sent.
            tick: ticks since the beginning of the present step; a change within the step is interpolated from there.
        """
        actions = np.asarray(chunk.actions)
        if actions.ndim != 2 or actions.shape[1] != self._size or not len(actions) or actions.dtype.kind != "f":
            return "malformed"
        if chunk.observation_stamp < self._since - _ROUNDING or chunk.observation_seq > self.step:
            return "flushed"
        consumed = self.step - chunk.observation_seq
        if consumed >= min(len(actions), self._playable):
            return "late"
        if self._player is not None and chunk.observation_seq <= self._chunk_step:
            return "out_of_order"
        if self._player is None or len(actions) != self._length:
            self._length = len(actions)
            self._player = ChunkPlayer(1, self._length, self._playable, self._size)
        self._player.push(_LANE, actions[None], consumed)
        self._chunk_step, self.stamp = chunk.observation_seq, chunk.observation_stamp
        self._action, self._start_tick = None, tick
        return ""

    def action(self) -> np.ndarray | None:
        """Return the action (A,) of the present step, None if the policy is starved."""
        if self._action is None and not self.starved and self._player is not None:
            self._action = self._player.pop()[0].copy()
        return self._action

    def target(self, tick: int, command: np.ndarray) -> np.ndarray | None:
        """Return the command (A,) wanted at ``tick`` of the present step, None if the policy is starved.

        At the last tick of a step it is the action itself. Until then it is held, or interpolated linearly from
        ``command`` (A,), the last one sent, as of the tick on which the action became known.
        """
        action = self.action()
        if action is None or not self._linear:
            return action
        if tick <= self._start_tick:
            self._start_tick, self._before = tick, np.array(command, float)
        if tick >= self._ticks - 1:
            return action
        share = (tick - self._start_tick + 1) / (self._ticks - self._start_tick)
        return self._before + share * (action - self._before)
