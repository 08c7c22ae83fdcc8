"""The supervised loop: windows in, EMA weights out, resumable to the bit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor

from robot_rl.core.errors import ConfigError, DataError, RobotRLError
from robot_rl.core.ranges import require_range
from robot_rl.data.windows import WindowSampler
from robot_rl.nets.device import device_of
from robot_rl.nets.precision import has_fast_bf16
from robot_rl.policies.checkpoint import save_policy, write_tensors
from robot_rl.train.ema import EMA
from robot_rl.train.interrupt import finishing_steps
from robot_rl.train.progress import progress
from robot_rl.train.run import Run


@dataclass(frozen=True)
class TrainConfig:
    """How a policy is trained."""

    steps: int = 20_000
    """Optimiser steps."""
    batch_size: int = 512
    """Windows per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; cosine decay to zero after the warm-up."""
    warmup_steps: int = 500
    """Steps of linear warm-up."""
    weight_decay: float = 1e-4
    """Decoupled weight decay on matrices (not on biases and norms)."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Largest decay of the averaged weights that are evaluated and saved."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of matrix products; auto times both where the processor has bf16 and keeps the faster."""
    checkpoint_every: int = 2_000
    """Steps between resumable checkpoints."""
    log_every: int = 100
    """Steps between log lines."""

    def __post_init__(self) -> None:
        require_range(self, "steps", "batch_size", "checkpoint_every", "log_every", low=1)
        require_range(self, "learning_rate", "warmup_steps", "weight_decay", "gradient_clip")
        require_range(self, "ema_decay", high=1)


def train(
    policy: Any, sampler: WindowSampler, config: TrainConfig, run: Run, seed: int = 0, metadata: dict | None = None
) -> Any:
    """Train ``policy`` on windows and return its averaged copy, also saved as ``checkpoints/best`` of ``run``.

    A run that was interrupted goes on from its last checkpoint, which Ctrl-C writes; batches, times and noise are pure
    functions of the seed and the step, so the weights equal those of a run that was not.

    Raises:
        RobotRLError: the loss or a weight is not finite; names the step. The last good checkpoint is kept.
    """
    trainer = Trainer(policy, sampler, config, run, seed)
    trainer.run_all()
    save_policy(trainer.ema.module, run.checkpoint_dir("best"), {"steps": config.steps, **(metadata or {})})
    return trainer.ema.module


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the random generator of one step: it depends on nothing else, so that a resumed run draws the same."""
    return torch.Generator().manual_seed(step + 1_000_000_007 * seed)  # only the lower 32 bits count


class Trainer:
    """Optimiser, schedule, EMA and their checkpoint."""

    def __init__(self, policy: Any, sampler: WindowSampler, config: TrainConfig, run: Run, seed: int = 0) -> None:
        self.policy, self.sampler, self.config, self.run, self.seed = policy, sampler, config, run, seed
        self.policy.train()
        self._device = device_of(policy)
        self.ema = EMA(policy, config.ema_decay)
        matrices = [p for p in policy.parameters() if p.ndim >= 2]
        vectors = [p for p in policy.parameters() if p.ndim < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self.bf16 = False
        if not self._resume():
            self.bf16 = self._choose_precision()

    def run_all(self) -> None:
        """Train until ``config.steps``, logging and checkpointing on the way; Ctrl-C checkpoints and ends it."""
        config, losses = self.config, []
        with finishing_steps() as interrupted, progress("train", config.steps, done=self.step) as bar:
            while self.step < config.steps:
                losses.append(self.update())
                if self.step % config.log_every == 0 or self.step == config.steps:
                    self._require_finite("loss is", losses)
                    loss = torch.stack(losses).mean().item()
                    self.run.log({"loss": loss, "learning_rate": self._learning_rate()}, self.step, stage="train")
                    bar.advance(len(losses), loss=loss)
                    losses = []
                stop = interrupted()
                if self.step % config.checkpoint_every == 0 or self.step == config.steps or stop:
                    self._require_finite("loss is", losses)
                    self._require_finite("weights are", self.policy.parameters())
                    self._save()
                if stop:
                    raise KeyboardInterrupt

    def update(self) -> Tensor:
        """Take one optimiser step and return its loss (a scalar tensor, not synchronised)."""
        batch = self.sampler.sample(self.step, self.config.batch_size, self.seed)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        generator = step_generator(self.seed, self.step)
        with self._arithmetic(self.bf16):
            loss = self.policy.loss(batch, generator).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.gradient_clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.ema.update(self.step)
        return loss.detach()

    def _require_finite(self, what: str, values: Iterable[Tensor]) -> None:
        if not all(value.isfinite().all() for value in values):
            raise RobotRLError(f"the {what} not finite near step {self.step}; {self._last_good()}")

    def _learning_rate(self) -> float:
        warmup, total = min(self.config.warmup_steps, self.config.steps // 10), self.config.steps
        if self.step < warmup:
            return self.config.learning_rate * (self.step + 1) / warmup
        progress_made = (self.step - warmup) / max(1, total - warmup)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress_made)))

    def _choose_precision(self) -> bool:
        """Return whether to use bf16: as told, or, for ``auto``, where it is supported and measured to be faster."""
        if self.config.precision != "auto":
            return self.config.precision == "bf16"
        if not has_fast_bf16(self._device):
            return False
        batch = self.sampler.sample(0, self.config.batch_size, self.seed)
        seconds = {}
        for bf16 in (False, True, False, True):
            start = time.perf_counter()
            with self._arithmetic(bf16):
                self.policy.loss(batch).mean().backward()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.policy.zero_grad(set_to_none=True)
            seconds[bf16] = time.perf_counter() - start
        return seconds[True] < seconds[False]

    def _arithmetic(self, bf16: bool) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=bf16)

    def _state_path(self) -> Path:
        return self.run.checkpoint_dir("trainer") / "state.safetensors"

    def _last_good(self) -> str:
        path = self._state_path()
        return f"the last good checkpoint is {path.parent}" if path.exists() else "no checkpoint had been written yet"

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.module.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        return tensors

    def _save(self) -> None:
        path = self._state_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".writing")
        meta = {"step": self.step, "seed": self.seed, "bf16": self.bf16}
        try:
            write_tensors(temporary, self._tensors(), {"trainer": json.dumps(meta)})
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error

    def _resume(self) -> bool:
        """Load the last checkpoint of the run, if there is one; returns whether there was."""
        path = self._state_path()
        if not path.exists():
            return False
        try:
            with safetensors.safe_open(path, "pt") as file:
                meta = json.loads(file.metadata()["trainer"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise DataError(f"cannot resume from {path}: {error}") from error
        if meta["seed"] != self.seed:
            raise ConfigError(
                f"{path} was written with seed {meta['seed']}, not {self.seed}; choose another run directory"
            )
        self.policy.load_state_dict(_part(tensors, "policy."))
        self.ema.module.load_state_dict(_part(tensors, "ema."))
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in _part(tensors, "optimizer.").items():
            index, _, key = name.partition(".")
            states.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})
        self.step, self.bf16 = meta["step"], meta["bf16"]
        self.run.rewind(self.step, "train")
        return True


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
