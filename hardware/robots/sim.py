"""A task of the simulator as a robot in real time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.core.bridge import EnvRobot
from robot_rl.core.errors import DataError
from robot_rl.core.registry import make_env

DEMONSTRATION_SEED = 2_000_000
"""First episode seed of deployments: apart from training (below 1,000,000) and evaluation (from there on)."""


class SimRobot(EnvRobot):
    """One lane of the registered task ``task``, behind the same contract as a real robot."""

    accepts_replacement = True
    """The physics holds the newest command, whenever it came."""

    def __init__(
        self,
        task: str,
        *,
        seed: int = DEMONSTRATION_SEED,
        tick_rate_hz: float = 100.0,
        restart: bool = True,
        lock_step: bool = False,
        trace: str | Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        """Build the task.

        Args:
            task: registered task name, for example ``"peg_insert"``.
            seed: of the first episode.
            tick_rate_hz: how often the physics is advanced and measured, at most.
            restart: set up a new scene when an episode ends.
            lock_step: nothing moves until `advance` is called (tests).
            trace: file for the commands of every tick, written at the end; enough to repeat the run exactly.
            clock: monotonic time in seconds; that of the simulation where it does not run in real time.
            **options: of the task.

        Raises:
            UnknownNameError: no such task; the message suggests the nearest.
        """
        env = make_env(task, 1, seed=seed, threads=1, **options)
        super().__init__(env, tick_rate_hz=tick_rate_hz, restart=restart, seed=seed, lock_step=lock_step, clock=clock)
        self.task = task
        self._trace = Path(trace) if trace else None
        self._ticks_done: list[tuple[float, np.ndarray]] = []
        options = {"task": task, "seed": seed, "tick_rate_hz": tick_rate_hz, "restart": restart, **options}
        self._options: dict[str, Any] = options

    @classmethod
    def from_trace(cls, path: str | Path) -> tuple[SimRobot, np.ndarray, np.ndarray]:
        """Return a lock-step robot for the trace at ``path``, the stamps (T,) and the commands (T, A) of its ticks.

        Raises:
            DataError: the file is missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                options = json.loads(str(file["options"]))
                stamps, commands = file["stamps"], file["commands"]
        except Exception as error:
            raise DataError(f"trace {path} cannot be read: {error}") from error
        return cls(**options, lock_step=True), stamps, commands

    def replay(self, commands: np.ndarray) -> Iterator[None]:
        """Repeat ticks with the commands (T, A) of a trace, one per iteration; for a robot in lock-step."""
        for command in commands:
            self._command = command
            self.advance()
            yield

    def disconnect(self) -> None:
        """Stop, end the thread, write the trace, and close the environment."""
        super().disconnect()
        if self._trace is not None and self._ticks_done:
            stamps, commands = zip(*self._ticks_done, strict=True)
            self._trace.parent.mkdir(parents=True, exist_ok=True)
            np.savez(
                self._trace, stamps=np.array(stamps), commands=np.stack(commands), options=json.dumps(self._options)
            )
            self._ticks_done.clear()
        self.env.close()

    def _actions(self) -> np.ndarray:
        command = self._command  # read once: another thread may set the next one at any time
        if self._trace is not None:
            self._ticks_done.append((self._now(), command))
        return np.repeat(command[None], self.env.num_envs, axis=0)
