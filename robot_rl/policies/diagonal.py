"""A Gaussian policy with independent actions and a state-independent deviation, as policy-gradient methods take it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.policy import Policy
from robot_rl.core.spec import Spec
from robot_rl.data.normalizer import Normalizer
from robot_rl.nets.mlp import mlp

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}


@dataclass(frozen=True)
class DiagonalConfig:
    """Shape of a diagonal Gaussian policy."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""
    activation: Literal["tanh", "relu", "elu"] = "tanh"
    """Nonlinearity between the layers."""
    log_std: float = 0.0
    """Initial log standard deviation, in units of half the range of actions."""
    obs_steps: int = 1
    """Observations T that the policy sees."""
    clamp: float = 10.0
    """Normalised observations are clamped to this."""
    low: tuple[float, ...] = ()
    """Lowest action, in the units of the spec."""
    high: tuple[float, ...] = ()
    """Highest action."""
    deterministic: bool = True
    """Act with the mean; else sample."""


class DiagonalPolicy(nn.Module):
    """``u ~ N(mean(observations), diag(std ** 2))``; the action is u mapped from [-1, 1] to the range, and clipped.

    Initialisation as is usual for it (37 details of PPO, ICLR blog track 2022): orthogonal, the last layer a hundredth.
    """

    kind = "diagonal"
    closed_loop = False
    base: Policy | None = None
    horizon = 1
    execute_steps = 1

    def __init__(self, spec: Spec, config: DiagonalConfig) -> None:
        super().__init__()
        images = [key for key, array in spec.observation.items() if array.is_image]
        if images:
            raise CapabilityError(f"a diagonal policy sees no images, and '{images[0]}' is one; choose state keys")
        size = spec.action.size
        if len(config.low) != size or len(config.high) != size:
            raise ConfigError(f"a diagonal policy needs {size} bounds, got {len(config.low)} and {len(config.high)}")
        if config.activation not in ACTIVATIONS:
            raise ConfigError(f"activation '{config.activation}' does not exist; available: {', '.join(ACTIVATIONS)}")
        self.spec, self.config, self.obs_steps = spec, config, config.obs_steps
        self.normalizer = Normalizer(spec)
        self.state_size = config.obs_steps * sum(array.size for array in spec.observation.values())
        self.mean = mlp((self.state_size, *config.hidden, size), ACTIVATIONS[config.activation])
        layers = [layer for layer in self.mean if isinstance(layer, nn.Linear)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight, 0.01 if layer is layers[-1] else math.sqrt(2))
            nn.init.zeros_(layer.bias)
        self.log_std = nn.Parameter(torch.full((size,), float(config.log_std)))
        self.register_buffer("low", torch.tensor(config.low), persistent=False)
        self.register_buffer("high", torch.tensor(config.high), persistent=False)
        self._generator = torch.Generator().manual_seed(0)

    @classmethod
    def from_parts(cls, config: dict[str, Any], spec: Spec, base: Policy | None = None) -> DiagonalPolicy:
        """Rebuild from a checkpoint's configuration."""
        tuples = {key: tuple(value) for key, value in config.items() if isinstance(value, (list, tuple))}
        return cls(spec, DiagonalConfig(**{**config, **tuples}))

    def config_dict(self) -> dict[str, Any]:
        """Return the configuration, ready for JSON."""
        return asdict(self.config)

    def seed(self, seed: int) -> None:
        """Make sampling reproducible."""
        self._generator.manual_seed(seed)

    @torch.no_grad()
    def features(self, history: Observation) -> Tensor:
        """Return states (B, S): the normalised, clamped history (each (B, T, …)), flattened."""
        clamp = self.config.clamp
        parts = []
        for key in self.spec.observation:
            values = torch.as_tensor(history[key], dtype=torch.float32, device=self.log_std.device)
            parts.append(self.normalizer.normalize(key, values).flatten(1))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).clamp(-clamp, clamp)

    def scale_up(self, u: Tensor) -> Tensor:
        """Map u (…, A) from [-1, 1] to actions in the units of the spec, clipped to the range."""
        low, high = self.get_buffer("low"), self.get_buffer("high")
        return low + (u.clamp(-1, 1) + 1) * 0.5 * (high - low)

    @torch.no_grad()
    def plan(self, history: Observation) -> np.ndarray:
        """Return one action per history: (B, 1, A) in the units of the spec."""
        u = self.mean(self.features(history))
        if not self.config.deterministic:
            u = u + self.log_std.exp() * torch.randn(u.shape, generator=self._generator).to(u.device)
        return self.scale_up(u)[:, None].cpu().numpy()

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return ``actions`` unchanged."""
        return actions
