"""Chunks that go on from a running one, against a Gaussian prior whose conditionals are known in closed form."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.realtime import Commitment, RealTimeConfig, require_real_time
from robot_rl.heads.continuation import ContinuationGuide, Prefix, PrefixBackbone
from robot_rl.heads.diffusion import DiffusionHead
from robot_rl.heads.flow import FlowHead
from robot_rl.heads.path import Path
from robot_rl.nets.mlp import ResidualMLP
from robot_rl.nets.unet1d import UNet1D

HORIZON, RHO, EXECUTED = 8, 0.9, (1.5, 1.4, 1.3)
CONDITIONAL = [EXECUTED[-1] * RHO**k for k in range(1, 6)]  # 1.17, 1.05, 0.95, 0.85, 0.77
COVARIANCE = RHO ** (torch.arange(HORIZON).double()[:, None] - torch.arange(HORIZON)).abs()


class AutoregressiveVelocity(nn.Module):
    """The exact velocity for chunks of a stationary Gaussian with correlation rho^|i - j|; known actions are clean."""

    prefix_steps = 4

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, known: Tensor | None = None) -> Tensor:
        times = t[0].double().expand(HORIZON)
        if known is not None:
            times = times.masked_fill(known[0], 1e-6)
        alpha = torch.diag(1 - times)
        solved = torch.linalg.solve(alpha @ COVARIANCE @ alpha + torch.diag(times**2), x[..., 0].T.double())
        sample, noise = COVARIANCE @ alpha @ solved, torch.diag(times) @ solved
        return (noise - sample).T.float()[..., None]


def executed(count):
    target = torch.zeros(count, HORIZON, 1)
    target[:, : len(EXECUTED), 0] = torch.tensor(EXECUTED)
    return target, (torch.arange(HORIZON) < len(EXECUTED)).expand(count, -1)


def mean_chunk(steps=5, count=500, **continuation):
    """Mean (H,) of sampled chunks; with noises and their negatives it is exact where sampling is affine in them."""
    head = FlowHead(AutoregressiveVelocity(), HORIZON, 1, steps=steps)
    noise = torch.randn(count, HORIZON, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sampled = head.sample(torch.zeros(2 * count, 0), torch.cat([noise, -noise]), **continuation).actions
    return sampled.mean(0)[:, 0].numpy()


def guide(jacobian, max_weight=5.0, count=1000):
    target, known = executed(count)
    return ContinuationGuide(Path("flow", "velocity"), target, known.float(), jacobian == "full", max_weight)


@pytest.mark.parametrize(
    ("jacobian", "kept", "free"),
    [
        ("full", (1.48, 1.41, 1.33), (1.36, 1.28, 1.17, 1.05, 0.95)),
        ("identity", (1.57, 1.47, 1.35), (1.24, 0.96, 0.76, 0.63, 0.53)),
    ],
)
def test_guidance_continues_a_gaussian_chunk_as_published(jacobian, kept, free):
    mean = mean_chunk(guides=[guide(jacobian)])
    np.testing.assert_allclose(mean, [*kept, *free], atol=0.015)


def test_without_guidance_nothing_is_continued_and_large_weights_overshoot():
    np.testing.assert_allclose(mean_chunk(), np.zeros(HORIZON), atol=1e-6)
    overshooting = mean_chunk(steps=50, guides=[guide("identity", max_weight=50.0)])
    assert overshooting[3] == pytest.approx(2.03, abs=0.015)


def test_a_known_prefix_gives_the_exact_conditional():
    mean = mean_chunk(steps=50, prefix=Prefix(*executed(1000)))
    np.testing.assert_allclose(mean[:3], EXECUTED, rtol=1e-6)
    np.testing.assert_allclose(mean[3:], CONDITIONAL, atol=0.03)


def test_guidance_weights_of_five_steps_are_the_published_ones():
    t = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])
    one, zero = torch.ones(5, 1, 1), torch.zeros(5, 1, 1)
    moved = ContinuationGuide(Path("flow", "velocity"), one, torch.ones(5, 1), False, 5.0)(zero, zero, t)
    np.testing.assert_allclose((moved.flatten() / t).numpy(), [5, 4.25, 2.1667, 2.1667, 4.25], rtol=1e-3)


def test_weights_fall_from_the_executed_actions_to_the_end_of_the_running_chunk():
    rest = np.zeros((3, 16, 1), np.float32)
    found = Commitment(rest, np.array([10, 0, 2]), delay=4).weights
    np.testing.assert_allclose(found[0], [1] * 4 + [0.677, 0.433, 0.256, 0.133, 0.055, 0.013] + [0] * 6, atol=1e-3)
    assert not found[1].any()  # nothing is being executed
    assert found[2].tolist() == [1] * 4 + [0] * 12  # beyond the end of the chunk, its last action is held


@pytest.mark.parametrize("head_type", [FlowHead, DiffusionHead])
def test_guidance_of_no_weight_changes_nothing(head_type):
    torch.manual_seed(0)
    head = head_type(UNet1D(8, 2, 3, width=32, depth=2), 8, 2, steps=4)
    nn.init.normal_(head.backbone.leave[-1].weight, std=0.1)
    cond, noise = torch.randn(5, 3), torch.randn(5, 8, 2)
    for full in (True, False):
        guides = [ContinuationGuide(head.path, torch.ones(5, 8, 2), torch.zeros(5, 8), full, 5.0)]
        with torch.no_grad():
            free, guided = head.sample(cond, noise).actions, head.sample(cond, noise, guides=guides).actions
        torch.testing.assert_close(guided, free, atol=1e-6, rtol=1e-6)
        assert not guided.requires_grad


class AutoregressiveNoise(nn.Module):
    """The exact noise estimate of the same chunks on the cosine schedule."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        alpha, sigma = (value[0].double() for value in Path("cosine", "epsilon").alpha_sigma(t))
        spread = alpha**2 * COVARIANCE + sigma**2 * torch.eye(HORIZON)
        return (sigma * torch.linalg.solve(spread, x[..., 0].T.double())).T.float()[..., None]


