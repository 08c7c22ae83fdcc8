"""HDF5 demonstrations: robomimic's layout (``data/demo_i/obs/…``) and robosuite's (``data/demo_i/states``)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.core.errors import DataError, MissingDependencyError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.adroit import action_warnings
from robot_rl.data.dataset import EpisodeReader, reading, recognises

EXTRA_NAMES = {"rewards": "reward", "dones": "done", "states": "states", "joint_torques": "joint_torques"}
"""Per-step arrays that are no observations, and what they are called in `Frames.extras`."""
MAGIC = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class _Source:
    """Where a key is inside a demonstration."""

    path: str
    columns: slice | int | None = None
    observed: bool = False


def _looks_like_hdf5(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC or path.suffix in (".hdf5", ".h5")


@recognises(_looks_like_hdf5)
def open_hdf5(path: Path) -> Hdf5Dataset:
    """Open demonstrations of robomimic or robosuite; raises `DataError` for a damaged file or another layout."""
    return Hdf5Dataset(path)


class Hdf5Dataset(EpisodeReader):
    """Demonstrations in one HDF5 file, read on `load`.

    robosuite's own files hold simulator states instead of observations: time, qpos and qvel. The time becomes the
    extra ``timestamp``, the rest the observation ``state``. ``next_obs`` repeats ``obs`` and is not read.
    """

    format = "hdf5"

    def __init__(self, path: Path) -> None:
        with reading(path), _open(path) as file:
            if "data" not in file:
                raise DataError(f"{path}: no group 'data'; found {', '.join(file) or 'nothing'}")
            data = file["data"]
            self._demos = sorted((name for name in data if name.startswith("demo")), key=_natural)
            if not self._demos:
                raise DataError(
                    f"{path}: no demonstration 'data/demo_…'; found {', '.join(list(data)[:5]) or 'nothing'}"
                )
            for name in self._demos:
                if "actions" not in data[name]:
                    raise DataError(f"{path}: {name} has no 'actions'; found {', '.join(data[name])}")
            first = data[self._demos[0]]
            self._sources = _sources(path, first)
            observation = {
                key: _array_spec(first[source.path], source) for key, source in self._sources.items() if source.observed
            }
            actions = np.concatenate([np.asarray(data[name]["actions"]) for name in self._demos])
            environment = _environment(data.attrs)
            action, warnings = _action_spec(actions, environment)
            rate, rate_warnings = _rate(environment, first if "timestamp" in self._sources else None)
            lengths = [len(data[name]["actions"]) for name in self._demos]
            splits = {name: [_decode(demo) for demo in part] for name, part in file.get("mask", {}).items()}
            super().__init__(path, Spec(observation, action, rate), lengths)
            self._check_lengths(data)
            self.warnings = [*warnings, *rate_warnings, *_state_warnings(first, self._sources)]
        self.extras = tuple(key for key in self._sources if key not in observation and key != "action")
        known = {name: number for number, name in enumerate(self._demos)}
        for name, part in splits.items():
            self.splits[name] = [known[demo] for demo in part if demo in known]
        self.environment = environment
        """What the file says about the environment (robosuite or robomimic arguments)."""
        task = environment.get("env_name", "")
        self.tasks = [str(task)] * len(self._demos) if task else []

    def initial_state(self, episode: int) -> dict[str, np.ndarray]:
        """Return the simulator state at the start of an episode, where the file holds one; else an empty mapping."""
        with reading(self.root), _open(self.root) as file:
            demo = file["data"][self._demos[self._episode(episode)]]
            if "initial_state" in demo:
                return {name: np.asarray(value) for name, value in demo["initial_state"].items()}
            return {"states": np.asarray(demo["states"][0])} if "states" in demo else {}

    def _check_lengths(self, data: Any) -> None:
        for name in self._demos:
            for source in {source.path for source in self._sources.values()}:
                if source not in data[name]:
                    raise DataError(f"{self.root}: {name} has no '{source}', which {self._demos[0]} has")
                stored, expected = data[name][source].shape, data[self._demos[0]][source].shape
                if stored[0] != len(data[name]["actions"]) or stored[1:] != expected[1:]:
                    raise DataError(
                        f"{self.root}: {name}/{source} has shape {stored}, "
                        f"expected {(len(data[name]['actions']), *expected[1:])}"
                    )
            stated = data[name].attrs.get("num_samples")
            if stated is not None and int(stated) != len(data[name]["actions"]):
                raise DataError(f"{self.root}: {name} states {stated} samples and holds {len(data[name]['actions'])}")

    def _column(self, name: str, episodes: Sequence[int]) -> np.ndarray:
        source = self._sources[name]
        with reading(self.root), _open(self.root) as file:
            data = file["data"]
            parts = [np.asarray(data[self._demos[i]][source.path]) for i in episodes]
            values = np.concatenate(parts) if parts else np.asarray(data[self._demos[0]][source.path][:0])
        if source.columns is not None:
            return values[:, source.columns]
        return values[:, None] if values.ndim == 1 and source.observed else values


def _open(path: Path) -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise MissingDependencyError("h5py", "datasets", f"Reading {path}") from error
    return h5py.File(path, "r")


def _natural(name: str) -> tuple[int, str]:
    """Sort demo_2 before demo_10."""
    number = re.search(r"\d+$", name)
    return (int(number[0]) if number else 0, name)


def _decode(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _sources(path: Path, demo: Any) -> dict[str, _Source]:
    """Return where each key is inside a demonstration."""
    sources = {"action": _Source("actions")}
    if "obs" in demo:
        sources |= {key: _Source(f"obs/{key}", observed=True) for key in demo["obs"]}
    elif "states" in demo:
        sources["state"] = _Source("states", slice(1, None), observed=True)
        sources["timestamp"] = _Source("states", 0)
    else:
        raise DataError(f"{path}: {demo.name} has neither 'obs' nor 'states'; found {', '.join(demo)}")
    taken = {source.path for source in sources.values()}
    return sources | {key: _Source(name) for name, key in EXTRA_NAMES.items() if name in demo and name not in taken}


def _array_spec(array: Any, source: _Source) -> ArraySpec:
    if source.columns is not None:
        return ArraySpec((array.shape[1] - 1,))
    shape = tuple(array.shape[1:]) or (1,)
    if array.dtype == np.uint8 and len(shape) == 3 and shape[-1] == 3:
        return ArraySpec(shape, "uint8")
    return ArraySpec(shape, "float32" if array.dtype.kind == "f" else str(array.dtype))


def _environment(attributes: Any) -> dict[str, Any]:
    """Return the JSON that robomimic keeps in ``env_args`` and robosuite in ``env_info``."""
    for name in ("env_args", "env_info"):
        if name in attributes:
            return dict(json.loads(_decode(attributes[name])))
    return {"env_name": _decode(attributes["env"])} if "env" in attributes else {}


def _action_spec(actions: np.ndarray, environment: dict[str, Any]) -> tuple[ArraySpec, list[str]]:
    """Return the action's spec with the bounds that the controller states, or robomimic's convention of [-1, 1]."""
    size = actions.shape[1]
    controller = environment.get("env_kwargs", environment).get("controller_configs") or {}
    low, high = controller.get("input_min", -1.0), controller.get("input_max", 1.0)
    inside = np.mean((actions >= low) & (actions <= high))
    if not np.isscalar(low) or not np.isscalar(high) or inside < 0.9:
        return ArraySpec((size,)), ["the bounds of the action are not known"]
    spec = ArraySpec((size,), low=(float(low),) * size, high=(float(high),) * size)
    return spec, action_warnings(actions, spec)


def _rate(environment: dict[str, Any], timed: Any) -> tuple[float, list[str]]:
    """Return the control rate in Hz that the file states, or that the times in robosuite's states measure."""
    for part in (environment, environment.get("env_kwargs") or {}):
        if part.get("control_freq"):
            return float(part["control_freq"]), []
    if timed is not None and len(timed["states"]) > 1:
        rate = round(1.0 / float(np.median(np.diff(timed["states"][:, 0]))), 2)
        return rate, [f"the file states no control rate: {rate:g} Hz is measured from the times of the states"]
    return 0.0, ["the file states no control rate: rate_hz is 0"]


def _state_warnings(demo: Any, sources: dict[str, _Source]) -> list[str]:
    """Report that a robosuite recording does not start at time 0."""
    if "timestamp" not in sources or demo["states"][0, 0] == 0:
        return []
    return [f"states[0] has time {demo['states'][0, 0]:.3f} s, not 0"]
