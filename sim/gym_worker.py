"""Lanes of a Gymnasium environment, in this process or in worker processes.

A worker is a fresh interpreter that runs `serve` and talks over a socket pair, so that it depends neither on
``fork`` nor on how the user's script starts, and ends when its parent does.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from robot_rl.core import errors
from robot_rl.core.env import Observation
from robot_rl.core.errors import RobotRLError
from robot_rl.core.spec import Spec
from sim.gym_spaces import (
    action_spec,
    array_spec,
    array_type,
    control_rate,
    descend,
    make_gymnasium,
    observation_keys,
)

_SUCCESS_KEYS = ("is_success", "success")
_NO_LIMIT = 1_000_000
"""Time limit reported for environments that have none."""
_MEASURES: dict[str, Callable[[Any], dict[str, float]]] = {
    "AdroitHandDoor": lambda env: {"door_angle": float(env.data.joint("door_hinge").qpos[0])}
}
"""Further values for `Step.info`, by the start of the id."""


@dataclass(frozen=True)
class Description:
    """What a group of lanes tells about its environment before the first reset."""

    spec: Spec
    max_episode_steps: int
    info_keys: tuple[str, ...]


@dataclass
class GroupStep:
    """One control step of a group of lanes; arrays as in `robot_rl.core.env.Step`."""

    observation: Observation
    final_observation: Observation
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    info: dict[str, np.ndarray]


class LaneGroup:
    """Some lanes of one Gymnasium environment, stepped one after the other.

    With ``reward="sparse"`` the reward is 1 on the step of the first success, which also ends the episode. A control
    step of ours is ``hold`` steps of the environment, whose actions run on a line from the command before to the
    present one; their rewards are summed.
    """

    def __init__(self, env_id: str, lanes: int, reward: str, hold: int, options: Mapping[str, Any]) -> None:
        self._envs = [make_gymnasium(env_id, options) for _ in range(lanes)]
        self._sparse, self._hold = reward == "sparse", hold
        self._measure = next((f for name, f in _MEASURES.items() if env_id.startswith(name)), None)
        env = self._envs[0]
        self._action_space = env.action_space
        self._keys = observation_keys(env_id, env.observation_space)
        spec = Spec(
            {key: array_spec(space) for key, (_, space) in self._keys.items()},
            action_spec(env_id, env.action_space),
            control_rate(env) / hold,
        )
        limit = math.ceil((env.spec.max_episode_steps or _NO_LIMIT) / hold)
        self.description = Description(spec, limit, self._probe_info(env))
        self._succeeded = np.zeros(lanes, bool)
        self._command: list[np.ndarray | None] = [None] * lanes
        self._renderer: Any = None

    def reset(self, seeds: np.ndarray) -> Observation:
        """Start the episodes with these seeds, one per lane."""
        self._succeeded[:] = False
        self._command = [None] * len(self._envs)
        return self._stack([env.reset(seed=int(seed))[0] for env, seed in zip(self._envs, seeds, strict=True)])

    def step(self, actions: np.ndarray, next_seeds: np.ndarray) -> GroupStep:
        """Step every lane; one that ends starts the episode with its seed of ``next_seeds``."""
        n = len(self._envs)
        reward, ends = np.zeros(n, np.float32), np.zeros((2, n), bool)
        info = {key: np.full(n, np.nan) for key in self.description.info_keys}
        finals, nexts = [], []
        for lane, env in enumerate(self._envs):
            for action in self._actions(lane, actions[lane]):
                observation, value, terminated, truncated, extra = env.step(action)
                extra = self._all_info(env, extra)
                first = any(extra.get(key, 0.0) > 0 for key in _SUCCESS_KEYS) and not self._succeeded[lane]
                self._succeeded[lane] |= first
                if self._sparse:
                    value, terminated = float(first), terminated or first
                reward[lane] += value
                if terminated or truncated:
                    break
            for key in info:
                info[key][lane] = extra.get(key, np.nan)
            ends[:, lane] = terminated, truncated and not terminated
            finals.append(observation)
            nexts.append(observation)
        success = self._succeeded.copy()
        for lane in np.flatnonzero(ends.any(axis=0)):
            nexts[lane], _ = self._envs[lane].reset(seed=int(next_seeds[lane]))
            self._succeeded[lane], self._command[lane] = False, None
        return GroupStep(self._stack(nexts), self._stack(finals), reward, ends[0], ends[1], success, info)

    def _actions(self, lane: int, command: np.ndarray) -> np.ndarray:
        """Return the ``hold`` actions that lead to ``command`` (A,); an episode's first command is held throughout."""
        before = self._command[lane]
        self._command[lane] = command.copy()
        start = command if before is None else before
        part = np.arange(1, self._hold + 1)[:, None] / self._hold
        # Written so that the last action is the command to the bit.
        return ((1 - part) * start + part * command).astype(self._action_space.dtype)

    def render(self, lane: int) -> np.ndarray:
        """Return an RGB frame of one lane; MuJoCo models are ray traced, which needs no display."""
        env = self._envs[lane].unwrapped
        model, data = getattr(env, "model", None), getattr(env, "data", None)
        if getattr(model, "ncam", 0) and data is not None:
            from sim.render import Renderer

            if self._renderer is None:
                self._renderer = Renderer(model)
            return self._renderer.render_data(data)
        return np.asarray(self._envs[lane].render(), np.uint8)

    def close(self) -> None:
        """Close every lane."""
        for env in self._envs:
            env.close()

    def _probe_info(self, env: Any) -> tuple[str, ...]:
        env.reset(seed=0)
        action = np.clip(np.zeros(env.action_space.shape), env.action_space.low, env.action_space.high)
        extra = env.step(action.astype(env.action_space.dtype))[-1]
        return tuple(sorted(self._all_info(env, extra)))

    def _all_info(self, env: Any, extra: Mapping[str, Any]) -> dict[str, float]:
        """Return the numbers among an environment's info, as floats."""
        found = {k: float(v) for k, v in extra.items() if np.ndim(v) == 0 and isinstance(v, (int, float, np.generic))}
        return found | self._measure(env.unwrapped) if self._measure else found

    def _stack(self, observations: list[Any]) -> Observation:
        return {
            key: np.array([descend(o, path) for o in observations], array_type(space))
            for key, (path, space) in self._keys.items()
        }


