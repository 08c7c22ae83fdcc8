"""A classifier that tells success from observations: a reward where no simulator knows one (SERL, arXiv 2401.16013)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from robot_rl.core.env import Observation
from robot_rl.core.errors import DataError
from robot_rl.core.spec import Spec
from robot_rl.data.normalizer import Normalizer
from robot_rl.nets.mlp import mlp
from robot_rl.policies.checkpoint import load_policy, replacing, save_policy, write_tensors

FORMAT = 1
"""Version of the layout on disk; readers refuse newer ones."""


class Encoder(Protocol):
    """Turns observations into features; every policy with an ``encode`` is one, images or not."""

    spec: Spec
    obs_steps: int

    def encode(self, history: dict[str, Tensor]) -> Tensor:
        """Return features (B, C) for a history (each (B, T, …), raw units)."""


class StateEncoder(nn.Module):
    """Normalised observations that are no images, laid end to end and clamped to [-5, 5]."""

    def __init__(self, spec: Spec, obs_steps: int = 1, normalizer: Normalizer | None = None) -> None:
        super().__init__()
        keys = tuple(key for key, array in spec.observation.items() if not array.is_image)
        self.spec, self.obs_steps = spec.select(keys), obs_steps
        self.normalizer = normalizer or Normalizer(self.spec)

    def encode(self, history: dict[str, Tensor]) -> Tensor:
        """Return features (B, C) for a history (each (B, T, …), raw units)."""
        parts = [self.normalizer.normalize(key, history[key].float()).flatten(1) for key in self.spec.observation]
        return torch.cat(parts, dim=-1).clamp(-5, 5)


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of the classifier on top of its encoder."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""
    dropout: float = 0.1
    """Share of the last hidden layer dropped while training."""


class SuccessClassifier(nn.Module):
    """Probability that the newest observations show success.

    Args:
        encoder: what it sees: a `StateEncoder`, or a policy, whose features are used as they are.
        config: shape.
        threshold: probability above which `fires` says yes.
    """

    def __init__(self, encoder: Any, config: ClassifierConfig | None = None, threshold: float = 0.5) -> None:
        super().__init__()
        config = config or ClassifierConfig()
        self.encoder = encoder.requires_grad_(False).eval()
        self.config, self.threshold = config, threshold
        self.spec: Spec = encoder.spec
        self.obs_steps: int = encoder.obs_steps
        with torch.no_grad():
            zeros = {k: torch.zeros(1, self.obs_steps, *a.shape) for k, a in self.spec.observation.items()}
            self.feature_size = int(encoder.encode(zeros).shape[-1])
        layers = list(mlp((self.feature_size, *config.hidden, 1), layer_norm=True))
        self.net = nn.Sequential(*layers[:-1], nn.Dropout(config.dropout), layers[-1])

    def train(self, mode: bool = True) -> SuccessClassifier:
        """Set the mode of the classifier; its encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B,) for features (B, C)."""
        logits: Tensor = self.net(features).squeeze(-1)
        return logits

    @torch.no_grad()
    def features(self, history: Observation) -> Tensor:
        """Return the encoder's features (B, C) for a history of arrays (each (B, T, …), raw units)."""
        device = next(self.net.parameters()).device
        return self.encoder.encode({k: torch.as_tensor(history[k], device=device) for k in self.spec.observation})

    @torch.no_grad()
    def probability(self, history: Observation) -> np.ndarray:
        """Return probabilities of success (B,) for a history (each (B, T, …), raw units)."""
        return self(self.features(history)).sigmoid().cpu().numpy()

    def fires(self, history: Observation) -> np.ndarray:
        """Return (B,) bool: whether each history shows success, by the calibrated threshold."""
        return self.probability(history) > self.threshold


def save_classifier(classifier: SuccessClassifier, directory: str | Path, report: dict[str, Any] | None = None) -> Path:
    """Write ``classifier.json``, ``model.safetensors`` and, where its encoder is a policy, ``encoder/``.

    Args:
        classifier: what to write.
        directory: where; what is there is replaced once all is written.
        report: JSON-ready facts on how good it is, to keep.

    Raises:
        ConfigError: the directory holds something else.
        DataError: nothing can be written there, or the disk is full.
    """
    directory = Path(directory)
    own = isinstance(classifier.encoder, StateEncoder)
    description = {
        "format": FORMAT,
        "config": asdict(classifier.config),
        "threshold": classifier.threshold,
        "obs_steps": classifier.obs_steps,
        "spec": classifier.spec.to_json(),
        "encoder": "state" if own else "policy",
        "report": report or {},
    }
    with replacing(directory, "classifier.json", "classifier") as temporary:
        tensors = {k: v for k, v in classifier.state_dict().items() if own or k.startswith("net.")}
        write_tensors(temporary / "model.safetensors", tensors)
        if not own:
            save_policy(classifier.encoder, temporary / "encoder")
        (temporary / "classifier.json").write_text(json.dumps(description, indent=2))
    return directory


def load_classifier(directory: str | Path, device: str = "cpu") -> SuccessClassifier:
    """Read a classifier written by `save_classifier`, ready for use.

    Raises:
        DataError: it is missing, damaged or of a newer format.
    """
    directory = Path(directory)
    description = read_classifier(directory)
    try:
        spec, config = Spec.from_json(description["spec"]), dict(description["config"])
        encoder: Any = (
            StateEncoder(spec, description["obs_steps"])
            if description["encoder"] == "state"
            else load_policy(directory / "encoder")
        )
        shape = ClassifierConfig(**{**config, "hidden": tuple(config["hidden"])})
        classifier = SuccessClassifier(encoder, shape, float(description["threshold"]))
        tensors = safetensors.torch.load_file(directory / "model.safetensors")
        found = classifier.load_state_dict(tensors, strict=False)
        missing = [name for name in found.missing_keys if description["encoder"] == "state" or name.startswith("net.")]
        if missing or found.unexpected_keys:
            raise DataError(f"{directory} is damaged: its weights do not fit its description")
    except (KeyError, TypeError, OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(f"cannot read the classifier {directory}: {error}") from error
    return classifier.to(device).eval().requires_grad_(False)


def read_classifier(directory: str | Path) -> dict[str, Any]:
    """Return the parsed ``classifier.json``: threshold, what it sees, and its report.

    Raises:
        DataError: it is missing, damaged or of a newer format.
    """
    path = Path(directory) / "classifier.json"
    if not path.exists():
        raise DataError(f"no success classifier in {directory}: classifier.json is missing (robot-rl reward train)")
    try:
        description: dict[str, Any] = json.loads(path.read_text())
        newer = description["format"] > FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if newer:
        raise DataError(f"{path} has format {description['format']}; this version reads up to {FORMAT}")
    return description
