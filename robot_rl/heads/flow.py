"""Conditional flow matching on the straight path (pi0's form, clock: t = 1 is noise)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from robot_rl.core.errors import ConfigError
from robot_rl.heads.base import Capabilities, Guide, Head, SampleResult, differentiable, masked_mean, without
from robot_rl.heads.continuation import Prefix
from robot_rl.heads.path import Path
from robot_rl.nets.device import draw


class FlowHead(Head):
    """Learns ``v(x_t, t, c) = e - a`` with ``x_t = t e + (1 - t) a`` and integrates from noise to actions.

    Args:
        backbone: network (x, t, cond) -> (B, H, A).
        horizon: chunk length H.
        action_size: A.
        steps: integration steps when sampling.
        solver: ``euler`` or ``midpoint`` (two network calls a step, second order).
        times: draw of training times: ``beta`` is ``0.999 Beta(1.5, 1) + 0.001`` (more weight on the noisy end, as
            pi0), ``uniform`` is U(0, 1).
    """

    capabilities = Capabilities(steerable=True, chain_log_prob=False, velocity_steps=True)

    def __init__(
        self,
        backbone: nn.Module,
        horizon: int,
        action_size: int,
        steps: int = 10,
        solver: Literal["euler", "midpoint"] = "euler",
        times: Literal["beta", "uniform"] = "beta",
    ) -> None:
        super().__init__(backbone, horizon, action_size)
        if solver not in ("euler", "midpoint"):
            raise ConfigError(f"unknown solver '{solver}': expected euler or midpoint")
        if times not in ("beta", "uniform"):
            raise ConfigError(f"unknown draw of times '{times}': expected beta or uniform")
        self.path = Path("flow", "velocity")
        self.steps, self.solver, self.times = int(steps), solver, times

    def draw_times(self, batch: int, device: torch.device, generator: Generator | None = None) -> Tensor:
        """Draw training times (batch,) in (0, 1]."""
        u = draw(torch.rand, batch, device=device, generator=generator)
        if self.times == "uniform":
            return u
        return 0.999 * u ** (1 / 1.5) + 0.001  # inverse distribution function of Beta(1.5, 1)

    def loss(
        self, actions: Tensor, cond: Tensor, mask: Tensor | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Return the flow-matching loss per sample (B,)."""
        t = self.draw_times(len(actions), actions.device, generator)
        noise = draw(torch.randn, actions.shape, device=actions.device, generator=generator)
        known = self.draw_prefix(len(actions), actions.device, generator)
        return self.loss_at(actions, cond, noise, t, mask, known)

    def loss_at(
        self,
        actions: Tensor,
        cond: Tensor,
        noise: Tensor,
        t: Tensor,
        mask: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Return the loss per sample (B,) for given noise (B, H, A), times (B,) and known actions (B, H) bool."""
        prefix = None if known is None else Prefix(actions, known)
        output = self.network(self.path.noised(actions, noise, t), t, cond, prefix)
        return masked_mean((output.float() - self.path.target(actions, noise)) ** 2, without(mask, known))

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
        """Integrate dx/dt = v from t = 1 to 0; a deterministic function of ``noise``."""
        steps = steps or self.steps
        x = noise
        if x is None:
            x = draw(torch.randn, (len(cond), *self.noise_shape), device=cond.device, generator=generator)
        chain = [x]
        for k in range(steps):
            x = self.advance(x, torch.full((len(x),), k, device=x.device), cond, steps, guides, prefix)
            if trace:
                chain.append(x)
        calls = steps * (2 if self.solver == "midpoint" else 1)
        return SampleResult(x, calls, chain if trace else [])

    def advance(
        self,
        x: Tensor,
        index: Tensor,
        cond: Tensor,
        steps: int | None = None,
        guides: Sequence[Guide] = (),
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Return the iterates (B, H, A) one step of the solver after ``x`` at places ``index`` (B,)."""
        now, then = self._times(index, steps, x.device)
        velocity = self._velocity(x, now, cond, guides, prefix)
        if self.solver == "midpoint":
            half = (now + then) / 2
            ahead = x + (half - now)[:, None, None] * velocity
            velocity = self._velocity(ahead, half, cond, guides, prefix)
        x = x + (then - now)[:, None, None] * velocity
        return x if prefix is None else prefix.impose(x)

    def chain_step(
        self, x: Tensor, index: Tensor, cond: Tensor, steps: int | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the Euler step (B, H, A) from ``x`` at places ``index`` (B,) of the chain, and zeros (B, 1, 1).

        The deviation is zero: noise is what a method adds. Times are those of `sample`.
        """
        now, then = self._times(index, steps, x.device)
        mean = x + (then - now)[:, None, None] * self.backbone(x, now, cond)
        return mean, x.new_zeros(len(x), 1, 1)

    def _times(self, index: Tensor, steps: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the times (B,) before and after the steps ``index`` (B,)."""
        times = torch.linspace(1, 0, (steps or self.steps) + 1, device=device)
        return times[index], times[index + 1]

    def _velocity(self, x: Tensor, t: Tensor, cond: Tensor, guides: Sequence[Guide], prefix: Prefix | None) -> Tensor:
        if not guides:
            return self.network(x, t, cond, prefix)
        scale = t[:, None, None].clamp_min(1e-4)
        with differentiable(x, guides) as start:
            velocity = self.network(start, t, cond, prefix)
            free = guided = start - scale * velocity
            for guide in guides:
                guided = guide(guided, start, t)
        return velocity + (free - guided) / scale
