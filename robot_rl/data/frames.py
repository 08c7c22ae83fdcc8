"""A whole low-dimensional data set in memory: flat arrays over all frames, and where the episodes end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from robot_rl.core.errors import DataError, UnknownNameError
from robot_rl.core.spec import ArraySpec, Spec

_SOURCE = re.compile(r"^(?P<key>[^\[\]]+?)(\[(?P<start>-?\d+)?(?P<colon>:)?(?P<stop>-?\d+)?\])?$")


@dataclass
class Frames:
    """F frames of E episodes, laid end to end."""

    observation: dict[str, np.ndarray]
    """Observation arrays by key, each (F, …)."""
    action: np.ndarray
    """(F, A) float32; ``action[t]`` was commanded at ``observation[t]``."""
    episode_ends: np.ndarray
    """(E,) int64, cumulative and exclusive: episode i is ``[episode_ends[i - 1], episode_ends[i])``."""
    spec: Spec
    """What the arrays mean; its keys are those of ``observation``."""
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    """Other per-frame arrays (F, …) by name: ``reward``, ``success``, ``actor`` and whatever the source holds."""

    def __post_init__(self) -> None:
        self.episode_ends = np.asarray(self.episode_ends, np.int64)
        if len(self.episode_ends) and (self.episode_lengths <= 0).any():
            raise DataError(f"episode {int(np.argmax(self.episode_lengths <= 0))} has no frames")
        total = self.num_frames
        columns = {"action": self.action, **{f"observation '{k}'": v for k, v in self.observation.items()}}
        for name, array in {**columns, **{f"extra '{k}'": v for k, v in self.extras.items()}}.items():
            if len(array) != total:
                raise DataError(f"{name} has {len(array)} frames, expected {total} (the last episode end)")

    @property
    def num_episodes(self) -> int:
        """Number E of episodes."""
        return len(self.episode_ends)

    @property
    def num_frames(self) -> int:
        """Number F of frames."""
        return int(self.episode_ends[-1]) if len(self.episode_ends) else 0

    @property
    def episode_starts(self) -> np.ndarray:
        """(E,) int64: first frame of each episode."""
        return np.concatenate([np.zeros(1, np.int64), self.episode_ends[:-1]])[: self.num_episodes]

    @property
    def episode_lengths(self) -> np.ndarray:
        """(E,) int64: frames of each episode."""
        return self.episode_ends - self.episode_starts

    def episode(self, index: int) -> slice:
        """Return the frames of episode ``index`` as a slice; negative indices count from the end."""
        if not -self.num_episodes <= index < self.num_episodes:
            raise DataError(f"there is no episode {index}; the data holds {self.num_episodes}")
        return slice(int(self.episode_starts[index]), int(self.episode_ends[index]))

    def take(self, episodes: Iterable[int]) -> Frames:
        """Return a copy that holds only ``episodes``, in the order given."""
        slices = [self.episode(int(i)) for i in episodes]
        rows = np.concatenate([np.arange(s.start, s.stop) for s in slices]) if slices else np.zeros(0, np.int64)
        return Frames(
            observation={key: value[rows] for key, value in self.observation.items()},
            action=self.action[rows],
            episode_ends=np.cumsum([s.stop - s.start for s in slices], dtype=np.int64),
            spec=self.spec,
            extras={key: value[rows] for key, value in self.extras.items()},
        )

    def select(self, keys: Sequence[str]) -> Frames:
        """Return these frames with only the observations in ``keys``; arrays are shared, not copied."""
        spec = self.spec.select(tuple(keys))
        return replace(self, observation={key: self.observation[key] for key in keys}, spec=spec)

    def remap(self, sources: Mapping[str, str], flatten: bool = True) -> Frames:
        """Return these frames with observations renamed, sliced and flattened.

        ``frames.remap({"environment_state": "keypoint", "agent_pos": "state[0:2]"})`` makes two observations: the
        whole of ``keypoint`` and the first two elements of ``state``.

        Args:
            sources: for each new key the old one, with an optional index or range of its last axis.
            flatten: whether arrays of several axes (images excepted) become vectors.

        Raises:
            UnknownNameError: a source does not exist; the message lists those that do.
            DataError: a source is not of the form ``key``, ``key[i]`` or ``key[i:j]``, or its range is empty.
        """
        observation, spec = {}, {}
        for key, source in sources.items():
            name, part = parse_source(source)
            if name not in self.observation:
                raise UnknownNameError("observation", name, self.observation)
            spec[key] = slice_spec(self.spec.observation[name], part, flatten, source)
            value = self.observation[name][..., part]
            observation[key] = np.ascontiguousarray(value.reshape(len(value), *spec[key].shape))
        return replace(self, observation=observation, spec=Spec(spec, self.spec.action, self.spec.rate_hz))


def parse_source(source: str) -> tuple[str, slice]:
    """Split ``"state[0:2]"`` into its key and the range of its last axis; raises `DataError` for any other form."""
    match = _SOURCE.match(source)
    if match is None or source.endswith("[]"):
        raise DataError(f"'{source}' is no source of an observation; expected 'key', 'key[2]' or 'key[0:2]'")
    start, stop = (None if match[part] is None else int(match[part]) for part in ("start", "stop"))
    if start is not None and not match["colon"]:
        stop = start + 1 if start != -1 else None
    return match["key"], slice(start, stop)


def slice_spec(spec: ArraySpec, part: slice, flatten: bool, source: str) -> ArraySpec:
    """Return ``spec`` for the elements ``part`` of its last axis, as a vector if ``flatten`` and it is no image."""
    if not spec.shape:
        raise DataError(f"'{source}' is a single number and has no axis to slice")
    elements = np.arange(spec.size).reshape(spec.shape)[..., part]
    if elements.size == 0:
        raise DataError(f"'{source}' is an empty range: the last axis has {spec.shape[-1]} elements")
    picked = elements.ravel().tolist()
    vector = flatten and not spec.is_image
    keep_names = len(spec.shape) == 1 or not vector
    return replace(
        spec,
        shape=(elements.size,) if vector else elements.shape,
        names=spec.names[part] if keep_names else (),
        low=None if spec.low is None else tuple(spec.low[i] for i in picked),
        high=None if spec.high is None else tuple(spec.high[i] for i in picked),
    )


def concatenate(parts: Sequence[Frames]) -> Frames:
    """Join ``parts`` of one spec; extras that are not in every part are dropped.

    Raises:
        SpecMismatchError: two parts differ in keys, shapes, units or rate; the message lists the differences.
    """
    if not parts:
        raise DataError("there are no frames to join")
    first = parts[0]
    for number, part in enumerate(parts[1:], 1):
        first.spec.require(part.spec, "part 0", f"part {number}")
    shared = [name for name in first.extras if all(name in part.extras for part in parts)]
    offsets = np.cumsum([0] + [part.num_frames for part in parts[:-1]])
    return Frames(
        observation={k: np.concatenate([part.observation[k] for part in parts]) for k in first.observation},
        action=np.concatenate([part.action for part in parts]),
        episode_ends=np.concatenate([part.episode_ends + o for part, o in zip(parts, offsets, strict=True)]),
        spec=first.spec,
        extras={k: np.concatenate([part.extras[k] for part in parts]) for k in shared},
    )
