"""Our environments as Gymnasium's: a `gymnasium.vector.VectorEnv`, and one lane as a `gymnasium.Env`.

Learners written for Gymnasium can train on every task: ``GymnasiumVectorEnv(make_env("push_t", 16))``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from robot_rl.core.env import Observation, VecEnv
from robot_rl.core.errors import ConfigError, DataError, MissingDependencyError
from robot_rl.core.spec import ArraySpec

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ModuleNotFoundError as error:
    raise MissingDependencyError("gymnasium", "gym", "The Gymnasium view of an environment") from error


class GymnasiumVectorEnv(VectorEnv):
    """All lanes of an environment, with Gymnasium's same-step autoreset.

    As from Gymnasium's own vector environments, ``infos["final_obs"]`` is an object array that holds the last
    observation of each lane that ended, and ``infos["final_info"]`` their info.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": ["rgb_array"]}

    def __init__(self, env: VecEnv, key: str | None = None) -> None:
        """Wrap ``env``; with ``key`` observations are that array alone instead of a dictionary."""
        self.env, self._key = env, key
        self.num_envs = env.num_envs
        self.render_mode = "rgb_array"
        self.metadata = {**type(self).metadata, "render_fps": env.spec.rate_hz or 30}
        self.single_observation_space = _observation_space(env, key)
        self.single_action_space = box(env.spec.action)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def reset(self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Start a new episode in every lane; seeds as in `robot_rl.core.env.VecEnv`, options are none."""
        if isinstance(seed, int):
            super().reset(seed=seed)
        return _pick(self.env.reset(seed), self._key), {}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return observations, rewards, terminations, truncations and infos, each with a leading axis of lanes."""
        step = self.env.step(actions)
        done = step.done
        infos: dict[str, Any] = {}
        if done.any():
            infos["final_obs"], infos["_final_obs"] = np.full(self.num_envs, None, object), done.copy()
            final = _pick(step.final_observation, self._key)
            for lane in np.flatnonzero(done):
                infos["final_obs"][lane] = _lane(final, lane)
            infos["final_info"] = {name: np.where(_like(done, value), value, 0) for name, value in step.info.items()}
            infos["final_info"] |= {f"_{name}": done.copy() for name in step.info}
            infos["_final_info"] = done.copy()
        going = ~done
        for name, value in step.info.items() if going.any() else ():
            infos[name], infos[f"_{name}"] = value, going.copy()
        return _pick(step.observation, self._key), step.reward, step.terminated, step.truncated, infos

    def render(self) -> tuple[np.ndarray, ...]:
        """Return one RGB frame per lane."""
        return tuple(self.env.render(lane) for lane in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Close the wrapped environment."""
        self.env.close()


class GymnasiumEnv(gymnasium.Env):
    """An environment of one lane as a `gymnasium.Env`, without automatic resets."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, env: VecEnv, key: str | None = None) -> None:
        """Wrap ``env``, which must have one lane; ``key`` as in `GymnasiumVectorEnv`."""
        if env.num_envs != 1:
            raise ConfigError(f"GymnasiumEnv needs an environment with one lane, got {env.num_envs}")
        self.env, self._key = env, key
        self.render_mode = "rgb_array"
        self.metadata = {**type(self).metadata, "render_fps": env.spec.rate_hz or 30}
        self.observation_space = _observation_space(env, key)
        self.action_space = box(env.spec.action)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start a new episode; without a seed, the one after the last."""
        super().reset(seed=seed)
        return _lane(_pick(self.env.reset(seed), self._key), 0), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Return the observation (the last of the episode where it ended), reward, terminated, truncated and info."""
        step = self.env.step(np.asarray(action)[None])
        observation = _lane(_pick(step.final_observation, self._key), 0)
        info = {name: value[0] for name, value in step.info.items()}
        return observation, float(step.reward[0]), bool(step.terminated[0]), bool(step.truncated[0]), info

    def render(self) -> np.ndarray:
        """Return an RGB frame."""
        return self.env.render(0)

    def close(self) -> None:
        """Close the wrapped environment."""
        self.env.close()


def box(spec: ArraySpec) -> spaces.Box:
    """Return the Box space of an array; integers without bounds get those of their type."""
    low, high = spec.bounds()
    dtype = np.dtype(spec.dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        low, high = np.maximum(low, limits.min), np.minimum(high, limits.max)
    return spaces.Box(low.astype(dtype), high.astype(dtype), spec.shape, dtype.type)


def _observation_space(env: VecEnv, key: str | None) -> spaces.Space:
    if key is None:
        return spaces.Dict({name: box(spec) for name, spec in env.spec.observation.items()})
    if key not in env.spec.observation:
        raise DataError(f"no observation '{key}'; available: {', '.join(sorted(env.spec.observation))}")
    return box(env.spec.observation[key])


def _pick(observation: Observation, key: str | None) -> Any:
    return observation if key is None else observation[key]


def _lane(observation: Any, lane: int) -> Any:
    return {k: v[lane] for k, v in observation.items()} if isinstance(observation, dict) else observation[lane]


def _like(mask: np.ndarray, value: np.ndarray) -> np.ndarray:
    return mask.reshape(-1, *(1,) * (value.ndim - 1))
