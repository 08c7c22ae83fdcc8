"""Train a success classifier on episodes with success and failure marks, for use as a reward.

`robot-rl finetune --reward classifier:PATH` then rewards what the classifier takes for success.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from robot_rl.rl.reward_training import RewardTrainConfig


@dataclass(frozen=True)
class Train:
    """Train a classifier, set its threshold on episodes kept apart, and report on others."""

    data: Annotated[Path, tyro.conf.Positional]
    """Data set with an extra `success`; failures teach it most (robot-rl collect --keep all)."""
    out: Path = Path("runs/reward")
    """Directory of the classifier, which is replaced."""
    observations: tuple[str, ...] = ()
    """Observations that it sees; all that are no images by default."""
    encoder: Path | None = None
    """Checkpoint of a policy whose features to use, rather than the observations themselves."""
    train: RewardTrainConfig = field(default_factory=RewardTrainConfig)
    """Labels, optimisation and threshold."""
    seed: int = 0
    """Seed of the split, the weights and the batches."""
    threads: int = 1
    """Processor threads; the network is small."""


@dataclass(frozen=True)
class Check:
    """Report how a classifier does on a data set that it has not seen."""

    classifier: Annotated[Path, tyro.conf.Positional]
    """Directory of the classifier."""
    data: Annotated[Path, tyro.conf.Positional]
    """Data set with an extra `success`."""
    train: RewardTrainConfig = field(default_factory=RewardTrainConfig)
    """Only the labels' settings are used."""


Config = Annotated[Train, tyro.conf.subcommand("train")] | Annotated[Check, tyro.conf.subcommand("check")]


def run(config: Train | Check) -> None:
    """Run one of the sub-commands."""
    actions: dict[type, Any] = {Train: _train, Check: _check}
    actions[type(config)](config)


def _train(config: Train) -> None:
    import torch

    from robot_rl.data.dataset import open_dataset
    from robot_rl.policies.checkpoint import load_policy
    from robot_rl.policies.success import save_classifier
    from robot_rl.rl.reward_training import train_classifier
    from robot_rl.train.progress import progress, say

    torch.set_num_threads(config.threads)
    dataset = open_dataset(config.data)
    encoder = None if config.encoder is None else load_policy(config.encoder)
    if encoder is not None:
        encoder.spec.require(dataset.spec, "the encoder's policy", "the data set")
    keys = config.observations if encoder is None else tuple(encoder.spec.observation)
    frames = dataset.load(keys=keys or None)
    with progress("classifier", config.train.steps, unit="step") as bar:
        classifier, report = train_classifier(
            frames, config.train, seed=config.seed, encoder=encoder, where=str(config.data), progress=bar
        )
    save_classifier(classifier, config.out, report.to_json() | {"data": str(config.data)})
    say(report.summary())
    if report.successes == report.episodes:
        say("No failed episode among those reported on: what failure looks like is not known.", style="yellow")
    say(f"Reward: --reward classifier:{config.out}")


def _check(config: Check) -> None:
    from robot_rl.data.dataset import open_dataset
    from robot_rl.policies.success import load_classifier
    from robot_rl.rl.reward_training import assess
    from robot_rl.train.progress import say

    classifier = load_classifier(config.classifier)
    dataset = open_dataset(config.data)
    classifier.spec.require(dataset.spec, "the classifier", "the data set")
    frames = dataset.load(keys=list(classifier.spec.observation))
    say(assess(classifier, frames, config.train, str(config.data)).summary())
