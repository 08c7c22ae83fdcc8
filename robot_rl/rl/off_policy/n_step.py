"""Returns over n decisions: rows of one decision each become rows of up to n."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from robot_rl.core.errors import ConfigError

_START = ("state", "action", "weight")
"""What a longer row takes from its first decision; of the rest it takes the last decision's."""


class NStepRows:
    """Joins the decisions of N lanes to n-step rows (arXiv 1507.04296): rewards add up, discounted, exponents add up.

    A row waits until n decisions follow it, or until its episode ends; then those that wait end with it, shorter.

    Args:
        lanes: number N of lanes.
        steps: decisions n per row; 1 passes rows on as they are.
        discount: discount per unit of the exponent, as the critic uses it; 1 step needs none.

    Raises:
        ConfigError: several steps, and no discount.
    """

    def __init__(self, lanes: int, steps: int, discount: float | None = None) -> None:
        if steps > 1 and discount is None:
            raise ConfigError("rows of several decisions need the core's discount")
        self.steps, self.discount = steps, 1.0 if discount is None else discount
        self._waiting: dict[str, Tensor] = {}
        self._count = torch.zeros(lanes, dtype=torch.int64)
        """(N,): rows that wait, oldest first."""

    def clear(self) -> None:
        """Drop all rows that wait."""
        self._count.zero_()

    def push(self, lanes: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add one decision for each of ``lanes`` (b,) and return the rows that are complete, each field (m, …).

        Args:
            lanes: indices of lanes, each at most once.
            rows: fields of `robot_rl.rl.off_policy.collector.FIELDS`, each (b, …).
        """
        if not self._waiting:
            shape = (len(self._count), self.steps)
            self._waiting = {name: values.new_zeros(*shape, *values.shape[1:]) for name, values in rows.items()}
        slot = self._count[lanes]
        earlier = torch.arange(self.steps) < slot[:, None]  # (b, n)
        exponent, reward = self._waiting["exponent"], self._waiting["reward"]
        exponents = exponent[lanes]
        reward[lanes] += earlier * self.discount**exponents * rows["reward"][:, None]
        exponent[lanes] = exponents + earlier * rows["exponent"][:, None]
        for name, values in rows.items():
            self._waiting[name][lanes, slot] = values
        self._count[lanes] = slot + 1
        ended = (rows["terminated"] + rows["truncated"]) > 0
        complete = (torch.arange(self.steps) <= slot[:, None]) & ended[:, None]
        complete[:, 0] |= slot + 1 == self.steps
        row, position = complete.nonzero(as_tuple=True)
        found = {
            name: self._waiting[name][lanes[row], position] if name in (*_START, "reward", "exponent") else values[row]
            for name, values in rows.items()
        }
        self._drop(lanes, ended)
        return found

    def _drop(self, lanes: Tensor, ended: Tensor) -> None:
        """Forget what is complete: all rows of lanes whose episode ended, the oldest of those that are full."""
        self._count[lanes[ended]] = 0
        full = lanes[self._count[lanes] == self.steps]
        for values in self._waiting.values():
            values[full] = values[full].roll(-1, dims=1)
        self._count[full] -= 1
