"""A critic of action chunks that carries its own normaliser, so that it can be asked about any policy's chunks."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.spec import Spec
from robot_rl.data.normalizer import Normalizer
from robot_rl.nets.device import device_of
from robot_rl.nets.ensemble import EnsembleMLP


@dataclass(frozen=True)
class ChunkCriticConfig:
    """Shape of a critic of chunks; saved with it."""

    steps: int = 8
    """Actions of a chunk that are scored, from its first."""
    history: int = 1
    """Newest observations that the critic sees."""
    members: int = 2
    """Networks of the ensemble."""
    keys: tuple[str, ...] = ()
    """Observations that it sees; empty for all that are no images."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    layer_norm: bool = True
    """LayerNorm in the networks."""
    clamp: float = 5.0
    """Normalised observations are clamped to this."""


class ChunkCritic(nn.Module):
    """``Q_k(history, first actions of a chunk)`` for E networks, from raw observations and actions.

    A critic that was given another policy's numbers in that policy's normalised units would be silently wrong (the
    pitfall of value guidance, arXiv 2410.13816); this one takes units of the spec and normalises by its own statistics.

    Args:
        spec: observations and action in the units of the environment; images are not seen.
        config: shape.
        normalizer: statistics, which are copied; the identity by default, for a checkpoint to fill.
    """

    def __init__(self, spec: Spec, config: ChunkCriticConfig, normalizer: Normalizer | None = None) -> None:
        super().__init__()
        self.keys = config.keys or tuple(key for key, array in spec.observation.items() if not array.is_image)
        if not self.keys:
            raise CapabilityError("a critic of chunks needs an observation that is no image")
        self.spec, self.config = spec.select(self.keys), replace(config, keys=self.keys)
        self.normalizer = copy.deepcopy(normalizer) if normalizer is not None else Normalizer(spec, self.keys)
        device = device_of(self.normalizer)
        low, high = (torch.as_tensor(bound, dtype=torch.float32, device=device) for bound in spec.action.bounds())
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.state_size = config.history * sum(spec.observation[key].size for key in self.keys)
        self.action_size = config.steps * spec.action.size
        sizes = (self.state_size + self.action_size, *config.hidden, 1)
        self.net = EnsembleMLP(sizes, config.members, config.layer_norm)

    def state(self, history: dict[str, Tensor]) -> Tensor:
        """Return states (B, S) for a history (each (B, T, …), raw units) of at least ``config.history`` observations.

        Raises:
            ConfigError: the history is shorter.
        """
        steps, parts = self.config.history, []
        for key in self.keys:
            if history[key].shape[1] < steps:
                raise ConfigError(
                    f"the critic sees {steps} observations, but the history holds {history[key].shape[1]}"
                )
            parts.append(self.normalizer.normalize(key, history[key][:, -steps:].float()).flatten(1))
        return torch.cat(parts, dim=-1).clamp(-self.config.clamp, self.config.clamp)

    def action(self, chunks: Tensor) -> Tensor:
        """Return the critic's actions (…, D) for chunks (…, H, A) in the units of the spec, H >= ``config.steps``."""
        inside = chunks[..., : self.config.steps, :].clamp(self.get_buffer("low"), self.get_buffer("high"))
        return self.normalizer.normalize("action", inside).flatten(-2)

    def chunk(self, action: Tensor) -> Tensor:
        """Return (…, steps, A) in the units of the spec, inside its bounds: the inverse of `action`."""
        chunks = self.normalizer.unnormalize("action", action.unflatten(-1, (self.config.steps, -1)))
        return chunks.clamp(self.get_buffer("low"), self.get_buffer("high"))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest action (D,) as the critic takes them; infinite where unbounded."""
        low, high = (self.normalizer.normalize("action", self.get_buffer(name)) for name in ("low", "high"))
        return low.repeat(self.config.steps), high.repeat(self.config.steps)

    def forward(self, state: Tensor, actions: Tensor, members: Tensor | None = None) -> Tensor:
        """Return values (E, B, N) of N actions (B, N, D) per state (B, S), in float32.

        Args:
            state: (B, S).
            actions: (B, N, D).
            members: indices (M,) of the networks to ask; the result is then (M, B, N).
        """
        return score(self.net, state, actions, members)


def score(net: EnsembleMLP, state: Tensor, actions: Tensor, members: Tensor | None = None) -> Tensor:
    """Return values (E, B, N) of N actions (B, N, D) per state (B, S).

    In float32 whatever ``net`` is trained in: the differences between a state's candidates are what counts.
    """
    rows = torch.cat([state.unsqueeze(1).expand(-1, actions.shape[1], -1), actions], dim=-1)
    dtype, net.dtype = net.dtype, torch.float32
    try:
        values: Tensor = net(rows.flatten(0, 1), members)
    finally:
        net.dtype = dtype
    return values.squeeze(-1).unflatten(-1, actions.shape[:2])
