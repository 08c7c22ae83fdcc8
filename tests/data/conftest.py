"""Small data sets made on the spot, and the folder of human demonstrations where it exists."""

import os
from pathlib import Path

import numpy as np
import pytest

from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames
from robot_rl.data.store import EpisodeWriter

SPEC = Spec(
    {
        "state": ArraySpec((3,), names=("x", "y", "angle"), unit="m,m,rad"),
        "keypoint": ArraySpec((4, 2)),
        "images.front": ArraySpec((32, 48, 3), "uint8"),
    },
    ArraySpec((2,), low=(-1.0, -1.0), high=(1.0, 1.0)),
    rate_hz=10.0,
)


@pytest.fixture
def spec():
    return SPEC


@pytest.fixture
def human_data():
    """Return a function from a relative path to the file below ROBOT_RL_DATA, skipping where that is missing."""
    root = Path(os.environ.get("ROBOT_RL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))

    def find(path):
        if not (root / path).exists():
            pytest.skip(f"no human demonstrations at {root / path} (set ROBOT_RL_DATA)")
        return root / path

    return find


@pytest.fixture
def make_frames():
    def make(lengths, seed=0, extras=False):
        rng = np.random.default_rng(seed)
        total = sum(lengths)
        spec = SPEC.select(("state", "keypoint"))
        observation = {
            "state": rng.normal(size=(total, 3)).astype(np.float32),
            "keypoint": rng.normal(size=(total, 4, 2)).astype(np.float32),
        }
        action = rng.uniform(-1, 1, (total, 2)).astype(np.float32)
        columns = {"reward": rng.normal(size=total).astype(np.float32)} if extras else {}
        return Frames(observation, action, np.cumsum(lengths), spec, columns)

    return make


@pytest.fixture
def record():
    """Return a function that records episodes into a directory and returns what it recorded."""

    def run(root, lengths=(7, 5, 9), seed=0, append=False, spec=SPEC, **options):
        rng = np.random.default_rng(seed)
        recorded = []
        with EpisodeWriter(root, spec, task="push", append=append, **options) as writer:
            for number, length in enumerate(lengths):
                for step in range(length):
                    observation = {key: sample(rng, array, step) for key, array in spec.observation.items()}
                    action = rng.uniform(-1, 1, spec.action.shape).astype(np.float32)
                    writer.add(observation, action, reward=0.5 * step, actor="human")
                    recorded.append((observation, action))
                writer.save_episode(success=number % 2 == 1)
        return recorded

    return run


def sample(rng, array, step):
    if array.is_image:
        return np.full(array.shape, 20 + 20 * step % 220, np.uint8)
    return rng.normal(size=array.shape).astype(array.dtype)
