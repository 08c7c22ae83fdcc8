"""The human demonstrations of the Adroit hand (arXiv 1709.10087), which are Python 2 pickles.

A pickle can run any code when it is loaded. This reader admits nothing but plain numpy arrays, lists, dictionaries,
text and numbers, and refuses everything else by name before it is called.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.core.errors import DataError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.dataset import EpisodeReader, reading, recognises

ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
"""The only names that a pickle may ask for: what plain arrays are rebuilt with."""
CONTROL_RATE_HZ = 100.0
"""Frame skip 5 at a physics step of 2 ms."""
NEEDED = ("observations", "actions", "rewards")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles plain arrays and containers only."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._bytes
        if (module, name) not in ADMITTED:
            raise DataError(
                f"{self._path}: refused: the pickle asks for '{module}.{name}', "
                "and only plain numpy arrays, lists and dictionaries are admitted"
            )
        return super().find_class(module, name)

    def _bytes(self, text: Any, encoding: Any) -> bytes:
        """Do the one thing that Python 3 asks ``_codecs.encode`` for in old pickles: the raw bytes of an array."""
        if not isinstance(text, str) or encoding != "latin1":
            raise DataError(f"{self._path}: refused: the pickle asks for '_codecs.encode' of something but raw bytes")
        return text.encode("latin1")

    def persistent_load(self, pid: Any) -> Any:
        raise DataError(f"{self._path}: refused: the pickle refers to an object outside itself ({pid!r})")


@recognises(lambda path: path.is_file() and path.suffix in (".pickle", ".pkl"))
def open_adroit(path: Path) -> AdroitDataset:
    """Open an Adroit pickle; raises `DataError` if it asks for anything but plain arrays or has another layout."""
    return AdroitDataset(path)


class AdroitDataset(EpisodeReader):
    """A list of episodes, each with ``observations``, ``actions``, ``rewards`` and ``init_state_dict``."""

    format = "adroit"

    def __init__(self, path: Path) -> None:
        self._episodes = _load(path)
        lengths = [len(episode["actions"]) for episode in self._episodes]
        first = self._episodes[0]
        size = first["actions"].shape[1]
        # The hand's commands are position targets normalised to [-1, 1].
        action = ArraySpec((size,), low=(-1.0,) * size, high=(1.0,) * size)
        observation = {"state": ArraySpec(first["observations"].shape[1:])}
        super().__init__(path, Spec(observation, action, CONTROL_RATE_HZ), lengths)
        self.extras = ("reward",)
        self.warnings = [
            f"nothing marks the end of an episode: it ends with its arrays ({min(lengths)} to {max(lengths)} steps)",
            *action_warnings(self._column("action", range(self.num_episodes)), action),
            *_initial_state_warnings(self._episodes),
        ]

    def initial_state(self, episode: int) -> dict[str, np.ndarray]:
        """Return the simulator state at the start of an episode: ``qpos``, ``qvel`` and the place of objects."""
        return dict(self._episodes[self._episode(episode)].get("init_state_dict", {}))

    def _column(self, name: str, episodes: Sequence[int]) -> np.ndarray:
        source = {"state": "observations", "action": "actions", "reward": "rewards"}[name]
        parts = [self._episodes[i][source] for i in episodes]
        return np.concatenate(parts) if parts else np.zeros((0, *self._episodes[0][source].shape[1:]))


def action_warnings(actions: np.ndarray, spec: ArraySpec) -> list[str]:
    """Report entries of ``actions`` (F, A) outside the bounds of ``spec``."""
    low, high = spec.bounds()
    outside = (actions < low) | (actions > high)
    if not outside.any():
        return []
    return [
        f"{100 * outside.mean():.1f} % of the action entries lie outside the bounds [{low.min():g}, {high.max():g}] "
        f"({actions.min():.2f} to {actions.max():.2f}): clip them before use"
    ]


def _load(path: Path) -> list[dict[str, Any]]:
    with reading(path), path.open("rb") as file:
        episodes = _ArrayUnpickler(file, path).load()
    if not isinstance(episodes, list) or not episodes:
        raise DataError(f"{path}: holds a {type(episodes).__name__}, expected a list of episodes")
    for number, episode in enumerate(episodes):
        if not isinstance(episode, dict) or any(key not in episode for key in NEEDED):
            found = ", ".join(map(str, episode)) if isinstance(episode, dict) else type(episode).__name__
            raise DataError(f"{path}: episode {number} lacks one of {', '.join(NEEDED)}; found {found}")
        for key in NEEDED:
            array = episode[key]
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
                raise DataError(f"{path}: episode {number}: '{key}' is no array of numbers")
        if len({len(episode[key]) for key in NEEDED}) != 1 or len(episode["actions"]) == 0:
            sizes = ", ".join(f"{key} {len(episode[key])}" for key in NEEDED)
            raise DataError(f"{path}: episode {number}: arrays of different or no length ({sizes})")
        for key in ("observations", "actions"):
            if episode[key].ndim != 2 or episode[key].shape[1:] != episodes[0][key].shape[1:]:
                raise DataError(f"{path}: episode {number}: '{key}' has shape {episode[key].shape}")
    return episodes


def _initial_state_warnings(episodes: list[dict[str, Any]]) -> list[str]:
    """Report that resetting to ``init_state_dict`` does not give the first observation (door task: qpos[1:28])."""
    worst = 0.0
    for episode in episodes:
        qpos = np.asarray(episode.get("init_state_dict", {}).get("qpos", ()))
        first = episode["observations"][0]
        if qpos.shape == (30,) and first.shape == (39,):
            worst = max(worst, float(np.abs(qpos[1:28] - first[:27]).max()))
    if worst < 0.01:
        return []
    return [
        f"init_state_dict.qpos differs from the joint angles of the first observation by up to {worst:.2f} rad: "
        "take qpos[1:28] from the observation"
    ]
