"""What differs between off-policy methods: where the next action of the backup comes from, and how the actor learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from robot_rl.policies.gaussian import SquashedGaussian

Batch = Mapping[str, Tensor]
"""Rows of one update: ``state`` (B, S), ``action`` (B, D), ``reward`` (B,), ``next_state`` (B, S), ``terminated`` (B,),
``exponent`` (B,), ``weight`` (B,), and what the method stores besides (`Behaviour.extra_fields`)."""


class ActionValue(Protocol):
    """An ensemble of action values: states (B, S) and actions (B, D) to (E, B)."""

    def __call__(self, state: Tensor, action: Tensor, members: Tensor | None = None, frozen: bool = False) -> Tensor:
        """Return values (E, B), of all members or of some; ``frozen`` keeps gradients from the critic's weights."""


class Proposal(nn.Module, ABC):
    """Supplies actions for the backup and improves itself by the critic; sees whole rows of the replay.

    Randomness enters as standard normal ``eps`` (B, noise_size), so that an update is a pure function and the same
    numbers give the same losses whatever the method is wrapped in.
    """

    noise_size: int
    """Standard normal numbers per row and use."""
    log_volume: float = 0.0
    """Log-volume that scales what the actor draws, by which its log-densities differ from those in (-1, 1)^n."""

    @property
    def entropy_size(self) -> int:
        """Numbers n that the actor draws per row, whose entropy the temperature holds."""
        return self.noise_size

    @abstractmethod
    def backup(self, batch: Batch, eps: Tensor, critic: ActionValue, target: ActionValue) -> tuple[Tensor, Tensor]:
        """Return actions (B, D) as the critic takes them, and log-densities (B,), for the states that follow.

        Called without gradients; ``eps`` is (B, noise_size), ``target`` the critic that will value the actions.
        """

    @abstractmethod
    def value(self, batch: Batch, eps: Tensor, critic: ActionValue) -> tuple[Tensor, Tensor]:
        """Return what the actor wants to raise, an ensemble of values (E, B), and its log-densities (B,).

        Gradients reach the actor's weights only. Not called where there is no actor.
        """

    @abstractmethod
    def actor_parameters(self) -> list[nn.Parameter]:
        """Return what the actor's optimiser trains; empty for a method without an actor."""

    def auxiliary_loss(self, batch: Batch, eps: Tensor, critic: ActionValue) -> Tensor | None:
        """Return the loss (a scalar) of what the method trains besides actor and critic, or None."""
        return None

    def auxiliary_parameters(self) -> list[nn.Parameter]:
        """Return what the optimiser of the auxiliary loss trains."""
        return []

    @property
    def auxiliary_noise_size(self) -> int:
        """Standard normal numbers per row of the auxiliary loss."""
        return self.noise_size

    def metrics(self) -> dict[str, float]:
        """Return what else to log of the latest update."""
        return {}


class GaussianProposal(Proposal):
    """The action itself is drawn from a squashed Gaussian: SAC, RLPD, and latent steering of a wrapped environment."""

    def __init__(self, actor: SquashedGaussian) -> None:
        super().__init__()
        self.actor = actor
        self.noise_size = actor.action_size

    def backup(self, batch: Batch, eps: Tensor, critic: ActionValue, target: ActionValue) -> tuple[Tensor, Tensor]:
        """Return actions (B, D) in (-1, 1) and their log-densities (B,)."""
        action, log_prob = self.actor(batch["next_state"], eps)
        return action, log_prob

    def value(self, batch: Batch, eps: Tensor, critic: ActionValue) -> tuple[Tensor, Tensor]:
        """Return values of the actor's own actions (E, B) and their log-densities (B,)."""
        action, log_prob = self.actor(batch["state"], eps)
        return critic(batch["state"], action, frozen=True), log_prob

    def actor_parameters(self) -> list[nn.Parameter]:
        """Return the actor's weights."""
        return list(self.actor.parameters())


class Decoder(Protocol):
    """A frozen generative policy: conditions (B, C) and unscaled noise (B, D) to flat actions (B, K)."""

    def __call__(self, cond: Tensor, noise: Tensor) -> Tensor:
        """Return what the environment is given, (B, K)."""


class AliasedNoiseProposal(Proposal):
    """Noise for a frozen policy, with two critics (DSRL-NA, arXiv 2506.15799).

    Many noises make one action, so Q^A(s, a) learns from executed actions, and Q^W(s, w) is distilled from it over
    w ~ N(0, I), unclipped; the actor climbs Q^W. The core's critic is Q^A.

    Args:
        actor: squashed Gaussian over noise divided by ``bound``.
        noise_critic: Q^W, an ensemble of as many members as Q^A.
        decode: frozen policy, noise to the action chunk that is executed.
        bound: largest magnitude b of a noise element the actor can choose.
    """

    def __init__(self, actor: SquashedGaussian, noise_critic: nn.Module, decode: Decoder, bound: float) -> None:
        super().__init__()
        self.actor, self.noise_critic, self.bound = actor, noise_critic, bound
        self.decode = decode
        self.noise_size = actor.action_size

    def backup(self, batch: Batch, eps: Tensor, critic: ActionValue, target: ActionValue) -> tuple[Tensor, Tensor]:
        """Return the decoded actions (B, K) of the actor's noise and the noise's log-densities (B,)."""
        noise, log_prob = self.actor(batch["next_state"], eps)
        return self.decode(batch["next_state"], self.bound * noise), log_prob

    def value(self, batch: Batch, eps: Tensor, critic: ActionValue) -> tuple[Tensor, Tensor]:
        """Return Q^W of the actor's noise (E, B) and its log-densities (B,); ``critic`` (Q^A) is not asked."""
        noise, log_prob = self.actor(batch["state"], eps)
        return self.noise_critic(batch["state"], noise, frozen=True), log_prob

    def auxiliary_loss(self, batch: Batch, eps: Tensor, critic: ActionValue) -> Tensor | None:
        """Return the distillation loss of Q^W at prior noise ``eps`` (B, D)."""
        state = batch["state"]
        with torch.no_grad():
            target = critic(state, self.decode(state, eps))
        value: Tensor = self.noise_critic(state, eps / self.bound)
        return 0.5 * (value - target).square().mean(-1).sum()

    def auxiliary_parameters(self) -> list[nn.Parameter]:
        """Return Q^W's weights."""
        return list(self.noise_critic.parameters())

    def actor_parameters(self) -> list[nn.Parameter]:
        """Return the actor's weights."""
        return list(self.actor.parameters())
