"""Training a success classifier: labels, threshold, and its report on episodes that it has not seen.

Success is a moment, failure a whole episode, so that threshold and report count episodes: does it fire where it should,
and does it ever fire where it should not. One false yes ends an episode with a reward, and a policy finds it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.core.errors import ConfigError, DataError
from robot_rl.data.frames import Frames
from robot_rl.data.normalizer import Normalizer
from robot_rl.policies.success import ClassifierConfig, StateEncoder, SuccessClassifier
from robot_rl.rollout.evaluate import wilson


@dataclass(frozen=True)
class RewardTrainConfig:
    """Settings of training a success classifier."""

    last_frames: int = 3
    """Last frames of a successful episode that count as success."""
    margin: int = 5
    """Frames before those that count as neither."""
    obs_steps: int = 1
    """Newest observations that the classifier sees, where it has no policy's encoder."""
    steps: int = 600
    """Optimiser steps."""
    batch_size: int = 256
    """Frames per step, half of them success."""
    learning_rate: float = 1e-3
    """AdamW's step size; follows a cosine to zero."""
    weight_decay: float = 1e-2
    """AdamW's weight decay."""
    label_smoothing: float = 0.05
    """Labels are 1 - s/2 and s/2 rather than 1 and 0."""
    false_alarms: float = 0.05
    """Largest share of failed episodes in which the threshold may let it fire. Where no episode failed, firing before
    the frames of success, and the margin, counts in their place."""
    least_threshold: float = 0.5
    """The threshold is not set below this."""
    held_out: float = 0.3
    """Share of the episodes kept from training: half of them set the threshold, the others are reported on."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Shape of the classifier."""


