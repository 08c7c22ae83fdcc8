"""The interface of generative action heads.

A head turns noise (B, H, A) and a condition (B, C) into a chunk of normalised actions (B, H, A). Latent-space RL
steers it through ``noise=``, policy-gradient fine-tuning reads ``trace``, and every kind of inference-time steering is
a guide: a function that changes the denoised estimate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor, nn

from robot_rl.core.errors import CapabilityError
from robot_rl.heads.path import Estimate, Path

Guide = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``guide(x0_hat (B, H, A), x (B, H, A), t (B,)) -> x0_hat``."""


@dataclass(frozen=True)
class Capabilities:
    """What a head can do; methods that need more refuse it and list the heads that can."""

    steerable: bool
    """Sampling is a deterministic function of the start noise (latent-space RL)."""
    chain_log_prob: bool
    """Each sampling step is a Gaussian with a density (policy-gradient RL on the denoising chain)."""
    guidable: bool = True
    """Guides may change the denoised estimate during sampling."""


@dataclass
class SampleResult:
    """Sampled chunks and, if asked for, how they came about."""

    actions: Tensor
    """(B, H, A) normalised actions."""
    calls: int
    """Evaluations of the network per chunk."""
    trace: list[Tensor] = field(default_factory=list)
    """Chain from noise to actions, each (B, H, A); ``steps + 1`` long where recorded."""


class Head(nn.Module, ABC):
    """A generative head over chunks of ``horizon`` actions of ``action_size`` numbers."""

    path: Path
    capabilities: Capabilities

    def __init__(self, backbone: nn.Module, horizon: int, action_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.horizon, self.action_size = horizon, action_size

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape (H, A) of one start noise."""
        return (self.horizon, self.action_size)

    @abstractmethod
    def loss(
        self, actions: Tensor, cond: Tensor, mask: Tensor | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Return the training loss per sample (B,).

        Args:
            actions: (B, H, A) normalised.
            cond: (B, C).
            mask: (B, H) bool, False for padding, which does not count; None counts everything.
            generator: source of times and noise.
        """

    @abstractmethod
    def sample(
        self,
        cond: Tensor,
        noise: Tensor | None = None,
        steps: int | None = None,
        guides: Sequence[Guide] = (),
        trace: bool = False,
        generator: Generator | None = None,
    ) -> SampleResult:
        """Sample chunks for conditions (B, C), starting from ``noise`` (B, H, A) or from fresh N(0, I)."""

    def predict(self, x: Tensor, t: Tensor, cond: Tensor) -> Estimate:
        """Return the denoised and the noise estimate at x (B, H, A), times t (B,) in [0, 1]."""
        return self.path.estimate(self.backbone(x, t, cond), x, t)

    def step_log_prob(self, trace: Sequence[Tensor], cond: Tensor, **options: Any) -> Tensor:
        """Return log-densities (B, K) of the steps of a stochastic chain; heads without one refuse."""
        raise CapabilityError(
            f"{type(self).__name__} samples deterministically and has no step densities; heads that have: diffusion"
        )


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Average squared errors (B, H, A) per sample over unmasked steps; returns (B,)."""
    per_step = error.mean(dim=-1)
    if mask is None:
        return per_step.mean(dim=-1)
    weight = mask.to(per_step.dtype)
    return (per_step * weight).sum(dim=-1) / weight.sum(dim=-1).clamp_min(1)