class WorkerGroup:
    """A `LaneGroup` in its own process; `send` and `receive` let several groups work at once."""

    def __init__(self, env_id: str, lanes: int, reward: str, hold: int, options: Mapping[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._name = f"worker process of 'gym:{env_id}'"
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from sim.gym_worker import serve; serve({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._finalizer = weakref.finalize(self, _shut_down, self._connection, self._process)
        self.send("make", env_id, lanes, reward, hold, dict(options))

    def send(self, command: str, *arguments: Any) -> None:
        """Ask for ``command``, a method of `LaneGroup`."""
        try:
            self._connection.send((command, arguments))
        except OSError as error:
            raise self._gone() from error

    def receive(self) -> Any:
        """Wait for the answer to the oldest request; raises `RobotRLError` if the worker failed or ended."""
        try:
            failure, answer = self._connection.recv()
        except (EOFError, OSError) as problem:
            raise self._gone() from problem
        if failure is not None:
            kind = getattr(errors, failure)
            error = kind.__new__(kind)
            RobotRLError.__init__(error, answer)
            raise error
        return answer

    def close(self) -> None:
        """End the process."""
        self._finalizer()

    def _gone(self) -> RobotRLError:
        code = self._process.wait(timeout=5)
        cause = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return RobotRLError(f"the {self._name} ended unexpectedly, {cause}")


def _shut_down(connection: Connection, process: subprocess.Popen[bytes]) -> None:
    connection.close()
    try:
        process.wait(timeout=3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def serve(descriptor: int) -> None:
    """Answer requests that arrive at the socket ``descriptor`` until it closes: the main loop of a worker process."""
    connection = Connection(descriptor)
    group: LaneGroup | None = None
    while True:
        try:
            command, arguments = connection.recv()
        except (EOFError, OSError):
            break
        try:
            if command == "make":
                group = LaneGroup(*arguments)
                answer: Any = group.description
            else:
                answer = getattr(group, command)(*arguments)
        except Exception as error:  # whatever a foreign environment raises belongs to the process that asked for it
            kind, message = type(error).__name__, " ".join(str(error).split())
            if not isinstance(error, RobotRLError):
                traceback.print_exc()
                kind, message = "RobotRLError", f"a Gymnasium environment raised {kind}: {message}"
            connection.send((kind, message))
        else:
            connection.send((None, answer))
    if group is not None:
        group.close()
