"""Data-parallel learning: processes started by torchrun that learn one policy, each in environments of its own.

``torchrun --nproc-per-node 2 -m robot_rl.cli.main finetune …`` starts them. Every function here is the identity in a
process that is alone, so that a learner is written once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from robot_rl.nets.device import find_device


def start(device: torch.device | None = None) -> int:
    """Join the processes that torchrun has started, if it has; returns this one's rank, 0 for one that is alone.

    Args:
        device: where this process learns; the processor by default.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        cards = device is not None and device.type == "cuda"
        dist.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo")
    return rank()


def own_device(name: str) -> torch.device:
    """Return the device called ``name`` for this process: of ``cuda`` each of torchrun's processes has a card.

    Raises:
        ConfigError: there is no such device here.
    """
    place = os.environ.get("LOCAL_RANK")
    return find_device(f"cuda:{place}" if name == "cuda" and place is not None else name)


def rank() -> int:
    """Return the number of this process; 0 evaluates, logs and saves."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def directory(run: Path) -> Path:
    """Return where this process keeps its run: ``run`` for the first one, a directory below it for the others."""
    return run if rank() == 0 else run / "ranks" / str(rank())


def first_directory(run: Path) -> Path:
    """Return the run directory of the first process from that of this one."""
    return run if rank() == 0 else run.parents[1]


def all_reduce_gradients(parameters: Iterable[nn.Parameter], weight: float = 1.0) -> None:
    """Replace gradients by their mean over all processes, each counted with its ``weight``.

    With the number of rows as the weight, a loss that is a mean over rows has the gradient of the mean over all rows.
    """
    if world() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), gradients[0].new_ones(1)]) * weight
    dist.all_reduce(flat)
    flat = flat[:-1] / flat[-1]
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def mean(value: float, weight: float = 1.0) -> float:
    """Return the mean of ``value`` over all processes, each counted with its ``weight``."""
    if world() == 1:
        return value
    total = torch.tensor([value * weight, weight], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total[0] / total[1])


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and (unbiased) standard deviation over the elements of all processes."""
    if world() == 1:
        return values.mean(), values.std()
    own = torch.tensor([values.numel(), values.double().sum()], dtype=torch.float64)
    dist.all_reduce(own)
    count, centre = own[0], own[1] / own[0]
    squared = (values.double() - centre).square().sum().cpu().reshape(1)
    dist.all_reduce(squared)
    return centre.to(values), (squared[0] / (count - 1)).sqrt().to(values)


def pooled(own: np.ndarray) -> np.ndarray:
    """Return count, mean and summed squared deviation (3,) over all processes from those of each."""
    if world() == 1:
        return own
    every = [torch.zeros(3, dtype=torch.float64) for _ in range(world())]
    dist.all_gather(every, torch.as_tensor(own, dtype=torch.float64))
    count, centre, squared = np.stack([part.numpy() for part in every], axis=1)
    total = max(count.sum(), 1.0)
    common = (count * centre).sum() / total
    return np.array([count.sum(), common, (squared + count * (centre - common) ** 2).sum()])


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if world() == 1:
        return
    for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == kind]
        flat = torch.cat([tensor.detach().flatten() for tensor in alike])
        dist.broadcast(flat, 0)
        for tensor, values in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(values.view_as(tensor))


def from_first(value: float) -> float:
    """Return the first process's ``value`` in all of them, which wait for it."""
    if world() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared[0])
