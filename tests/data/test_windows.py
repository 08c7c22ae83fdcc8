import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_rl.core.errors import ConfigError, UnknownNameError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames
from robot_rl.data.windows import WindowSampler

SPEC = Spec({"state": ArraySpec((2,)), "point": ArraySpec((2, 2))}, ArraySpec((1,)))


def numbered(lengths):
    """Frames whose values tell their row."""
    rows = np.arange(sum(lengths), dtype=np.float32)
    observation = {"state": rows[:, None] + [0, 0.5], "point": rows[:, None, None] + np.zeros((2, 2))}
    observation = {key: value.astype(np.float32) for key, value in observation.items()}
    return Frames(observation, rows[:, None], np.cumsum(lengths), SPEC)


def naive(frames, window, obs_steps, horizon):
    """One window, written down as the definition reads."""
    episode = next(frames.episode(i) for i in range(frames.num_episodes) if window < frames.episode_ends[i])
    observed = [max(window - back, episode.start) for back in range(obs_steps - 1, -1, -1)]
    actions = [min(window + ahead, episode.stop - 1) for ahead in range(horizon)]
    mask = [window + ahead < episode.stop for ahead in range(horizon)]
    return observed, actions, mask


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    obs_steps=st.integers(1, 4),
    horizon=st.integers(1, 12),
)
def test_windows_equal_the_naive_definition(lengths, obs_steps, horizon):
    frames = numbered(lengths)
    sampler = WindowSampler(frames, obs_steps, horizon)
    assert sampler.num_windows == sum(lengths)
    batch = sampler.batch(torch.arange(sampler.num_windows))
    for window in range(sampler.num_windows):
        observed, actions, mask = naive(frames, window, obs_steps, horizon)
        assert batch["observation"]["state"][window, :, 0].tolist() == observed
        assert batch["observation"]["point"][window, :, 1, 1].tolist() == observed
        assert batch["action"][window, :, 0].tolist() == actions
        assert batch["mask"][window].tolist() == mask


def test_shapes_and_keys():
    sampler = WindowSampler(numbered([5, 7]), 2, 4, keys=["point"])
    batch = sampler.batch(torch.tensor([0, 11, 3]))
    assert {key: tuple(value.shape) for key, value in batch["observation"].items()} == {"point": (3, 2, 2, 2)}
    assert batch["action"].shape == (3, 4, 1)
    assert batch["mask"].dtype == torch.bool


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_every_window_is_drawn_once_per_pass(size, batch, seed):
    sampler = WindowSampler(numbered([size]), 1, 1)
    steps = -(-3 * size // batch)
    drawn = torch.cat([sampler.index(step, batch, seed) for step in range(steps)])
    for start in range(0, 3 * size, size):
        assert sorted(drawn[start : start + size].tolist()) == list(range(size))


def test_index_is_a_function_of_seed_and_step_alone():
    first, second = WindowSampler(numbered([50]), 1, 1), WindowSampler(numbered([50]), 1, 1)
    forward = [first.index(step, 16, 3) for step in range(20)]
    for step in (19, 0, 7, 7, 12):
        assert torch.equal(second.index(step, 16, 3), forward[step])
    assert not torch.equal(second.index(0, 16, 4), forward[0])


def test_settings_and_names_are_checked():
    with pytest.raises(ConfigError, match="at least 1, got 0 and 4"):
        WindowSampler(numbered([3]), 0, 4)
    with pytest.raises(UnknownNameError, match="Did you mean 'state'"):
        WindowSampler(numbered([3]), 1, 4, keys=["stat"])
