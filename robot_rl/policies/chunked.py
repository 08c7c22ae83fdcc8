"""The chunked generative policy: normaliser, observation history and a head over action chunks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core import registry
from robot_rl.core.env import Observation
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.ranges import require_range
from robot_rl.core.realtime import Commitment, require_way
from robot_rl.core.spec import Spec
from robot_rl.data.frames import Frames
from robot_rl.data.normalizer import Normalizer
from robot_rl.heads.base import Guide, Head
from robot_rl.heads.continuation import ContinuationGuide, Prefix, PrefixBackbone
from robot_rl.nets.device import draw


@dataclass(frozen=True)
class ChunkedConfig:
    """Architecture of a chunked policy; saved in its checkpoint."""

    head: str = "flow"
    """Generative head by name (`robot-rl list heads`)."""
    backbone: str = "mlp"
    """Network inside the head by name (`robot-rl list backbones`)."""
    obs_steps: int = 2
    """Newest observations that the policy sees."""
    horizon: int = 16
    """Actions per planned chunk."""
    execute_steps: int = 8
    """Actions of a chunk that are executed before the next plan."""
    sample_steps: int = 10
    """Integration or denoising steps per plan."""
    width: int = 512
    """Width of the network (of its first level, for the U-Net)."""
    depth: int = 3
    """Residual blocks (levels, for the U-Net)."""
    normalization: str = "minmax"
    """How observations and actions are normalised: minmax (to [-1, 1]) or meanstd."""
    observation_noise: float = 0.0
    """Standard deviation of noise on normalised observations while training; makes clones less brittle."""
    mask_padding: bool = False
    """Ignore the repeated last action beyond an episode's end, rather than learning to hold it."""
    start_scale: float = 1.0
    """Scale of the start noise when planning; 0 starts in the middle of the prior and makes plans deterministic."""
    head_options: dict[str, Any] = field(default_factory=dict)
    """Further options of the head by name, for example ``solver midpoint``."""
    prefix_steps: int = 0
    """Train to go on from up to this many actions that are known already, as real-time chunking needs with the method
    prefix; 0 for none."""

    def __post_init__(self) -> None:
        require_range(self, "obs_steps", "horizon", "sample_steps", "width", "depth", low=1)
        require_range(self, "observation_noise", "start_scale")


