"""A small closed-loop correction on top of a frozen chunked policy (ResiP, arXiv 2407.16677)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.policy import Policy
from robot_rl.core.spec import Spec
from robot_rl.nets.mlp import mlp


@dataclass(frozen=True)
class ResidualPolicyConfig:
    """Shape of the correction."""

    scale: float = 0.2
    """Correction per unit of the residual's output, in the base's normalised action units."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    log_std: float = -1.5
    """Initial log standard deviation of the residual's output while exploring."""
    history: int = 1
    """Newest observations that the correction sees; at most the base's ``obs_steps``."""
    keys: tuple[str, ...] = ()
    """Observations that the correction sees; empty for all of the base's that are no images."""
    clamp: float = 3.0
    """Normalised observations are clamped to this."""
    squashed: bool = False
    """Whether tanh keeps the mean of the residual's output within (-1, 1), so that ``scale`` bounds the correction."""


class ResidualPolicy(nn.Module):
    """``action = base action + scale * u(observation, base action)``, corrected at every control step.

    The base is frozen and keeps its own normaliser; its last layer starts at zero, so that a new residual policy
    gives the base's actions bit for bit. `refine` uses the mean of u.
    """

    kind = "residual"
    closed_loop = True
    base: Any

    def __init__(self, base: Policy, config: ResidualPolicyConfig) -> None:
        super().__init__()
        units = hasattr(base, "normalizer") and hasattr(base, "normalize_action")
        if not isinstance(base, nn.Module) or not units or base.closed_loop:
            raise CapabilityError(
                "a residual needs a base with a normaliser of actions and without closed-loop correction (kind "
                f"'chunked' or 'chain'), got {type(base).__name__}"
            )
        self.base = base.requires_grad_(False).eval()
        self.config = config
        self.spec: Spec = base.spec
        self.obs_steps, self.horizon, self.execute_steps = base.obs_steps, base.horizon, base.execute_steps
        if not 1 <= config.history <= base.obs_steps:
            raise ConfigError(f"history={config.history} is outside 1..{base.obs_steps}, what the base keeps")
        self.keys = config.keys or tuple(k for k, a in base.spec.observation.items() if not a.is_image)
        sizes = [self.spec.observation[key].size for key in self.keys]
        action_size = self.spec.action.size
        self.state_size = config.history * sum(sizes) + action_size
        self.actor = mlp((self.state_size, *config.hidden, action_size))
        last = self.actor[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        if config.squashed:
            self.actor.append(nn.Tanh())
        self.log_std = nn.Parameter(torch.full((action_size,), float(config.log_std)))
        self.register_buffer(
            "low", torch.as_tensor(self.spec.action.bounds()[0], dtype=torch.float32), persistent=False
        )
        self.register_buffer(
            "high", torch.as_tensor(self.spec.action.bounds()[1], dtype=torch.float32), persistent=False
        )

    @classmethod
    def from_parts(cls, config: dict[str, Any], spec: Spec, base: Policy | None) -> ResidualPolicy:
        """Rebuild from a checkpoint's configuration and its base."""
        if base is None:
            raise ConfigError("a residual policy's checkpoint holds no base policy")
        tuples = {key: tuple(value) for key, value in config.items() if isinstance(value, (list, tuple))}
        return cls(base, ResidualPolicyConfig(**{**config, **tuples}))

    def config_dict(self) -> dict[str, Any]:
        """Return the configuration, ready for JSON."""
        return asdict(self.config)

    def train(self, mode: bool = True) -> ResidualPolicy:
        """Set the mode of the correction; the base stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def seed(self, seed: int) -> None:
        """Make the base's sampling reproducible."""
        self.base.seed(seed)

    @property
    def real_time(self) -> tuple[str, ...]:
        """The base's ways to continue a running chunk."""
        return tuple(getattr(self.base, "real_time", ()))

    @property
    def prefix_steps(self) -> int:
        """Most actions at the beginning of a chunk that the base can be told."""
        return int(getattr(self.base, "prefix_steps", 0))

    def plan(self, history: Observation, **options: Any) -> np.ndarray:
        """Return the base's chunks (B, H, A); ``options`` are its own."""
        return self.base.plan(history, **options)

    @torch.no_grad()
    def features(self, history: Observation, actions: np.ndarray) -> Tensor:
        """Return what the correction sees (B, S): clamped normalised observations, then the normalised base action."""
        device = self.log_std.device
        recent = {
            key: torch.as_tensor(history[key][:, -self.config.history :], dtype=torch.float32, device=device)
            for key in self.keys
        }
        return self._features(recent, torch.as_tensor(actions, dtype=torch.float32, device=device))

    def _features(self, recent: dict[str, Tensor], actions: Tensor) -> Tensor:
        parts = []
        for key in self.keys:
            normalized = self.base.normalizer.normalize(key, recent[key])
            parts.append(normalized.flatten(1).clamp(-self.config.clamp, self.config.clamp))
        return torch.cat([*parts, self.base.normalize_action(actions)], dim=-1)

    def corrected(self, history: dict[str, Tensor], actions: Tensor) -> Tensor:
        """Return what `refine` does for tensors: the corrected actions (B, A)."""
        recent = {key: history[key][:, -self.config.history :] for key in self.keys}
        delta = self._delta(self.actor(self._features(recent, actions)))
        return (actions + delta).clamp(self.get_buffer("low"), self.get_buffer("high"))

    def _delta(self, u: Tensor) -> Tensor:
        """Return by how much the residual's output u (B, A) moves actions, in the spec's units."""
        ones = torch.ones_like(u[:1])
        normalizer = self.base.normalizer
        unit = normalizer.unnormalize("action", ones) - normalizer.unnormalize("action", 0 * ones)
        return self.config.scale * unit * u

    def apply_correction(self, actions: np.ndarray, u: Tensor) -> np.ndarray:
        """Return the base's actions (B, A) moved by the residual's output u (B, A), inside the spec's bounds."""
        delta = self._delta(u).cpu().numpy()
        # The base stays inside the bounds, so that clipping changes nothing where there is no correction.
        return np.clip(actions + delta, self.get_buffer("low").cpu().numpy(), self.get_buffer("high").cpu().numpy())

    def correction_of(self, actions: np.ndarray, base_actions: np.ndarray) -> Tensor:
        """Return the residual's output u (B, A) that turns ``base_actions`` (B, A) into ``actions`` (B, A)."""
        device = self.log_std.device
        wanted, base = (torch.as_tensor(a, dtype=torch.float32, device=device) for a in (actions, base_actions))
        return (self.base.normalize_action(wanted) - self.base.normalize_action(base)) / self.config.scale

    @torch.no_grad()
    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return the base's actions (B, A) with the mean correction for the newest history (each (B, T, …))."""
        return self.apply_correction(actions, self.actor(self.features(history, actions)))

    def log_prob(self, features: Tensor, u: Tensor) -> Tensor:
        """Return the log-density (B,) of residual outputs u (B, A), summed over the action."""
        eps = (u - self.actor(features)) * (-self.log_std).exp()
        return (-0.5 * eps.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Return the entropy of u, a scalar."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
