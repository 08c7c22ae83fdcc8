"""What a learner keeps on disk, and the random streams that it owns."""

import pytest
import torch
from safetensors import SafetensorError

from robot_rl.core.errors import DataError
from robot_rl.rl import state
from robot_rl.rl.state import generators, keeping_generators, load_state, reseed, save_state


class Drawing(torch.nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.inner, self.stream = inner, torch.Generator().manual_seed(1)


def test_streams_go_on_as_if_they_had_not_been_used():
    policy = Drawing(Drawing())
    expected = [torch.rand(3, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    with keeping_generators(policy):
        for stream in generators(policy):
            torch.rand(5, generator=stream.manual_seed(7))
    assert all(torch.equal(torch.rand(3, generator=g), e) for g, e in zip(generators(policy), expected, strict=True))


def test_every_stream_gets_a_seed_of_its_own():
    policy = Drawing(Drawing())
    reseed(5, policy)
    first, second = (torch.rand(3, generator=stream) for stream in generators(policy))
    assert not torch.isclose(first, second).any()
    reseed(5, policy)
    assert torch.equal(torch.rand(3, generator=policy.stream), first)


def test_a_full_disk_is_one_line_and_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "learner.safetensors"
    save_state(path, {"x": torch.ones(2)}, {"steps": 3})

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(DataError, match=r"cannot write the learner's state .*No space left"):
        save_state(path, {"x": torch.zeros(2)}, {"steps": 4})
    assert load_state(path)[1] == {"steps": 3}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
