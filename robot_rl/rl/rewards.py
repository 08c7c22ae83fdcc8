"""Rewards from a success classifier: labels and training, its report on episodes that it has not seen, and its use.

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

from robot_rl.core.env import Observation, Step, VecEnv
from robot_rl.core.errors import CapabilityError, ConfigError, DataError
from robot_rl.core.spec import Spec
from robot_rl.data.frames import Frames
from robot_rl.data.normalizer import Normalizer
from robot_rl.policies.success import ClassifierConfig, StateEncoder, SuccessClassifier
from robot_rl.rollout.evaluate import wilson


@dataclass(frozen=True)
class RewardTrainConfig:
    """Settings of training a success classifier."""

    last_frames: int = 3
    """Last frames of a successful episode that count as success."""
    margin: int = 3
    """Frames before those that count as neither."""
    obs_steps: int = 1
    """Newest observations that the classifier sees, where it has no policy's encoder."""
    steps: int = 1_000
    """Optimiser steps."""
    batch_size: int = 256
    """Frames per step, half of them success."""
    learning_rate: float = 1e-3
    """AdamW's step size; follows a cosine to zero."""
    weight_decay: float = 1e-3
    """AdamW's weight decay."""
    label_smoothing: float = 0.05
    """Labels are 1 - s/2 and s/2 rather than 1 and 0."""
    false_alarms: float = 0.05
    """Largest share of episodes in which the threshold may let it fire on a frame that is no success."""
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
    false_alarms: int
    """Episodes in which it fires on a frame that is no success."""
    area: float
    """Share of pairs of a success frame and another frame that it ranks rightly (area under the ROC curve)."""

    def summary(self) -> str:
        """Return one line for people."""
        return (
            f"detects {_share(self.detected, self.successes)} successes, false alarms in "
            f"{_share(self.false_alarms, self.episodes)} episodes, frames ranked rightly {self.area:.1%}, "
            f"threshold {self.threshold:.3f}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready figures, with 95 % intervals of the two shares."""
        return asdict(self) | {
            "detected_interval_95": list(wilson(self.detected, self.successes)),
            "false_alarms_interval_95": list(wilson(self.false_alarms, self.episodes)),
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
    worst = [_largest(probability, labels.negative, frames.episode(i)) for i in calibrate]
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
    parts = [frames.episode(i) for i in episodes]
    successes = [part for i, part in zip(episodes, parts, strict=True) if labels.success[i]]
    rows = np.concatenate([np.arange(part.start, part.stop) for part in parts])
    positive, negative = (probability[rows[mask[rows]]] for mask in (labels.positive, labels.negative))
    return RewardReport(
        threshold=threshold,
        episodes=len(parts),
        successes=len(successes),
        detected=sum(_largest(probability, labels.positive, part) > threshold for part in successes),
        false_alarms=sum(_largest(probability, labels.negative, part) > threshold for part in parts),
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


class ClassifierReward:
    """A view of an environment whose reward is 1 where the classifier first fires in an episode, and 0 elsewhere.

    The environment's own ``success`` stays in ``info``, so that evaluation does not believe what was trained on;
    ``classifier`` is there beside it.

    Args:
        env: the environment; its reward is dropped.
        classifier: says what success is.
        terminate: end the episode where it fires. That takes an environment of one lane, or one that restarts single
            lanes: ``restart_lanes(lanes (N,) bool) -> observation (each (N, …))``.

    Raises:
        SpecMismatchError: the environment does not provide what the classifier sees.
        CapabilityError: ``terminate`` with an environment that cannot.
    """

    def __init__(self, env: VecEnv, classifier: SuccessClassifier, terminate: bool = False) -> None:
        classifier.spec.require(env.spec, "the success classifier", "the environment")
        if terminate and env.num_envs > 1 and not hasattr(env, "restart_lanes"):
            raise CapabilityError("ending episodes by classifier needs one lane, or an environment with restart_lanes")
        self.env, self.classifier, self.terminate = env, classifier, terminate
        self.num_envs, self.max_episode_steps = env.num_envs, env.max_episode_steps
        self.spec: Spec = env.spec
        self._history: Observation = {}
        self._fired = np.zeros(env.num_envs, bool)

    def reset(self, seed: Any = None) -> Observation:
        """Start a new episode in every lane."""
        observation = self.env.reset(seed)
        self._begin(observation, np.ones(self.num_envs, bool))
        return observation

    def step(self, actions: np.ndarray) -> Step:
        """Step the environment and replace its reward."""
        step = self.env.step(actions)
        for key, frames in self._history.items():
            self._history[key] = np.concatenate([frames[:, 1:], step.final_observation[key][:, None]], axis=1)
        fires = self.classifier.fires(self._history)
        first = fires & ~self._fired
        self._fired |= fires
        terminated, truncated, observation = step.terminated, step.truncated, step.observation
        if self.terminate and first.any():
            ours = first & ~step.done
            terminated, truncated = terminated | first, truncated & ~first
            if ours.any():
                observation = self._restart(ours)
        info = {**step.info, "classifier": fires}
        step = Step(observation, first.astype(np.float32), terminated, truncated, step.final_observation, info)
        self._begin(observation, step.done)
        return step

    def render(self, lane: int = 0) -> np.ndarray:
        """Return an RGB frame (height, width, 3) uint8 of one lane."""
        return self.env.render(lane)

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _restart(self, lanes: np.ndarray) -> Observation:
        if hasattr(self.env, "restart_lanes"):
            restarted: Observation = self.env.restart_lanes(lanes)
            return restarted
        return self.env.reset(None)

    def _begin(self, observation: Observation, lanes: np.ndarray) -> None:
        for key in self.classifier.spec.observation:
            first = np.repeat(observation[key][:, None], self.classifier.obs_steps, axis=1)
            if key not in self._history:
                self._history[key] = first
            self._history[key][lanes] = first[lanes]
        self._fired[lanes] = False
