"""The off-policy core: one ensemble critic, batches from several sources, and a swappable proposal of actions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robot_rl.core.errors import ConfigError
from robot_rl.rl.critics import EnsembleCritic
from robot_rl.rl.proposals import Proposal
from robot_rl.rl.state import optimizer_tensors, restore_optimizer

Batch = Mapping[str, Tensor]
"""``state`` (B, S), ``action`` (B, D), ``reward`` (B,), ``next_state`` (B, S), ``terminated`` (B,), ``exponent`` (B,),
``weight`` (B,): the target is ``reward + discount ** exponent * (1 - terminated) * Q(next_state, proposed)``. A time
limit does not set ``terminated``."""


@dataclass(frozen=True)
class OffPolicyConfig:
    """Settings of the off-policy core."""

    batch_size: int = 256
    """Rows per update."""
    discount: float = 0.99
    """Discount per unit of the stored exponent."""
    tau: float = 0.005
    """How far the target critic moves per update."""
    critics: int = 2
    """Members E of the ensemble."""
    subset: int = 2
    """Target members M drawn anew for each update's backup, without replacement."""
    reduce: Literal["min", "mean"] = "min"
    """How the M target values become one."""
    actor_reduce: Literal["min", "mean"] = "mean"
    """How the E values become the one that the actor climbs."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the critic's hidden layers."""
    layer_norm: bool = True
    """LayerNorm in the critic."""
    updates_per_step: float = 1.0
    """Critic updates per environment step, counted over all lanes."""
    actor_every: int = 1
    """Critic updates per update of actor and temperature."""
    auxiliary_every: int = 1
    """Critic updates per update of the proposal's auxiliary loss, where it has one."""
    critic_learning_rate: float = 3e-4
    """Adam's step size for the critic."""
    actor_learning_rate: float = 3e-4
    """Adam's step size for the actor."""
    temperature_learning_rate: float = 3e-4
    """Adam's step size for the log-temperature; 0 keeps the temperature."""
    initial_temperature: float = 1.0
    """Entropy's weight at the start."""
    target_entropy: float | None = None
    """Entropy that the temperature aims at, over all dimensions; None for minus half their number."""
    entropy_backup: bool = True
    """Whether the backup counts the entropy of what follows; off for sparse rewards."""
    start_steps: int = 5_000
    """Environment steps collected before the first update."""
    replay_capacity: int = 500_000
    """Rows of the online source."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the hidden layers' products; weights, last layers and optimiser stay in float32."""
    compile: bool = False
    """Compile the losses; pays after about ten thousand updates."""


