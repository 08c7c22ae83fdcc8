import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_rl.core.errors import ConfigError, DataError, UnknownNameError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames
from robot_rl.data.normalizer import Normalizer


def frames_of(state, action):
    spec = Spec({"a.state": ArraySpec(state.shape[1:]), "camera": ArraySpec((8, 8, 3), "uint8")}, ArraySpec((1,)))
    observation = {"a.state": state.astype(np.float32), "camera": np.zeros((len(state), 8, 8, 3), np.uint8)}
    return Frames(observation, action.astype(np.float32), [len(state)], spec)


@pytest.fixture
def frames():
    rng = np.random.default_rng(0)
    return frames_of(rng.normal(size=(50, 4)) * [1, 100, 1e-3, 0] + [0, 5, 2, 7], rng.uniform(-1.3, 1.2, (50, 1)))


def test_minmax_maps_the_range_to_one(frames):
    normalizer = Normalizer.fit(frames)
    y = normalizer.normalize("a.state", torch.from_numpy(frames.observation["a.state"]))
    torch.testing.assert_close(y.amin(0)[:3], torch.full((3,), -1.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.amax(0)[:3], torch.full((3,), 1.0), atol=1e-4, rtol=0)
    assert (y[:, 3] == 0).all()
    assert normalizer.normalize("action", torch.from_numpy(frames.action)).abs().max() <= 1 + 1e-5


def test_constant_elements_are_only_shifted(frames):
    normalizer = Normalizer.fit(frames)
    moved = torch.tensor([[0.0, 5.0, 2.0, 7.5]])
    assert normalizer.normalize("a.state", moved)[0, 3] == pytest.approx(0.5)


def test_meanstd_standardises(frames):
    normalizer = Normalizer.fit(frames, mode={"a.state": "meanstd"})
    y = normalizer.normalize("a.state", torch.from_numpy(frames.observation["a.state"]))[:, :2]
    torch.testing.assert_close(y.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=12),
    st.sampled_from(["minmax", "meanstd"]),
    st.integers(0, 2),
)
def test_unnormalize_inverts_with_any_leading_axes(values, mode, leading):
    state = np.array(values)[:, None]
    normalizer = Normalizer.fit(frames_of(state, state), mode=mode)
    x = torch.tensor(values, dtype=torch.float32).reshape(*([1] * leading), -1, 1)
    back = normalizer.unnormalize("action", normalizer.normalize("action", x))
    assert back.shape == x.shape
    torch.testing.assert_close(back, x, atol=1e-6 * max(1.0, float(x.abs().max())), rtol=1e-5)


def test_state_dict_carries_everything(frames):
    fitted, empty = Normalizer.fit(frames), Normalizer(frames.spec)
    empty.load_state_dict(fitted.state_dict())
    x = torch.randn(3, 2, 4)
    assert torch.equal(empty.normalize("a.state", x), fitted.normalize("a.state", x))
    assert fitted.keys == ("a.state", "action")


def test_errors_name_the_key(frames):
    with pytest.raises(UnknownNameError, match=r"Available: a\.state, action"):
        Normalizer.fit(frames).normalize("state", torch.zeros(4))
    with pytest.raises(DataError, match="'camera' is an image"):
        Normalizer(frames.spec, ["camera"])
    with pytest.raises(ConfigError, match="available: minmax, meanstd"):
        Normalizer.fit(frames, mode="gauss")
    frames.observation["a.state"][7, 2] = np.nan
    with pytest.raises(DataError, match=r"'a.state' is not finite at frame 7, element \[2\]"):
        Normalizer.fit(frames)
