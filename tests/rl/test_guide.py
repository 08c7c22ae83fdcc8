"""Critics of finished runs, asked about raw observations and actions, say what they said in their own run."""

import numpy as np
import pytest
import torch

from robot_rl.cli import guide as command
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.policies.best_of import BestOfConfig, guide
from robot_rl.policies.checkpoint import load_policy, save_policy
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
from robot_rl.policies.gaussian import GaussianConfig, GaussianPolicy
from robot_rl.policies.steered import SteeredPolicyConfig
from robot_rl.rl.guide import _of_gaussian, load_critic
from robot_rl.rl.methods import dsrl, qchunk, rlpd
from robot_rl.rl.off_policy.core import OffPolicyConfig
from robot_rl.rl.session import SessionConfig
from robot_rl.rl.state import load_state
from robot_rl.rl.testing import TWO_MODES, clone, run_method
from robot_rl.rollout.evaluate import evaluate
from robot_rl.train.run import Run

CORE = OffPolicyConfig(
    hidden=(32, 32), batch_size=64, start_steps=300, updates_per_step=0.3, critic_learning_rate=3e-3, precision="fp32",
    entropy_backup=False, initial_temperature=0.02, discount=0.5,
)  # fmt: skip


def make(reach_env):
    return lambda num_envs=1: reach_env(num_envs, hold=True, radius=0.12, limit=6)


def finetuned(module, config, path, base, env_factory, steps):
    with Run.create(path, {"method": config}, spec=base.spec) as run:
        module.finetune(base, env_factory, config, run, session=SessionConfig(steps=steps, evaluations=1))
    return path


def scaled(base, scale):
    """Give a base other statistics than the identity."""
    for name, buffer in base.normalizer.named_buffers():
        buffer.fill_(scale if name.endswith("scale") else 0.1)
    return base


def test_a_base_is_guided_by_the_critic_of_a_policy_learned_from_nothing(tmp_path, reach_env, fake_base):
    """RLPD's critic: other units, other history; the guided base is far better than the base."""
    base = fake_base(make(reach_env)().spec, offset=0.11, noise_gain=0.2, hold=True, execute_steps=1)
    config = rlpd.RLPDConfig(lanes=16, hidden=(32, 32), core=CORE)
    path = finetuned(rlpd, config, tmp_path / "rlpd", base, make(reach_env), 2500)
    critic = load_critic(path)
    env = make(reach_env)(50)
    before = evaluate(base, env, 200).success_rate
    after = evaluate(guide(base, critic, BestOfConfig(candidates=16)), env, 200).success_rate
    assert after > before + 0.2


def test_a_base_is_guided_by_the_critic_of_an_expo_run(tmp_path):
    """The critic comes without the edits: what is planned is the base's own, chosen by the values of the run."""
    options = ("candidates=4", "edits=2", "backup_candidates=2", "critics=2", "tau=0.05")
    run_method("expo", TWO_MODES, tmp_path / "expo", steps=600, options=options, evaluations=1)
    base, env = clone(TWO_MODES), TWO_MODES.env(num_envs=100)
    critic, tensors = load_critic(tmp_path / "expo"), load_state(tmp_path / "expo" / "learner.safetensors")[0]
    for name, value in critic.net.state_dict().items():
        assert torch.equal(value, tensors[f"target.net.{name}"]), f"{name}: the run chose by its target critic"
    guided = guide(base, critic, BestOfConfig(candidates=16))
    history = {"state": np.zeros((20, 1, 2), np.float32)}
    drawn = guided.draw(history, 16, torch.Generator().manual_seed(0))
    value = critic(critic.state(guided.tensors(history)), critic.action(drawn)).mean(0)
    chosen = guided.choose(history, torch.Generator().manual_seed(0)).chunks
    assert torch.equal(chosen, drawn[torch.arange(20), value.argmax(-1)])
    assert evaluate(base, env, 200).success_rate < 0.75
    assert evaluate(guided, env, 200).success_rate > 0.9


