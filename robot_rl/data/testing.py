"""The contract of data set readers as a test; authors of plug-ins can call it on their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from robot_rl.core.errors import DataError, UnknownNameError
from robot_rl.data.dataset import Dataset


def check_reader(dataset: Dataset) -> None:
    """Raise `AssertionError` where ``dataset`` breaks the contract of `robot_rl.data.dataset.Dataset`."""
    assert isinstance(dataset, Dataset), "attributes or methods of Dataset are missing"
    assert dataset.num_episodes > 0, "a data set to be checked needs episodes"
    assert dataset.format, "format is empty"
    assert all(isinstance(text, str) and "\n" not in text for text in dataset.warnings), "warnings are single lines"
    _check_frames(dataset)
    _check_choice(dataset)
    _check_images(dataset)


def _check_frames(dataset: Dataset) -> None:
    frames = dataset.load()
    spec = dataset.spec
    low_dimensional = {key for key, array in spec.observation.items() if not array.is_image}
    assert set(frames.observation) == low_dimensional == set(frames.spec.observation), "load() reads all but images"
    assert frames.num_episodes == dataset.num_episodes, "number of episodes"
    assert frames.num_frames == dataset.num_frames, "number of frames"
    assert frames.action.dtype == np.float32, "actions are float32"
    assert frames.action.shape == (dataset.num_frames, *spec.action.shape), "shape of the actions"
    for key in low_dimensional:
        value, array = frames.observation[key], spec.observation[key]
        assert value.shape == (dataset.num_frames, *array.shape), f"shape of '{key}'"
        assert value.dtype == np.dtype(array.dtype), f"dtype of '{key}'"
        assert value.dtype != np.float64, f"'{key}' is float32 where it is floating-point"


def _check_choice(dataset: Dataset) -> None:
    frames = dataset.load()
    last = dataset.num_episodes - 1
    for chosen in ([last], [last, 0], []):
        part, expected = dataset.load(episodes=chosen), frames.take(chosen)
        assert np.array_equal(part.episode_ends, expected.episode_ends), f"ends of episodes {chosen}"
        assert np.array_equal(part.action, expected.action, equal_nan=True), f"actions of episodes {chosen}"
        for key, value in part.observation.items():
            assert np.array_equal(value, expected.observation[key], equal_nan=True), f"'{key}' of episodes {chosen}"
    assert not dataset.load(keys=[]).observation, "load([]) reads no observation"
    _raises(UnknownNameError, lambda: dataset.load(keys=["no such key"]))
    _raises(DataError, lambda: dataset.load(episodes=[dataset.num_episodes]))


def _check_images(dataset: Dataset) -> None:
    length = dataset.load([], [0]).num_frames
    for key, array in dataset.spec.observation.items():
        if array.is_image:
            images = dataset.images(key, 0)
            assert images.shape == (length, *array.shape), f"shape of the images '{key}'"
            assert images.dtype == np.uint8, f"dtype of the images '{key}'"
            assert np.array_equal(dataset.image(key, 0, length - 1), images[-1]), f"image and images of '{key}' differ"
            _raises(DataError, lambda key=key: dataset.image(key, 0, length))
    _raises(UnknownNameError, lambda: dataset.images("no such key", 0))


def _raises(kind: type[Exception], call: Callable[[], Any]) -> None:
    message = None
    try:
        call()
    except kind as error:
        message = str(error)
    assert message is not None, f"{kind.__name__} was not raised"
    assert "\n" not in message, "errors are single lines"
