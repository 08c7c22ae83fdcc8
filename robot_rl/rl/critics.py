"""Critics: a state value for on-policy learning, and an ensemble of action values evaluated at once."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

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

    Layers are linear, LayerNorm (optional), ReLU; the last one is linear and in float32 whatever the others are.
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
        self.members, self.layer_norm, self.dtype = members, layer_norm, dtype
        sizes = (state_size + action_size, *hidden)
        self.weights = nn.ParameterList(_uniform(members, n, m) for n, m in itertools.pairwise(sizes))
        self.biases = nn.ParameterList(_uniform(members, 1, m, n) for n, m in itertools.pairwise(sizes))
        if layer_norm:
            self.gains = nn.ParameterList(nn.Parameter(torch.ones(members, 1, m)) for m in hidden)
            self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(members, 1, m)) for m in hidden)
        self.last_weight = _uniform(members, hidden[-1], 1)
        self.last_bias = _uniform(members, 1, 1, hidden[-1])

    def forward(self, state: Tensor, action: Tensor, members: Tensor | None = None, frozen: bool = False) -> Tensor:
        """Return values (E, B) for states (B, S) and actions (B, D).

        Args:
            state: (B, S).
            action: (B, D).
            members: indices (M,) of the members to evaluate; the result is then (M, B).
            frozen: whether gradients stop at the critic's own weights (they still reach the action).
        """

        def pick(parameter: Tensor) -> Tensor:
            chosen = parameter.detach() if frozen else parameter
            return chosen if members is None else chosen.index_select(0, members)

        x = torch.cat([state, action], dim=-1).to(self.dtype)
        x = x.expand(self.members if members is None else len(members), *x.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(pick(bias).to(self.dtype), x, pick(weight).to(self.dtype))
            if self.layer_norm:
                x = nn.functional.layer_norm(x, x.shape[-1:])
                x = torch.addcmul(pick(self.shifts[i]).to(self.dtype), x, pick(self.gains[i]).to(self.dtype))
            x = x.relu()
        return torch.baddbmm(pick(self.last_bias), x.float(), pick(self.last_weight)).squeeze(-1)


def _uniform(members: int, rows: int, columns: int, fan_in: int | None = None) -> nn.Parameter:
    """Return (E, rows, columns) drawn as `torch.nn.Linear` draws them."""
    bound = 1 / math.sqrt(fan_in or rows)
    return nn.Parameter(torch.empty(members, rows, columns).uniform_(-bound, bound))
