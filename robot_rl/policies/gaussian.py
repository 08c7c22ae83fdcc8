"""A Gaussian policy squashed to the action bounds, and the squashed Gaussian that latent steering uses as well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation
from robot_rl.core.errors import ConfigError, UnknownNameError
from robot_rl.core.policy import Policy
from robot_rl.core.spec import Spec
from robot_rl.data.frames import parse_source
from robot_rl.data.normalizer import Normalizer
from robot_rl.nets.ensemble import EnsembleMLP

LOG_STD_RANGE = (-20.0, 2.0)


class SquashedGaussian(nn.Module):
    """``tanh(mean + std * eps)``: actions (B, D) in (-1, 1) with their log-density (SAC, arXiv 1801.01290)."""

    def __init__(self, state_size: int, action_size: int, hidden: tuple[int, ...], layer_norm: bool = False) -> None:
        super().__init__()
        self.action_size = action_size
        self.net = EnsembleMLP((state_size, *hidden, 2 * action_size), layer_norm=layer_norm)

    def forward(self, state: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Return actions (B, D) and log-densities (B,) for states (B, S) and standard normal ``eps`` (B, D)."""
        output = self.net(state)[0]
        if not output.requires_grad:
            return _squashed_sample(output, eps)[:2]
        action, log_prob = _SquashedSample.apply(output, eps)
        return action, log_prob

    def mode(self, state: Tensor) -> Tensor:
        """Return the squashed mean (B, D)."""
        return self.distribution(state)[0].tanh()

    def distribution(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation (B, D) before squashing, in float32."""
        mean, log_std = self.net(state)[0].chunk(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD_RANGE)


def _squashed_sample(output: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return actions (B, D), log-densities (B,), and log standard deviations and ``std * eps`` (B, D)."""
    mean, raw = output.chunk(2, dim=-1)
    log_std = raw.clamp(*LOG_STD_RANGE)
    spread = log_std.exp().mul_(eps)
    pre = mean + spread
    action = pre.tanh()
    # log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2 x)), which does not round to log 0.
    squash = nn.functional.softplus(pre.mul(-2)).add_(pre)
    density = squash.mul_(2).sub_(log_std).addcmul_(eps, eps, value=-0.5).sum(-1)
    constant = eps.shape[-1] * (2 * math.log(2) + 0.5 * math.log(2 * math.pi))
    return action, density.sub_(constant), raw, spread


class _SquashedSample(torch.autograd.Function):
    """`_squashed_sample`'s action and log-density, with the gradient written out.

    With ``pre`` the argument of tanh: d(log density)/d(pre) = 2 a at fixed eps, and d(log density)/d(log_std) adds -1.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        action, density, raw, spread = _squashed_sample(output, eps)
        ctx.save_for_backward(raw, spread, action)
        return action, density

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, action_gradient: Tensor, density_gradient: Tensor) -> tuple[Tensor, None]:
        raw, spread, action = ctx.saved_tensors
        density_gradient = density_gradient.unsqueeze(-1)
        along = torch.addcmul(action_gradient, action_gradient * action, action, value=-1)
        along = along.addcmul_(action, density_gradient, value=2)
        low, high = LOG_STD_RANGE
        inside = (raw > low) & (raw < high)
        return torch.cat([along, (along * spread).sub_(density_gradient).mul_(inside)], dim=-1), None


@dataclass(frozen=True)
class GaussianConfig:
    """Shape of a Gaussian policy."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    obs_steps: int = 1
    """Observations T that the policy sees."""
    horizon: int = 1
    """Actions per chunk; all are executed."""
    low: tuple[float, ...] = ()
    """Lowest action, in the units of the spec."""
    high: tuple[float, ...] = ()
    """Highest action."""
    deterministic: bool = True
    """Act with the squashed mean; else sample."""
    relative_to: str = ""
    """Part of the newest observation that actions are offsets from, such as ``state[0:6]``; ``low`` and ``high`` then
    bound the offsets. Empty for the actions themselves."""


class GaussianPolicy(nn.Module):
    """Plans ``horizon`` actions at once from the flattened, normalised history; the base of RLPD."""

    kind = "gaussian"
    closed_loop = False
    base: Policy | None = None

    def __init__(self, spec: Spec, config: GaussianConfig) -> None:
        super().__init__()
        if len(config.low) != spec.action.size or len(config.high) != spec.action.size:
            raise ConfigError(
                f"a Gaussian policy needs {spec.action.size} bounds, got {len(config.low)} and {len(config.high)}"
            )
        self.spec, self.config = spec, config
        self._origin = _part(config.relative_to, spec) if config.relative_to else None
        self.obs_steps, self.horizon, self.execute_steps = config.obs_steps, config.horizon, config.horizon
        self.normalizer = Normalizer(spec)
        state_size = config.obs_steps * sum(array.size for array in spec.observation.values())
        self.actor = SquashedGaussian(state_size, config.horizon * spec.action.size, config.hidden)
        self.register_buffer("low", torch.tensor(config.low), persistent=False)
        self.register_buffer("high", torch.tensor(config.high), persistent=False)
        self._generator = torch.Generator().manual_seed(0)

    @classmethod
    def from_parts(cls, config: dict[str, Any], spec: Spec, base: Policy | None = None) -> GaussianPolicy:
        """Rebuild from a checkpoint's configuration."""
        tuples = {key: tuple(value) for key, value in config.items() if isinstance(value, (list, tuple))}
        return cls(spec, GaussianConfig(**{**config, **tuples}))

    def config_dict(self) -> dict[str, Any]:
        """Return the configuration, ready for JSON."""
        return asdict(self.config)

    def seed(self, seed: int) -> None:
        """Make sampling reproducible."""
        self._generator.manual_seed(seed)

    def features(self, history: dict[str, Tensor]) -> Tensor:
        """Return states (B, S): the normalised history (each (B, T, …)), flattened and clamped to [-5, 5]."""
        parts = [self.normalizer.normalize(key, history[key]).flatten(1) for key in self.spec.observation]
        return torch.cat(parts, dim=-1).clamp(-5, 5)

    def origin(self, history: Mapping[str, Any]) -> Tensor | None:
        """Return (B, 1, A) what actions planned from a history (each (B, T, …)) are offsets from; None for nothing."""
        if self._origin is None:
            return None
        key, part = self._origin
        newest = torch.as_tensor(history[key], dtype=torch.float32, device=self.get_buffer("low").device)[:, -1]
        return newest[:, None, part]

    def unsquash(self, actions: Tensor, origin: Tensor | None = None) -> Tensor:
        """Map (B, H * A) in [-1, 1] to chunks (B, H, A) in the units of the spec; ``origin`` is that of the history."""
        chunks = actions.unflatten(-1, (self.horizon, -1))
        chunks = self.get_buffer("low") + (chunks + 1) / 2 * (self.get_buffer("high") - self.get_buffer("low"))
        return chunks if origin is None else chunks + origin

    def squash(self, chunks: Tensor, origin: Tensor | None = None) -> Tensor:
        """Map chunks (B, H, A) in the units of the spec to (B, H * A) in [-1, 1]; the inverse of `unsquash`."""
        low, high = self.get_buffer("low"), self.get_buffer("high")
        chunks = chunks if origin is None else chunks - origin
        return ((chunks - low) / (high - low) * 2 - 1).clamp(-1, 1).flatten(1)

    def loss(self, batch: dict[str, Any], generator: torch.Generator | None = None) -> Tensor:
        """Return the squared error (B,) of the squashed mean on windows (`robot_rl.data.windows.WindowSampler`)."""
        observed = {key: value.float() for key, value in batch["observation"].items()}
        wanted = self.squash(batch["action"], self.origin(observed))
        return (self.actor.mode(self.features(observed)) - wanted).square().mean(-1)

    @torch.no_grad()
    def plan(self, history: Observation) -> np.ndarray:
        """Return chunks (B, H, A) in the units of the spec."""
        device = self.get_buffer("low").device
        state = self.features({k: torch.as_tensor(v, dtype=torch.float32, device=device) for k, v in history.items()})
        origin = self.origin(history)
        if self.config.deterministic:
            return self.unsquash(self.actor.mode(state), origin).cpu().numpy()
        eps = torch.randn(len(state), self.actor.action_size, generator=self._generator).to(device)
        return self.unsquash(self.actor(state, eps)[0], origin).cpu().numpy()

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return ``actions`` unchanged."""
        return actions


def _part(source: str, spec: Spec) -> tuple[str, slice]:
    """Return the observation and the part of it that actions are offsets from."""
    key, part = parse_source(source)
    if key not in spec.observation:
        raise UnknownNameError("observation", key, spec.observation)
    size = len(range(spec.observation[key].size)[part])
    if len(spec.observation[key].shape) != 1 or size != spec.action.size:
        raise ConfigError(f"'{source}' has {size} elements; actions that are offsets from it have {spec.action.size}")
    return key, part
