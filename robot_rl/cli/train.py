"""Train a generative policy on demonstrations."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from robot_rl.core.ranges import require_range
from robot_rl.policies.chunked import ChunkedConfig
from robot_rl.train.trainer import TrainConfig


@dataclass(frozen=True)
class Config:
    """Settings of ``robot-rl train``."""

    data: Annotated[Path, tyro.conf.Positional]
    """Dataset of demonstrations, in any format that `robot-rl data info` reads."""
    out: Path = Path("runs/train")
    """Run directory; the policy is written to its checkpoints/best."""
    observations: tuple[str, ...] = ()
    """Observations that the policy sees; all that are no images by default. ``new=old[0:2]`` renames and slices."""
    episodes: int | None = None
    """Use only the first episodes."""
    policy: ChunkedConfig = field(default_factory=ChunkedConfig)
    """Architecture."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation."""
    device: str = "cpu"
    """Where networks run: cpu, cuda, cuda:1."""
    threads: int = 0
    """Processor threads; 0 uses all cores."""
    seed: int = 0
    """Seed of weights, batches and noise."""
    resume: bool = False
    """Continue an interrupted run in the same directory."""

    def __post_init__(self) -> None:
        require_range(self, "threads", "seed")
        require_range(self, "episodes", low=1)


def run(config: Config) -> None:
    """Train and say where the policy is."""
    import torch

    from robot_rl.data.dataset import open_dataset
    from robot_rl.data.windows import WindowSampler
    from robot_rl.nets.device import find_device
    from robot_rl.policies.chunked import ChunkedPolicy
    from robot_rl.train.progress import say
    from robot_rl.train.run import Run
    from robot_rl.train.trainer import train

    if config.threads:
        torch.set_num_threads(config.threads)
    device = find_device(config.device)
    dataset = open_dataset(config.data)
    frames = dataset.load(episodes=None if config.episodes is None else range(config.episodes))
    if config.observations:
        pairs = [item.partition("=") for item in config.observations]
        frames = frames.remap({new: old or new for new, _, old in pairs})
    torch.manual_seed(config.seed)
    policy = ChunkedPolicy.fit(frames, config.policy).to(device)
    say(
        f"{frames.num_episodes} episodes, {frames.num_frames} frames; "
        f"{sum(p.numel() for p in policy.parameters()) / 1e6:.1f} M parameters"
    )
    sampler = WindowSampler(frames, config.policy.obs_steps, config.policy.horizon, device=device)
    with Run.create(config.out, config, spec=frames.spec, seed=config.seed, resume=config.resume) as directory:
        train(policy, sampler, config.train, directory, config.seed, {"data": str(config.data)})
    say(f"Policy: {config.out / 'checkpoints' / 'best'}")
