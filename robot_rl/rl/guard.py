"""Stops a run at the first value that is not finite, and keeps what is needed to find out why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robot_rl.core.env import Observation, Step
from robot_rl.core.errors import RobotRLError


class NonFiniteError(RobotRLError):
    """A reward, observation or loss is NaN or infinite; the message names the step, the value and the dump."""


class Guard:
    """Checks arrays as they pass; `directory` receives a dump when one is bad."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory

    def check(self, step: int, values: Mapping[str, np.ndarray | Tensor | float], **context: np.ndarray) -> None:
        """Raise `NonFiniteError` if any of ``values`` is not finite.

        Args:
            step: environment step, for the message and the name of the dump.
            values: what to check, by name.
            context: further arrays for the dump.
        """
        arrays = {name: _array(value) for name, value in values.items()}
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                bad = np.argwhere(~np.isfinite(np.atleast_1d(array)))
                where = f"first at index {[int(i) for i in bad[0]]}, {len(bad)} in all"
                dump = self._dump(step, {**arrays, **context})
                raise NonFiniteError(f"{name} is not finite at environment step {step} ({where}){dump}")

    def check_reset(self, at: int, observation: Observation) -> None:
        """Raise `NonFiniteError` if an observation that episodes begin with, after ``at`` steps, is not finite."""
        self.check(at, {f"first observation '{key}'": value for key, value in observation.items()})

    def check_step(self, at: int, step: Step, actions: np.ndarray) -> None:
        """Raise `NonFiniteError` if a reward or an observation of environment step ``at`` is not finite.

        The observations that episodes ended with count, for what follows a time limit is valued by them.
        """
        values = {"reward": step.reward}
        values |= {f"observation '{key}'": value for key, value in step.observation.items()}
        if step.done.any():
            values |= {f"final observation '{key}'": v[step.done] for key, v in step.final_observation.items()}
        self.check(at, values, action=actions)

    def _dump(self, step: int, arrays: Mapping[str, np.ndarray]) -> str:
        if self.directory is None:
            return ""
        path = self.directory / f"not_finite_{step}.npz"
        np.savez_compressed(path, **{name.replace("/", "_"): value for name, value in arrays.items()})  # type: ignore[arg-type]
        return f"; the arrays are in {path}"


def _array(value: np.ndarray | Tensor | float) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