@dataclass(frozen=True)
class RewardReport:
    """How good a classifier is, on episodes that neither trained it nor set its threshold."""

    threshold: float
    """Probability above which it fires."""
    episodes: int
    """Episodes reported on."""
    successes: int
    """Successful ones among them."""
    detected: int
    """Successful ones in whose last frames it fires."""
    failures: int
    """Failed ones; where there are none, the successful ones stand for them up to their margin."""
    false_alarms: int
    """Of those, how many it fires in."""
    lead: float
    """Frames between its first firing in a successful episode and the end, median; NaN where it fires in none."""
    area: float
    """Share of pairs of a success frame and another frame that it ranks rightly (area under the ROC curve)."""

    def summary(self) -> str:
        """Return one line for people."""
        return (
            f"detects {_share(self.detected, self.successes)} successes, {self.lead:g} frames before the end; "
            f"false alarms in {_share(self.false_alarms, self.failures)} failures; frames ranked rightly "
            f"{self.area:.1%}; threshold {self.threshold:.3f}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready figures, with 95 % intervals of the two shares."""
        return asdict(self) | {
            "lead": None if math.isnan(self.lead) else self.lead,
            "detected_interval_95": list(wilson(self.detected, self.successes)),
            "false_alarms_interval_95": list(wilson(self.false_alarms, self.failures)),
        }


@dataclass(frozen=True)
class Labels:
    """Which frames are success, which are not, and which are left out."""

    positive: np.ndarray
    """(F,) bool."""
    negative: np.ndarray
    """(F,) bool."""
    success: np.ndarray
    """(E,) bool, by episode."""


def label(frames: Frames, last_frames: int, margin: int, where: str = "the data set") -> Labels:
    """Label the last frames of every successful episode, and those marked as success themselves, as success.

    Args:
        frames: episodes with an extra ``success``, which is set on some frame of every successful episode.
        last_frames: how many last frames are success.
        margin: how many frames before these are left out.
        where: what to call the data in messages.

    Raises:
        DataError: there are no marks, or no episode is marked as a success.
    """
    if "success" not in frames.extras:
        kept = ", ".join(sorted(frames.extras)) or "none"
        raise DataError(f"{where} has no success marks: it needs an extra 'success' (its extras: {kept})")
    if last_frames < 1 or margin < 0:
        raise ConfigError(f"last_frames must be at least 1 and margin at least 0, got {last_frames} and {margin}")
    marked = np.asarray(frames.extras["success"]).reshape(frames.num_frames).astype(bool)
    positive, negative = marked.copy(), np.ones(frames.num_frames, bool)
    success = np.zeros(frames.num_episodes, bool)
    for index in range(frames.num_episodes):
        part = frames.episode(index)
        success[index] = marked[part].any()
        if success[index]:
            first = min(part.start + int(np.argmax(marked[part])), max(part.stop - last_frames, part.start))
            positive[max(part.stop - last_frames, part.start) : part.stop] = True
            negative[max(first - margin, part.start) : part.stop] = False
    if not success.any():
        raise DataError(f"{where} marks none of its {frames.num_episodes} episodes as a success")
    if not negative.any():
        raise DataError(f"{where} holds nothing but success: its episodes have no frame before the last {last_frames}")
    return Labels(positive, negative, success)


def train_classifier(
    frames: Frames,
    config: RewardTrainConfig | None = None,
    *,
    seed: int = 0,
    encoder: Any = None,
    where: str = "the data set",
    progress: Any = None,
) -> tuple[SuccessClassifier, RewardReport]:
    """Train a classifier on episodes with success marks, set its threshold and report on the rest.

    Args:
        frames: successful episodes, and failed ones if there are any.
        config: settings.
        seed: seed of the split, the weights and the batches.
        encoder: a policy whose features to use; by default the observations that are no images.
        where: what to call the data in messages.
        progress: a progress bar with ``advance(n, **values)``.

    Raises:
        DataError: there are no marks, no successes, or too few episodes to keep some out.
    """
    config = config or RewardTrainConfig()
    labels = label(frames, config.last_frames, config.margin, where)
    train, calibrate, report = split(labels.success, config.held_out, seed, where)
    torch.manual_seed(seed)
    if encoder is None:
        normalizer = Normalizer.fit(frames.take(train), mode="meanstd")
        encoder = StateEncoder(frames.spec, config.obs_steps, normalizer)
    classifier = SuccessClassifier(encoder, config.classifier)
    features = encode_frames(classifier, frames)
    _fit(classifier, features, labels, _rows(frames, train), config, seed, progress)
    probability = _probability(classifier, features)
    worst = [_largest(probability, labels.negative, part) for part in _failures(frames, labels, calibrate)]
    classifier.threshold = conformal_threshold(np.array(worst), config.false_alarms, config.least_threshold)
    return classifier, make_report(probability, labels, frames, report, classifier.threshold)


def conformal_threshold(worst: np.ndarray, false_alarms: float, least: float = 0.0) -> float:
    """Return a threshold that a new episode's largest wrong probability exceeds with at most this probability.

    The split-conformal quantile: of n values the one of rank ceil((n + 1) (1 - false_alarms)). With fewer episodes
    than that takes, the largest value is the best there is.

    Args:
        worst: (n,) largest probability of every episode on frames that are no success.
        false_alarms: share of episodes that may exceed the threshold.
        least: lower bound of the threshold.
    """
    rank = math.ceil((len(worst) + 1) * (1 - false_alarms))
    value = float(np.sort(worst)[min(rank, len(worst)) - 1])
    return max(value, least)


def split(success: np.ndarray, held_out: float, seed: int, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split episodes into those that train, set the threshold and are reported on, successes and failures alike.

    Raises:
        DataError: there are too few episodes.
    """
    rng = np.random.default_rng(seed)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for kind in (True, False):
        order = rng.permutation(np.flatnonzero(success == kind)).tolist()
        count = math.ceil(held_out / 2 * len(order))
        for part, episodes in zip(parts[::-1], (order[:count], order[count : 2 * count]), strict=False):
            part.extend(episodes)
        parts[0].extend(order[2 * count :])
    if not any(success[i] for i in parts[0]) or not all(parts):
        raise DataError(f"{where} has {int(success.sum())} successful episodes; at least 3 are needed to keep some out")
    train, calibrate, report = (np.array(sorted(part)) for part in parts)
    return train, calibrate, report


def make_report(
    probability: np.ndarray, labels: Labels, frames: Frames, episodes: np.ndarray, threshold: float
) -> RewardReport:
    """Count what a classifier with probabilities (F,) gets right in ``episodes``."""
    successes = [frames.episode(i) for i in episodes if labels.success[i]]
    failures = _failures(frames, labels, episodes)
    rows = _rows(frames, episodes)
    positive, negative = (probability[rows[mask[rows]]] for mask in (labels.positive, labels.negative))
    firings = [np.flatnonzero(probability[part] > threshold) for part in successes]
    leads = [part.stop - part.start - 1 - int(at[0]) for part, at in zip(successes, firings, strict=True) if len(at)]
    return RewardReport(
        threshold=threshold,
        episodes=len(episodes),
        successes=len(successes),
        detected=sum(_largest(probability, labels.positive, part) > threshold for part in successes),
        failures=len(failures),
        false_alarms=sum(_largest(probability, labels.negative, part) > threshold for part in failures),
        lead=float(np.median(leads)) if leads else math.nan,
        area=_area(positive, negative),
    )


def assess(classifier: SuccessClassifier, frames: Frames, config: RewardTrainConfig, where: str) -> RewardReport:
    """Report on all episodes of ``frames``, none of which the classifier has seen."""
    labels = label(frames, config.last_frames, config.margin, where)
    probability = _probability(classifier, encode_frames(classifier, frames))
    return make_report(probability, labels, frames, np.arange(frames.num_episodes), classifier.threshold)


def encode_frames(classifier: SuccessClassifier, frames: Frames, chunk: int = 4096) -> Tensor:
    """Return the features (F, C) of every frame with its history, its episode's first frame repeated before it."""
    starts = np.repeat(frames.episode_starts, frames.episode_lengths)
    found = []
    for first in range(0, frames.num_frames, chunk):
        now = np.arange(first, min(first + chunk, frames.num_frames))
        index = np.maximum(now[:, None] + np.arange(1 - classifier.obs_steps, 1), starts[now, None])
        found.append(classifier.features({k: frames.observation[k][index] for k in classifier.spec.observation}))
    return torch.cat(found)


def _fit(
    classifier: SuccessClassifier,
    features: Tensor,
    labels: Labels,
    rows: np.ndarray,
    config: RewardTrainConfig,
    seed: int,
    progress: Any,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    positive, negative = (torch.from_numpy(rows[mask[rows]]) for mask in (labels.positive, labels.negative))
    half = config.batch_size // 2
    target = torch.cat([torch.ones(half), torch.zeros(half)]).to(features.device)
    target = target * (1 - config.label_smoothing) + config.label_smoothing / 2
    optimizer = torch.optim.AdamW(
        classifier.net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    classifier.train()
    for _ in range(config.steps):
        picked = [group[torch.randint(len(group), (half,), generator=generator)] for group in (positive, negative)]
        loss = nn.functional.binary_cross_entropy_with_logits(classifier(features[torch.cat(picked)]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress.advance(1, loss=loss.item())
    classifier.eval()


@torch.no_grad()
def _probability(classifier: SuccessClassifier, features: Tensor) -> np.ndarray:
    return classifier(features).sigmoid().cpu().numpy()


def _rows(frames: Frames, episodes: np.ndarray) -> np.ndarray:
    parts = [frames.episode(int(i)) for i in episodes]
    return np.concatenate([np.arange(part.start, part.stop) for part in parts])


def _failures(frames: Frames, labels: Labels, episodes: np.ndarray) -> list[slice]:
    """Return the failed ones of ``episodes``; all of them, for what precedes their success, where none failed."""
    failed = [frames.episode(int(i)) for i in episodes if not labels.success[i]]
    return failed or [frames.episode(int(i)) for i in episodes]


def _largest(probability: np.ndarray, mask: np.ndarray, part: slice) -> float:
    return float(probability[part][mask[part]].max(initial=0.0))


def _area(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the share of pairs (positive, negative) in the right order; ties count half."""
    if not len(positive) or not len(negative):
        return math.nan
    order = np.sort(negative)
    below, upto = np.searchsorted(order, positive, "left"), np.searchsorted(order, positive, "right")
    return float(((below + upto) / 2).mean() / len(order))


def _share(count: int, total: int) -> str:
    low, high = wilson(count, total)
    return f"{count} of {total} [{low:.0%}, {high:.0%}]"
