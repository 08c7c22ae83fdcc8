"""A diffusion policy whose last denoising steps have a network of their own (DPPO, arXiv 2409.00588)."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation
from robot_rl.core.errors import ConfigError
from robot_rl.core.policy import Policy
from robot_rl.core.spec import Spec
from robot_rl.data.normalizer import Normalizer
from robot_rl.heads.base import Capabilities, require_head


@dataclass(frozen=True)
class ChainPolicyConfig:
    """How a policy with tuned last denoising steps samples."""

    steps: int = 0
    """Denoising steps K per plan; 0 for as many as the base takes."""
    tuned_steps: int = 5
    """Last steps K' of these that the tuned network takes; the base's network takes the steps before."""
    eta: float = 0.0
    """Share of ancestral noise: 0 is DDIM; 1 with as many steps as the base has training levels is DDPM."""


class ChainPolicy(nn.Module):
    """Denoises with the frozen base's network first and with a tuned copy of it in the last steps.

    It starts as the base. The base carries normaliser and conditioning, which tuning does not touch.
    """

    kind = "chain"
    closed_loop = False
    base: Any

    def __init__(self, base: Policy, config: ChainPolicyConfig) -> None:
        super().__init__()
        head = require_head(base, "chain_log_prob", "tuning the last denoising steps")
        assert isinstance(base, nn.Module)
        self.base = base.requires_grad_(False).eval()
        self.tuned = copy.deepcopy(head)
        self.config = config
        self.steps, self.tuned_steps = config.steps or head.steps, config.tuned_steps
        if not 1 <= self.tuned_steps <= self.steps:
            raise ConfigError(f"tuned_steps={self.tuned_steps} is outside 1..{self.steps}, the denoising steps")
        self.spec: Spec = base.spec
        self.obs_steps, self.horizon, self.execute_steps = base.obs_steps, base.horizon, base.execute_steps
        self.eta = config.eta
        self.capabilities = Capabilities(steerable=self.eta == 0, chain_log_prob=False, guidable=False)
        self._generator = torch.Generator()

    @classmethod
    def from_parts(cls, config: dict[str, Any], spec: Spec, base: Policy | None) -> ChainPolicy:
        """Rebuild from a checkpoint's configuration and its base."""
        if base is None:
            raise ConfigError("the checkpoint of a policy with tuned denoising steps holds no base policy")
        return cls(base, ChainPolicyConfig(**config))

    def config_dict(self) -> dict[str, Any]:
        """Return the configuration, ready for JSON."""
        return asdict(self.config)

    @property
    def normalizer(self) -> Normalizer:
        """The base's normaliser."""
        return self.base.normalizer

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.base.device

    def encode(self, history: dict[str, Tensor]) -> Tensor:
        """Return the base's conditions (B, C) for a history of tensors (each (B, T, …), raw units)."""
        return self.base.encode(history)

    def normalize_action(self, actions: Tensor) -> Tensor:
        """Map actions (…, A) from their units to about [-1, 1]."""
        return self.base.normalize_action(actions)

    def unnormalize_action(self, actions: Tensor) -> Tensor:
        """Map normalised actions (…, A) to their units, inside the spec's bounds."""
        return self.base.unnormalize_action(actions)

    def seed(self, seed: int) -> None:
        """Restart the stream of noises; one stream serves all lanes in their order."""
        self._generator.manual_seed(seed)

    def draw_noise(self, batch: int) -> Tensor:
        """Return the next noises (B, H, A) of the policy's own stream."""
        return torch.randn((batch, *self.tuned.noise_shape), generator=self._generator).to(self.device)

    @torch.no_grad()
    def walk(
        self,
        cond: Tensor,
        noise: Tensor,
        eta: float,
        std_floor: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample chunks and return the iterates (B, K' + 1, H, A) that the tuned steps start from and arrive at.

        Args:
            cond: (B, C).
            noise: (B, H, A) start noise.
            eta: share of ancestral noise.
            std_floor: least standard deviation of the noise in tuned steps.
            generator: source of noise; None for the policy's own stream.
        """
        x, first = noise, self.steps - self.tuned_steps
        chain = []
        for k in range(self.steps):
            if k >= first:
                chain.append(x)
            head = self.tuned if k >= first else self.base.head
            x, std = head.chain_step(x, torch.full((len(x),), k, device=x.device), cond, self.steps, eta=eta)
            floor = std_floor if k >= first else 0.0
            if eta > 0 or floor > 0:
                fresh = torch.randn(x.shape, generator=generator or self._generator)
                x = x + std.clamp_min(floor) * fresh.to(x.device)
        return torch.stack([*chain, x], dim=1)

    def sample(self, cond: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return normalised chunks (B, H, A) for conditions (B, C); deterministic given ``noise`` where eta is 0."""
        if noise is None:
            noise = self.draw_noise(len(cond))
        return self.walk(cond, noise, self.eta)[:, -1]

    def plan(self, history: Observation) -> np.ndarray:
        """Return chunks (B, H, A) in the action's units for a history of arrays (B, T, …)."""
        tensors = {key: torch.from_numpy(np.asarray(history[key])).to(self.device) for key in self.spec.observation}
        return self.unnormalize_action(self.sample(self.encode(tensors))).cpu().numpy()

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return ``actions`` unchanged: this policy is open loop within a chunk."""
        return actions