class ChunkedPolicy(nn.Module):
    """Clones demonstrations with a generative head; implements `robot_rl.core.policy.Policy`."""

    kind = "chunked"
    closed_loop = False
    base = None

    def __init__(self, spec: Spec, config: ChunkedConfig, normalizer: Normalizer | None = None) -> None:
        super().__init__()
        images = [key for key, array in spec.observation.items() if array.is_image]
        if images:
            others = [key for key in spec.observation if key not in images]
            hint = f"; choose from: {', '.join(others)}" if others else ""
            raise CapabilityError(
                f"there is no image encoder: no policy here sees images, and '{images[0]}' is one{hint}"
            )
        if not 0 < config.execute_steps <= config.horizon:
            raise ConfigError(f"execute_steps must be in 1..{config.horizon} (horizon), got {config.execute_steps}")
        self.spec, self.config = spec, config
        self.obs_steps, self.horizon, self.execute_steps = config.obs_steps, config.horizon, config.execute_steps
        self.normalizer = normalizer or Normalizer(spec)
        self.cond_size = config.obs_steps * sum(array.size for array in spec.observation.values())
        size = spec.action.size
        if not 0 <= config.prefix_steps < config.horizon:
            raise ConfigError(f"prefix_steps must be in 0..{config.horizon - 1}, got {config.prefix_steps}")
        inputs = size + (config.prefix_steps > 0)
        backbone = registry.load("backbones", config.backbone)(
            config.horizon, inputs, self.cond_size, width=config.width, depth=config.depth
        )
        if config.prefix_steps:
            backbone = PrefixBackbone(backbone, size, config.prefix_steps)
        self.head: Head = registry.load("heads", config.head)(
            backbone, config.horizon, size, steps=config.sample_steps, **config.head_options
        )
        low, high = spec.action.bounds()
        self.register_buffer("action_low", torch.as_tensor(low, dtype=torch.float32), persistent=False)
        self.register_buffer("action_high", torch.as_tensor(high, dtype=torch.float32), persistent=False)
        self._generator = torch.Generator()

    @classmethod
    def fit(cls, frames: Frames, config: ChunkedConfig) -> ChunkedPolicy:
        """Create an untrained policy for ``frames`` with its normaliser fitted to them."""
        return cls(frames.spec, config, Normalizer.fit(frames, mode=config.normalization))

    @classmethod
    def from_parts(cls, config: dict[str, Any], spec: Spec, base: None = None) -> ChunkedPolicy:
        """Create the policy that a checkpoint describes; its weights are loaded afterwards."""
        return cls(spec, ChunkedConfig(**config))

    def with_sample_steps(self, steps: int) -> ChunkedPolicy:
        """Return a copy that samples in ``steps`` steps: fewer cost less and are less exact."""
        policy = ChunkedPolicy(self.spec, replace(self.config, sample_steps=steps)).to(self.device)
        policy.load_state_dict(self.state_dict())
        return policy

    def config_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON-ready values; the inverse is `from_parts`."""
        return asdict(self.config)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.action_low.device

    def encode(self, history: dict[str, Tensor]) -> Tensor:
        """Return the condition (B, C): the normalised history (each (B, T, …), raw units), concatenated."""
        parts = [self.normalizer.normalize(key, history[key].float()).flatten(1) for key in self.spec.observation]
        return torch.cat(parts, dim=-1)

    def loss(self, batch: dict[str, Any], generator: torch.Generator | None = None) -> Tensor:
        """Return the training loss per sample (B,) of a window batch (see `robot_rl.data.windows.WindowSampler`)."""
        cond = self.encode(batch["observation"])
        if self.config.observation_noise:
            fresh = draw(torch.randn, cond.shape, device=cond.device, generator=generator)
            cond = cond + self.config.observation_noise * fresh
        actions = self.normalize_action(batch["action"])
        return self.head.loss(actions, cond, batch["mask"] if self.config.mask_padding else None, generator)

    def sample(self, cond: Tensor, noise: Tensor | None = None, commitment: Commitment | None = None) -> Tensor:
        """Return normalised chunks (B, H, A) for conditions (B, C); deterministic given ``noise`` (B, H, A)."""
        if commitment is None:
            return self.head.sample(cond, noise).actions
        guides, prefix = self._continuation(commitment)
        return self.head.sample(cond, noise, guides=guides, prefix=prefix).actions

    def _continuation(self, commitment: Commitment) -> tuple[list[Guide], Prefix | None]:
        """Return what makes the head go on from the running chunks."""
        how = commitment.how
        require_way(self, how)
        target = self.normalize_action(torch.as_tensor(commitment.actions, dtype=torch.float32, device=self.device))
        if how.method == "prefix":
            return [], Prefix(target, torch.as_tensor(commitment.known, device=self.device))
        weights = torch.as_tensor(commitment.weights, device=self.device)
        return [ContinuationGuide(self.head.path, target, weights, how.jacobian == "full", how.max_weight)], None

    def normalize_action(self, actions: Tensor) -> Tensor:
        """Map actions (…, A) from their units to about [-1, 1]."""
        return self.normalizer.normalize("action", actions)

    def unnormalize_action(self, actions: Tensor) -> Tensor:
        """Map normalised actions (…, A) to their units, inside the spec's bounds."""
        return self.normalizer.unnormalize("action", actions).clamp(self.action_low, self.action_high)

    def seed(self, seed: int) -> None:
        """Restart the stream of start noises; one stream serves all lanes in their order."""
        self._generator.manual_seed(seed)

    def draw_noise(self, batch: int) -> Tensor:
        """Return the next start noises (B, H, A) of the policy's own stream."""
        return torch.randn((batch, *self.head.noise_shape), generator=self._generator).to(self.device)

    @property
    def prefix_steps(self) -> int:
        """Most actions at the beginning of a chunk that the policy can be told."""
        return self.head.prefix_steps

    @property
    def real_time(self) -> tuple[str, ...]:
        """The ways in which `plan` can continue a running chunk (see `robot_rl.core.realtime`)."""
        guided = ("guided_full", "guided_identity") if self.head.capabilities.guidable else ()
        return (*guided, "prefix") if self.prefix_steps else guided

    def plan(
        self, history: Observation, noise: Tensor | np.ndarray | None = None, commitment: Commitment | None = None
    ) -> np.ndarray:
        """Return chunks (B, H, A) in the action's units for a history of arrays (B, T, …).

        Args:
            history: the newest observations.
            noise: (B, H, A) start noise; None takes the next of the policy's own stream.
            commitment: what is executed while this is planned, to be continued.
        """
        # Guidance through the network needs gradients, which inference mode cannot give back.
        gradient = commitment is not None and commitment.how.way == "guided_full"
        with torch.no_grad() if gradient else torch.inference_mode():
            tensors = {key: torch.from_numpy(np.asarray(history[key])).to(self.device) for key in self.spec.observation}
            cond = self.encode(tensors)
            if noise is None:
                noise = self.config.start_scale * self.draw_noise(len(cond))
            start = torch.as_tensor(noise, dtype=torch.float32, device=self.device)
            return self.unnormalize_action(self.sample(cond, start, commitment)).cpu().numpy()

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return ``actions`` unchanged: this policy is open loop within a chunk."""
        return actions
