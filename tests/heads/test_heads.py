"""Heads against closed forms: what tells a right implementation from a wrong one."""

import math

import pytest
import torch
from torch import Tensor, nn

from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.heads.diffusion import DiffusionHead
from robot_rl.heads.flow import FlowHead
from robot_rl.heads.path import Path, squared_cosine
from robot_rl.nets.mlp import ResidualMLP
from robot_rl.nets.unet1d import UNet1D


class GaussianVelocity(nn.Module):
    """The exact velocity for data N(0, 1): v(z, t) = (2t - 1) z / ((1 - t)^2 + t^2)."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        t = t[:, None, None]
        return (2 * t - 1) * x / ((1 - t) ** 2 + t**2)


def test_flow_integrates_the_exact_gaussian_field_to_unit_deviation():
    head = FlowHead(GaussianVelocity(), 1, 1, steps=100)
    noise = torch.linspace(-2, 2, 9)[:, None, None]
    actions = head.sample(torch.zeros(9, 0), noise).actions
    torch.testing.assert_close(actions, noise, atol=0.02, rtol=0.02)
    one_step = head.sample(torch.zeros(9, 0), noise, steps=1).actions
    torch.testing.assert_close(one_step, torch.zeros_like(noise))


def test_midpoint_is_more_accurate_than_euler_at_equal_steps():
    noise = torch.ones(1, 1, 1)
    errors = [
        abs(FlowHead(GaussianVelocity(), 1, 1, steps=8, solver=solver).sample(torch.zeros(1, 0), noise).actions - 1)
        for solver in ("euler", "midpoint")
    ]
    assert errors[1] < errors[0] / 3


def test_beta_times_put_more_mass_on_the_noisy_end():
    head = FlowHead(GaussianVelocity(), 1, 1)
    times = head.draw_times(200_000, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert times.mean().item() == pytest.approx(0.6, abs=0.01)
    assert times.min() > 0
    assert times.max() <= 1


def test_cosine_schedule_has_the_published_levels():
    abar = squared_cosine(100)
    assert abar[0].item() == pytest.approx(0.99937, abs=1e-5)
    assert abar[49].item() == pytest.approx(0.4938, abs=1e-4)
    assert abar[99].item() == pytest.approx(2.4e-7, rel=0.05)
    from diffusers import DDIMScheduler

    reference = DDIMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(reference.alphas_cumprod, abar, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "sample"])
def test_path_conversions_are_inverse(prediction):
    path = Path("flow", prediction)
    actions, noise, t = torch.randn(5, 3, 2), torch.randn(5, 3, 2), torch.rand(5) * 0.8 + 0.1
    estimate = path.estimate(path.target(actions, noise), path.noised(actions, noise, t), t)
    torch.testing.assert_close(estimate.sample, actions, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(estimate.epsilon, noise, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(estimate.velocity, noise - actions, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backbone", [ResidualMLP, UNet1D])
@pytest.mark.parametrize("head_type", [FlowHead, DiffusionHead])
def test_initial_loss_and_determinism(head_type, backbone):
    torch.manual_seed(0)
    head = head_type(backbone(8, 2, 3, width=32, depth=2), 8, 2, steps=4)
    actions, cond = torch.randn(512, 8, 2), torch.randn(512, 3)
    loss = head.loss(actions, cond, generator=torch.Generator().manual_seed(0))
    expected = 2.0 if head_type is FlowHead else 1.0  # E|e - a|^2 of two unit Gaussians, E|e|^2 of one
    assert loss.shape == (512,)
    assert loss.mean().item() == pytest.approx(expected, abs=0.1)
    noise = torch.randn(512, 8, 2)
    assert torch.equal(head.sample(cond, noise).actions, head.sample(cond, noise).actions)
    result = head.sample(cond, noise, trace=True)
    assert len(result.trace) == 5
    assert result.calls == 4
    assert torch.equal(result.trace[0], noise)
    assert torch.equal(result.trace[-1], result.actions)


def test_mask_removes_padding_from_the_loss():
    head = FlowHead(ResidualMLP(4, 1, 1, width=16, depth=1), 4, 1)
    actions = torch.zeros(2, 4, 1)
    actions[1, 2:] = 100.0
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    loss = head.loss(actions, torch.zeros(2, 1), mask, torch.Generator().manual_seed(0))
    assert loss[1] < 50


@pytest.mark.parametrize("head_type", [FlowHead, DiffusionHead])
def test_two_modes_are_both_sampled_and_never_averaged(head_type):
    torch.manual_seed(0)
    head = head_type(ResidualMLP(1, 1, 1, width=128, depth=2), 1, 1, steps=20)
    optimizer = torch.optim.Adam(head.parameters(), 2e-3)
    cond = torch.zeros(256, 1)
    for step in range(400):
        actions = torch.where(torch.rand(256, 1, 1) < 0.5, 0.7, -0.7)
        optimizer.zero_grad()
        head.loss(actions, cond).mean().backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / 400)
    with torch.no_grad():
        samples = head.sample(torch.zeros(1000, 1)).actions.flatten()
    assert 0.4 < (samples > 0).float().mean() < 0.6
    assert ((samples.abs() - 0.7).abs() < 0.15).float().mean() > 0.93
    assert (samples.abs() < 0.3).float().mean() < 0.03


@pytest.mark.parametrize("head_type", [FlowHead, DiffusionHead])
def test_a_guide_changes_the_denoised_estimate(head_type):
    head = head_type(ResidualMLP(4, 2, 3, width=16, depth=1), 4, 2, steps=8)
    goal = torch.full((5, 4, 2), 0.3)
    guided = head.sample(torch.zeros(5, 3), torch.randn(5, 4, 2), guides=[lambda sample, x, t: goal]).actions
    torch.testing.assert_close(guided, goal, atol=1e-3, rtol=1e-3)


def test_diffusion_chain_density_is_that_of_its_noise():
    torch.manual_seed(0)
    head = DiffusionHead(ResidualMLP(4, 2, 3, width=32, depth=1), 4, 2, steps=10, eta=1.0)
    cond = torch.randn(4000, 3)
    with torch.no_grad():
        trace = head.sample(cond, trace=True).trace
        density = head.step_log_prob(trace, cond)
    assert density.shape == (4000, 9)  # the last step adds no noise
    for step, level in enumerate(range(9, 0, -1)):
        std = head.chain_step(trace[0], torch.full((4000,), 9 - level), cond)[1][0].item()
        entropy = 8 * (0.5 + math.log(std * math.sqrt(2 * math.pi)))
        assert -density[:, step].mean().item() == pytest.approx(entropy, abs=0.2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [10, 16])
def test_the_sampled_chain_is_that_of_diffusers(eta, steps):
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    head = DiffusionHead(ResidualMLP(4, 2, 3, width=32, depth=1), 4, 2, steps=steps, eta=eta)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    scheduler = DDIMScheduler(
        num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon", clip_sample=True
    )
    scheduler.set_timesteps(steps)
    cond, start = torch.randn(64, 3), torch.randn(64, 4, 2)
    with torch.no_grad():
        ours = head.sample(cond, start, trace=True, generator=torch.Generator().manual_seed(5)).trace
        generator, theirs = torch.Generator().manual_seed(5), [start]
        for level in scheduler.timesteps:
            noise = torch.randn(start.shape, generator=generator)
            output = head.network(theirs[-1], torch.full((64,), level.item() / 99), cond)
            options = {"eta": eta, "use_clipped_model_output": True, "variance_noise": noise}
            theirs.append(scheduler.step(output, level, theirs[-1], **options).prev_sample)
    assert len(ours) == len(theirs) == steps + 1
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-5, rtol=1e-5)
    assert (ours[-1].abs() == 1).any(), "some estimates are clipped"
    assert (ours[-1].abs() < 1).any()


def test_heads_without_densities_refuse_and_name_those_that_have():
    head = FlowHead(GaussianVelocity(), 1, 1)
    with pytest.raises(CapabilityError, match="diffusion"):
        head.step_log_prob([], torch.zeros(1, 0))
    deterministic = DiffusionHead(ResidualMLP(4, 2, 3, width=16, depth=1), 4, 2, steps=4)
    with pytest.raises(ConfigError, match="eta"):
        deterministic.step_log_prob(deterministic.sample(torch.zeros(1, 3), trace=True).trace, torch.zeros(1, 3))


def test_only_a_diffusion_head_without_fresh_noise_is_steerable():
    heads = [DiffusionHead(ResidualMLP(4, 2, 3, width=16, depth=1), 4, 2, steps=4, eta=eta) for eta in (0.0, 0.5)]
    assert [head.capabilities.steerable for head in heads] == [True, False]
    assert all(head.capabilities.chain_log_prob for head in heads)


def test_horizons_that_a_unet_cannot_halve_are_refused():
    with pytest.raises(ConfigError, match="divisible by 4"):
        UNet1D(10, 2, 3, depth=3)
