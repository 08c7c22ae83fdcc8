"""A frozen generative policy steered through its start noise (DSRL, arXiv 2506.15799; GoRL, arXiv 2512.02581)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation
from robot_rl.core.errors import ConfigError
from robot_rl.core.policy import Policy
from robot_rl.core.spec import Spec
from robot_rl.heads.base import refusal
from robot_rl.nets.device import device_of
from robot_rl.nets.mlp import mlp
from robot_rl.policies.gaussian import SquashedGaussian


@dataclass(frozen=True)
class SteeredPolicyConfig:
    """Shape of the noise policy."""

    bound: float = 1.5
    """The actor's output is scaled by this b: the largest magnitude of a noise element where it is squashed."""
    squashed: bool = True
    """Bound the noise by tanh; else the actor is a Gaussian that starts as N(0, I), the base's own prior."""
    noise_steps: int = 0
    """Steps of the horizon that get noise of their own, each held for horizon / noise_steps; 0 for every step."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    deterministic: bool = False
    """Steer with the actor's mean; else sample, which keeps the search that the base's own noise is."""
    prior: bool = False
    """Ignore the actor and draw N(0, I), which is the base policy."""


class LatentGaussian(nn.Module):
    """Noises ``N(mean(state), diag(std ** 2))`` without bounds; a new one is N(0, I) for every state.

    With the base's prior as its start, a steered policy begins as the base itself. It learns by policy gradients, for
    which a deviation that does not depend on the state is enough.
    """

    def __init__(self, state_size: int, action_size: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.action_size = action_size
        self.mean = mlp((state_size, *hidden, action_size), nn.Tanh)
        self.log_std = nn.Parameter(torch.zeros(action_size))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Become N(0, I) again, with new hidden weights."""
        layers = [layer for layer in self.mean if isinstance(layer, nn.Linear)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(self.log_std)

    def forward(self, state: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Return noises (B, D) and log-densities (B,) for states (B, S) and standard normal ``eps`` (B, D)."""
        noise = torch.addcmul(self.mean(state), eps, self.log_std.exp())
        return noise, self._density(eps)

    def log_prob(self, state: Tensor, noise: Tensor) -> Tensor:
        """Return log-densities (B,) of given noises (B, D), summed over D."""
        return self._density((noise - self.mean(state)) * (-self.log_std).exp())

    def mode(self, state: Tensor) -> Tensor:
        """Return the mean (B, D)."""
        mean: Tensor = self.mean(state)
        return mean

    def _density(self, eps: Tensor) -> Tensor:
        return (-0.5 * eps.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


class SteeredPolicy(nn.Module):
    """``chunk = base(observation, noise = bound * actor(observation))``; the base's weights are never touched."""

    kind = "steered"
    closed_loop = False
    base: Any

    def __init__(self, base: Policy, config: SteeredPolicyConfig) -> None:
        super().__init__()
        missing = [name for name in ("encode", "sample", "unnormalize_action") if not hasattr(base, name)]
        if not isinstance(base, nn.Module) or missing:
            raise refusal("steering", "steerable", base)
        sampler = getattr(base, "head", base)
        if hasattr(sampler, "capabilities") and not sampler.capabilities.steerable:
            raise refusal("steering", "steerable", sampler)
        self.base = base.requires_grad_(False).eval()
        self.config = config
        self.spec: Spec = base.spec
        self.obs_steps, self.horizon, self.execute_steps = base.obs_steps, base.horizon, base.execute_steps
        steps = config.noise_steps or self.horizon
        if self.horizon % steps:
            raise ConfigError(f"noise_steps={steps} does not divide the base's horizon of {self.horizon}")
        self.noise_shape = (steps, self.spec.action.size)
        with torch.no_grad():
            shapes = {k: (1, self.obs_steps, *a.shape) for k, a in self.spec.observation.items()}
            zeros = {k: torch.zeros(shape, device=device_of(base)) for k, shape in shapes.items()}
            self.state_size = int(base.encode(zeros).shape[-1])
        size = steps * self.spec.action.size
        self.actor: Any = (
            SquashedGaussian(self.state_size, size, config.hidden, layer_norm=True)
            if config.squashed
            else LatentGaussian(self.state_size, size, config.hidden)
        )
        self._generator = torch.Generator().manual_seed(0)

    @classmethod
    def from_parts(cls, config: dict[str, Any], spec: Spec, base: Policy | None) -> SteeredPolicy:
        """Rebuild from a checkpoint's configuration and its base."""
        if base is None:
            raise ConfigError("a steered policy's checkpoint holds no base policy")
        return cls(base, SteeredPolicyConfig(**{**config, "hidden": tuple(config["hidden"])}))

    def config_dict(self) -> dict[str, Any]:
        """Return the configuration, ready for JSON."""
        return asdict(self.config)

    def train(self, mode: bool = True) -> SteeredPolicy:
        """Set the mode of the noise policy; the base stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def seed(self, seed: int) -> None:
        """Make sampling reproducible."""
        self._generator.manual_seed(seed)
        self.base.seed(seed)

    @torch.no_grad()
    def encode(self, history: Observation) -> Tensor:
        """Return the base's conditioning vectors (B, C) for a history (each (B, T, …))."""
        device = device_of(self.actor)
        return self.base.encode({k: torch.as_tensor(v, dtype=torch.float32, device=device) for k, v in history.items()})

    def unnormalize_action(self, actions: Tensor) -> Tensor:
        """Map normalised actions (…, A) to the units of the spec, as the base does."""
        executable: Tensor = self.base.unnormalize_action(actions)
        return executable

    def spread(self, noise: Tensor) -> Tensor:
        """Hold noise (B, steps * A) over the horizon; returns (B, H, A)."""
        blocks = noise.unflatten(-1, self.noise_shape)
        return blocks.repeat_interleave(self.horizon // self.noise_shape[0], dim=1)

    def decode(self, cond: Tensor, noise: Tensor) -> Tensor:
        """Return the base's normalised chunks (B, H, A) for unscaled noise (B, steps * A)."""
        return self.base.sample(cond, noise=self.spread(noise))

    def draw(self, batch: int) -> Tensor:
        """Draw unscaled prior noise (B, steps * A) ~ N(0, I)."""
        return torch.randn(batch, self.actor.action_size, generator=self._generator)

    @torch.no_grad()
    def plan(self, history: Observation) -> np.ndarray:
        """Return steered chunks (B, H, A) in the units of the spec."""
        cond = self.encode(history)
        drawn = self.config.prior or not self.config.deterministic
        eps = self.draw(len(cond)).to(cond.device) if drawn else None
        return self.base.unnormalize_action(self.base.sample(cond, noise=self.steer(cond, eps))).cpu().numpy()

    def steer(self, cond: Tensor, eps: Tensor | None) -> Tensor:
        """Return the base's start noise (B, H, A) for conditions (B, C) and standard normal ``eps`` (B, steps * A)."""
        if self.config.prior:
            noise = eps
        elif self.config.deterministic:
            noise = self.config.bound * self.actor.mode(cond)
        else:
            noise = self.config.bound * self.actor(cond, eps)[0]
        return self.spread(noise)

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return ``actions`` unchanged."""
        return actions
