"""What a decision earns: conventions that both cores share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DecisionConfig:
    """How control steps become decisions: rewards and discounts of chunks, in one place."""

    reward: Literal["sum", "discounted"] = "sum"
    """Rewards within a chunk are summed, or discounted per control step."""
    clock: Literal["decision", "step"] = "decision"
    """The stored discount exponent counts decisions (1 per chunk) or control steps (as many as were executed)."""
    penalty: float = 0.0
    """Subtracted from the reward of every decision; with 1 and a sparse reward, the return counts chunks to success."""
    discount: float = 0.99
    """Discount per control step within a chunk, for ``discounted``."""
