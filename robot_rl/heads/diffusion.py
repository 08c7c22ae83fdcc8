"""Denoising diffusion as in Diffusion Policy: DDPM training, DDIM or ancestral sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Generator, Tensor, nn

from robot_rl.core.errors import ConfigError
from robot_rl.heads.base import Capabilities, Guide, Head, SampleResult, differentiable, masked_mean, without
from robot_rl.heads.continuation import Prefix
from robot_rl.heads.path import Path, squared_cosine
from robot_rl.nets.device import draw


class DiffusionHead(Head):
    """Learns the noise of the squared-cosine schedule and samples with DDIM (arXiv 2010.02502).

    With ``eta = 0`` sampling is a deterministic function of the start noise; with ``eta > 0`` each step is a Gaussian
    whose density `step_log_prob` returns (DDPM's ancestral sampling is ``eta = 1`` with all levels).

    Args:
        backbone: network (x, t, cond) -> (B, H, A).
        horizon: chunk length H.
        action_size: A.
        steps: DDIM steps when sampling.
        levels: training levels.
        eta: share of ancestral noise while sampling.
        clip: denoised estimates are clipped to [-clip, clip], the range of normalised actions.
    """

    capabilities = Capabilities(steerable=True, chain_log_prob=True)

    def __init__(
        self,
        backbone: nn.Module,
        horizon: int,
        action_size: int,
        steps: int = 16,
        levels: int = 100,
        eta: float = 0.0,
        clip: float = 1.0,
    ) -> None:
        super().__init__(backbone, horizon, action_size)
        _coefficients(levels, steps, eta)  # refuses what cannot be
        self.path = Path("cosine", "epsilon", levels)
        self.steps, self.levels, self.eta, self.clip = int(steps), int(levels), eta, clip
        self.capabilities = replace(self.capabilities, steerable=eta == 0)

    def loss(
        self, actions: Tensor, cond: Tensor, mask: Tensor | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Return the noise-prediction loss per sample (B,)."""
        levels = draw(torch.randint, self.levels, (len(actions),), device=actions.device, generator=generator)
        noise = draw(torch.randn, actions.shape, device=actions.device, generator=generator)
        t = levels.float() / (self.levels - 1)
        known = self.draw_prefix(len(actions), actions.device, generator)
        prefix = None if known is None else Prefix(actions, known)
        output = self.network(self.path.noised(actions, noise, t), t, cond, prefix)
        return masked_mean((output.float() - noise) ** 2, without(mask, known))

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
        """Run DDIM from pure noise at the top level; deterministic given ``noise`` where ``eta`` is 0."""
        steps = steps or self.steps
        x = noise
        if x is None:
            x = draw(torch.randn, (len(cond), *self.noise_shape), device=cond.device, generator=generator)
        chain = [x]
        for k in range(steps):
            index = torch.full((len(x),), k, device=x.device)
            x, std = self.chain_step(x, index, cond, steps, guides=guides, prefix=prefix)
            if self.eta > 0:
                x = x + std * draw(torch.randn, x.shape, device=x.device, generator=generator)
            if trace:
                chain.append(x)
        return SampleResult(x if prefix is None else prefix.impose(x), steps, chain if trace else [])

    def advance(
        self,
        x: Tensor,
        index: Tensor,
        cond: Tensor,
        steps: int | None = None,
        guides: Sequence[Guide] = (),
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Return the iterates (B, H, A) of DDIM without fresh noise after ``x`` at places ``index`` (B,)."""
        x, _ = self.chain_step(x, index, cond, steps, 0.0, guides, prefix)
        return x if prefix is None else prefix.impose(x)

    def chain_step(
        self,
        x: Tensor,
        index: Tensor,
        cond: Tensor,
        steps: int | None = None,
        eta: float | None = None,
        guides: Sequence[Guide] = (),
        prefix: Prefix | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return mean (B, H, A) and standard deviation (B, 1, 1) of the iterates after ``x`` (DDIM's eq. 12).

        Args:
            x: (B, H, A) iterates.
            index: (B,) long, place in the chain, 0 for pure noise.
            cond: (B, C).
            steps: length of the chain; None for the head's own.
            eta: share of ancestral noise; None for the head's own.
            guides: change the denoised estimate.
            prefix: known actions.
            options: none are known.
        """
        if options:
            raise ConfigError(f"a diffusion step does not know the option '{next(iter(options))}'")
        table = _coefficients(self.levels, steps or self.steps, self.eta if eta is None else eta).to(x.device)
        t, *columns = table[index].unbind(-1)
        alpha, sigma, alpha_then, kept, std = (column[:, None, None] for column in columns)
        with differentiable(x, guides) as start:
            sample = ((start - sigma * self.network(start, t, cond, prefix)) / alpha).clamp(-self.clip, self.clip)
            for guide in guides:
                sample = guide(sample, start, t).clamp(-self.clip, self.clip)
        # The noise that is consistent with the clipped estimate, not the network's own.
        epsilon = (x - alpha * sample) / sigma
        return alpha_then * sample + kept * epsilon, std


@lru_cache(maxsize=64)
def _coefficients(levels: int, steps: int, eta: float) -> Tensor:
    """Return (K, 6) for a chain of evenly spaced levels that ends at the data, noisiest step first.

    Columns: time; alpha and sigma before the step; alpha after it; weight of the noise direction; standard deviation of
    fresh noise, of which ``eta`` is the share.
    """
    if not 1 <= steps <= levels:
        raise ConfigError(f"diffusion sampling steps must be in 1..{levels}, got {steps}")
    abar = squared_cosine(levels).double()
    level = torch.arange(steps - 1, -1, -1) * (levels // steps)
    now = abar[level]
    then = torch.cat([now[1:], now.new_ones(1)])
    variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
    kept = (1 - then - variance).clamp_min(0)
    columns = (level / (levels - 1), now.sqrt(), (1 - now).sqrt(), then.sqrt(), kept.sqrt(), variance.sqrt())
    return torch.stack([column.double() for column in columns], dim=1).float()
