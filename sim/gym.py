"""Tasks ``gym:<id>``: any Gymnasium environment with Box actions, as lanes of our contract.

``make_env("gym:gym_pusht/PushT-v0", 16, workers=2)`` runs its lanes in two worker processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from robot_rl.core.env import Expert, Observation, Step
from robot_rl.core.errors import CapabilityError, ConfigError, RobotRLError
from sim.gym_worker import GroupStep, LaneGroup, WorkerGroup
from sim.lanes import ActionGate, EpisodeSeeds

REWARDS = ("native", "sparse")


class GymEnv:
    """N lanes of one Gymnasium environment; implements `robot_rl.core.env.VecEnv`.

    Box observations are called ``state``, those of a Dict keep their names, images are ``images.<name>``.
    ``info["success"]`` latches the environment's ``is_success`` or ``success``; every other number of its info is there
    under its own name. The control rate is known where the environment states it, else 0.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        seed: int = 0,
        reward: str = "native",
        workers: int = 0,
        hold: int = 1,
        **options: Any,
    ) -> None:
        if hold < 1:
            raise ConfigError(f"gym:{env_id}: hold must be at least 1, got {hold}")
        if num_envs < 1:
            raise ConfigError(f"gym:{env_id}: num_envs must be at least 1, got {num_envs}")
        if reward not in REWARDS:
            raise ConfigError(f"gym:{env_id}: unknown reward '{reward}'. Available: {', '.join(REWARDS)}")
        self.name = f"gym:{env_id}"
        self.num_envs = num_envs
        count = min(max(workers, 1), num_envs)
        edges = np.linspace(0, num_envs, count + 1).astype(int)
        self._slices = [slice(a, b) for a, b in pairwise(edges.tolist())]
        sizes = [part.stop - part.start for part in self._slices]
        self._groups: list[LaneGroup] = []
        self._workers: list[WorkerGroup] = []
        if workers:
            self._workers = [WorkerGroup(env_id, size, reward, hold, options) for size in sizes]
            description = self._gather()[0]
        else:
            self._groups = [LaneGroup(env_id, sizes[0], reward, hold, options)]
            description = self._groups[0].description
        self.spec, self.max_episode_steps = description.spec, description.max_episode_steps
        self._seeds = EpisodeSeeds(self.name, num_envs, seed)
        self._gate = ActionGate(self.name, num_envs, self.spec.action)

    @property
    def episode_seed(self) -> np.ndarray:
        """(N,) seed of the present episode."""
        return self._seeds.current

    @property
    def seed_stride(self) -> int:
        """From an episode's seed to that of the lane's next episode: N, or more for a part of a larger environment."""
        return self._seeds.stride

    @seed_stride.setter
    def seed_stride(self, stride: int) -> None:
        self._seeds.stride = stride

    def reset(self, seed: int | Sequence[int] | None = None) -> Observation:
        """Start a new episode in every lane; seeds as in `robot_rl.core.env.VecEnv`."""
        self._seeds.restart(seed)
        self._seeds.advance(slice(None))
        return _join(self._call("reset", [self.episode_seed[part] for part in self._slices]))

    def step(self, actions: np.ndarray) -> Step:
        """Apply ``actions`` (N, A); values outside the bounds are clipped.

        Raises:
            DataError: wrong shape, or a value that is not finite.
            RobotRLError: a worker process failed.
        """
        actions = self._gate.admit(actions, self._seeds)
        parts: list[GroupStep] = self._call(
            "step", [actions[p] for p in self._slices], [self._seeds.next[p] for p in self._slices]
        )
        terminated, truncated, reward, success = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("terminated", "truncated", "reward", "success")
        )
        info = _join([part.info for part in parts])
        info |= {"success": success, "episode_seed": self.episode_seed.copy()}
        self._seeds.advance(terminated | truncated)
        observation = _join([part.observation for part in parts])
        final = _join([part.final_observation for part in parts])
        return Step(observation, reward, terminated, truncated, final, info)

    def render(self, lane: int = 0) -> np.ndarray:
        """Return an RGB frame (height, width, 3) uint8 of one lane."""
        if self._groups:
            return self._groups[0].render(lane)
        index = next(i for i, part in enumerate(self._slices) if lane < part.stop)
        worker = self._workers[index]
        worker.send("render", lane - self._slices[index].start)
        return worker.receive()

    def make_expert(self, noise: float = 1.0, seed: int = 0) -> Expert:
        """Raise `CapabilityError`: foreign environments bring no expert."""
        raise CapabilityError(f"task '{self.name}' has no scripted expert")

    def close(self) -> None:
        """Close the environments and end the worker processes."""
        for group in (*self._groups, *self._workers):
            group.close()

    def _call(self, command: str, *arguments: list[np.ndarray]) -> list[Any]:
        """Run ``command`` in every group with its own part of ``arguments``; workers run at the same time."""
        if self._groups:
            return [getattr(self._groups[0], command)(*(parts[0] for parts in arguments))]
        for worker, own in zip(self._workers, zip(*arguments, strict=True), strict=True):
            worker.send(command, *own)
        return self._gather()

    def _gather(self) -> list[Any]:
        try:
            return [worker.receive() for worker in self._workers]
        except RobotRLError:
            self.close()
            raise


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def make(
    env_id: str = "",
    num_envs: int = 1,
    *,
    seed: int = 0,
    threads: int = 0,
    reward: str = "native",
    workers: int = 0,
    hold: int = 1,
    **options: Any,
) -> GymEnv:
    """Build ``num_envs`` lanes of the Gymnasium environment ``env_id``; the factory registered as ``gym``.

    Args:
        env_id: Gymnasium's id, after the colon of ``gym:<id>``.
        num_envs: number of lanes.
        seed: first episode seed where `GymEnv.reset` is called without one.
        threads: ignored; these environments run Python code, which only ``workers`` speeds up.
        reward: ``"native"`` for the environment's own; ``"sparse"`` for 1 on the step of the first success, which then
            ends the episode.
        workers: worker processes; 0 runs every lane in this process.
        hold: environment steps per control step of ours, for policies that command at a lower rate; the actions between
            two commands lie on a line, as position targets should.
        options: passed to `gymnasium.make`.
    """
    if not env_id:
        raise ConfigError("the task 'gym' needs an environment id: gym:<id>, for example gym:gym_pusht/PushT-v0")
    return GymEnv(env_id, num_envs, seed=seed, reward=reward, workers=workers, hold=hold, **options)
