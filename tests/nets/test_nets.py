import pytest
import torch

from robot_rl.nets.embed import TimeEmbedding
from robot_rl.nets.mlp import ResidualMLP, mlp
from robot_rl.nets.plain import PlainMLP
from robot_rl.nets.unet1d import UNet1D


@pytest.mark.parametrize("backbone", [ResidualMLP, UNet1D, PlainMLP])
def test_backbones_keep_the_shape_start_at_zero_and_use_every_input(backbone):
    torch.manual_seed(0)
    net = backbone(8, 2, 5, width=32, depth=2)
    x, t, cond = torch.randn(3, 8, 2), torch.rand(3), torch.randn(3, 5)
    assert torch.equal(net(x, t, cond), torch.zeros(3, 8, 2))
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    out = net(x, t, cond)
    assert not torch.allclose(out, net(x + 0.1, t, cond))
    assert not torch.allclose(out, net(x, t * 0.5, cond))
    assert not torch.allclose(out, net(x, t, cond + 0.1))


@pytest.mark.parametrize("backbone", [ResidualMLP, UNet1D])
def test_every_parameter_gets_a_gradient(backbone):
    torch.manual_seed(0)
    net = backbone(8, 2, 5, width=32, depth=3)
    torch.nn.init.normal_(next(p for n, p in net.named_parameters() if n.startswith("leave") and p.ndim > 1), std=0.1)
    for parameter in net.parameters():
        with torch.no_grad():
            parameter.add_(0.01 * torch.randn_like(parameter))
    net(torch.randn(4, 8, 2), torch.rand(4), torch.randn(4, 5)).square().sum().backward()
    unused = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert unused == []


def test_neighbouring_times_are_told_apart():
    embedding = TimeEmbedding(64)
    angles = torch.stack([torch.tensor(0.50), torch.tensor(0.51)])[:, None] * embedding.frequencies
    features = torch.cat([angles.sin(), angles.cos()], dim=-1)
    assert (features[0] - features[1]).norm() > 1.0


def test_plain_mlp_has_the_layers_asked_for():
    net = mlp([3, 8, 8, 2], torch.nn.Tanh, layer_norm=True)
    kinds = [type(layer).__name__ for layer in net]
    assert kinds == ["Linear", "LayerNorm", "Tanh", "Linear", "LayerNorm", "Tanh", "Linear"]