class OffPolicyCore:
    """Critic, target, proposal and their optimisers; knows nothing of environments."""

    def __init__(
        self, state_size: int, action_size: int, proposal: Proposal, config: OffPolicyConfig, seed: int = 0
    ) -> None:
        """Create the critic for states (B, state_size) and critic actions (B, action_size)."""
        if not 1 <= config.subset <= config.critics:
            raise ConfigError(f"subset must be in 1..{config.critics} (critics), got {config.subset}")
        self.config, self.proposal = config, proposal
        device = next(proposal.parameters()).device
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32

        def critic() -> EnsembleCritic:
            return EnsembleCritic(state_size, action_size, config.critics, config.hidden, config.layer_norm, dtype).to(
                device
            )

        self.critic, self.target = critic(), critic()
        self.target.load_state_dict(self.critic.state_dict())
        self.target.requires_grad_(False)
        wanted = config.target_entropy
        self.target_entropy = -0.5 * proposal.noise_size if wanted is None else wanted
        highest = proposal.noise_size * math.log(2)
        if self.target_entropy >= highest and config.temperature_learning_rate > 0:
            raise ConfigError(
                f"target_entropy={self.target_entropy:g} cannot be reached: {proposal.noise_size} numbers in "
                f"(-1, 1) have an entropy of at most {highest:.3g}"
            )
        start = torch.tensor(float(config.initial_temperature), device=device).log()
        self.log_temperature = nn.Parameter(start)
        self._optimizers = self._make_optimizers(device)
        self._generator = torch.Generator().manual_seed(seed)
        self.updates = 0
        self._device = device
        self._critic_loss, self._actor_loss = self.critic_loss, self.actor_loss
        if config.compile:
            self._critic_loss, self._actor_loss = torch.compile(self.critic_loss), torch.compile(self.actor_loss)

    def _make_optimizers(self, device: torch.device) -> dict[str, torch.optim.Optimizer]:
        config = self.config
        groups = {
            "critic": (list(self.critic.parameters()), config.critic_learning_rate),
            "actor": (self.proposal.actor_parameters(), config.actor_learning_rate),
            "temperature": ([self.log_temperature], config.temperature_learning_rate),
            "auxiliary": (self.proposal.auxiliary_parameters(), config.critic_learning_rate),
        }
        return {
            name: torch.optim.Adam(parameters, lr=rate, fused=True)
            for name, (parameters, rate) in groups.items()
            if parameters
        }

    def critic_loss(self, batch: Batch, eps: Tensor, members: Tensor) -> Tensor:
        """Return the summed squared TD error of the members, averaged over rows by their weight."""
        with torch.no_grad():
            action, log_prob = self._propose(batch["next_state"], eps)
            following = self.target(batch["next_state"], action, members)
            following = following.amin(0) if self.config.reduce == "min" else following.mean(0)
            if self.config.entropy_backup:
                following = following - self.log_temperature.exp() * log_prob
            discount = self.config.discount ** batch["exponent"] * (1 - batch["terminated"])
            target = batch["reward"] + discount * following
        error = self.critic(batch["state"], batch["action"]) - target
        return 0.5 * (batch["weight"] * error.square()).mean(-1).sum()

    def actor_loss(self, state: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the actor's loss and the mean log-density, scalars."""
        with self._autocast():
            value, log_prob = self.proposal.value(state, eps, self.critic)
        value = value.amin(0) if self.config.actor_reduce == "min" else value.mean(0)
        loss = (self.log_temperature.detach().exp() * log_prob - value).mean()
        return loss, log_prob.detach().mean()

    def _propose(self, next_state: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return self.proposal.backup(next_state, eps)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def update(self, batches: Batch) -> dict[str, float]:
        """Make one critic update per slice of ``batches`` (U, B, …), and the other updates in their turn.

        Returns:
            Metrics of the last slice.
        """
        slices, size = batches["reward"].shape
        eps = torch.randn(slices, 2, size, self.proposal.noise_size, generator=self._generator).to(self._device)
        order = torch.rand(slices, self.config.critics, generator=self._generator).argsort(-1)
        members = order[:, : self.config.subset].to(self._device)
        critic_loss = actor_loss = auxiliary_loss = None
        log_prob = torch.zeros(())
        for i in range(slices):
            batch = {name: values[i] for name, values in batches.items() if name != "source"}
            critic_loss = self._critic_loss(batch, eps[i, 0], members[i])
            self._descend("critic", critic_loss)
            self.updates += 1
            if self.updates % self.config.actor_every == 0:
                actor_loss, log_prob = self._actor_loss(batch["state"], eps[i, 1])
                self._descend("actor", actor_loss)
                if self.config.temperature_learning_rate > 0:
                    # d/d(log a) of a * (entropy - target): written out, a scalar needs no graph.
                    slack = -log_prob - self.target_entropy
                    self.log_temperature.grad = (self.log_temperature.exp() * slack).detach()
                    self._optimizers["temperature"].step()
            if "auxiliary" in self._optimizers and self.updates % self.config.auxiliary_every == 0:
                auxiliary_loss = self._auxiliary(batch["state"])
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), self.config.tau)
        metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss, "auxiliary_loss": auxiliary_loss}
        result = {name: loss.item() for name, loss in metrics.items() if loss is not None}
        return result | {"temperature": self.log_temperature.exp().item(), "entropy": -log_prob.item()}

    def _auxiliary(self, state: Tensor) -> Tensor | None:
        eps = torch.randn(len(state), self.proposal.auxiliary_noise_size, generator=self._generator).to(self._device)
        loss = self.proposal.auxiliary_loss(state, eps, self.critic)
        if loss is not None:
            self._descend("auxiliary", loss)
        return loss

    def _descend(self, name: str, loss: Tensor) -> None:
        optimizer = self._optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return tensors and numbers from which `restore` continues."""
        modules = {"critic": self.critic, "target": self.target, "proposal": self.proposal}
        tensors = {f"{n}.{k}": v for n, module in modules.items() for k, v in module.state_dict().items()}
        for name, optimizer in self._optimizers.items():
            tensors |= optimizer_tensors(f"{name}_optimizer", optimizer)
        tensors |= {"log_temperature": self.log_temperature.detach(), "core_generator": self._generator.get_state()}
        return tensors, {"updates": self.updates}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Continue from `state`."""
        modules = {"critic": self.critic, "target": self.target, "proposal": self.proposal}
        for name, module in modules.items():
            prefix = f"{name}."
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        for name, optimizer in self._optimizers.items():
            restore_optimizer(f"{name}_optimizer", optimizer, dict(tensors))
        with torch.no_grad():
            self.log_temperature.copy_(tensors["log_temperature"])
        self._generator.set_state(tensors["core_generator"])
        self.updates = int(numbers["updates"])
