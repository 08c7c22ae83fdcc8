"""Lanes of a Gymnasium environment, in this process or in worker processes.

A worker is a fresh interpreter that runs `serve` and talks over a socket pair, so that it depends neither on
``fork`` nor on how the user's script starts, and ends when its parent does.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import io
import os
import socket
import subprocess
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from robot_rl.core import errors
from robot_rl.core.env import Observation
from robot_rl.core.errors import CapabilityError, ConfigError, MissingDependencyError, RobotRLError, UnknownNameError
from robot_rl.core.spec import ArraySpec, Spec

_REGISTERING = ("gym_pusht", "gymnasium_robotics")
"""Packages whose import registers environments without a name space."""
_SUCCESS_KEYS = ("is_success", "success")
_NO_LIMIT = 1_000_000
"""Time limit reported for environments that have none."""
_DEFAULTS: dict[str, dict[str, Any]] = {"gym_pusht/PushT": {"obs_type": "environment_state_agent_pos"}}
"""Options of `gymnasium.make` that we set unless the caller does, by the id without its version."""
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

    With ``reward="sparse"`` the reward is 1 on the step of the first success, which also ends the episode.
    """

    def __init__(self, env_id: str, lanes: int, reward: str, options: Mapping[str, Any]) -> None:
        self._envs = [make_gymnasium(env_id, options) for _ in range(lanes)]
        self._sparse = reward == "sparse"
        self._measure = next((f for name, f in _MEASURES.items() if env_id.startswith(name)), None)
        env = self._envs[0]
        self._action_space = env.action_space
        self._keys = _observation_keys(env_id, env.observation_space)
        spec = Spec(
            {key: _array_spec(space) for key, (_, space) in self._keys.items()},
            _action_spec(env_id, env.action_space),
            _rate(env),
        )
        limit = env.spec.max_episode_steps or _NO_LIMIT
        self.description = Description(spec, limit, self._probe_info(env))
        self._succeeded = np.zeros(lanes, bool)
        self._renderer: Any = None

    def reset(self, seeds: np.ndarray) -> Observation:
        """Start the episodes with these seeds, one per lane."""
        self._succeeded[:] = False
        return self._stack([env.reset(seed=int(seed))[0] for env, seed in zip(self._envs, seeds, strict=True)])

    def step(self, actions: np.ndarray, next_seeds: np.ndarray) -> GroupStep:
        """Step every lane; one that ends starts the episode with its seed of ``next_seeds``."""
        n = len(self._envs)
        reward, ends = np.zeros(n, np.float32), np.zeros((2, n), bool)
        info = {key: np.full(n, np.nan) for key in self.description.info_keys}
        finals, nexts = [], []
        actions = actions.astype(self._action_space.dtype)
        for lane, env in enumerate(self._envs):
            observation, value, terminated, truncated, extra = env.step(actions[lane])
            extra = self._all_info(env, extra)
            for key in info:
                info[key][lane] = extra.get(key, np.nan)
            first = any(extra.get(key, 0.0) > 0 for key in _SUCCESS_KEYS) and not self._succeeded[lane]
            self._succeeded[lane] |= first
            if self._sparse:
                value, terminated = float(first), terminated or first
            reward[lane] = value
            ends[:, lane] = terminated, truncated and not terminated
            finals.append(observation)
            nexts.append(observation)
        success = self._succeeded.copy()
        for lane in np.flatnonzero(ends.any(axis=0)):
            nexts[lane], _ = self._envs[lane].reset(seed=int(next_seeds[lane]))
            self._succeeded[lane] = False
        return GroupStep(self._stack(nexts), self._stack(finals), reward, ends[0], ends[1], success, info)

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
            key: np.array([_descend(o, path) for o in observations], _dtype(space))
            for key, (path, space) in self._keys.items()
        }


class WorkerGroup:
    """A `LaneGroup` in its own process; `send` and `receive` let several groups work at once."""

    def __init__(self, env_id: str, lanes: int, reward: str, options: Mapping[str, Any]) -> None:
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
        self.send("make", env_id, lanes, reward, dict(options))

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


