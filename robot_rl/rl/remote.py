"""Task ``ray:<task>``: lanes of any task on the machines of a Ray cluster, behind the one contract of environments.

``make_env("ray:peg_insert", 256, workers=16)`` steps sixteen parts at once, each with sixteen lanes in a process of its
own. Both cores, evaluation and every command use it as they use a local task.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from robot_rl.core.env import Expert, Observation, Step
from robot_rl.core.errors import CapabilityError, ConfigError, DataError, MissingDependencyError, RobotRLError
from robot_rl.core.registry import make_env
from robot_rl.core.spec import Spec


def connect_ray(purpose: str, address: str = "") -> Any:
    """Return the module ``ray``, connected to a cluster.

    Args:
        purpose: who needs it, for the message.
        address: of the cluster; empty for that of ``RAY_ADDRESS``, or else one that is started on this machine.

    Raises:
        MissingDependencyError: Ray is not installed.
        ConfigError: there is no cluster at the address.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingDependencyError("ray", "cluster", purpose) from error
    if not ray.is_initialized():
        try:
            ray.init(address=address or None, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            where = address or os.environ.get("RAY_ADDRESS", "this machine")
            raise ConfigError(f"no Ray cluster at {where}: {str(error).splitlines()[0]}") from error
    return ray


class RemoteLanes:
    """A part of the lanes, in a process of its own; what crosses the wire is NumPy arrays and JSON."""

    def open(self, task: str, num_envs: int, stride: int, options: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Build ``num_envs`` lanes of ``task`` out of ``stride`` in all; returns the spec and the time limit."""
        self.env = make_env(task, num_envs=num_envs, **options)
        if num_envs != stride:
            if not hasattr(self.env, "seed_stride"):
                raise CapabilityError(
                    f"task '{task}' cannot be split: its environment has no seed_stride, which keeps the seeds of "
                    "episodes in one block; workers=1 works"
                )
            self.env.seed_stride = stride
        return self.env.spec.to_json(), self.env.max_episode_steps

    def reset(self, seeds: list[int] | None) -> Observation:
        """Start new episodes."""
        observation: Observation = self.env.reset(seeds)
        return observation

    def step(self, actions: np.ndarray) -> Step:
        """Take one control step."""
        step: Step = self.env.step(actions)
        return step

    def render(self, lane: int) -> np.ndarray:
        """Return a frame of one lane."""
        frame: np.ndarray = self.env.render(lane)
        return frame

    def close(self) -> None:
        """Release what the environment holds."""
        self.env.close()


class RayEnv:
    """N lanes of a task, divided among Ray actors; implements `robot_rl.core.env.VecEnv`.

    Args:
        task: any task's name, also ``gym:<id>``.
        num_envs: number of lanes N.
        workers: actors; 0 for one per processor of the cluster, and never more than lanes.
        seed: first episode seed where `reset` is called without one.
        options: what the task's factory is given.

    Raises:
        MissingDependencyError: Ray is not installed.
        CapabilityError: the task cannot be split.
    """

    def __init__(self, task: str, num_envs: int, workers: int, seed: int, options: dict[str, Any]) -> None:
        if num_envs < 1:
            raise ConfigError(f"ray:{task}: num_envs must be at least 1, got {num_envs}")
        self._ray = connect_ray(f"task 'ray:{task}'")
        self.name, self.num_envs = f"ray:{task}", num_envs
        count = min(workers or int(self._ray.cluster_resources().get("CPU", 1)), num_envs)
        edges = np.linspace(0, num_envs, count + 1).astype(int).tolist()
        self._parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        kind = self._ray.remote(num_cpus=1)(RemoteLanes)
        self._actors = [kind.remote() for _ in self._parts]
        sizes = [part.stop - part.start for part in self._parts]
        try:
            described = self._call("open", [(task, size, num_envs, options) for size in sizes])
        except RobotRLError:
            self.close()
            raise
        self.spec, self.max_episode_steps = Spec.from_json(described[0][0]), int(described[0][1])
        self._first_seed: int | None = seed

    def reset(self, seed: int | Sequence[int] | None = None) -> Observation:
        """Start a new episode in every lane; seeds as in `robot_rl.core.env.VecEnv`."""
        if seed is None:
            seed, self._first_seed = self._first_seed, None
        else:
            self._first_seed = None
        if seed is None:
            return _join(self._call("reset", [(None,)] * len(self._parts)))
        seeds = np.asarray(seed, np.int64)
        if seeds.ndim == 0:
            seeds = seeds + np.arange(self.num_envs)
        if seeds.shape != (self.num_envs,):
            raise ConfigError(f"{self.name}: reset needs {self.num_envs} seeds, got {seed}")
        return _join(self._call("reset", [(seeds[part].tolist(),) for part in self._parts]))

    def step(self, actions: np.ndarray) -> Step:
        """Apply ``actions`` (N, A); all parts step at the same time.

        Raises:
            DataError: wrong shape, or a value that is not finite.
            RobotRLError: a part was lost, or what the task itself raises.
        """
        actions = np.asarray(actions)
        # Checked here, because a part that refused would fall behind the others.
        if actions.shape != (self.num_envs, *self.spec.action.shape):
            expected = (self.num_envs, *self.spec.action.shape)
            raise DataError(f"{self.name}: actions have shape {actions.shape}, expected {expected}")
        if not np.isfinite(actions).all():
            lane = int(np.argwhere(~np.isfinite(actions))[0, 0])
            raise DataError(f"{self.name}: the action of lane {lane} holds a value that is not finite")
        steps: list[Step] = self._call("step", [(actions[part],) for part in self._parts])
        return Step(
            _join([step.observation for step in steps]),
            np.concatenate([step.reward for step in steps]),
            np.concatenate([step.terminated for step in steps]),
            np.concatenate([step.truncated for step in steps]),
            _join([step.final_observation for step in steps]),
            _join([step.info for step in steps]),
        )

    def render(self, lane: int = 0) -> np.ndarray:
        """Return an RGB frame (height, width, 3) uint8 of one lane."""
        index = next(i for i, part in enumerate(self._parts) if lane < part.stop)
        frame: np.ndarray = self._wait([self._actors[index].render.remote(lane - self._parts[index].start)])[0]
        return frame

    def make_expert(self, noise: float = 1.0, seed: int = 0) -> Expert:
        """Raise `CapabilityError`: an expert reads the simulator, which is elsewhere."""
        raise CapabilityError(f"task '{self.name}' has no expert: collect demonstrations where the simulator runs")

    def close(self) -> None:
        """Close the environments and end the actors; the cluster stays."""
        actors, self._actors = self._actors, []
        for actor in actors:
            self._ray.kill(actor)

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call ``method`` of every actor with its own arguments, at the same time."""
        if not self._actors:
            raise RobotRLError(f"{self.name} is closed")
        return self._wait(
            [getattr(actor, method).remote(*own) for actor, own in zip(self._actors, arguments, strict=True)]
        )

    def _wait(self, references: list[Any]) -> list[Any]:
        errors = self._ray.exceptions
        try:
            found: list[Any] = self._ray.get(references)
        except errors.RayTaskError as error:
            if isinstance(error.cause, RobotRLError):
                raise error.cause from None
            raise
        except errors.RayActorError as error:
            self.close()
            raise RobotRLError(f"{self.name}: the cluster lost some lanes: {str(error).splitlines()[0]}") from error
        return found


def _join(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def make(task: str = "", num_envs: int = 1, *, seed: int = 0, workers: int = 0, **options: Any) -> RayEnv:
    """Lanes of any other task on a Ray cluster: ray:<task>, for example ray:peg_insert.

    Args:
        task: after the colon of ``ray:<task>``.
        num_envs: number of lanes.
        seed: first episode seed where `RayEnv.reset` is called without one.
        workers: parts that the lanes are divided into, each a process; 0 for one per processor of the cluster.
        options: for the task's own factory, such as ``reward``; ``threads`` is 1 in each part if it is not given.
    """
    if not task:
        raise ConfigError("ray: which task? For example ray:peg_insert")
    return RayEnv(task, num_envs, workers, seed, {"threads": 1, **options})
