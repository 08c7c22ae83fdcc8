"""Several chunks from a base policy, edited ones among them, and a critic that picks one."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core import registry
from robot_rl.core.env import Observation
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.policy import Policy
from robot_rl.core.spec import Spec
from robot_rl.nets.precision import has_fast_bf16
from robot_rl.policies.chunk_critic import ChunkCritic, ChunkCriticConfig
from robot_rl.policies.gaussian import SquashedGaussian


@dataclass(frozen=True)
class BestOfConfig:
    """How candidates are made and chosen."""

    candidates: int = 16
    """Chunks N that the base draws per plan."""
    edits: int = 0
    """Of these, how many are offered in an edited form as well."""
    edit_scale: float = 0.1
    """Largest edit of an action, in the critic's normalised units."""
    edit_steps: int = 0
    """Edits per executed chunk, each held over its part of the steps; 0, or more than there are, for every step."""
    edit_hidden: tuple[int, ...] = (256, 256)
    """Widths of the editing network."""
    edit_log_std: float = -1.5
    """Initial log standard deviation of an edit before tanh and scale: small, so that learning starts from the base."""
    execute_steps: int = 0
    """Actions executed before the next choice; 0 for as many as the base executes."""
    choose_by: Literal["min", "mean"] = "mean"
    """How the ensemble's values of a candidate become one."""
    choose_members: int = 0
    """Members drawn anew for every choice; 0 asks all."""
    temperature: float = 0.0
    """Choose with probability softmax(value / (temperature * spread of the state's values)); 0 takes the best."""
    sample_steps: int = 0
    """Sampling steps of the base per candidate; 0 for the base's own number."""
    prior: bool = False
    """Ignore the critic and take the base's first chunk, which is the base policy."""


