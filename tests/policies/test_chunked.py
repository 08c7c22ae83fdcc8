import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from robot_rl.core.errors import CapabilityError, ConfigError, DataError, UnknownNameError
from robot_rl.core.policy import Policy
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames
from robot_rl.data.windows import WindowSampler
from robot_rl.policies.checkpoint import load_policy, save_policy
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy

SPEC = Spec({"state": ArraySpec((3,))}, ArraySpec((2,), low=(-5, -5), high=(5, 5)), 10.0)
SMALL = ChunkedConfig(width=32, depth=1, horizon=8, execute_steps=4, sample_steps=4)


@pytest.fixture
def frames():
    rng = np.random.default_rng(0)
    state = rng.normal(size=(100, 3)).astype(np.float32) * [1, 10, 100]
    return Frames({"state": state.astype(np.float32)}, state[:, :2].astype(np.float32), np.array([60, 100]), SPEC)


def test_plans_are_policies_and_reproducible(frames):
    policy = ChunkedPolicy.fit(frames, SMALL).eval()
    assert isinstance(policy, Policy)
    history = {"state": np.zeros((3, 2, 3), np.float32)}
    policy.seed(1)
    first = policy.plan(history)
    assert first.shape == (3, 8, 2)
    assert first.dtype == np.float32
    assert not np.array_equal(first, policy.plan(history))
    policy.seed(1)
    assert np.array_equal(first, policy.plan(history))


def test_latent_noise_is_an_explicit_argument(frames):
    policy = ChunkedPolicy.fit(frames, SMALL).eval()
    history = {"state": np.zeros((1, 2, 3), np.float32)}
    noise = torch.randn(1, 8, 2)
    assert np.array_equal(policy.plan(history, noise), policy.plan(history, noise))


@pytest.mark.parametrize("head", ["flow", "diffusion"])
def test_a_copy_with_fewer_sample_steps_keeps_the_weights_and_says_so_in_its_checkpoint(frames, tmp_path, head):
    policy = ChunkedPolicy.fit(frames, replace(SMALL, head=head)).eval()
    with torch.no_grad():  # an untrained velocity is zero, which as many steps of lead to the same
        for weight in policy.head.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    quick, history = policy.with_sample_steps(2), {"state": np.ones((2, 2, 3), np.float32)}
    noise = torch.randn(2, 8, 2)
    assert policy.config.sample_steps == 4
    assert not np.array_equal(policy.plan(history, noise), quick.plan(history, noise))
    assert all(torch.equal(one, other) for one, other in zip(policy.parameters(), quick.parameters(), strict=True))
    loaded = load_policy(save_policy(quick, tmp_path / "quick"))
    assert np.array_equal(quick.plan(history, noise), loaded.plan(history, noise))


def test_actions_stay_inside_the_bounds(frames):
    policy = ChunkedPolicy.fit(frames, SMALL)
    assert policy.unnormalize_action(torch.full((1, 1, 2), 1e6)).max() == 5


def test_checkpoint_round_trip_is_bit_exact(frames, tmp_path):
    policy = ChunkedPolicy.fit(frames, SMALL).eval()
    save_policy(policy, tmp_path / "best", {"task": "toy"})
    loaded = load_policy(tmp_path / "best")
    history = {"state": np.ones((2, 2, 3), np.float32)}
    noise = torch.randn(2, 8, 2)
    assert np.array_equal(policy.plan(history, noise), loaded.plan(history, noise))
    assert loaded.spec == policy.spec
    save_policy(loaded, tmp_path / "best")  # replacing an existing checkpoint


def test_damaged_checkpoints_give_one_line_errors(frames, tmp_path):
    path = save_policy(ChunkedPolicy.fit(frames, SMALL), tmp_path / "best")
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_policy(path)
    weights.write_bytes(whole)
    description = json.loads((path / "policy.json").read_text())
    description["policy"]["config"]["width"] = 64
    (path / "policy.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match="do not fit"):
        load_policy(path)
    description["policy"]["config"]["head"] = "flwo"
    (path / "policy.json").write_text(json.dumps(description))
    with pytest.raises(UnknownNameError, match="Did you mean 'flow'"):
        load_policy(path)
    (path / "policy.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        load_policy(path)
    with pytest.raises(DataError, match=str(path)):
        load_policy(tmp_path)  # names the checkpoint below


def test_unusable_configurations_are_refused(frames):
    with pytest.raises(ConfigError, match="execute_steps"):
        ChunkedPolicy(SPEC, ChunkedConfig(horizon=4, execute_steps=8))
    images = Spec({"images.front": ArraySpec((8, 8, 3), "uint8")}, SPEC.action, 10.0)
    with pytest.raises(CapabilityError, match=r"images\.front"):
        ChunkedPolicy(images, SMALL)


@pytest.mark.parametrize("head", ["flow", "diffusion"])
@pytest.mark.parametrize("backbone", ["mlp", "unet"])
def test_every_combination_overfits_one_batch(frames, head, backbone):
    torch.manual_seed(0)
    width, steps, tolerance = {"mlp": (128, 1000, 0.02), "unet": (32, 500, 0.15)}[backbone]
    policy = ChunkedPolicy.fit(
        frames, ChunkedConfig(head=head, backbone=backbone, width=width, depth=2, horizon=8, execute_steps=4)
    )
    batch = WindowSampler(frames, 2, 8).batch(torch.arange(4).repeat(8))
    target = policy.normalize_action(batch["action"])
    optimizer = torch.optim.Adam(policy.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        policy.loss(batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        sampled = policy.sample(policy.encode(batch["observation"]), torch.randn(target.shape))
    assert (sampled - target).abs().mean() < tolerance