def test_values_are_those_of_the_run(tmp_path, reach_env):
    torch.manual_seed(0)
    shape = ChunkedConfig(obs_steps=2, horizon=8, execute_steps=2, width=16, depth=1, sample_steps=2)
    base = scaled(ChunkedPolicy(reach_env().spec, shape), 2.0)
    history = {"state": np.random.default_rng(0).normal(size=(30, 2, 4)).astype(np.float32)}
    chunks = torch.rand(30, 3, 8, 2) * 2 - 1
    configs = {
        "rlpd": (rlpd, rlpd.RLPDConfig(lanes=4, horizon=2, obs_steps=2, hidden=(16,), core=CORE)),
        "na": (
            dsrl,
            dsrl.DSRLConfig("na", lanes=4, core=CORE, steering=SteeredPolicyConfig(noise_steps=1, hidden=(16,))),
        ),
    }
    for name, (module, config) in configs.items():
        path = finetuned(module, config, tmp_path / name, base, reach_env, 400)
        critic = load_critic(path)
        tensors, _ = load_state(path / "learner.safetensors")
        policy = load_policy(path / "checkpoints" / "best")
        if name == "rlpd":
            state = policy.features({k: torch.from_numpy(v) for k, v in history.items()})
            action = torch.stack([policy.squash(chunks[:, i, :2]) for i in range(3)], 1)
        else:
            state = policy.encode(history)
            action = base.normalize_action(chunks[:, :, :2]).flatten(2)
        x = torch.cat([state[:, None].expand(-1, 3, -1), action], -1).flatten(0, 1)
        for i in range(2):
            x = x @ tensors[f"critic.net.weights.{i}"] + tensors[f"critic.net.biases.{i}"]
            x = torch.nn.functional.layer_norm(x, x.shape[-1:])
            x = (x * tensors[f"critic.net.gains.{i}"] + tensors[f"critic.net.shifts.{i}"]).relu()
        expected = (x @ tensors["critic.net.weights.2"] + tensors["critic.net.biases.2"]).view(2, 30, 3)
        got = critic(critic.state({k: torch.from_numpy(v) for k, v in history.items()}), critic.action(chunks))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_command_and_what_has_no_critic(tmp_path, reach_env, fake_base):
    base = fake_base(reach_env().spec, noise_gain=0.3)
    save_policy(base, tmp_path / "base")
    config = qchunk.QChunkConfig(lanes=4, core=CORE, choice=BestOfConfig(candidates=4))
    path = finetuned(qchunk, config, tmp_path / "run", base, reach_env, 400)
    for source in (path, path / "checkpoints" / "best"):
        command.run(command.Config(tmp_path / "base", source, tmp_path / "guided", candidates=5))
    guided = load_policy(tmp_path / "guided")
    assert (guided.kind, guided.config.candidates, guided.config.prior) == ("best_of", 5, False)
    guided.plan({"state": np.zeros((3, 2, 4), np.float32)})
    with pytest.raises(CapabilityError, match="holds no critic"):
        load_critic(tmp_path / "base")
    plain = dsrl.DSRLConfig(lanes=4, core=CORE, steering=SteeredPolicyConfig(noise_steps=1, hidden=(16,)))
    path = finetuned(dsrl, plain, tmp_path / "plain", base, reach_env, 40)
    with pytest.raises(
        CapabilityError, match=r"no critic of actions; methods that do: qchunk, expo, rlpd, dsrl with variant=na"
    ):
        load_critic(path)


def test_what_is_read_is_never_replaced(tmp_path):
    for out in ("policy", "run"):
        with pytest.raises(ConfigError, match="would be replaced"):
            command.Config(tmp_path / "policy", tmp_path / "run", out=tmp_path / "x" / ".." / out)


def test_a_critic_of_offsets_guides_nothing(reach_env):
    shape = GaussianConfig(hidden=(8,), low=(-0.1, -0.1), high=(0.1, 0.1), relative_to="state[0:2]")
    with pytest.raises(CapabilityError, match=r"values offsets from state\[0:2\]"):
        _of_gaussian(GaussianPolicy(reach_env(1).spec, shape), {})
