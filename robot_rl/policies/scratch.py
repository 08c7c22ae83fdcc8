"""Small flow policies that start from nothing and decide at every control step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robot_rl.core.errors import ConfigError
from robot_rl.core.spec import Spec
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy


@dataclass(frozen=True)
class ScratchConfig:
    """Shape of a policy that decides at every control step."""

    width: int = 64
    """Width of the hidden layers."""
    depth: int = 2
    """Hidden layers."""
    sample_steps: int = 10
    """Integration steps per action."""
    start_scale: float = 0.0
    """Scale of the start noise when it does not explore; 0 acts deterministically."""


def flow_from_scratch(spec: Spec, config: ScratchConfig) -> ChunkedPolicy:
    """Return an untrained flow policy for ``spec`` that plans one action from one observation.

    Its velocity is zero, so that actions are N(0, I) in units of half the action range, clipped to the bounds.
    Observations are not normalised: that is for who trains it.

    Raises:
        ConfigError: the action has no finite bounds.
    """
    low, high = spec.action.bounds()
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ConfigError("a policy from scratch needs finite action bounds in the spec")
    policy = ChunkedPolicy(
        spec,
        ChunkedConfig(
            head="flow",
            backbone="plain",
            obs_steps=1,
            horizon=1,
            execute_steps=1,
            sample_steps=config.sample_steps,
            width=config.width,
            depth=config.depth,
            start_scale=config.start_scale,
            head_options={"times": "uniform"},
        ),
    )
    policy.normalizer.assign("action", (low + high) / 2, (high - low) / 2)
    return policy
