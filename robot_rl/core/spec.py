"""Specs: what every array that crosses a border means.

A spec is saved with each dataset, checkpoint and recording and compared when they meet, so that a mismatch is an
error that lists its differences and never a silent re-normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robot_rl.core.errors import DataError, SpecMismatchError

SHOWN_NAMES, SHOWN_CHARACTERS = 6, 60
"""Length up to which messages show lists of names, and texts such as units, in full."""


@dataclass(frozen=True)
class ArraySpec:
    """One array: shape without batch or time axes, element type, names, unit, frame and bounds."""

    shape: tuple[int, ...]
    """Shape of one sample."""
    dtype: str = "float32"
    """NumPy name of the element type. Images are ``uint8`` of shape (height, width, 3), RGB."""
    names: tuple[str, ...] = ()
    """One name per element of the last axis, or empty."""
    unit: str = ""
    """Unit of all elements (``"m"``, ``"rad"``, ``"m/s"``); comma-separated if they differ; empty for unitless."""
    frame: str = ""
    """Coordinate frame, for example ``"world"`` or ``"base_link"``; empty where none applies."""
    low: tuple[float, ...] | None = None
    """Lowest permitted value per element, flattened; ``None`` for unbounded."""
    high: tuple[float, ...] | None = None
    """Highest permitted value per element, flattened; ``None`` for unbounded."""

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            bound = getattr(self, name)
            if bound is not None and len(bound) != self.size:
                raise DataError(f"ArraySpec.{name} has {len(bound)} entries, expected {self.size} for {self.shape}")
        if self.names and self.shape and len(self.names) != self.shape[-1]:
            raise DataError(f"ArraySpec has {len(self.names)} names, expected {self.shape[-1]} for {self.shape}")

    @property
    def size(self) -> int:
        """Number of elements of one sample."""
        return math.prod(self.shape)

    @property
    def is_image(self) -> bool:
        """Whether this is an RGB image of shape (height, width, 3)."""
        return self.dtype == "uint8" and len(self.shape) == 3

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (low, high), each of ``shape``, with infinities where unbounded."""
        low = np.full(self.size, -np.inf) if self.low is None else np.asarray(self.low, float)
        high = np.full(self.size, np.inf) if self.high is None else np.asarray(self.high, float)
        return low.reshape(self.shape), high.reshape(self.shape)

    def validate(self, value: np.ndarray, name: str = "array", batch_dims: int = 0) -> None:
        """Raise `DataError` unless ``value`` has this shape after ``batch_dims`` leading axes and is finite."""
        got = np.shape(value)[batch_dims:]
        if got != self.shape:
            raise DataError(f"{name} has shape {got}, expected {self.shape}")
        if np.issubdtype(np.asarray(value).dtype, np.floating) and not np.isfinite(value).all():
            raise DataError(f"{name} holds a value that is not finite")

    def differences(self, other: ArraySpec, name: str) -> list[str]:
        """List what differs from ``other``; names, unit and frame count only where both sides state them."""
        found = []
        for part in ("shape", "dtype"):
            mine, theirs = getattr(self, part), getattr(other, part)
            if mine != theirs:
                found.append(f"{name}: {part} {mine} against {theirs}")
        for part in ("names", "unit", "frame"):
            mine, theirs = getattr(self, part), getattr(other, part)
            if mine and theirs and mine != theirs:
                show = _names_against if part == "names" else _text_against
                found.append(f"{name}: {part} {show(mine, theirs)}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready mapping; the inverse is `from_json`."""
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "names": list(self.names),
            "unit": self.unit,
            "frame": self.frame,
            "low": None if self.low is None else [_finite_or_text(x) for x in self.low],
            "high": None if self.high is None else [_finite_or_text(x) for x in self.high],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ArraySpec:
        """Build a spec from the mapping that `to_json` returns."""
        low, high = data.get("low"), data.get("high")
        return cls(
            shape=tuple(data["shape"]),
            dtype=data.get("dtype", "float32"),
            names=tuple(data.get("names") or ()),
            unit=data.get("unit", ""),
            frame=data.get("frame", ""),
            low=None if low is None else tuple(float(x) for x in low),
            high=None if high is None else tuple(float(x) for x in high),
        )


@dataclass(frozen=True)
class Spec:
    """The interface of an environment, robot, dataset or policy: named observations, one action, one rate."""

    observation: Mapping[str, ArraySpec] = field(default_factory=dict)
    """Observation arrays by key, for example ``{"state": …, "images.front": …}``."""
    action: ArraySpec = field(default_factory=lambda: ArraySpec((0,)))
    """The action of one control step."""
    rate_hz: float = 0.0
    """Control steps per second; 0 where unknown."""

    def select(self, keys: tuple[str, ...]) -> Spec:
        """Return this spec with only the observations in ``keys``; a missing key is an error that lists what exists."""
        missing = [key for key in keys if key not in self.observation]
        if missing:
            raise DataError(f"no observation {missing[0]!r}; available: {', '.join(sorted(self.observation))}")
        return Spec({key: self.observation[key] for key in keys}, self.action, self.rate_hz)

    def differences(self, provided: Spec) -> list[str]:
        """List why ``provided`` cannot stand where this spec is required; extra observations are no difference."""
        found = []
        for key, required in self.observation.items():
            if key not in provided.observation:
                found.append(f"observation '{key}' is missing (available: {_few(sorted(provided.observation))})")
            else:
                found += required.differences(provided.observation[key], f"observation '{key}'")
        found += self.action.differences(provided.action, "action")
        if self.rate_hz and provided.rate_hz and not math.isclose(self.rate_hz, provided.rate_hz, rel_tol=1e-3):
            found.append(f"rate {self.rate_hz:g} Hz against {provided.rate_hz:g} Hz")
        return found

    def require(self, provided: Spec, left: str, right: str) -> None:
        """Raise `SpecMismatchError` with every difference between this spec (``left``) and ``provided``."""
        differences = self.differences(provided)
        if differences:
            raise SpecMismatchError(left, right, differences)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready mapping; the inverse is `from_json`."""
        return {
            "observation": {key: spec.to_json() for key, spec in self.observation.items()},
            "action": self.action.to_json(),
            "rate_hz": self.rate_hz,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Spec:
        """Build a spec from the mapping that `to_json` returns."""
        observation = {key: ArraySpec.from_json(value) for key, value in data["observation"].items()}
        return cls(observation, ArraySpec.from_json(data["action"]), float(data.get("rate_hz", 0.0)))


def _names_against(mine: Sequence[str], theirs: Sequence[str]) -> str:
    """Show where two lists of names differ: all of short ones, else the first place and how many there are."""
    if max(len(mine), len(theirs)) <= SHOWN_NAMES:
        return f"{mine!r} against {theirs!r}"
    if len(mine) != len(theirs):
        return f"({_few(mine)}) against ({_few(theirs)})"
    places = [i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]]
    first = places[0]
    return f"{mine[first]!r} against {theirs[first]!r} at {first}, {len(places)} of {len(mine)} differ"


def _text_against(mine: str, theirs: str) -> str:
    """Show two texts, and no more than the beginnings of long ones."""
    if max(len(mine), len(theirs)) <= SHOWN_CHARACTERS:
        return f"{mine!r} against {theirs!r}"
    first = next(
        (i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), min(len(mine), len(theirs))
    )
    start = max(0, first - SHOWN_CHARACTERS // 2)
    return " against ".join(repr(_part(text, start)) for text in (mine, theirs))


def _part(text: str, start: int) -> str:
    end = start + SHOWN_CHARACTERS
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"


def _few(names: Sequence[str]) -> str:
    """Join the first names, and say how many there are where that is not all."""
    shown = ", ".join(names[:SHOWN_NAMES])
    return f"{shown}, … {len(names)} in all" if len(names) > SHOWN_NAMES else shown


def _finite_or_text(x: float) -> float | str:
    return float(x) if math.isfinite(x) else str(float(x))
