"""Data sets on disk: the contract of readers, what they share, and `open_dataset`, which finds the right one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from robot_rl.core import registry
from robot_rl.core.errors import DataError, RobotRLError, UnknownNameError
from robot_rl.core.spec import Spec
from robot_rl.data.frames import Frames

Opener = TypeVar("Opener", bound=Callable[..., Any])

SCANNED, SHOWN = 1000, 5
"""Entries of a directory that are looked at for data sets when it is none itself, and how many of them are named."""


@runtime_checkable
class Dataset(Protocol):
    """Demonstrations or recordings on disk, in any format."""

    root: Path
    spec: Spec
    format: str
    warnings: list[str]
    """What is irregular in the files, one sentence each."""

    @property
    def num_episodes(self) -> int:
        """Number E of episodes."""

    @property
    def num_frames(self) -> int:
        """Number F of frames."""

    def load(self, keys: Sequence[str] | None = None, episodes: Sequence[int] | None = None) -> Frames:
        """Read the observations ``keys`` (all that are no images by default) of ``episodes`` (all) into memory."""

    def image(self, key: str, episode: int, index: int) -> np.ndarray:
        """Return one image (H, W, 3) uint8, RGB."""

    def images(self, key: str, episode: int) -> np.ndarray:
        """Return the images (T, H, W, 3) uint8, RGB, of one episode."""


class EpisodeReader:
    """What the readers share: choice of keys and episodes, and conversion to `Frames`.

    A reader sets the attributes and implements `_column`; one with videos overrides `image` and `images` too.
    """

    format = ""

    def __init__(self, root: Path, spec: Spec, episode_lengths: Sequence[int] | np.ndarray) -> None:
        self.root, self.spec = root, spec
        self.episode_lengths = np.asarray(episode_lengths, np.int64)
        self.warnings: list[str] = []
        self.extras: tuple[str, ...] = ()
        """Names of the per-frame columns that are neither observation nor action."""
        self.tasks: list[str] = []
        """One instruction per episode, or empty where the format has none."""
        self.splits: dict[str, list[int]] = {}
        """Episodes of each named part (``train``, ``valid``), where the source says so."""

    @property
    def num_episodes(self) -> int:
        """Number E of episodes."""
        return len(self.episode_lengths)

    @property
    def num_frames(self) -> int:
        """Number F of frames."""
        return int(self.episode_lengths.sum())

    def load(self, keys: Sequence[str] | None = None, episodes: Sequence[int] | None = None) -> Frames:
        """Read into memory; floating-point arrays become float32.

        Args:
            keys: observations, images included if named; by default all that are no images.
            episodes: episode numbers in the order wanted; all by default.

        Raises:
            UnknownNameError: a key does not exist.
            DataError: an episode does not exist, or a file is missing or damaged.
        """
        if keys is None:
            keys = [key for key, array in self.spec.observation.items() if not array.is_image]
        for key in keys:
            if key not in self.spec.observation:
                raise UnknownNameError("observation", key, self.spec.observation)
        chosen = list(range(self.num_episodes)) if episodes is None else [self._episode(i) for i in episodes]
        observation = {}
        for key in keys:
            if self.spec.observation[key].is_image:
                observation[key] = _join([self.images(key, i) for i in chosen], self.spec.observation[key].shape)
            else:
                observation[key] = as_float32(self._column(key, chosen))
        return Frames(
            observation=observation,
            action=as_float32(self._column("action", chosen)),
            episode_ends=np.cumsum(self.episode_lengths[chosen], dtype=np.int64),
            spec=self.spec.select(tuple(keys)),
            extras={name: self._column(name, chosen) for name in self.extras},
        )

    def image(self, key: str, episode: int, index: int) -> np.ndarray:
        """Return image ``index`` of an episode, (H, W, 3) uint8, RGB."""
        self._frame(episode, index)
        return self.images(key, episode)[index]

    def images(self, key: str, episode: int) -> np.ndarray:
        """Return the images (T, H, W, 3) uint8, RGB, of one episode."""
        self._image_key(key)
        return self._column(key, [self._episode(episode)])

    def _column(self, name: str, episodes: Sequence[int]) -> np.ndarray:
        """Return the observation, extra or ``"action"`` called ``name`` for ``episodes``, laid end to end (F, …)."""
        raise NotImplementedError

    def _episode(self, episode: int) -> int:
        if not -self.num_episodes <= episode < self.num_episodes:
            raise DataError(f"{self.root}: there is no episode {episode}; the data set holds {self.num_episodes}")
        return int(episode) % self.num_episodes

    def _frame(self, episode: int, index: int) -> None:
        length = int(self.episode_lengths[self._episode(episode)])
        if not -length <= index < length:
            raise DataError(f"{self.root}: episode {episode} has no frame {index}; it holds {length}")

    def _image_key(self, key: str) -> None:
        images = [name for name, array in self.spec.observation.items() if array.is_image]
        if key not in images:
            raise UnknownNameError("image observation", key, images)


def as_float32(array: np.ndarray) -> np.ndarray:
    """Return ``array`` as contiguous float32 if it is floating-point, else unchanged; what is too large is infinite."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)


