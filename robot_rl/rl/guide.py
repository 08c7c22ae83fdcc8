"""Critics of finished runs, ready to guide any policy with the same observations and actions (V-GPS, 2410.13816)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from robot_rl.core.errors import CapabilityError, DataError
from robot_rl.policies.best_of import BestOfPolicy
from robot_rl.policies.checkpoint import load_policy
from robot_rl.policies.chunk_critic import ChunkCritic, ChunkCriticConfig
from robot_rl.policies.gaussian import GaussianPolicy
from robot_rl.policies.steered import SteeredPolicy
from robot_rl.rl.state import load_state

_PREFIX = "critic.net."
_UNCLAMPED = 1e6


def load_critic(source: str | Path) -> ChunkCritic:
    """Return the critic of a fine-tuning run, or of a best-of-N checkpoint.

    Args:
        source: a run directory of ``qchunk``, ``expo``, ``rlpd`` or ``dsrl`` (variant na), or a checkpoint of kind
            ``best_of``.

    Raises:
        CapabilityError: the run's critic does not value actions.
        DataError: there is nothing to read.
    """
    source = Path(source)
    run = source if (source / "checkpoints" / "best").exists() else None
    policy = load_policy(run / "checkpoints" / "best" if run else source)
    if isinstance(policy, BestOfPolicy):
        return policy.critic
    able = "qchunk, expo, rlpd, dsrl with variant=na"
    if run is None:
        raise CapabilityError(f"{source} holds no critic; give the run directory of one of: {able}")
    if isinstance(policy, GaussianPolicy):
        return _with_weights(_of_gaussian(policy, _weights(run)), _weights(run))
    if isinstance(policy, SteeredPolicy) and _method(run).get("variant") == "na":
        return _with_weights(_of_base(policy.base, policy.execute_steps, _weights(run)), _weights(run))
    raise CapabilityError(f"the run {run} learned no critic of actions; methods that do: {able}")


def _of_gaussian(policy: GaussianPolicy, weights: dict[str, Tensor]) -> ChunkCritic:
    """RLPD's critic: actions in [-1, 1] between the policy's bounds, which need not be those of the spec."""
    if policy.config.relative_to:
        raise CapabilityError(
            f"the run's critic values offsets from {policy.config.relative_to}, and what guides has to value actions: "
            "train rlpd without relative_to"
        )
    shape = _shape(weights, steps=policy.horizon, history=policy.obs_steps)
    critic = ChunkCritic(policy.spec, shape, policy.normalizer)
    low, high = policy.get_buffer("low"), policy.get_buffer("high")
    critic.normalizer.assign("action", (low + high) / 2, (high - low) / 2)
    critic.get_buffer("low").copy_(low)
    critic.get_buffer("high").copy_(high)
    return critic


def _of_base(base: Any, steps: int, weights: dict[str, Tensor]) -> ChunkCritic:
    """DSRL's critic of executed actions: the frozen policy's own conditions and units."""
    shape = _shape(weights, steps=steps, history=base.obs_steps, clamp=_UNCLAMPED)
    return ChunkCritic(base.spec, shape, base.normalizer)


def _shape(weights: dict[str, Tensor], **known: Any) -> ChunkCriticConfig:
    layers = sorted(name for name in weights if name.startswith("weights."))
    hidden = tuple(weights[name].shape[-1] for name in layers[:-1])
    layer_norm = any(name.startswith("gains.") for name in weights)
    return ChunkCriticConfig(members=len(weights[layers[0]]), hidden=hidden, layer_norm=layer_norm, **known)


def _weights(run: Path) -> dict[str, Tensor]:
    tensors, _ = load_state(run / "learner.safetensors")
    return {name.removeprefix(_PREFIX): value for name, value in tensors.items() if name.startswith(_PREFIX)}


def _with_weights(critic: ChunkCritic, weights: dict[str, Tensor]) -> ChunkCritic:
    try:
        critic.net.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"the run's critic takes other states or actions than its policy: {error}") from error
    return critic.eval().requires_grad_(False)


def _method(run: Path) -> dict[str, Any]:
    """Return the recorded settings of the run's method; empty if it was not made by the command."""
    path = run / "config.yaml"
    recorded = yaml.safe_load(path.read_text()) if path.exists() else {}
    found = recorded.get("method", {})
    return found if isinstance(found, dict) else {}
