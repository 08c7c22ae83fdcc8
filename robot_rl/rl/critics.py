"""Critics: a state value for on-policy learning, and an ensemble of action values evaluated at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robot_rl.nets.ensemble import EnsembleMLP
from robot_rl.nets.mlp import mlp


class StateValue(nn.Module):
    """V(s): maps (B, F) to (B,)."""

    def __init__(self, size: int, hidden: tuple[int, ...] = (256, 256)) -> None:
        super().__init__()
        self.net = mlp((size, *hidden, 1))
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.orthogonal_(last.weight, 0.25)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return values (B,)."""
        value: Tensor = self.net(features).squeeze(-1)
        return value


class EnsembleCritic(nn.Module):
    """E action values ``Q_k(s, a)``, all members in one product per layer.

    With LayerNorm, |Q| is bounded by the last layer's weights for any action (RLPD, arXiv 2302.02948), which is what
    keeps values of unseen actions from running away.
    """

    def __init__(
        self,
        state_size: int,
        action_size: int,
        members: int = 2,
        hidden: tuple[int, ...] = (256, 256),
        layer_norm: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.net = EnsembleMLP((state_size + action_size, *hidden, 1), members, layer_norm, dtype)

    def forward(self, state: Tensor, action: Tensor, members: Tensor | None = None, frozen: bool = False) -> Tensor:
        """Return values (E, B) for states (B, S) and actions (B, D).

        Args:
            state: (B, S).
            action: (B, D).
            members: indices (M,) of the members to evaluate; the result is then (M, B).
            frozen: whether gradients stop at the critic's own weights (they still reach the action).
        """
        values: Tensor = self.net((state, action), members, frozen)
        return values.squeeze(-1)