class ChunkEditor(nn.Module):
    """Moves an action chunk by a tanh-Gaussian of state and chunk, scaled by beta (EXPO, arXiv 2507.07986).

    The edited action is clipped to the bounds, since that is what will be executed and stored.

    Args:
        critic: gives the units, sizes and bounds of actions.
        config: ``edit_scale`` (beta), ``edit_steps`` and ``edit_hidden``.
    """

    def __init__(self, critic: ChunkCritic, config: BestOfConfig) -> None:
        super().__init__()
        if config.edit_scale < 0 or config.edit_steps < 0:
            raise ConfigError(
                f"edit_scale and edit_steps must not be negative, got {config.edit_scale}, {config.edit_steps}"
            )
        executed = critic.config.steps
        steps = min(config.edit_steps or executed, executed)
        self.scale, self.steps = config.edit_scale, steps
        self.register_buffer("part", torch.arange(executed) * steps // executed, persistent=False)
        self.noise_size = steps * critic.spec.action.size
        # The entropy of a scaled edit differs from that in (-1, 1)^d by this; without any edit there is nothing to add.
        self.log_volume = self.noise_size * math.log(self.scale) if self.scale > 0 else 0.0
        self.actor = SquashedGaussian(critic.state_size + critic.action_size, self.noise_size, config.edit_hidden, True)
        with torch.no_grad():
            self.actor.net.weights[-1].mul_(0.1)
            self.actor.net.biases[-1][..., self.noise_size :].fill_(config.edit_log_std)
        low, high = critic.bounds()
        # Kept in the checkpoint: when one is read, the critic's normaliser is not yet there to ask.
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, state: Tensor, action: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Return edited actions (B, D) and the log-densities (B,) of the scaled edits.

        Args:
            state: (B, S).
            action: (B, D), as the critic takes it.
            eps: standard normal (B, noise_size).
        """
        raw, log_prob = self.actor(torch.cat([state, action], dim=-1), eps)
        held = raw.unflatten(-1, (self.steps, -1)).index_select(-2, self.get_buffer("part")).flatten(-2)
        edited = (action + self.scale * held).clamp(self.get_buffer("low"), self.get_buffer("high"))
        return edited, log_prob - self.log_volume

    def several(self, state: Tensor, actions: Tensor, eps: Tensor) -> Tensor:
        """Return the edited forms (B, n, D) of ``actions`` (B, n, D), with ``eps`` (B, n, noise_size)."""
        count = actions.shape[1]
        rows = state.repeat_interleave(count, dim=0)
        return self(rows, actions.flatten(0, 1), eps.flatten(0, 1))[0].unflatten(0, (-1, count))


@dataclass
class Choice:
    """What a plan looked at and what it took, for B states."""

    chunks: Tensor
    """(B, H, A) to execute, in the units of the spec."""
    state: Tensor
    """(B, S) as the critic takes it."""
    action: Tensor
    """(B, D): the chosen chunk as the critic takes it."""
    candidates: Tensor
    """(B, N, D): the base's chunks as the critic takes them."""
    edited: Tensor
    """(B,) bool: whether an edited chunk was chosen."""


class BestOfPolicy(nn.Module):
    """Plans by the best of N base chunks and of n edited ones, in the eyes of an ensemble critic.

    Serves Q-chunking (arXiv 2507.07969), EXPO (2507.07986) and value guidance of a finished policy (2410.13816). The
    base is frozen. Critic, editor and base are all in the checkpoint.

    Args:
        base: any stochastic policy without closed-loop correction; one with ``encode`` and ``sample`` draws all
            candidates of all lanes in one call and encodes once.
        critic: scores the executed part of a chunk.
        config: candidates and choice.
    """

    kind = "best_of"
    closed_loop = False
    base: Any

    def __init__(self, base: Policy, critic: ChunkCritic, config: BestOfConfig) -> None:
        super().__init__()
        if not isinstance(base, nn.Module) or base.closed_loop:
            raise CapabilityError(
                "best-of-N needs a stochastic base without closed-loop correction (kind 'chunked' or 'chain'), got "
                f"{type(base).__name__}"
            )
        if config.candidates < 1 or not 0 <= config.edits <= config.candidates:
            raise ConfigError(
                f"need candidates >= 1 and edits in 0..candidates, got {config.candidates}, {config.edits}"
            )
        self.base = base.requires_grad_(False).eval()
        self.critic, self.config = critic, config
        self.spec: Spec = base.spec
        critic.spec.require(base.spec, "the critic", "the policy")
        self.horizon, self.execute_steps = base.horizon, config.execute_steps or base.execute_steps
        self.obs_steps = max(base.obs_steps, critic.config.history)
        if not 1 <= critic.config.steps <= self.horizon or not 1 <= self.execute_steps <= self.horizon:
            raise ConfigError(
                f"the critic scores {critic.config.steps} and {self.execute_steps} are executed of chunks of only "
                f"{self.horizon} actions"
            )
        self._heads = hasattr(base, "encode") and hasattr(base, "sample")
        self._own_scale = getattr(getattr(base, "config", None), "start_scale", 1.0)
        if config.sample_steps and not hasattr(base, "head"):
            heads = ", ".join(registry.names("heads"))
            raise CapabilityError(
                f"sample_steps needs a base with a generative head, one of: {heads}; this is a {type(base).__name__}"
            )
        self.editor = ChunkEditor(critic, config) if config.edits else None
        self._generator = torch.Generator().manual_seed(0)

    @classmethod
    def from_parts(cls, config: dict[str, Any], spec: Spec, base: Policy | None) -> BestOfPolicy:
        """Rebuild from a checkpoint's configuration and its base."""
        if base is None:
            raise ConfigError("a best-of-N policy's checkpoint holds no base policy")
        choice, shape = ({k: tuple(v) if isinstance(v, list) else v for k, v in config[n].items()} for n in _PARTS)
        return cls(base, ChunkCritic(spec, ChunkCriticConfig(**shape)), BestOfConfig(**choice))

    def config_dict(self) -> dict[str, Any]:
        """Return the configuration, ready for JSON."""
        return dict(zip(_PARTS, (asdict(self.config), asdict(self.critic.config)), strict=True))

    def train(self, mode: bool = True) -> BestOfPolicy:
        """Set the mode of critic and editor; the base stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def seed(self, seed: int) -> None:
        """Make sampling reproducible."""
        self._generator.manual_seed(seed)
        self.base.seed(seed)

    def tensors(self, history: Observation) -> dict[str, Tensor]:
        """Return the history as float32 tensors on the policy's device."""
        device = self.critic.get_buffer("low").device
        return {k: torch.as_tensor(v, dtype=torch.float32, device=device) for k, v in history.items()}

    @torch.no_grad()
    def draw(self, history: Observation, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Return ``count`` chunks (B, count, H, A) of the base per history (each (B, T, …)), in the spec's units.

        The first is the base's own plan, from noise of its own scale; the others start from all of the prior.
        """
        recent = {key: values[:, -self.base.obs_steps :] for key, values in history.items()}
        if not self._heads:
            chunks = self.base.plan({key: np.repeat(values, count, axis=0) for key, values in recent.items()})
            return self.tensors({"": chunks})[""].unflatten(0, (-1, count))
        cond = self.base.encode(self.tensors(recent)).repeat_interleave(count, dim=0)
        generator = generator or self._generator
        noise = torch.randn(len(cond), self.horizon, self.spec.action.size, generator=generator).to(cond.device)
        noise[::count] *= self._own_scale
        with torch.autocast(cond.device.type, torch.bfloat16, enabled=has_fast_bf16(cond.device)):
            if self.config.sample_steps:
                sample = self.base.head.sample(cond, noise, self.config.sample_steps).actions
            else:
                sample = self.base.sample(cond, noise)
        chunks = self.base.unnormalize_action(sample.float())
        return chunks.unflatten(0, (-1, count))

    @torch.no_grad()
    def choose(self, history: Observation, generator: torch.Generator | None = None) -> Choice:
        """Draw candidates and choose."""
        generator = generator or self._generator
        chunks = self.draw(history, self.config.candidates, generator)
        state = self.critic.state(self.tensors(history))
        candidates = self.critic.action(chunks)
        lanes = torch.arange(len(state), device=state.device)
        if self.config.prior:
            edited = torch.zeros_like(lanes, dtype=torch.bool)
            return Choice(chunks[:, 0], state, candidates[:, 0], candidates, edited)
        offered = candidates
        if self.editor is not None:
            shape = (len(state), self.config.edits, self.editor.noise_size)
            eps = torch.randn(shape, generator=generator).to(state.device)
            offered = torch.cat(
                [candidates, self.editor.several(state, candidates[:, : self.config.edits], eps)], dim=1
            )
        index = self._pick(self.critic(state, offered, self._members(generator)), generator)
        edited, source = index >= self.config.candidates, index % self.config.candidates
        action, chosen = offered[lanes, index], chunks[lanes, source].clone()
        chosen[edited, : self.critic.config.steps] = self.critic.chunk(action[edited])
        return Choice(chosen, state, action, candidates, edited)

    def plan(self, history: Observation) -> np.ndarray:
        """Return the chosen chunks (B, H, A) in the units of the spec."""
        if self.config.prior:
            return self.draw(history, 1)[:, 0].cpu().numpy()
        return self.choose(history).chunks.cpu().numpy()

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return ``actions`` unchanged."""
        return actions

    def _members(self, generator: torch.Generator) -> Tensor | None:
        members = self.critic.config.members
        if not 0 < self.config.choose_members < members:
            return None
        order = torch.randperm(members, generator=generator)[: self.config.choose_members]
        return order.to(self.critic.get_buffer("low").device)

    def _pick(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Return indices (B,) into candidates, from values (E, B, N)."""
        value = values.amin(0) if self.config.choose_by == "min" else values.mean(0)
        if self.config.temperature > 0:
            # Raw values have the scale of the reward; relative to their own spread one temperature serves all tasks.
            spread = value.std(-1, keepdim=True, correction=0).clamp_min(1e-6)
            uniform = torch.rand(value.shape, generator=generator).to(value.device).clamp(1e-9, 1 - 1e-9)
            value = value / (self.config.temperature * spread) - (-uniform.log()).log()
        return value.argmax(-1)


_PARTS = ("choice", "critic")


def guide(base: Policy, critic: ChunkCritic, config: BestOfConfig | None = None) -> BestOfPolicy:
    """Let ``critic`` choose among the chunks of ``base``, which it need not have been learned with.

    Raises:
        CapabilityError: the base corrects its actions in a closed loop.
        SpecMismatchError: the critic needs other observations or actions than the base's.
    """
    return BestOfPolicy(base, critic, config or BestOfConfig()).eval().requires_grad_(False)