def _join(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros((0, *shape), np.uint8)


def rows_of(lengths: np.ndarray, episodes: Sequence[int]) -> np.ndarray | slice:
    """Return the rows of ``episodes`` in arrays that hold all episodes end to end; a slice if that is all of them."""
    if list(episodes) == list(range(len(lengths))):
        return slice(None)
    ends = np.cumsum(lengths)
    return np.concatenate([np.arange(ends[i] - lengths[i], ends[i]) for i in episodes] or [np.zeros(0, np.int64)])


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn whatever a library raises on a missing or damaged file into a one-line `DataError` that names ``path``."""
    try:
        yield
    except RobotRLError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: the file does not exist") from error
    except Exception as error:  # libraries raise anything from OSError to RuntimeError on a truncated file
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise DataError(f"{path}: cannot be read, it may be truncated or damaged ({reason[:200]})") from error


def recognises(sniff: Callable[[Path], bool]) -> Callable[[Opener], Opener]:
    """Mark a registered opener with the test that tells, cheaply, whether a path looks like its format."""

    def mark(opener: Opener) -> Opener:
        opener.recognises = sniff  # type: ignore[attr-defined]
        return opener

    return mark


def open_dataset(path: str | Path, format: str | None = None) -> Dataset:  # noqa: A002
    """Open the data set at ``path``.

    Args:
        path: a LeRobot directory, a ``.zarr`` directory or ``.zarr.zip``, an HDF5 file or an Adroit pickle, or
            whatever a plug-in of the registry group ``datasets`` reads.
        format: name of the format; found out from the path by default.

    Raises:
        DataError: the path does not exist, is damaged or looks like no known format.
        UnknownNameError: there is no such format.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"{root}: does not exist{_nearest(root)}")
    if format is not None:
        return registry.load("datasets", format)(root)
    formats, broken = _formats()
    name = _recognise(root, formats)
    if name is not None:
        return formats[name](root)
    known = ", ".join(registry.names("datasets")) or "none is installed"
    hint = _inside(root, formats) if root.is_dir() else ""
    unloaded = f". Not asked: {broken[0]}" if broken else ""
    raise DataError(f"{root}: looks like none of the known formats ({known}){hint}{unloaded}")


def _formats() -> tuple[dict[str, Callable[..., Any]], list[str]]:
    """Return the openers of all formats by name, and why the others cannot be loaded."""
    openers, broken = {}, []
    for name in registry.names("datasets"):
        try:
            openers[name] = registry.load("datasets", name)
        except RobotRLError as error:  # noqa: PERF203 - there are few formats
            broken.append(str(error))
    return openers, broken


def _recognise(path: Path, formats: dict[str, Callable[..., Any]]) -> str | None:
    """Return the name of the first of ``formats`` that recognises ``path``."""
    for name, opener in formats.items():
        sniff = getattr(opener, "recognises", None)
        if sniff is not None and sniff(path):
            return name
    return None


def _inside(root: Path, formats: dict[str, Callable[..., Any]]) -> str:
    """Return a hint that names data sets in the directory ``root``; `SCANNED` entries at most are looked at."""
    entries = list(islice(root.iterdir(), SCANNED + 1))
    found: list[str] = []
    for entry in sorted(entries[:SCANNED]):
        with suppress(OSError):  # what may not be read is no help
            if _recognise(entry, formats):
                found.append(entry.name)
        if len(found) == SHOWN:
            break
    if found:
        return f"; inside it are: {', '.join(found)}"
    return f"; nor does any of {SCANNED} entries in it" if len(entries) > SCANNED else ""


def _nearest(path: Path) -> str:
    """Return a hint for a path that does not exist: the nearest name beside it."""
    if path.with_name(f"{path.name}.before-compact").exists():
        return f". A compaction was killed: rename '{path.name}.before-compact' back to '{path.name}'"
    if not path.parent.is_dir():
        return ""
    names = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.5)
    return f". Did you mean '{path.parent / names[0]}'?" if names else ""
