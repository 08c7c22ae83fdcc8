"""The critics of the on-policy core: values of states, medians of action values for bpo, and advantages from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robot_rl.rl.critics import StateValue
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.on_policy.config import OnPolicyConfig
from robot_rl.rl.on_policy.decisions import Batch, Rollout, advantages
from robot_rl.rl.on_policy.flat_adam import FlatAdam
from robot_rl.rl.state import below
from robot_rl.train import distributed


class Critics:
    """Values of states and their optimiser, made when the size of their input is known: at the first update."""

    def __init__(self, config: OnPolicyConfig, seed: int) -> None:
        self.config = config
        self.value: StateValue | None = None
        self.median: StateValue | None = None
        """Median of the action values under the policy, for bpo."""
        self.adam: FlatAdam | None = None
        self._seed = seed
        self._restored: dict[str, Tensor] = {}

    def make(self, size: int, device: str | torch.device = "cpu") -> StateValue:
        """Return the critic of inputs (B, size) on ``device``, the same in all processes."""
        if self.value is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                self.value = StateValue(size, self.config.value_hidden).to(device)
                if self.config.loss == "bpo":
                    self.median = StateValue(size, self.config.value_hidden).to(device)
            parameters = [parameter for _, critic in self._named() for parameter in critic.parameters()]
            self.adam = FlatAdam(parameters, self.config.max_grad_norm)
            distributed.broadcast(parameters)
            if self._restored:
                for name, critic in self._named():
                    critic.load_state_dict(below(f"{name}.", self._restored))
                self.adam.restore(below("value_optimizer.", self._restored))
                self._restored = {}
        return self.value

    def loss(self, part: Batch) -> tuple[Tensor, Tensor]:
        """Return the values (B,) before the step and the critics' loss."""
        assert self.value is not None
        values = self.value(part.critic_input)
        loss = 0.5 * nn.functional.mse_loss(values, part.target)
        if self.median is not None:
            # log(2 cosh(x / 2)): |x| / 2 with a round foot, whose minimiser is the median where |x| is large.
            gap = (part.target - self.median(part.critic_input)).abs()
            loss = loss + (nn.functional.softplus(-gap) + gap / 2).mean()
        return values.detach(), loss

    @torch.no_grad()
    def above_median(self, part: Batch) -> Tensor:
        """Return in [-1, 1] whether each decision (B,) was better than its state's median, softened near zero."""
        assert self.median is not None
        gap = part.target - self.median(part.critic_input)
        return 2 * (gap / self.config.bpo_temperature).clamp(-10, 10).sigmoid() - 1

    @torch.no_grad()
    def advantages(
        self, rollout: Rollout, critic_input: Tensor, decision: DecisionConfig, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return values (T, N) before the update and advantages (T, N), zero where there is no complete decision.

        Args:
            rollout: T decisions of N lanes.
            critic_input: (B, F) of the filled ones.
            decision: how rewards of control steps became those of decisions.
            scale: factor of the rewards.
        """
        config, valid, truncated = self.config, rollout.valid.float(), rollout.truncated
        value = self.make(critic_input.shape[-1], critic_input.device)
        before = torch.zeros_like(rollout.reward)
        before[rollout.filled] = value(critic_input).cpu()
        following = torch.cat([before[1:], before.new_zeros(1, before.shape[1])])
        ahead = value(rollout.last_input).cpu()
        lanes = (rollout.last >= 0).nonzero().squeeze(-1)
        following[rollout.last[lanes], lanes] = ahead[lanes]
        if rollout.final:
            slots, ended, inputs = (torch.cat(column) for column in zip(*rollout.final, strict=True))
            following[slots, ended] = value(inputs).cpu()
        if config.timeout == "current":
            following = torch.where(truncated > 0, before, following)
        elif config.timeout == "mask":
            valid = valid * (1 - truncated)
        terminated = rollout.terminated + truncated if config.timeout == "terminal" else rollout.terminated
        discount = config.discount**rollout.length if decision.clock == "step" else config.discount
        reward = (rollout.reward - decision.penalty) * scale * valid
        ends = terminated, truncated
        found = advantages(reward, before * valid, following * valid, *ends, discount, config.gae_lambda)
        return before, found

    def state(self) -> dict[str, Tensor]:
        """Return the tensors from which `restore` continues."""
        tensors = {f"{name}.{key}": p for name, critic in self._named() for key, p in critic.state_dict().items()}
        if self.adam is not None:
            tensors |= {f"value_optimizer.{key}": moment for key, moment in self.adam.state().items()}
        return tensors | self._restored

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        self._restored = {key: tensor for key, tensor in tensors.items() if key.startswith(("value", "median"))}

    def _named(self) -> list[tuple[str, StateValue]]:
        return [(name, one) for name, one in (("value", self.value), ("median", self.median)) if one is not None]
