"""Windows for training chunked policies: the last observations and the next actions, gathered in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from robot_rl.core.errors import ConfigError, DataError, UnknownNameError
from robot_rl.data.frames import Frames


class WindowSampler:
    """Gathers windows of ``obs_steps`` observations and ``horizon`` actions from tensors held in memory.

    Every frame is the newest observation of one window, so there are as many windows as frames. Before an episode's
    start its first frame is repeated, after its end its last action, as in Diffusion Policy (arXiv 2303.04137); the
    mask tells the repeated actions.

    Sampling keeps no state: `index` is a pure function of the seed and the step, so that a resumed training sees the
    windows that it would have seen.
    """

    def __init__(
        self,
        frames: Frames,
        obs_steps: int,
        horizon: int,
        keys: Sequence[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Copy the needed arrays to ``device``.

        Args:
            frames: the data.
            obs_steps: observations T per window, the newest last.
            horizon: actions H per window, the first of which belongs to the newest observation.
            keys: observations to gather; all by default.
            device: where the tensors are held and the windows made.
        """
        if obs_steps < 1 or horizon < 1:
            raise ConfigError(f"obs_steps and horizon must be at least 1, got {obs_steps} and {horizon}")
        if frames.num_frames == 0:
            raise DataError("there are no frames to take windows from")
        self.obs_steps, self.horizon = obs_steps, horizon
        self.keys = tuple(frames.observation if keys is None else keys)
        for key in self.keys:
            if key not in frames.observation:
                raise UnknownNameError("observation", key, frames.observation)
        self.device = torch.device(device)
        self.observation = {key: self._tensor(frames.observation[key]) for key in self.keys}
        self.action = self._tensor(frames.action)
        lengths = frames.episode_lengths
        self._start = self._tensor(np.repeat(frames.episode_starts, lengths))
        self._last = self._tensor(np.repeat(frames.episode_ends - 1, lengths))
        self._before = torch.arange(1 - obs_steps, 1, device=self.device)
        self._after = torch.arange(horizon, device=self.device)
        self._permutation: tuple[tuple[int, int], Tensor] | None = None

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @property
    def num_windows(self) -> int:
        """Number of windows, which is the number of frames."""
        return len(self.action)

    def index(self, step: int, batch_size: int, seed: int = 0) -> Tensor:
        """Return the windows (B,) int64 of training step ``step``: pass after pass over seeded permutations.

        Each window is drawn exactly once per pass; a batch may span the end of one pass and the start of the next.
        """
        first, size = step * batch_size, self.num_windows
        parts = []
        while first < (step + 1) * batch_size:
            epoch, offset = divmod(first, size)
            count = min(size - offset, (step + 1) * batch_size - first)
            parts.append(self._epoch(epoch, seed)[offset : offset + count])
            first += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _epoch(self, epoch: int, seed: int) -> Tensor:
        """Return the permutation of pass ``epoch``; the latest is kept, for it serves many steps."""
        if self._permutation is None or self._permutation[0] != (epoch, seed):
            state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(state) >> 1)
            order = torch.randperm(self.num_windows, generator=generator).to(self.device)
            self._permutation = ((epoch, seed), order)
        return self._permutation[1]

    def batch(self, index: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
        """Gather the windows ``index`` (B,) int64.

        Returns:
            ``{"observation": {key: (B, T, …)}, "action": (B, H, A), "mask": (B, H) bool}``, in the units of the data;
            the mask is False where the last action is repeated after the end of the episode.
        """
        index = index.to(self.device)
        observed = torch.maximum(index[:, None] + self._before, self._start[index][:, None])
        wanted = index[:, None] + self._after
        last = self._last[index][:, None]
        return {
            "observation": {key: _gather(value, observed) for key, value in self.observation.items()},
            "action": _gather(self.action, torch.minimum(wanted, last)),
            "mask": wanted <= last,
        }

    def sample(self, step: int, batch_size: int, seed: int = 0) -> dict[str, Tensor | dict[str, Tensor]]:
        """Return the `batch` of the windows that `index` names for ``step``."""
        return self.batch(self.index(step, batch_size, seed))


def _gather(data: Tensor, rows: Tensor) -> Tensor:
    """Return ``data[rows]`` of shape (*rows.shape, …); `index_select` is several times faster than indexing."""
    return data.index_select(0, rows.reshape(-1)).view(*rows.shape, *data.shape[1:])
