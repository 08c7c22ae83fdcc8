"""Weights and states from a stranger: where a pickle is put in their place, it is refused, and none of it runs."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from robot_rl.core.errors import DataError  # noqa: E402
from robot_rl.core.spec import ArraySpec, Spec  # noqa: E402
from robot_rl.data.frames import Frames  # noqa: E402
from robot_rl.data.windows import WindowSampler  # noqa: E402
from robot_rl.policies.checkpoint import load_policy, save_policy  # noqa: E402
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy  # noqa: E402
from robot_rl.policies.success import (  # noqa: E402
    ClassifierConfig,
    StateEncoder,
    SuccessClassifier,
    load_classifier,
    save_classifier,
)
from robot_rl.rl.state import load_state, save_state  # noqa: E402
from robot_rl.train.run import Run  # noqa: E402
from robot_rl.train.trainer import TrainConfig, train  # noqa: E402

SPEC = Spec({"state": ArraySpec((3,))}, ArraySpec((2,), low=(-1.0, -1.0), high=(1.0, 1.0)), 10.0)
CONFIG = TrainConfig(steps=2, batch_size=8, warmup_steps=1, checkpoint_every=1, log_every=1, precision="fp32")


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def zipped(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def legacy(content):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def unpickle(data):
    return torch.load(io.BytesIO(data), weights_only=False)


FLAVOURS = {"pickle": (pickle.dumps, pickle.loads), "torch": (zipped, unpickle), "old torch": (legacy, unpickle)}


def policy(seed=0):
    torch.manual_seed(seed)
    return ChunkedPolicy(SPEC, ChunkedConfig(width=16, depth=1, horizon=4, execute_steps=2))


def checkpoint(folder):
    save_policy(policy(), folder)
    return lambda: load_policy(folder)


def classifier(folder):
    encoder = StateEncoder(SPEC, 2)
    encoder.low, encoder.high = np.full(6, -3.0, np.float32), np.full(6, 3.0, np.float32)
    save_classifier(SuccessClassifier(encoder, ClassifierConfig(hidden=(16,))), folder)
    return lambda: load_classifier(folder)


def trainer(folder):
    rng = np.random.default_rng(0)
    frames = Frames({"state": rng.normal(size=(40, 3))}, np.zeros((40, 2), np.float32), np.array([40]), SPEC)
    with Run.create(folder, CONFIG) as run:
        train(policy(), WindowSampler(frames, 2, 4), CONFIG, run)

    def resume():
        with Run.create(folder, CONFIG, resume=True) as run:
            train(policy(), WindowSampler(frames, 2, 4), CONFIG, run)

    return resume


def learner(folder):
    folder.mkdir()
    save_state(folder / "learner.safetensors", {"x": torch.ones(2)}, {"steps": 3})
    return lambda: load_state(folder / "learner.safetensors")


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (checkpoint, "model.safetensors"),
        (checkpoint, "policy.json"),
        (classifier, "model.safetensors"),
        (classifier, "classifier.json"),
        (trainer, "state.safetensors"),
        (learner, "learner.safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_pickle_in_place_of_a_file_is_refused_in_one_line_and_runs_nothing(tmp_path, write, name, flavour):
    marker, (dumps, loads) = tmp_path / "marker", FLAVOURS[flavour]
    read = write(tmp_path / "written")
    read()  # as it was written, it is read
    (file,) = (tmp_path / "written").rglob(name)
    hostile = dumps({"weights": Touch(marker)})
    loads(hostile)
    assert marker.exists(), "it does what it is meant to do"
    marker.unlink()
    file.write_bytes(hostile)
    with pytest.raises(DataError) as caught:
        read()
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value) or str(tmp_path / "written") in str(caught.value)
