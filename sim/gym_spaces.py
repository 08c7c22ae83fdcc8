"""Gymnasium's environments by name, and what their spaces are in our terms."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any

import numpy as np

from robot_rl.core.errors import CapabilityError, ConfigError, MissingDependencyError, UnknownNameError
from robot_rl.core.spec import ArraySpec
from sim.engine import quiet_log_file

_REGISTERING = ("gym_pusht", "gymnasium_robotics")
"""Packages whose import registers environments without a name space."""
_DEFAULTS: dict[str, dict[str, Any]] = {"gym_pusht/PushT": {"obs_type": "environment_state_agent_pos"}}
"""Options of `gymnasium.make` that we set unless the caller does, by the id without its version."""


def make_gymnasium(env_id: str, options: Mapping[str, Any]) -> Any:
    """Build one Gymnasium environment, importing the packages that register its id.

    As for Gymnasium, ``module:id`` imports ``module`` first.

    Raises:
        UnknownNameError: nothing has registered the id; names similar ones.
        MissingDependencyError: a package is not installed.
        ConfigError: the environment refused its options.
    """
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise MissingDependencyError("gymnasium", "gym", f"The environment 'gym:{env_id}'") from error
    quiet_log_file()
    env_id = _registered(env_id, gymnasium.registry)
    defaults = next((d for name, d in _DEFAULTS.items() if env_id.startswith(name)), {})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = {"render_mode": "rgb_array"} if "rgb_array" in _render_modes(env_id) else {}
            return gymnasium.make(env_id, **{"disable_env_checker": True, **drawn, **defaults, **options})
    except (gymnasium.error.Error, TypeError, ValueError) as error:
        message = str(error).partition(" was raised from the environment creator")[0]
        raise ConfigError(f"gym:{env_id}: {' '.join(message.split())}") from error
    except ModuleNotFoundError as error:
        raise MissingDependencyError(str(error.name), "gym", f"The environment 'gym:{env_id}'") from error


def _render_modes(env_id: str) -> Sequence[str]:
    from gymnasium.envs.registration import load_env_creator, spec

    entry = spec(env_id).entry_point
    creator = load_env_creator(entry) if isinstance(entry, str) else entry
    return getattr(creator, "metadata", {}).get("render_modes") or ()


def _registered(env_id: str, registry: Mapping[str, Any]) -> str:
    """Return the id by which Gymnasium knows the environment, once what registers it is imported."""
    module, _, name = env_id.rpartition(":")
    namespace = name.partition("/")[0] if "/" in name else ""
    for package in (module,) if module else (namespace, *_REGISTERING):
        if name in registry:
            return name
        if package and importlib.util.find_spec(package.partition(".")[0]):
            # Importing gymnasium_robotics prints release notes.
            with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                importlib.import_module(package)
        elif module:
            raise ConfigError(f"gym:{env_id}: there is no module '{module}' that could register it")
    if name in registry:
        return name
    if namespace in _REGISTERING and not importlib.util.find_spec(namespace):
        raise MissingDependencyError(namespace, "gym", f"The environment 'gym:{env_id}'")
    near = difflib.get_close_matches(name, list(registry), n=5, cutoff=0.4)
    raise UnknownNameError("Gymnasium environment", env_id, near)


def observation_keys(env_id: str, space: Any) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Map our observation keys to where in the environment's observation they are, and to their spaces."""
    from gymnasium import spaces

    found: dict[str, tuple[tuple[str, ...], Any]] = {}

    def collect(path: tuple[str, ...], part: Any) -> None:
        if isinstance(part, spaces.Dict):
            for name, child in part.spaces.items():
                collect((*path, name), child)
        elif isinstance(part, spaces.Box):
            image = part.dtype == np.uint8 and len(part.shape) == 3
            name = ".".join(path)
            key = f"images.{name or 'pixels'}" if image else "state" if name in ("", "observation") else name
            found[key] = (path, part)
        else:
            raise CapabilityError(
                f"gym:{env_id}: {type(part).__name__} observations are not supported; use Box or Dict"
            )

    collect((), space)
    return found


def descend(observation: Any, path: tuple[str, ...]) -> Any:
    """Return the part of a nested observation at ``path``."""
    for name in path:
        observation = observation[name]
    return observation


def array_type(space: Any) -> str:
    """Return our element type for a Box: float32 for every float."""
    return "float32" if np.issubdtype(space.dtype, np.floating) else str(space.dtype)


def array_spec(space: Any) -> ArraySpec:
    """Return the spec of an observation; Gymnasium tells neither names nor units."""
    return ArraySpec(tuple(space.shape), array_type(space))


def action_spec(env_id: str, space: Any) -> ArraySpec:
    """Return the spec of a Box action, with its bounds; raises `CapabilityError` for other spaces."""
    from gymnasium import spaces

    if not isinstance(space, spaces.Box):
        raise CapabilityError(f"gym:{env_id}: {type(space).__name__} actions are not supported; use Box")
    low, high = (tuple(float(x) for x in bound.ravel()) for bound in (space.low, space.high))
    bounded = np.isfinite([*low, *high]).all()
    return ArraySpec(tuple(space.shape), low=low if bounded else None, high=high if bounded else None)


def control_rate(env: Any) -> float:
    """Return control steps per second: from the environment's time step, else its frame rate, else 0."""
    period = getattr(env.unwrapped, "dt", None)
    rate = env.metadata.get("render_fps")
    # gym_pusht's dt is its physics step; where both are given and disagree, the frame rate is the control rate.
    return float(rate) if rate else 1.0 / float(period) if period else 0.0
