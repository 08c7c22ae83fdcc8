"""The normaliser: an affine map per element, fitted once and kept in the checkpoint with the policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.errors import ConfigError, DataError, UnknownNameError
from robot_rl.core.spec import Spec
from robot_rl.data.frames import Frames

MODES = ("minmax", "meanstd")
MINIMUM_RANGE = 1e-4
"""Elements that vary by less are only shifted (Diffusion Policy's threshold, arXiv 2303.04137)."""


class Normalizer(nn.Module):
    """Maps each key to about [-1, 1] (``minmax``) or to zero mean and unit deviation (``meanstd``), and back.

    ``y = (x - center) / scale`` per element. The numbers are buffers, so that they travel in the policy's
    ``state_dict``: build ``Normalizer(spec)`` and load it, or `fit` it to data. Images are not its business.
    """

    def __init__(self, spec: Spec, keys: Iterable[str] | None = None) -> None:
        """Create the identity for the observations ``keys`` (all that are no images by default) and for the action."""
        super().__init__()
        if keys is None:
            keys = [key for key, array in spec.observation.items() if not array.is_image]
        self._shapes: dict[str, tuple[int, ...]] = {}
        for key in dict.fromkeys([*keys, "action"]):
            if key != "action" and key not in spec.observation:
                raise UnknownNameError("observation", key, spec.observation)
            array = spec.action if key == "action" else spec.observation[key]
            if array.is_image:
                raise DataError(f"'{key}' is an image: images are scaled by their encoder, not by the normaliser")
            self._shapes[key] = array.shape
            self.register_buffer(_buffer(key, "center"), torch.zeros(array.shape))
            self.register_buffer(_buffer(key, "scale"), torch.ones(array.shape))

    @classmethod
    def fit(
        cls, frames: Frames, keys: Iterable[str] | None = None, mode: str | Mapping[str, str] = "minmax"
    ) -> Normalizer:
        """Fit to the observations ``keys`` and the action of ``frames``.

        Args:
            frames: the data; actions beyond the bounds of the spec are no special case, the range is measured.
            keys: observation keys; all that are no images by default. The action is always included.
            mode: ``"minmax"`` or ``"meanstd"`` for all keys, or one of them for each key (``"minmax"`` if left out).

        Raises:
            DataError: a value is not finite; the message says where.
        """
        normalizer = cls(frames.spec, keys)
        for key in normalizer.keys:
            chosen = mode if isinstance(mode, str) else mode.get(key, "minmax")
            values = frames.action if key == "action" else frames.observation[key]
            center, scale = _measure(key, np.asarray(values, np.float64), chosen)
            normalizer.assign(key, center, scale)
        return normalizer

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that can be normalised: observations and ``"action"``."""
        return tuple(self._shapes)

    def assign(self, key: str, center: Any, scale: Any) -> None:
        """Set the map of ``key`` to ``(x - center) / scale``, both of the shape of ``key``."""
        self._get(key, "center").copy_(torch.as_tensor(center))
        self._get(key, "scale").copy_(torch.as_tensor(scale))

    def normalize(self, key: str, x: Tensor) -> Tensor:
        """Map ``x`` (…, *shape of key) from the data's units to normalised ones, with any leading axes."""
        return (x - self._get(key, "center")) / self._get(key, "scale")

    def unnormalize(self, key: str, x: Tensor) -> Tensor:
        """Map ``x`` (…, *shape of key) back to the data's units; the inverse of `normalize`."""
        return x * self._get(key, "scale") + self._get(key, "center")

    def _get(self, key: str, part: str) -> Tensor:
        if key not in self._shapes:
            raise UnknownNameError("normalised array", key, self._shapes)
        return self.get_buffer(_buffer(key, part))


def _buffer(key: str, part: str) -> str:
    """Return the buffer's name; torch allows no dots in it."""
    return f"{key.replace('.', '__')}__{part}"


def _measure(key: str, values: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (center, scale) of ``values`` (F, …), both of the shape of one sample."""
    if mode not in MODES:
        raise ConfigError(f"normaliser mode '{mode}' does not exist; available: {', '.join(MODES)}")
    if len(values) == 0:
        raise DataError(f"'{key}' has no frames to fit the normaliser to")
    finite = np.isfinite(values)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise DataError(f"'{key}' is not finite at frame {where[0]}, element {list(where[1:])}")
    low, high = values.min(axis=0), values.max(axis=0)
    constant = high - low < MINIMUM_RANGE
    if mode == "minmax":
        center, scale = (low + high) / 2, (high - low) / 2
    else:
        center, scale = values.mean(axis=0), values.std(axis=0)
    return center, np.where(constant, 1.0, scale)
