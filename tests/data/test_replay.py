"""The replay: sources, shares, ring order, and a round trip through its state."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_rl.core.errors import ConfigError, DataError, UnknownNameError
from robot_rl.data.replay import Replay, interleave

FIELDS = {"state": (3,), "picture": (2, 2), "reward": ()}


def rows(n, value=0.0):
    return {
        "state": torch.full((n, 3), value),
        "picture": torch.arange(4.0).reshape(1, 2, 2).expand(n, 2, 2) + value,
        "reward": np.arange(n, dtype=np.float32),
    }


def test_fields_come_back_in_shape():
    replay = Replay(FIELDS, {"online": 10})
    replay.add("online", rows(4, 2.0))
    batch = replay.sample(3, 5, {"online": 1.0})
    assert batch["state"].shape == (3, 5, 3)
    assert batch["picture"].shape == (3, 5, 2, 2)
    assert batch["reward"].shape == (3, 5)
    assert torch.equal(batch["picture"][0, 0], torch.arange(4.0).reshape(2, 2) + 2)


def test_ring_overwrites_the_oldest():
    replay = Replay({"reward": ()}, {"online": 5})
    for i in range(7):
        replay.add("online", {"reward": np.array([i], np.float32)})
    assert sorted(replay.all("online")["reward"].tolist()) == [2, 3, 4, 5, 6]
    assert replay.size["online"] == 5


def test_every_slice_holds_the_sources_half_and_half():
    replay = Replay({"reward": ()}, {"online": 50, "demonstrations": 20})
    replay.add("online", {"reward": np.zeros(30, np.float32)})
    replay.add("demonstrations", {"reward": np.ones(20, np.float32)})
    batch = replay.sample(20, 256, {"online": 0.5, "demonstrations": 0.5})
    assert (batch["reward"].sum(-1) == 128).all()
    # Interleaved, so that any contiguous part is mixed as well.
    assert (batch["reward"].view(20, 64, 4).sum(-1) == 2).all()
    assert torch.equal(batch["source"], batch["reward"][0].long())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.lists(st.floats(0.01, 1), min_size=1, max_size=4))
def test_interleave_keeps_shares(batch_size, weights):
    shares = np.array(weights) / np.sum(weights)
    pattern = interleave(batch_size, shares.tolist())
    assert len(pattern) == batch_size
    counts = np.bincount(pattern, minlength=len(shares))
    assert np.abs(counts - shares * batch_size).max() <= len(shares)


def test_bad_requests_are_named():
    replay = Replay(FIELDS, {"online": 10})
    with pytest.raises(DataError, match="empty"):
        replay.sample(1, 4, {"online": 1.0})
    with pytest.raises(UnknownNameError, match="online"):
        replay.add("onlin", rows(1))
    with pytest.raises(DataError, match="expected"):
        replay.add("online", {"state": torch.zeros(1, 3)})
    with pytest.raises(DataError, match="shape"):
        replay.add("online", {**rows(2), "state": torch.zeros(2, 4)})
    with pytest.raises(ConfigError, match="add up to 1"):
        replay.sample(1, 4, {"online": 0.4})


def test_state_continues_with_the_same_batches():
    first, second = (Replay(FIELDS, {"online": 10, "other": 4}, seed=1) for _ in range(2))
    first.add("online", rows(13 - 4, 1.0))
    first.add("online", rows(4, 5.0))
    first.add("other", rows(2, 3.0))
    tensors, numbers = first.state()
    second.restore({k: v.clone() for k, v in tensors.items()}, numbers)
    for replay in (first, second):
        replay.add("online", rows(3, 7.0))
    assert torch.equal(first.rows, second.rows)
    shares = {"online": 0.75, "other": 0.25}
    assert torch.equal(first.sample(2, 8, shares)["state"], second.sample(2, 8, shares)["state"])
