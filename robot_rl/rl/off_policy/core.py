"""The off-policy core: one ensemble critic, batches from several sources, and a swappable proposal of actions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from robot_rl.core.errors import ConfigError
from robot_rl.nets.device import device_of
from robot_rl.nets.ensemble import EnsembleMLP
from robot_rl.nets.precision import has_fast_bf16
from robot_rl.rl.critics import EnsembleCritic
from robot_rl.rl.off_policy.proposals import Batch, Proposal
from robot_rl.rl.state import optimizer_tensors, restore_optimizer


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
    critic_updates: int = 0
    """First updates, which train the critic alone on what was collected till then, all at once when learning begins;
    actor and temperature stay as they are, and only then does the behaviour change."""
    actor_average: float = 0.0
    """Decay per update of a running average of the actor, which is evaluated and saved in the actor's place while the
    actor itself explores and learns; 0.998 averages over about 500 updates, 0 keeps none. It helps where one validation
    differs much from the next."""
    replay_capacity: int = 500_000
    """Rows of the online source."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the hidden layers' products; weights, sums and optimiser stay in float32. auto takes bf16 where
    the processor has it."""


class OffPolicyCore:
    """Critic, target, proposal and their optimisers; knows nothing of environments.

    The critic's target is ``reward + discount ** exponent * (1 - terminated) * Q(next_state, proposed)``; a time limit
    does not set ``terminated``.
    """

    def __init__(
        self,
        state_size: int,
        action_size: int,
        proposal: Proposal,
        config: OffPolicyConfig,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """Create the critic for states (B, state_size) and critic actions (B, action_size).

        Args:
            state_size: numbers of a state.
            action_size: numbers of an action as the critic takes it.
            proposal: the method.
            config: settings.
            seed: seed of the updates' random numbers.
            device: where updates are computed; by default where the proposal's weights are.

        Raises:
            ConfigError: settings that cannot be.
        """
        if not 1 <= config.subset <= config.critics:
            raise ConfigError(f"subset must be in 1..{config.critics} (critics), got {config.subset}")
        if not 0 <= config.actor_average < 1:
            raise ConfigError(f"actor_average must be at least 0 and below 1, got {config.actor_average:g}")
        self.config, self.proposal = config, proposal
        self.state_size, self.action_size = state_size, action_size
        self.device = device = device_of(proposal) if device is None else device
        """Where updates are computed and batches are expected."""
        fast = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(device))
        dtype = torch.bfloat16 if fast else torch.float32

        def critic() -> EnsembleCritic:
            return EnsembleCritic(state_size, action_size, config.critics, config.hidden, config.layer_norm, dtype).to(
                device
            )

        self.critic, self.target = critic(), critic()
        self.target.load_state_dict(self.critic.state_dict())
        self.target.requires_grad_(False)
        self.target_entropy = self._reachable_entropy(proposal, config)
        start = torch.tensor(float(config.initial_temperature), device=device).log()
        self.log_temperature = nn.Parameter(start)
        kept = proposal.actor_parameters() if config.actor_average else []
        self.average = [parameter.detach().clone() for parameter in kept]
        """The running average of the proposal's actor parameters, in their order; empty where none is kept."""
        self._optimizer = self._make_optimizer()
        self._generator = torch.Generator().manual_seed(seed)
        self._subset = config.subset < config.critics
        self._networks: list[EnsembleMLP] = []
        self.updates = 0

    @staticmethod
    def _reachable_entropy(proposal: Proposal, config: OffPolicyConfig) -> float:
        """Return the entropy that the temperature aims at; one that no temperature reaches is an error."""
        size, volume = proposal.entropy_size, proposal.log_volume
        wanted = volume - 0.5 * size if config.target_entropy is None else config.target_entropy
        highest = volume + size * math.log(2)
        if wanted >= highest and config.temperature_learning_rate > 0 and proposal.actor_parameters():
            bound = math.exp(volume / size)
            raise ConfigError(
                f"target_entropy={wanted:g} cannot be reached: {size} numbers in ({-bound:.3g}, {bound:.3g}) have an "
                f"entropy of at most {highest:.3g}"
            )
        return wanted

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """One optimiser for all, of one group where step sizes are equal; it leaves alone what has no gradient."""
        config = self.config
        parts = [
            ([*self.critic.parameters(), *self.proposal.auxiliary_parameters()], config.critic_learning_rate),
            (self.proposal.actor_parameters(), config.actor_learning_rate),
            ([self.log_temperature], config.temperature_learning_rate),
        ]
        groups = [
            {"params": [parameter for part, _ in same for parameter in part], "lr": rate}
            for rate, same in groupby(parts, key=lambda part: part[1])
        ]
        self._trained = [parameter for part, _ in parts for parameter in part]
        return torch.optim.Adam(groups, fused=True)

    def critic_loss(self, batch: Batch, eps: Tensor, members: Tensor) -> Tensor:
        """Return the summed squared TD error of the members, averaged over rows by their weight."""
        value, wanted = self._values(batch, eps, members)
        return _squared(value - wanted, batch["weight"])

    def actor_loss(self, batch: Batch, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the actor's loss and the mean log-density, scalars."""
        value, log_prob = self.proposal.value(batch, eps, self.critic)
        return self._entropic(value, log_prob), log_prob.detach().mean()

    def _values(self, batch: Batch, eps: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        """Return the critic's values (E, B), with its graph, and what they should be (B,)."""
        with torch.no_grad():
            action, log_prob = self.proposal.backup(batch, eps, self.critic, self.target)
            following = self.target(batch["next_state"], action, members if self._subset else None)
            following = following.amin(0) if self.config.reduce == "min" else following.mean(0)
            if self.config.entropy_backup:
                following = following - self.log_temperature.exp() * log_prob
            discount = self.config.discount ** batch["exponent"] * (1 - batch["terminated"])
            wanted = torch.addcmul(batch["reward"], discount, following)
        return self.critic(batch["state"], batch["action"]), wanted

    def _entropic(self, value: Tensor, log_prob: Tensor) -> Tensor:
        """Return the actor's loss for values (E, B) and log-densities (B,) of its actions."""
        value = value.amin(0) if self.config.actor_reduce == "min" else value.mean(0)
        return (self.log_temperature.detach().exp() * log_prob - value).mean()

    def _slopes(self, value: Tensor, log_prob: Tensor) -> list[Tensor]:
        """Return the gradients of `_entropic`, written out: each row has the same share."""
        members, rows = value.shape
        if self.config.actor_reduce == "mean":
            slope = torch.full_like(value, -1 / (members * rows))
        else:
            slope = torch.zeros_like(value).scatter_(0, value.detach().argmin(0, keepdim=True), -1 / rows)
        return [slope, (self.log_temperature.detach().exp() / rows).expand(rows)]

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Let the proposal's small networks use the update's arithmetic; acting stays in float32."""
        networks = [module for module in self.proposal.modules() if isinstance(module, EnsembleMLP)]
        for network in networks:
            network.dtype = self.critic.net.dtype
        self._networks = [self.critic.net, self.target.net, *networks]
        try:
            yield
        finally:
            for network in networks:
                network.dtype = torch.float32
            for network in self._networks:
                network.release()

    def update(self, batches: Batch) -> dict[str, float]:
        """Make one critic update per slice of ``batches`` (U, B, …), and the others with it in their turn.

        Critic, actor and auxiliary losses of a slice share one backward pass and one optimiser step, so that the actor
        sees the critic as it was before the slice.

        Returns:
            Metrics of the last slice; those of the actor where it learned. ``value`` is the critic's mean.
        """
        with self._precision():
            return self._update(batches)

    def _update(self, batches: Batch) -> dict[str, float]:
        slices, size = batches["reward"].shape
        eps = torch.randn(slices, 2, size, self.proposal.noise_size, generator=self._generator).to(self.device)
        order = torch.rand(slices, self.config.critics, generator=self._generator).argsort(-1)
        members = order[:, : self.config.subset].to(self.device)
        target: list[Tensor] = list(self.target.parameters())
        critic: list[Tensor] = list(self.critic.parameters())
        actor: list[Tensor] = list(self.proposal.actor_parameters())
        rows = {name: values.unbind(0) for name, values in batches.items() if name != "source"}
        losses: dict[str, Tensor] = {}
        has_actor = bool(actor)
        for i in range(slices):
            batch = {name: values[i] for name, values in rows.items()}
            self.updates += 1
            for network in self._networks:
                network.hold()
            # Backward starts at values and log-densities: the gradients of the losses are known.
            own, wanted = self._values(batch, eps[i, 0], members[i])
            error = own.detach() - wanted
            ends, slopes = [own], [error * (batch["weight"] / size)]
            alone = self.updates <= self.config.critic_updates
            acting = has_actor and not alone and self.updates % self.config.actor_every == 0
            if acting:
                value, log_prob = self.proposal.value(batch, eps[i, 1], self.critic)
                ends, slopes = [*ends, value, log_prob], slopes + self._slopes(value, log_prob)
            if self.updates % self.config.auxiliary_every == 0:
                auxiliary = self._auxiliary_loss(batch)
                if auxiliary is not None:
                    losses["auxiliary_loss"] = auxiliary
                    ends, slopes = [*ends, auxiliary], [*slopes, torch.ones_like(auxiliary)]
            self._descend(ends, slopes, log_prob if acting else None)
            with torch.no_grad():
                torch._foreach_lerp_(target, critic, self.config.tau)
                if acting and self.average:
                    torch._foreach_lerp_(self.average, actor, 1 - self.config.actor_average)
            if acting:
                losses["actor_loss"] = value
        with torch.no_grad():
            losses["critic_loss"] = _squared(error, batch["weight"])
            losses["value"] = own.mean()
            if "actor_loss" in losses:
                losses["actor_loss"] = self._entropic(losses["actor_loss"], log_prob)
        result = {name: loss.item() for name, loss in losses.items()}
        if has_actor:
            result["temperature"] = self.log_temperature.exp().item()
        if "actor_loss" in losses:
            result["entropy"] = -log_prob.mean().item()
        return result | self.proposal.metrics()

    def _auxiliary_loss(self, batch: Batch) -> Tensor | None:
        if not self.proposal.auxiliary_parameters():
            return None
        size = (len(batch["reward"]), self.proposal.auxiliary_noise_size)
        eps = torch.randn(size, generator=self._generator).to(self.device)
        return self.proposal.auxiliary_loss(batch, eps, self.critic)

    def _descend(self, ends: list[Tensor], slopes: list[Tensor], log_prob: Tensor | None) -> None:
        """Take one step down the sum of the losses; no two of them train the same weights.

        Args:
            ends: what the losses are functions of.
            slopes: the gradients of the losses there.
            log_prob: the actor's log-densities (B,), if it learns.
        """
        for parameter in self._trained:
            parameter.grad = None
        torch.autograd.backward(ends, slopes)
        if log_prob is not None and self.config.temperature_learning_rate > 0:
            # d/d(log a) of a * (entropy - target): written out, a scalar needs no graph.
            slack = log_prob.detach().mean().add_(self.target_entropy).neg_()
            self.log_temperature.grad = slack.mul_(self.log_temperature.detach().exp())
        self._optimizer.step()

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return tensors and numbers from which `restore` continues."""
        modules = {"critic": self.critic, "target": self.target, "proposal": self.proposal}
        tensors = {f"{n}.{k}": v for n, module in modules.items() for k, v in module.state_dict().items()}
        tensors |= optimizer_tensors("optimizer", self._optimizer)
        tensors |= {"log_temperature": self.log_temperature.detach(), "core_generator": self._generator.get_state()}
        tensors |= {f"average.{k}": value for k, value in enumerate(self.average)}
        return tensors, {"updates": self.updates}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Continue from `state`."""
        modules = {"critic": self.critic, "target": self.target, "proposal": self.proposal}
        for name, module in modules.items():
            prefix = f"{name}."
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        restore_optimizer("optimizer", self._optimizer, dict(tensors))
        with torch.no_grad():
            self.log_temperature.copy_(tensors["log_temperature"])
            for k, value in enumerate(self.average):
                value.copy_(tensors[f"average.{k}"])
        self._generator.set_state(tensors["core_generator"])
        self.updates = int(numbers["updates"])


def _squared(error: Tensor, weight: Tensor) -> Tensor:
    """Return the critic's loss for errors (E, B) and weights (B,)."""
    return 0.5 * (weight * error.square()).mean(-1).sum()
