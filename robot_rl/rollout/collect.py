"""Collecting demonstrations from an expert or a policy in many lanes at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from robot_rl.core.env import Observation, VecEnv
from robot_rl.core.errors import CapabilityError

Keep = Literal["all", "success"]
HOPELESS = 200
"""Episodes without one success after which collecting successes ends."""


@dataclass
class Collected:
    """What a collection came to."""

    kept: int
    """Episodes handed to the writer."""
    tried: int
    """Episodes that ended, kept or not."""
    succeeded: int
    """Episodes among them that succeeded."""
    frames: int
    """Control steps kept."""


def collect(
    env: VecEnv,
    act: Callable[[Observation], np.ndarray],
    writer: Any,
    episodes: int,
    *,
    seed: int = 0,
    keep: Keep = "success",
    actor: str = "expert",
    label: Callable[[], np.ndarray] | None = None,
    on_reset: Callable[[np.ndarray], None] | None = None,
    progress: Any = None,
) -> Collected:
    """Run ``act`` in ``env`` until ``episodes`` episodes are kept, and write each as soon as it ends.

    Args:
        env: the environment, of any number of lanes.
        act: maps observations (each (N, …)) to the actions (N, A) to execute.
        writer: a `robot_rl.data.store.EpisodeWriter`.
        episodes: episodes to keep.
        seed: first episode seed.
        keep: ``success`` drops failed episodes, ``all`` keeps them.
        actor: who acts, for the record.
        label: returns the actions (N, A) to record where they differ from those executed (noise injected to visit
            more states, clean actions to imitate).
        on_reset: called with the lanes (N,) bool that start a new episode.
        progress: a progress bar with ``advance(n, **values)``.

    Raises:
        CapabilityError: only successes are kept, and of the first `HOPELESS` episodes none was one.
    """
    lanes = [_Lane() for _ in range(env.num_envs)]
    observation = env.reset(seed)
    result = Collected(0, 0, 0, 0)
    while result.kept < episodes:
        actions = act(observation)
        recorded = actions if label is None else label()
        step = env.step(actions)
        for i, lane in enumerate(lanes):
            lane.add({k: v[i] for k, v in observation.items()}, recorded[i], step.reward[i], step.info["success"][i])
        for i in np.flatnonzero(step.done):
            succeeded = bool(step.info["success"][i])
            result.tried += 1
            result.succeeded += succeeded
            if (succeeded or keep == "all") and result.kept < episodes:
                result.frames += lanes[i].write(writer, actor, succeeded)
                result.kept += 1
                if progress is not None:
                    progress.advance(1, success=result.succeeded / result.tried)
            lanes[i] = _Lane()
        if keep == "success" and not result.succeeded and result.tried >= HOPELESS:
            raise CapabilityError(f"no success in {result.tried} episodes of '{actor}': lower its noise, or keep all")
        if on_reset is not None and step.done.any():
            on_reset(step.done)
        observation = step.observation
    return result


class _Lane:
    """The unfinished episode of one lane."""

    def __init__(self) -> None:
        self._rows: list[tuple[Observation, np.ndarray, float, bool]] = []

    def add(self, observation: Observation, action: np.ndarray, reward: float, success: bool) -> None:
        self._rows.append((observation, np.array(action, np.float32), float(reward), bool(success)))

    def write(self, writer: Any, actor: str, succeeded: bool) -> int:
        for observation, action, reward, success in self._rows:
            writer.add(observation, action, reward=reward, success=success, actor=actor)
        writer.save_episode(success=succeeded)
        return len(self._rows)
