"""Denoising diffusion as in Diffusion Policy: DDPM training, DDIM sampling, on diffusers' schedulers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from robot_rl.core.errors import ConfigError
from robot_rl.heads.base import Capabilities, Guide, Head, SampleResult, masked_mean
from robot_rl.heads.path import Path


class DiffusionHead(Head):
    """Learns the noise of the squared-cosine schedule and samples with DDIM.

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
        from diffusers import DDIMScheduler, DDPMScheduler

        if not 1 <= steps <= levels:
            raise ConfigError(f"diffusion sampling steps must be in 1..{levels}, got {steps}")
        self.path = Path("cosine", "epsilon", levels)
        self.steps, self.levels, self.eta, self.clip = int(steps), int(levels), eta, clip
        common: dict[str, Any] = {
            "num_train_timesteps": levels,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "epsilon",
            "clip_sample": True,
            "clip_sample_range": clip,
        }
        self._trainer: Any = DDPMScheduler(**common)
        self._sampler: Any = DDIMScheduler(**common, set_alpha_to_one=True)

    def loss(
        self, actions: Tensor, cond: Tensor, mask: Tensor | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Return the noise-prediction loss per sample (B,)."""
        levels = torch.randint(self.levels, (len(actions),), device=actions.device, generator=generator)
        noise = torch.randn(actions.shape, device=actions.device, generator=generator)
        noised = self._trainer.add_noise(actions, noise, levels)
        output = self.backbone(noised, self._time(levels), cond)
        return masked_mean((output.float() - noise) ** 2, mask)

    def sample(
        self,
        cond: Tensor,
        noise: Tensor | None = None,
        steps: int | None = None,
        guides: Sequence[Guide] = (),
        trace: bool = False,
        generator: Generator | None = None,
    ) -> SampleResult:
        """Run DDIM from pure noise at the top level; deterministic given ``noise`` where ``eta`` is 0."""
        self._sampler.set_timesteps(steps or self.steps)
        x = noise
        if x is None:
            x = torch.randn((len(cond), *self.noise_shape), device=cond.device, generator=generator)
        chain = [x]
        for level in self._sampler.timesteps:
            t = self._time(level).to(cond.device).expand(len(x))
            output = self.backbone(x, t, cond)
            if guides:
                sample = self.path.estimate(output, x, t).sample.clamp(-self.clip, self.clip)
                for guide in guides:
                    sample = guide(sample, x, t)
                output = self.path.epsilon_for(sample, x, t)
            x = self._sampler.step(
                output, int(level), x, eta=self.eta, use_clipped_model_output=True, generator=generator
            ).prev_sample
            if trace:
                chain.append(x)
        return SampleResult(x, len(self._sampler.timesteps), chain if trace else [])

    def step_log_prob(self, trace: Sequence[Tensor], cond: Tensor, std_floor: float = 0.0, **options: Any) -> Tensor:
        """Return log p(x_k-1 | x_k, cond) (B, K), summed over the chunk, of a chain sampled with ``eta > 0``.

        Args:
            trace: the K + 1 tensors (B, H, A) that `sample` recorded.
            cond: (B, C).
            std_floor: smallest standard deviation used in the density (DPPO's floor for log-probabilities).
            options: none are known.

        Raises:
            ConfigError: the chain is deterministic (``eta`` 0 and no floor).
        """
        if options:
            raise ConfigError(f"step_log_prob does not know the option '{next(iter(options))}'")
        self._sampler.set_timesteps(len(trace) - 1)
        densities = []
        for level, x, then in zip(self._sampler.timesteps, trace[:-1], trace[1:], strict=True):
            output = self.backbone(x, self._time(level).to(x.device).expand(len(x)), cond)
            mean = self._sampler.step(output, int(level), x, eta=0.0, use_clipped_model_output=True).prev_sample
            std = max(self._std(int(level), len(trace) - 1), std_floor)
            if std <= 0:
                if level == self._sampler.timesteps[-1]:
                    continue  # the last step of every DDIM chain is deterministic
                raise ConfigError("a deterministic chain has no density: sample with eta > 0 or pass std_floor")
            mean = self._ancestral_mean(output, x, int(level), mean, std)
            densities.append((-0.5 * ((then - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))).sum((1, 2)))
        return torch.stack(densities, dim=1)

    def _ancestral_mean(self, output: Tensor, x: Tensor, level: int, deterministic: Tensor, std: float) -> Tensor:
        """Return DDIM's mean when noise of ``std`` is added: the noise direction shrinks accordingly (eq. 12)."""
        previous = level - self.levels // len(self._sampler.timesteps)
        abar_then = self._abar(previous)
        abar = self._abar(level)
        sample = ((x - math.sqrt(1 - abar) * output) / math.sqrt(abar)).clamp(-self.clip, self.clip)
        epsilon = (x - math.sqrt(abar) * sample) / math.sqrt(1 - abar)
        kept = math.sqrt(max(1 - abar_then - std**2, 0.0)) - math.sqrt(1 - abar_then)
        return deterministic + kept * epsilon

    def _std(self, level: int, steps: int) -> float:
        abar, abar_then = self._abar(level), self._abar(level - self.levels // steps)
        return self.eta * math.sqrt((1 - abar_then) / (1 - abar) * (1 - abar / abar_then))

    def _abar(self, level: int) -> float:
        return float(self._sampler.alphas_cumprod[level]) if level >= 0 else 1.0

    def _time(self, level: Tensor) -> Tensor:
        return level.float() / (self.levels - 1)
