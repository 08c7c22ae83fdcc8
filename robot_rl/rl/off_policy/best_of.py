"""What methods share that choose among a frozen base's chunks: the behaviour, and the action of the backup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.policy import Policy
from robot_rl.nets.device import device_of
from robot_rl.policies.best_of import BestOfConfig, BestOfPolicy, ChunkEditor
from robot_rl.policies.chunk_critic import ChunkCritic, ChunkCriticConfig
from robot_rl.rl.off_policy.collector import PriorBehaviour
from robot_rl.rl.off_policy.core import OffPolicyConfig, OffPolicyCore
from robot_rl.rl.off_policy.proposals import ActionValue, Batch, Proposal


class BestOfBehaviour(PriorBehaviour):
    """Executes the chosen chunk; until learning begins, the base's first, which is the base policy itself.

    Stores what the base offered at the decision that follows (K chunks of it), so that no update asks the base.
    """

    def __init__(self, policy: BestOfPolicy, backup_candidates: int, seed: int) -> None:
        if backup_candidates < 0:
            raise ConfigError(f"backup_candidates must not be negative, got {backup_candidates}")
        self.kept = min(backup_candidates or policy.config.candidates, policy.config.candidates)
        self.policy, self.spec, self.obs_steps = policy, policy.spec, policy.obs_steps
        self.horizon, self.execute_steps = policy.horizon, policy.execute_steps
        self.extra_fields: Mapping[str, tuple[int, ...]] = {"next_candidates": (self.kept, policy.critic.action_size)}
        self.learning = False
        self.record = {}
        self._generator = torch.Generator().manual_seed(seed)

    def plan(self, history: Observation) -> np.ndarray:
        """Return chunks (b, H, A) and set `record`."""
        choice = self.policy.choose(history, self._generator)
        self.record = {"state": choice.state, "action": choice.action}
        self.record["candidates"] = choice.candidates[:, : self.kept]
        return choice.chunks.cpu().numpy()

    def state(self, history: Observation) -> Tensor:
        """Return the critic's states (b, S)."""
        return self.policy.critic.state(self.policy.tensors(history))

    def action(self, chunks: np.ndarray) -> Tensor:
        """Return executed chunks (b, D) as the critic takes them."""
        return self.policy.critic.action(torch.as_tensor(chunks, dtype=torch.float32, device=device_of(self.policy)))

    def successor(self, history: Observation, upcoming: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return the critic's states and what the base offers there."""
        chunks = self.policy.draw(history, self.kept, self._generator)
        return {"state": self.state(history), "candidates": self.policy.critic.action(chunks)}


class BestOfProposal(Proposal):
    """Backs up the best of the stored candidates and of their edits; the actor is the editor, if there is one.

    Q-chunking (arXiv 2507.07969) chooses by the online critic's mean and leaves the valuation to the target. EXPO
    (2507.07986) chooses by random members of the target; the core draws others to value, which keeps the arg-max from
    feeding on one pair's errors.

    Args:
        editor: moves chunks; None to choose among the base's own.
        config: how to choose.
        kept: candidates K in a row; as many of them as ``config.edits`` are offered in an edited form as well.
        judge: whether the online critic or its target chooses.
        members: size E of the ensemble.
    """

    def __init__(
        self,
        editor: ChunkEditor | None,
        config: BestOfConfig,
        kept: int,
        judge: Literal["online", "target"],
        members: int,
    ) -> None:
        super().__init__()
        self.editor, self.config, self.judge, self.edits = editor, config, judge, min(config.edits, kept)
        self.random = members if 0 < config.choose_members < members else 0
        self.noise_size = self.random + (self.edits * editor.noise_size if editor is not None else 0)
        self.log_volume = editor.log_volume if editor is not None else 0.0

    @property
    def entropy_size(self) -> int:
        """Numbers of one edit."""
        return self.editor.noise_size if self.editor is not None else 0

    def backup(self, batch: Batch, eps: Tensor, critic: ActionValue, target: ActionValue) -> tuple[Tensor, Tensor]:
        """Return the best candidates (B, D) of the states that follow, and zeros (B,): an arg-max has no density."""
        state, candidates = batch["next_state"], batch["next_candidates"]
        if self.editor is not None:
            noise = eps[:, self.random :].unflatten(-1, (self.edits, -1))
            edited = self.editor.several(state, candidates[:, : self.edits], noise)
            candidates = torch.cat([candidates, edited], dim=1)
        # The order of normal numbers is a uniformly random order: one draw for the whole batch, from its first row.
        members = eps[0, : self.random].argsort()[: self.config.choose_members] if self.random else None
        judge = critic if self.judge == "online" else target
        count = candidates.shape[1]
        values = judge(state.repeat_interleave(count, dim=0), candidates.flatten(0, 1), members)
        value = (values.amin(0) if self.config.choose_by == "min" else values.mean(0)).unflatten(0, (-1, count))
        rows = torch.arange(len(state), device=state.device)
        return candidates[rows, value.argmax(-1)], value.new_zeros(len(state))

    def value(self, batch: Batch, eps: Tensor, critic: ActionValue) -> tuple[Tensor, Tensor]:
        """Return values (E, B) of the executed actions after an edit, and the log-densities (B,) of the edits."""
        if self.editor is None:
            raise CapabilityError("choosing among a base's own chunks has no actor to improve")
        noise = eps[:, self.random : self.random + self.editor.noise_size]
        edited, log_prob = self.editor(batch["state"], batch["action"], noise)
        return critic(batch["state"], edited, frozen=True), log_prob

    def actor_parameters(self) -> list[nn.Parameter]:
        """Return the editor's weights."""
        return list(self.editor.parameters()) if self.editor is not None else []


def make_best_of(
    base: Policy,
    config: BestOfConfig,
    core: OffPolicyConfig,
    judge: Literal["online", "target"],
    seed: int,
    history: int = 0,
    backup_candidates: int = 0,
) -> tuple[BestOfPolicy, BestOfBehaviour, OffPolicyCore]:
    """Put a choosing policy on the off-policy core; policy and core share critic and editor.

    Args:
        base: the policy to choose from; it lends its normaliser.
        config: candidates and choice.
        core: settings of the core.
        judge: whether the online critic or its target chooses, in acting and in the backup.
        seed: seed of exploration and of the core's draws.
        history: newest observations that the critic sees; 0 for as many as the base.
        backup_candidates: chunks of the base that the backup chooses among, at most; 0 for as many as acting.

    Raises:
        CapabilityError: the base has no normaliser, or corrects its actions in a closed loop.
    """
    normalizer = getattr(base, "normalizer", None)
    if normalizer is None:
        raise CapabilityError(
            "the critic takes its units from the base's normaliser, as kinds 'chunked' and 'chain' have one; "
            f"{type(base).__name__} has none"
        )
    shape = ChunkCriticConfig(
        steps=config.execute_steps or base.execute_steps,
        history=history or base.obs_steps,
        members=core.critics,
        hidden=core.hidden,
        layer_norm=core.layer_norm,
    )
    policy = BestOfPolicy(base, ChunkCritic(base.spec, shape, normalizer), config).to(device_of(base))
    policy.seed(seed)
    critic, editor = policy.critic, policy.editor
    behaviour = BestOfBehaviour(policy, backup_candidates, seed)
    proposal = BestOfProposal(editor, config, behaviour.kept, judge, core.critics)
    made = OffPolicyCore(critic.state_size, critic.action_size, proposal, core, seed, device_of(policy))
    critic.net = (made.critic if judge == "online" else made.target).net
    return policy, behaviour, made