def test_guidance_continues_a_chunk_of_a_diffusion_head_too():
    head = DiffusionHead(AutoregressiveNoise(), HORIZON, 1, steps=20, clip=100.0)
    noise = torch.randn(500, HORIZON, 1, generator=torch.Generator().manual_seed(0))
    target, known = executed(1000)

    def mean(*guides):
        with torch.no_grad():
            return head.sample(torch.zeros(1000, 0), torch.cat([noise, -noise]), guides=guides).actions.mean(0)[:, 0]

    full, identity = (
        mean(ContinuationGuide(head.path, target, known.float(), one, 5.0)).numpy() for one in (True, False)
    )
    np.testing.assert_allclose(full[:3], EXECUTED, atol=0.1)
    np.testing.assert_allclose(full[3:], CONDITIONAL, atol=0.25)
    assert np.abs(identity[:3] - EXECUTED).max() < 0.15
    assert np.abs(mean().numpy()).max() < 1e-5


@pytest.mark.parametrize("head_type", [FlowHead, DiffusionHead])
def test_known_actions_do_not_count_in_the_loss_and_are_kept_while_sampling(head_type):
    torch.manual_seed(0)
    head = head_type(PrefixBackbone(ResidualMLP(8, 3, 4, width=32, depth=1), 2, 7), 8, 2, steps=4)
    known = head.draw_prefix(4000, torch.device("cpu"), torch.Generator().manual_seed(0))
    counts = known.sum(1)
    assert torch.equal(counts.unique(), torch.arange(8))  # 0 to 7, and equally often
    assert (counts == 0).float().mean().item() == pytest.approx(1 / 8, abs=0.02)
    assert (known.int().diff(dim=1) <= 0).all()
    actions = torch.randn(4000, 8, 2)
    loss = head.loss(actions, torch.zeros(4000, 4), generator=torch.Generator().manual_seed(0))
    # An untrained network predicts nothing: the loss is that of the actions that are not known, never less.
    assert loss.mean().item() == pytest.approx(2.0 if head_type is FlowHead else 1.0, abs=0.1)
    prefix = Prefix(actions[:5], known[:5])
    with torch.no_grad():
        sampled = head.sample(torch.zeros(5, 4), torch.randn(5, 8, 2), prefix=prefix).actions
    assert torch.equal(sampled[prefix.known], actions[:5][prefix.known])


def test_a_trained_prefix_is_continued():
    torch.manual_seed(0)
    head = FlowHead(PrefixBackbone(ResidualMLP(4, 2, 1, width=64, depth=2), 1, 2), 4, 1, steps=10)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for step in range(400):  # chunks are constant at +1 or at -1
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 400)
        actions = torch.where(torch.rand(256, 1, 1) < 0.5, 0.7, -0.7).expand(256, 4, 1)
        optimizer.zero_grad()
        head.loss(actions, torch.zeros(256, 1)).mean().backward()
        optimizer.step()
    running = torch.where(torch.arange(200) % 2 == 0, 0.7, -0.7)[:, None, None].expand(200, 4, 1)
    noise = torch.randn(200, 4, 1)
    with torch.no_grad():
        free = head.sample(torch.zeros(200, 1), noise).actions
        prefix = Prefix(running, torch.arange(4).expand(200, 4) < 1)
        going_on = head.sample(torch.zeros(200, 1), noise, prefix=prefix).actions
    assert (free.sign() == running.sign()).float().mean() < 0.65  # by chance
    assert (going_on.sign() == running.sign()).float().mean() > 0.97


def test_what_a_policy_cannot_continue_is_refused_with_what_it_can():
    class Plans:
        horizon, execute_steps, prefix_steps, real_time = 16, 8, 3, ("guided_identity", "prefix")

    require_real_time(Plans(), RealTimeConfig("guided", "identity", max_delay=8))
    require_real_time(object(), RealTimeConfig("off"))
    with pytest.raises(CapabilityError, match=r"guided_full.*guided_identity, prefix"):
        require_real_time(Plans(), RealTimeConfig("guided"))
    with pytest.raises(ConfigError, match=r"1\.\.8"):
        require_real_time(Plans(), RealTimeConfig("guided", "identity", max_delay=9))
    with pytest.raises(ConfigError, match=r"1\.\.3"):
        require_real_time(Plans(), RealTimeConfig("prefix", max_delay=4))
