"""Replay: rows of transitions from several named sources in one contiguous block, gathered in one operation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robot_rl.core.errors import ConfigError, DataError, UnknownNameError


class Replay:
    """Float32 rows of named fields; each source owns a region of the block and overwrites its oldest rows.

    A row stores its next state explicitly: rebuilding it from the row that follows is wrong at time limits, at the
    end of the ring and where lanes interleave. A batch is one gather of whole rows; its fields are views of it.
    """

    def __init__(
        self,
        fields: Mapping[str, tuple[int, ...]],
        capacity: Mapping[str, int],
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        """Allocate everything.

        Args:
            fields: shape of each field without the batch axis; ``()`` for a number.
            capacity: rows of each source, for example ``{"online": 200_000, "demonstrations": 10_000}``.
            seed: seed of the sampling.
            device: where the rows are held.
        """
        if not capacity or min(capacity.values()) < 1:
            raise ConfigError(f"every source of a replay needs at least one row, got {dict(capacity)}")
        self.fields = dict(fields)
        self.capacity = dict(capacity)
        self._columns: dict[str, slice] = {}
        width = 0
        for name, shape in self.fields.items():
            self._columns[name] = slice(width, width + math.prod(shape))
            width += math.prod(shape)
        ends = np.cumsum(list(capacity.values()))
        self._start = {name: int(end) - capacity[name] for name, end in zip(capacity, ends, strict=True)}
        self.rows = torch.zeros(int(ends[-1]), width, device=device)
        """(capacity, width): every source's rows."""
        self.size = dict.fromkeys(capacity, 0)
        """Rows held, by source."""
        self._cursor = dict.fromkeys(capacity, 0)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, source: str, values: Mapping[str, Tensor | np.ndarray]) -> None:
        """Append rows to ``source``; each field is (n, …) and all fields are given.

        Raises:
            DataError: a field is missing, unknown or of the wrong shape.
        """
        self._require(source)
        if set(values) != set(self.fields):
            raise DataError(f"replay rows have the fields {sorted(values)}, expected {sorted(self.fields)}")
        device = self.rows.device
        tensors = {name: torch.as_tensor(value, dtype=torch.float32, device=device) for name, value in values.items()}
        count = len(next(iter(tensors.values())))
        capacity = self.capacity[source]
        where = (torch.arange(count) + self._cursor[source]) % capacity + self._start[source]
        block = torch.empty(count, self.rows.shape[1], device=device)
        for name, tensor in tensors.items():
            if tensor.shape != (count, *self.fields[name]):
                raise DataError(f"'{name}' has shape {tuple(tensor.shape)}, expected {(count, *self.fields[name])}")
            block[:, self._columns[name]] = tensor.reshape(count, -1)
        self.rows[where.to(device)] = block
        self._cursor[source] = (self._cursor[source] + count) % capacity
        self.size[source] = min(self.size[source] + count, capacity)

    def sample(self, slices: int, batch_size: int, shares: Mapping[str, float]) -> dict[str, Tensor]:
        """Draw ``slices`` batches at once; every one of them holds the sources in exactly these shares, interleaved.

        Args:
            slices: number U of batches.
            batch_size: rows B of each.
            shares: share of each source; they add up to 1. ``share * batch_size`` is rounded, the largest source
                takes the difference.

        Returns:
            Fields (U, B, …), views of one block, and ``source`` (B,) int64, the position of each row's source in
            ``shares``, which is the same in every slice.
        """
        pattern = torch.from_numpy(interleave(batch_size, list(shares.values())))
        index = torch.empty(slices, batch_size, dtype=torch.int64)
        for number, source in enumerate(shares):
            self._require(source)
            columns = pattern == number
            count = int(columns.sum())
            if count == 0:
                continue
            if self.size[source] == 0:
                raise DataError(f"the replay's source '{source}' is empty")
            drawn = torch.randint(self.size[source], (slices, count), generator=self._generator)
            index[:, columns] = drawn + self._start[source]
        rows = self.rows.index_select(0, index.reshape(-1).to(self.rows.device)).view(slices, batch_size, -1)
        batch = {
            name: rows[..., self._columns[name]].reshape(slices, batch_size, *shape)
            if len(shape) != 1
            else rows[..., self._columns[name]]
            for name, shape in self.fields.items()
        }
        return batch | {"source": pattern}

    def all(self, source: str) -> dict[str, Tensor]:
        """Return the rows held of ``source``, each field (n, …), oldest first only until the ring has wrapped."""
        self._require(source)
        rows = self.rows[self._start[source] : self._start[source] + self.size[source]]
        return {name: rows[:, self._columns[name]].reshape(len(rows), *shape) for name, shape in self.fields.items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the rows held and the counters, from which `restore` continues."""
        tensors = {f"replay.{name}": self.rows[start : start + self.size[name]] for name, start in self._start.items()}
        tensors["replay_generator"] = self._generator.get_state()
        return tensors, {f"replay_cursor.{name}": cursor for name, cursor in self._cursor.items()}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from `state`; fields and capacities must be the same.

        Raises:
            DataError: the rows do not fit.
        """
        for name, start in self._start.items():
            rows = tensors[f"replay.{name}"]
            if rows.ndim != 2 or rows.shape[1] != self.rows.shape[1] or len(rows) > self.capacity[name]:
                raise DataError(f"saved rows of '{name}' {tuple(rows.shape)} do not fit {tuple(self.rows.shape)}")
            self.rows[start : start + len(rows)] = rows.to(self.rows.device)
            self.size[name], self._cursor[name] = len(rows), int(numbers[f"replay_cursor.{name}"])
        self._generator.set_state(tensors["replay_generator"])

    def _require(self, source: str) -> None:
        if source not in self.capacity:
            raise UnknownNameError("replay source", source, self.capacity)


def interleave(batch_size: int, shares: Sequence[float]) -> np.ndarray:
    """Return (B,) int64: which source each row of a batch comes from, spread evenly over the batch.

    Raises:
        ConfigError: the shares are negative or do not add up to 1.
    """
    share = np.asarray(shares, float)
    if (share < 0).any() or not math.isclose(share.sum(), 1.0, abs_tol=1e-6):
        raise ConfigError(f"shares of the sources must be positive and add up to 1, got {list(shares)}")
    counts = np.round(share * batch_size).astype(int)
    counts[np.argmax(counts)] += batch_size - counts.sum()
    positions = [(np.arange(count) + 0.5) / count for count in counts if count]
    sources = [np.full(count, i) for i, count in enumerate(counts) if count]
    return np.concatenate(sources)[np.argsort(np.concatenate(positions), kind="stable")].astype(np.int64)
