"""Let a critic choose among a policy's plans, without training: the best of N by a finished run's critic.

The critic need not have been learned with this policy, only with the same observations and actions. The result is a
policy that eval and deploy take.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robot_rl.core.errors import ConfigError
from robot_rl.core.ranges import require_range


@dataclass(frozen=True)
class Config:
    """Settings of ``robot-rl guide``."""

    policy: Path
    """Checkpoint of the policy whose plans are chosen from."""
    critic: Path
    """Run of qchunk, expo, rlpd or dsrl (variant na), or a checkpoint of kind best_of."""
    out: Path = Path("runs/guided")
    """Where the guided policy is written."""
    candidates: int = 16
    """Plans drawn per decision; with very many, the critic's errors are what is chosen."""
    temperature: float = 0.0
    """Choose with probability softmax(value / (temperature * spread)); 0 takes the best."""
    sample_steps: int = 0
    """Sampling steps of the policy per plan; 0 for its own number."""

    def __post_init__(self) -> None:
        require_range(self, "candidates", low=1)
        require_range(self, "temperature", "sample_steps")
        if self.out.resolve() in (self.policy.resolve(), self.critic.resolve()):
            raise ConfigError(f"--out {self.out} is what is read from, and would be replaced: name another directory")


def run(config: Config) -> None:
    """Write the guided policy."""
    from robot_rl.policies.best_of import BestOfConfig, guide
    from robot_rl.policies.checkpoint import load_policy, save_policy
    from robot_rl.rl.guide import load_critic
    from robot_rl.train.progress import say

    choice = BestOfConfig(
        candidates=config.candidates, temperature=config.temperature, sample_steps=config.sample_steps
    )
    policy = guide(load_policy(config.policy), load_critic(config.critic), choice)
    facts = {"guided": {"policy": str(config.policy), "critic": str(config.critic)}}
    say(f"Policy: {save_policy(policy, config.out, facts)}")