def make_gymnasium(env_id: str, options: Mapping[str, Any]) -> Any:
    """Build one Gymnasium environment, importing the packages that register its id.

    Raises:
        UnknownNameError: nothing has registered the id; names similar ones.
        MissingDependencyError: a package is not installed.
        ConfigError: the environment refused its options.
    """
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise MissingDependencyError("gymnasium", "gym", f"The environment 'gym:{env_id}'") from error
    _register(env_id, gymnasium.registry)
    defaults = next((d for name, d in _DEFAULTS.items() if env_id.startswith(name)), {})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = {"render_mode": "rgb_array"} if "rgb_array" in _render_modes(env_id) else {}
            return gymnasium.make(env_id, **{"disable_env_checker": True, **drawn, **defaults, **options})
    except (gymnasium.error.Error, TypeError, ValueError) as error:
        message = str(error).partition(" was raised from the environment creator")[0]
        raise ConfigError(f"gym:{env_id}: {' '.join(message.split())}") from error
    except ModuleNotFoundError as error:
        raise MissingDependencyError(str(error.name), "gym", f"The environment 'gym:{env_id}'") from error


def _render_modes(env_id: str) -> Sequence[str]:
    from gymnasium.envs.registration import load_env_creator, spec

    entry = spec(env_id).entry_point
    creator = load_env_creator(entry) if isinstance(entry, str) else entry
    return getattr(creator, "metadata", {}).get("render_modes") or ()


def _register(env_id: str, registry: Mapping[str, Any]) -> None:
    namespace = env_id.partition("/")[0] if "/" in env_id else ""
    for package in (namespace, *_REGISTERING):
        if env_id in registry or ":" in env_id:
            return
        if package and importlib.util.find_spec(package.partition(".")[0]):
            # Importing gymnasium_robotics prints release notes.
            with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                importlib.import_module(package)
    if env_id in registry:
        return
    if namespace in _REGISTERING and not importlib.util.find_spec(namespace):
        raise MissingDependencyError(namespace, "gym", f"The environment 'gym:{env_id}'")
    near = difflib.get_close_matches(env_id, list(registry), n=5, cutoff=0.4)
    raise UnknownNameError("Gymnasium environment", env_id, near)


def _observation_keys(env_id: str, space: Any) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Map our observation keys to where in the environment's observation they are, and to their spaces."""
    from gymnasium import spaces

    found: dict[str, tuple[tuple[str, ...], Any]] = {}

    def collect(path: tuple[str, ...], part: Any) -> None:
        if isinstance(part, spaces.Dict):
            for name, child in part.spaces.items():
                collect((*path, name), child)
        elif isinstance(part, spaces.Box):
            image = part.dtype == np.uint8 and len(part.shape) == 3
            name = ".".join(path)
            key = f"images.{name or 'pixels'}" if image else "state" if name in ("", "observation") else name
            found[key] = (path, part)
        else:
            raise CapabilityError(
                f"gym:{env_id}: {type(part).__name__} observations are not supported; use Box or Dict"
            )

    collect((), space)
    return found


def _descend(observation: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        observation = observation[name]
    return observation


def _dtype(space: Any) -> str:
    return "float32" if np.issubdtype(space.dtype, np.floating) else str(space.dtype)


def _array_spec(space: Any) -> ArraySpec:
    return ArraySpec(tuple(space.shape), _dtype(space))


def _action_spec(env_id: str, space: Any) -> ArraySpec:
    from gymnasium import spaces

    if not isinstance(space, spaces.Box):
        raise CapabilityError(f"gym:{env_id}: {type(space).__name__} actions are not supported; use Box")
    low, high = (tuple(float(x) for x in bound.ravel()) for bound in (space.low, space.high))
    bounded = np.isfinite([*low, *high]).all()
    return ArraySpec(tuple(space.shape), low=low if bounded else None, high=high if bounded else None)


def _rate(env: Any) -> float:
    """Return control steps per second: from the environment's time step, else its frame rate, else 0."""
    period = getattr(env.unwrapped, "dt", None)
    rate = env.metadata.get("render_fps")
    # gym_pusht's dt is its physics step; where both are given and disagree, the frame rate is the control rate.
    return float(rate) if rate else 1.0 / float(period) if period else 0.0


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
