"""What a decision earns: conventions that both cores share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robot_rl.core.errors import ConfigError


@dataclass(frozen=True)
class DecisionConfig:
    """How control steps become decisions: rewards and discounts of chunks, in one place.

    There is one discount, the core's; the settings here say what it counts.
    """

    reward: Literal["sum", "discounted"] = "sum"
    """Rewards within a chunk are summed, or discounted per control step."""
    clock: Literal["decision", "step"] = "decision"
    """The core's discount is per decision (a chunk counts 1) or per control step (as many as were executed)."""
    penalty: float = 0.0
    """Subtracted from the reward of every decision; with 1 and a sparse reward, the return counts chunks to success."""

    def step_discount(self, discount: float, steps: int) -> float:
        """Return the discount per control step of a core's ``discount``, where a whole chunk takes ``steps``."""
        return discount if self.clock == "step" else discount ** (1 / steps)

    def factor(self, discount: float | None, steps: int) -> float:
        """Return by what a reward is multiplied for every control step before it in its chunk: 1 for a sum.

        Raises:
            ConfigError: rewards are to be discounted, and the core's ``discount`` is not given.
        """
        if self.reward == "sum":
            return 1.0
        if discount is None:
            raise ConfigError("decision.reward=discounted needs the core's discount")
        return self.step_discount(discount, steps)
