"""Real-time chunking: a new chunk that goes on from the one a robot is executing while the policy plans.

Source: arXiv 2506.07339 (guided) and 2512.05964 (prefix-conditioned). NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from robot_rl.core.errors import CapabilityError, ConfigError


@dataclass(frozen=True)
class RealTimeConfig:
    """How a new chunk continues the running one."""

    method: Literal["off", "guided", "prefix"] = "off"
    """off plans every chunk by itself; guided draws the plan towards what is still to be executed of the running chunk;
    prefix gives these actions to a policy that was trained for it (--policy.prefix-steps of train)."""
    jacobian: Literal["full", "identity"] = "full"
    """Of guided: full sends the correction back through the network (a second pass per step), identity takes the
    denoised estimate as if it were the network's input, as fast as planning without guidance."""
    max_weight: float = 5.0
    """Of guided: largest weight of the correction; large ones overshoot."""
    max_delay: int = 4
    """Most actions that may be executed while a chunk is planned; the robot brakes and holds where planning takes
    longer. At most the horizon less the actions executed per chunk, and for prefix what was trained for."""

    @property
    def way(self) -> str:
        """Name of what a policy must be able to do: ``guided_full``, ``guided_identity``, ``prefix``, or ``off``."""
        return f"guided_{self.jacobian}" if self.method == "guided" else self.method

    @classmethod
    def of(cls, way: str, max_delay: int, max_weight: float) -> RealTimeConfig:
        """Return the settings whose `way` is given."""
        ways = {one.way: one for one in (cls(), cls("guided"), cls("guided", "identity"), cls("prefix"))}
        if way not in ways:
            raise ConfigError(f"real-time chunking knows {', '.join(ways)}, not '{way}'")
        return replace(ways[way], max_delay=max_delay, max_weight=max_weight)


@dataclass(frozen=True)
class Commitment:
    """What B robots go on doing while a policy plans for them."""

    actions: np.ndarray
    """(B, H, A) rests of the running chunks in the units of ``spec.action``, index 0 for the newest observation; beyond
    a chunk's end its last action is repeated."""
    remaining: np.ndarray
    """(B,) int: how many of the actions were planned; 0 where there is nothing to go on from."""
    delay: int
    """How many actions are executed before the new chunk takes over."""
    how: RealTimeConfig = field(default_factory=lambda: RealTimeConfig("guided"))
    """In which way the new chunk continues them."""

    @property
    def known(self) -> np.ndarray:
        """(B, H) bool: the actions that will have been executed when the new chunk comes."""
        index = np.arange(self.actions.shape[1])
        return (index < self.delay) & (self.remaining[:, None] > 0)

    @property
    def weights(self) -> np.ndarray:
        """(B, H) float32: how much each action of the running chunk counts for the new one.

        One for those that will have been executed, then falling to zero at the running chunk's end (2506.07339, eq. 5).
        """
        index, remaining = np.arange(self.actions.shape[1]), self.remaining[:, None]
        share = np.clip((remaining - index) / np.maximum(remaining - self.delay + 1, 1), 0.0, 1.0)
        soft = share * np.expm1(share) / np.expm1(1.0)
        return np.where(self.known, 1.0, np.where(remaining > 0, soft, 0.0)).astype(np.float32)


def require_way(policy: Any, how: RealTimeConfig) -> None:
    """Raise `CapabilityError` if ``policy`` cannot continue a chunk in this way; the message lists those it knows."""
    ways: Sequence[str] = getattr(policy, "real_time", ())
    if how.way not in ("off", *ways):
        able = ", ".join(ways) or "in no way"
        raise CapabilityError(f"this policy cannot continue a running chunk by {how.way}; it can by: {able}")


def require_real_time(policy: Any, how: RealTimeConfig) -> None:
    """Refuse what cannot work with ``policy``.

    Raises:
        CapabilityError: as `require_way`.
        ConfigError: more actions may be executed during planning than a chunk has left, or than was trained for.
    """
    require_way(policy, how)
    if how.method == "off":
        return
    spare = policy.horizon - policy.execute_steps
    if how.method == "prefix":
        spare = min(spare, policy.prefix_steps)
    if not 1 <= how.max_delay <= spare:
        raise ConfigError(
            f"real-time chunking by {how.way} needs max_delay in 1..{spare} with a horizon of {policy.horizon} and "
            f"{policy.execute_steps} actions executed per chunk, got {how.max_delay}"
        )
