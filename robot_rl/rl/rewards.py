"""Rewards that replace an environment's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from robot_rl.core.env import Observation, Step, VecEnv
from robot_rl.core.errors import CapabilityError
from robot_rl.core.spec import Spec
from robot_rl.policies.success import SuccessClassifier


class ClassifierReward:
    """A view of an environment whose reward is 1 where the classifier first fires in an episode, and 0 elsewhere.

    The environment's own ``success`` stays in ``info``, so that evaluation does not believe what was trained on;
    ``classifier`` is there beside it.

    Args:
        env: the environment; its reward is dropped.
        classifier: says what success is.
        terminate: end the episode where it fires. That takes an environment of one lane, or one that restarts single
            lanes: ``restart_lanes(lanes (N,) bool) -> observation (each (N, …))``.

    Raises:
        SpecMismatchError: the environment does not provide what the classifier sees.
        CapabilityError: ``terminate`` with an environment that cannot.
    """

    def __init__(self, env: VecEnv, classifier: SuccessClassifier, terminate: bool = False) -> None:
        classifier.spec.require(env.spec, "the success classifier", "the environment")
        if terminate and env.num_envs > 1 and not hasattr(env, "restart_lanes"):
            raise CapabilityError("ending episodes by classifier needs one lane, or an environment with restart_lanes")
        self.env, self.classifier, self.terminate = env, classifier, terminate
        self.num_envs, self.max_episode_steps = env.num_envs, env.max_episode_steps
        self.spec: Spec = env.spec
        self._history: Observation = {}
        self._fired = np.zeros(env.num_envs, bool)

    def reset(self, seed: Any = None) -> Observation:
        """Start a new episode in every lane."""
        observation = self.env.reset(seed)
        self._begin(observation, np.ones(self.num_envs, bool))
        return observation

    def step(self, actions: np.ndarray) -> Step:
        """Step the environment and replace its reward."""
        step = self.env.step(actions)
        for key, frames in self._history.items():
            self._history[key] = np.concatenate([frames[:, 1:], step.final_observation[key][:, None]], axis=1)
        fires = self.classifier.fires(self._history)
        first = fires & ~self._fired
        self._fired |= fires
        terminated, truncated, observation = step.terminated, step.truncated, step.observation
        if self.terminate and first.any():
            ours = first & ~step.done
            terminated, truncated = terminated | first, truncated & ~first
            if ours.any():
                observation = self._restart(ours)
        info = {**step.info, "classifier": fires}
        step = Step(observation, first.astype(np.float32), terminated, truncated, step.final_observation, info)
        self._begin(observation, step.done)
        return step

    def render(self, lane: int = 0) -> np.ndarray:
        """Return an RGB frame (height, width, 3) uint8 of one lane."""
        return self.env.render(lane)

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _restart(self, lanes: np.ndarray) -> Observation:
        if hasattr(self.env, "restart_lanes"):
            restarted: Observation = self.env.restart_lanes(lanes)
            return restarted
        return self.env.reset(None)

    def _begin(self, observation: Observation, lanes: np.ndarray) -> None:
        for key in self.classifier.spec.observation:
            first = np.repeat(observation[key][:, None], self.classifier.obs_steps, axis=1)
            if key not in self._history:
                self._history[key] = first
            self._history[key][lanes] = first[lanes]
        self._fired[lanes] = False
