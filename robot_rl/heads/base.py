"""The interface of generative action heads.

A head turns noise (B, H, A) and a condition (B, C) into a chunk of normalised actions (B, H, A). Latent-space RL
steers it through ``noise=``, policy-gradient fine-tuning reads ``trace``, and every kind of inference-time steering is
a guide: a function that changes the denoised estimate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

from robot_rl.core import registry
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.heads.chain import chain_moments, normal_log_prob
from robot_rl.heads.continuation import Prefix
from robot_rl.heads.path import Estimate, Path
from robot_rl.nets.device import draw

Guide = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``guide(x0_hat (B, H, A), x (B, H, A), t (B,)) -> x0_hat``; with an attribute ``needs_gradient`` that is true, x0_hat
may be differentiated with respect to x."""


@dataclass(frozen=True)
class Capabilities:
    """What a head can do; methods that need more refuse it and list the heads that can."""

    steerable: bool
    """Sampling is a deterministic function of the start noise (latent-space RL); a head's settings may rule it out."""
    chain_log_prob: bool
    """Sampling steps can be Gaussians of scheduled deviation (policy-gradient RL on the denoising chain)."""
    velocity_steps: bool = False
    """Sampling is Euler integration of a velocity, so that learned noise gives every step a density (ReinFlow)."""
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
    steps: int
    """Sampling steps, unless a call says otherwise."""

    def __init__(self, backbone: nn.Module, horizon: int, action_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.horizon, self.action_size = horizon, action_size

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape (H, A) of one start noise."""
        return (self.horizon, self.action_size)

    @property
    def prefix_steps(self) -> int:
        """Most actions at the beginning of a chunk that may be known while sampling; 0 if never trained for it."""
        return int(getattr(self.backbone, "prefix_steps", 0))

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
        prefix: Prefix | None = None,
    ) -> SampleResult:
        """Sample chunks for conditions (B, C), starting from ``noise`` (B, H, A) or from fresh N(0, I).

        Guides change the denoised estimate. A ``prefix`` is kept, and continued by a head that was trained for it.
        """

    @abstractmethod
    def advance(
        self,
        x: Tensor,
        index: Tensor,
        cond: Tensor,
        steps: int | None = None,
        guides: Sequence[Guide] = (),
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Return the iterates (B, H, A) that follow ``x`` where nothing is random: one step of `sample`.

        Args:
            x: (B, H, A) iterates.
            index: (B,) long, place in the chain: 0 leaves pure noise, ``steps - 1`` arrives at the actions.
            cond: (B, C).
            steps: length of the chain; None for the head's own.
            guides: change the denoised estimate.
            prefix: known actions.
        """

    def predict(self, x: Tensor, t: Tensor, cond: Tensor) -> Estimate:
        """Return the denoised and the noise estimate at x (B, H, A), times t (B,) in [0, 1]."""
        return self.path.estimate(self.backbone(x, t, cond), x, t)

    def network(self, x: Tensor, t: Tensor, cond: Tensor, prefix: Prefix | None = None) -> Tensor:
        """Return the backbone's output (B, H, A) at x (B, H, A), t (B,), with the actions of ``prefix`` in place."""
        output: Tensor
        if prefix is None:
            output = self.backbone(x, t, cond)
        else:
            output = self.backbone(prefix.impose(x), t, cond, prefix.known)
        return output

    def draw_prefix(self, batch: int, device: torch.device, generator: Generator | None = None) -> Tensor | None:
        """Draw the actions (B, H) bool that are known in training: 0 to `prefix_steps` of them; None for never any."""
        if not self.prefix_steps:
            return None
        count = draw(torch.randint, self.prefix_steps + 1, (batch, 1), device=device, generator=generator)
        return torch.arange(self.horizon, device=device) < count

    def chain_step(
        self, x: Tensor, index: Tensor, cond: Tensor, steps: int | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return mean (B, H, A) and standard deviation (B, 1, 1) of the iterates that follow ``x`` in a chain.

        Args:
            x: (B, H, A) iterates.
            index: (B,) long, place in the chain: 0 leaves pure noise, ``steps - 1`` arrives at the actions.
            cond: (B, C).
            steps: length of the chain; None for the head's own.
            options: further options of the head.
        """
        raise refusal("sampling step by step", "chain_log_prob", self)

    def step_log_prob(self, trace: Sequence[Tensor], cond: Tensor, std_floor: float = 0.0, **options: Any) -> Tensor:
        """Return log p(x_k-1 | x_k, cond) (B, K), summed over the chunk, of a stochastic chain.

        The last step has no density, and no column, where it adds no noise.

        Args:
            trace: the K + 1 tensors (B, H, A) that `sample` recorded.
            cond: (B, C).
            std_floor: smallest standard deviation used in the density (DPPO's floor for log-probabilities).
            options: further options of `chain_step`.

        Raises:
            CapabilityError: the head's steps have no density.
            ConfigError: the chain is deterministic.
        """
        if not self.capabilities.chain_log_prob:
            raise refusal("a density per sampling step", "chain_log_prob", self)
        chain = torch.stack(list(trace), dim=1)
        mean, std = chain_moments(self, chain, cond, len(trace) - 1, **options)
        std = std.clamp_min(std_floor)
        noisy = (std[0] > 0).flatten()
        if not noisy[:-1].all() or not noisy.any():
            raise ConfigError("a deterministic chain has no density: sample with eta > 0 or pass std_floor")
        density = normal_log_prob(chain[:, 1:][:, noisy], mean[:, noisy], std[:, noisy])
        return density.sum((-2, -1))


def require_head(policy: Any, capability: str, method: str) -> Head:
    """Return the head of ``policy`` if it has ``capability``, a field of `Capabilities`.

    Raises:
        CapabilityError: the policy has no head of its own, or its head cannot; the message lists the heads that can.
    """
    head: Head | None = getattr(policy, "head", None)
    if head is None or not getattr(head.capabilities, capability):
        raise refusal(method, capability, policy if head is None else head)
    return head


def refusal(method: str, capability: str, found: Any) -> CapabilityError:
    """Return the error that says what ``method`` needs and which heads have it."""
    eta = getattr(found, "eta", 0)  # the one setting that takes a capability away
    this = type(found).__name__ + (f" with eta={eta:g}" if eta else "")
    able = [name for name in registry.names("heads") if getattr(registry.load("heads", name).capabilities, capability)]
    return CapabilityError(
        f"{method} needs a chunked policy with one of these heads: {', '.join(able)}; this is a {this}"
    )


@contextmanager
def differentiable(x: Tensor, guides: Sequence[Guide]) -> Iterator[Tensor]:
    """Yield ``x``; gradients to it are recorded within the block if one of the guides needs them."""
    if not any(getattr(guide, "needs_gradient", False) for guide in guides):
        yield x
        return
    with torch.enable_grad():
        yield x.detach().requires_grad_()


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Average squared errors (B, H, A) per sample over unmasked steps; returns (B,)."""
    per_step = error.mean(dim=-1)
    if mask is None:
        return per_step.mean(dim=-1)
    weight = mask.to(per_step.dtype)
    return (per_step * weight).sum(dim=-1) / weight.sum(dim=-1).clamp_min(1)


def without(mask: Tensor | None, known: Tensor | None) -> Tensor | None:
    """Return the steps (B, H) bool that count: those of ``mask`` that are not ``known``; None counts everything."""
    if known is None:
        return mask
    return ~known if mask is None else mask & ~known
