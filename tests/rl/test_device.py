"""Everything that learns does so on another device as it does on the processor, as far as a pretended one can tell."""

import copy
import shutil

import numpy as np
import pytest
import torch
from pretend_device import PretendTensor, pretend_device

from robot_rl.core import registry
from robot_rl.core.errors import ConfigError
from robot_rl.data.frames import Frames
from robot_rl.data.windows import WindowSampler
from robot_rl.nets.device import device_of, find_device
from robot_rl.policies.checkpoint import load_policy
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
from robot_rl.rl.state import load_state
from robot_rl.rl.testing import HEADS, SPEC, TWO_MODES, clone, run_method
from robot_rl.train.run import Run
from robot_rl.train.trainer import TrainConfig, train

METHODS = registry.names("finetuners")


def learn(name, directory, device, steps):
    base = copy.deepcopy(clone(TWO_MODES, HEADS.get(name, "flow"))).to(device)
    few = {"options": ("core.critic_updates=20",)} if name == "residual_offpolicy" else {}
    return run_method(name, TWO_MODES, directory, steps=steps, base=base, evaluations=1, resume=True, **few)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_moves_to_another_device_learns_the_same_there(name, tmp_path):
    learn(name, tmp_path / "here", "cpu", 352)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here = learn(name, tmp_path / "here", "cpu", 480)
    with pretend_device() as device:
        there = learn(name, tmp_path / "there", device, 480)
        assert device_of(there) == device
        assert not [key for key, value in there.state_dict().items() if not isinstance(value, PretendTensor)]
        found = {key: value.cpu() for key, value in there.state_dict().items()}
    for key, value in here.state_dict().items():
        torch.testing.assert_close(found[key], value, msg=key)
    saved, moved = (load_state(tmp_path / place / "learner.safetensors")[0] for place in ("here", "there"))
    for key, value in saved.items():
        torch.testing.assert_close(moved[key], value, msg=key)


@pytest.mark.parametrize("head", ["flow", "diffusion"])
def test_imitation_learns_the_same_on_another_device_and_goes_on_there(head, tmp_path):
    rng = np.random.default_rng(0)
    state = rng.uniform(-1, 1, (60, 2)).astype(np.float32)
    frames = Frames({"state": state}, state[:, :1].copy(), np.arange(10, 61, 10), SPEC)
    shape = ChunkedConfig(head, horizon=4, execute_steps=2, sample_steps=3, width=16, depth=1, observation_noise=0.1)

    def trained(directory, device):
        torch.manual_seed(0)
        for steps in (6, 12):
            policy = ChunkedPolicy.fit(frames, shape).to(device)
            sampler = WindowSampler(frames, policy.obs_steps, policy.horizon, device=device)
            settings = TrainConfig(steps=steps, batch_size=16, checkpoint_every=3, log_every=3, precision="fp32")
            with Run.create(directory, {}, spec=SPEC, resume=True) as run:
                policy = train(policy, sampler, settings, run)
        saved = load_policy(directory / "checkpoints" / "best", device)
        saved.seed(0)
        history = {"state": state[:4, None].repeat(policy.obs_steps, 1)}
        return policy.state_dict(), saved.plan(history)

    weights, plans = trained(tmp_path / "here", "cpu")
    with pretend_device() as device:
        others, there = trained(tmp_path / "there", device)
        found = {key: value.cpu() for key, value in others.items()}
    np.testing.assert_array_equal(there, plans)
    for key, value in weights.items():
        torch.testing.assert_close(found[key], value, msg=key)


def test_the_pretended_device_refuses_what_a_gpu_refuses():
    with pretend_device() as device:
        there = torch.ones(3, device=device)
        assert device_of(torch.nn.Linear(2, 2).to(device)) == device
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device=device, generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="indices"):
            torch.ones(3)[torch.zeros(1, dtype=torch.long, device=device)]
        assert float(there.sum()) == 3.0


def test_a_device_that_is_not_there_is_refused_with_those_that_are():
    assert find_device("cpu") == torch.device("cpu")
    for name in ("cuda:9", "gpu", "meta"):
        with pytest.raises(ConfigError, match=f"no device '{name}' for networks here; there is cpu"):
            find_device(name)
