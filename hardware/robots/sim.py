"""A task of the simulator as a robot in real time."""

from __future__ import annotations

from typing import Any

from robot_rl.core.bridge import EnvRobot
from robot_rl.core.registry import make_env

DEMONSTRATION_SEED = 2_000_000
"""First episode seed of deployments: apart from training (below 1,000,000) and evaluation (from there on)."""


class SimRobot(EnvRobot):
    """One lane of the registered task ``task``, behind the same contract as a real robot."""

    def __init__(
        self,
        task: str,
        *,
        seed: int = DEMONSTRATION_SEED,
        tick_rate_hz: float = 100.0,
        restart: bool = True,
        lock_step: bool = False,
        **options: Any,
    ) -> None:
        """Build the task.

        Args:
            task: registered task name, for example ``"peg_insert"``.
            seed: of the first episode.
            tick_rate_hz: how often the physics is advanced and measured, at most.
            restart: set up a new scene when an episode ends.
            lock_step: nothing moves until `advance` is called (tests).
            **options: of the task.

        Raises:
            UnknownNameError: no such task; the message suggests the nearest.
        """
        env = make_env(task, 1, seed=seed, threads=1, **options)
        super().__init__(env, tick_rate_hz=tick_rate_hz, restart=restart, seed=seed, lock_step=lock_step)
        self.task = task

    def disconnect(self) -> None:
        """Stop, end the thread, and close the environment."""
        super().disconnect()
        self.env.close()
