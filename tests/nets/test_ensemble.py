"""The ensemble's hand-written gradient against autograd's, for every shape that is used."""

import copy

import pytest
import torch

from robot_rl.nets.ensemble import EnsembleMLP


def reference(network, x, members):
    outputs = []
    for k in members:
        h = x
        for i in range(len(network.weights)):
            h = h @ network.weights[i][k] + network.biases[i][k]
            if i < len(network.weights) - 1:
                if network.layer_norm:
                    h = torch.nn.functional.layer_norm(h, h.shape[-1:]) * network.gains[i][k] + network.shifts[i][k]
                h = h.relu()
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("out", [1, 5])
@pytest.mark.parametrize("depth", [1, 3])
def test_output_and_gradients(layer_norm, out, depth):
    torch.manual_seed(0)
    network = EnsembleMLP((7, *[16] * (depth - 1), out), 3, layer_norm)
    for gain in network.gains:
        gain.data += 0.1 * torch.randn_like(gain)
    x, weight = torch.randn(9, 7, requires_grad=True), torch.randn(3, 9, out)
    expected, got = reference(network, x, range(3)), network(x)
    torch.testing.assert_close(got, expected)
    inputs = [x, *network.parameters()]
    ours = torch.autograd.grad((got * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_frozen_weights_pass_the_gradient_on():
    network = EnsembleMLP((4, 8, 1), 2)
    x = torch.randn(5, 4, requires_grad=True)
    network(x, frozen=True).sum().backward()
    assert all(p.grad is None for p in network.parameters())
    expected = torch.autograd.grad(reference(network, x, range(2)).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_some_members():
    network = EnsembleMLP((4, 8, 1), 5, layer_norm=True)
    x = torch.randn(6, 4)
    torch.testing.assert_close(network(x, torch.tensor([4, 1])), reference(network, x, [4, 1]))


def test_bf16_is_near():
    network = EnsembleMLP((4, 64, 64, 1), 2, layer_norm=True)
    x = torch.randn(32, 4)
    exact = network(x)
    network.dtype = torch.bfloat16
    assert network(x).dtype == torch.float32
    torch.testing.assert_close(network(x), exact, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_bf16_gradients_are_near_and_bad_numbers_stay_visible(layer_norm):
    torch.manual_seed(0)
    network = EnsembleMLP((4, 64, 64, 1), 2, layer_norm)
    x = torch.randn(32, 4, requires_grad=True)
    expected = torch.autograd.grad(reference(network, x, range(2)).sum(), [network.flat, x])
    network.dtype = torch.bfloat16
    got = torch.autograd.grad(network(x).sum(), [network.flat, x])
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).norm() < 0.15 * theirs.norm()  # a ReLU near zero may take the other side
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not network(torch.full((1, 4), bad)).isfinite().any()


def test_parts_of_the_input_and_some_members_have_their_gradients():
    torch.manual_seed(0)
    network = EnsembleMLP((7, 16, 2), 4, layer_norm=True)
    left, right, weight = torch.randn(9, 3), torch.randn(9, 4, requires_grad=True), torch.randn(2, 9, 2)
    members = torch.tensor([3, 1])
    expected = reference(network, torch.cat([left, right], -1), [3, 1])
    got = network((left, right), members)
    torch.testing.assert_close(got, expected)
    inputs = [right, *network.parameters()]
    ours = torch.autograd.grad((got * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_held_network_sees_new_weights_from_the_next_hold_on(dtype):
    network, x = EnsembleMLP((4, 8, 1), 2, dtype=dtype), torch.randn(6, 4)
    network.hold()
    before = network(x)
    before.sum().backward()
    torch.optim.Adam(network.parameters(), lr=0.1, fused=True).step()  # leaves no trace in the tensor's version
    fresh = copy.deepcopy(network)
    fresh.release()
    network.hold()
    assert not torch.equal(network(x), before)
    torch.testing.assert_close(network(x), fresh(x), rtol=0, atol=0)
    network.release()
    network.flat.data.zero_()
    assert not network(x).any()


def test_checkpoints_hold_the_weights_by_layer():
    torch.manual_seed(0)
    one, two = (EnsembleMLP((4, 8, 1), 2, layer_norm=True) for _ in range(2))
    state = one.state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "weights.0": (2, 4, 8),
        "weights.1": (2, 8, 1),
        "biases.0": (2, 1, 8),
        "biases.1": (2, 1, 1),
        "gains.0": (2, 1, 8),
        "shifts.0": (2, 1, 8),
    }
    two.load_state_dict(state)
    assert torch.equal(one.flat, two.flat)
    for wrong, message in (
        ({k: v for k, v in state.items() if k != "gains.0"}, "Missing key.*gains.0"),
        (state | {"weights.2": torch.zeros(1)}, "Unexpected key.*weights.2"),
        (state | {"weights.0": torch.zeros(2, 5, 8)}, r"weights.0 is \(2, 5, 8\), expected \(2, 4, 8\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            two.load_state_dict(wrong)
