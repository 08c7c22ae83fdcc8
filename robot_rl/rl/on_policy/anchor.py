"""Staying near the policy that fine-tuning started from: weight and its control (arXiv 2310.17303, 2009.01325)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from robot_rl.core.errors import ConfigError


@dataclass(frozen=True)
class AnchorConfig:
    """A penalty ``weight * KL(policy || base)`` in the policy's loss, per item and without credit through time."""

    weight: float = 0.0
    """Weight at the start; 0 for no anchor."""
    target: float = 0.0
    """Divergence to keep: the weight grows while it is exceeded and shrinks below it; 0 for no control."""
    gain: float = 1.0
    """How fast the weight follows: by at most a fifth of this per iteration."""
    decay: float = 1.0
    """The weight is multiplied by this after every iteration (DAPG, arXiv 1709.10087)."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.target < 0:
            raise ConfigError("the anchor's weight and target cannot be negative")
        if self.target and not self.weight:
            raise ConfigError(f"anchor.target={self.target:g} needs a weight above 0 to start from")


class Anchor:
    """The present weight of an anchor."""

    def __init__(self, config: AnchorConfig) -> None:
        self.config, self.weight = config, config.weight

    def update(self, divergence: float) -> None:
        """Adapt the weight to the mean ``divergence`` from the base that an iteration saw."""
        config = self.config
        if config.target and math.isfinite(divergence):
            self.weight *= 1 + config.gain * min(max(divergence / config.target - 1, -0.2), 0.2)
        self.weight *= config.decay
