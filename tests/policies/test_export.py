"""Exported policies: the same chunks for the same observations and noise, and refused where they are not."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from robot_rl.cli import export as command
from robot_rl.core.errors import CapabilityError, ConfigError, DataError
from robot_rl.core.policy import Policy
from robot_rl.core.realtime import Commitment, RealTimeConfig
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.normalizer import Normalizer
from robot_rl.policies.checkpoint import load_policy, read_description, save_policy
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
from robot_rl.policies.gaussian import GaussianConfig, GaussianPolicy
from robot_rl.policies.residual import ResidualPolicy, ResidualPolicyConfig
from robot_rl.policies.steered import SteeredPolicy, SteeredPolicyConfig

pytest.importorskip("onnxruntime")
export = pytest.importorskip("robot_rl.policies.export")

ACTION = ArraySpec((2,), low=(-5.0, -2.0), high=(5.0, 2.0))
SPEC = Spec({"state": ArraySpec((3,)), "goal": ArraySpec((2,))}, ACTION, 10.0)


def chunked(seed=0, **options):
    torch.manual_seed(seed)
    normalizer = Normalizer(SPEC)
    normalizer.assign("state", [0.0, 2.0, -1.0], [1.0, 0.5, 3.0])
    normalizer.assign("action", [0.5, 0.0], [4.0, 1.0])
    config = ChunkedConfig(**{"horizon": 8, "execute_steps": 4, "width": 32, "depth": 2, "sample_steps": 3} | options)
    policy = ChunkedPolicy(SPEC, config, normalizer).eval().requires_grad_(False)
    for name, values in policy.head.named_parameters():  # layers that start at zero hide differences
        if not values.any():
            nn.init.normal_(policy.head.get_parameter(name), std=0.3)
    return policy


def history(batch, seed=0):
    rng = np.random.default_rng(seed)
    return {key: rng.normal(size=(batch, 2, *one.shape)).astype(np.float32) for key, one in SPEC.observation.items()}


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A U-Net flow policy that was trained with a prefix, and its export by the command."""
    policy = chunked(backbone="unet", width=16, depth=1, prefix_steps=3)
    directory = tmp_path_factory.mktemp("export")
    save_policy(policy, directory / "checkpoint", {"task": "toy"})
    command.run(command.Config(directory / "checkpoint", directory / "flow"))
    return policy, directory / "flow"


@pytest.fixture
def copied(flow, tmp_path):
    return shutil.copytree(flow[1], tmp_path / "export")


@pytest.mark.parametrize("batch", [1, 5])
def test_the_export_plans_what_the_policy_plans(flow, batch):
    policy, directory = flow
    exported = load_policy(directory, torch.device("cpu"))
    assert isinstance(exported, Policy)
    assert (exported.obs_steps, exported.horizon, exported.execute_steps) == (2, 8, 4)
    assert exported.spec == policy.spec
    assert read_description(directory)["metadata"]["task"] == "toy"
    noise = np.random.default_rng(1).normal(size=(batch, 8, 2)).astype(np.float32)
    planned = exported.plan(history(batch), noise)
    np.testing.assert_allclose(planned, policy.plan(history(batch), noise), atol=2e-5)
    assert np.ptp(planned) > 0.5
    assert (np.abs(planned[..., 1]) <= 2.0).all()


@pytest.mark.parametrize("how", [RealTimeConfig("guided", "identity"), RealTimeConfig("prefix")])
def test_the_export_continues_a_running_chunk_as_the_policy_does(flow, how):
    policy, directory = flow
    exported = load_policy(directory)
    assert exported.real_time == ("guided_identity", "prefix")
    running = np.random.default_rng(2).uniform(-1, 1, (3, 8, 2)).astype(np.float32)
    commitment = Commitment(running, np.array([0, 3, 8]), 2, how)
    noise = np.random.default_rng(1).normal(size=(3, 8, 2)).astype(np.float32)
    planned = exported.plan(history(3), noise, commitment)
    np.testing.assert_allclose(planned, policy.plan(history(3), noise, commitment), atol=2e-5)
    free = policy.plan(history(3), noise)
    np.testing.assert_allclose(planned[0], free[0], atol=2e-5)
    assert np.abs(planned[1:] - free[1:]).max() > 0.1
    if how.method == "prefix":
        np.testing.assert_allclose(planned[1:, :2], running[1:, :2], atol=1e-5)


def test_guidance_through_the_network_is_refused_by_an_export(flow):
    commitment = Commitment(np.zeros((1, 8, 2), np.float32), np.array([8]), 2, RealTimeConfig("guided", "full"))
    with pytest.raises(CapabilityError, match=r"guided_full.*guided_identity"):
        load_policy(flow[1]).plan(history(1), commitment=commitment)


def test_its_own_noise_is_reproducible(flow):
    exported = load_policy(flow[1])
    exported.seed(3)
    first = exported.plan(history(2))
    assert not np.array_equal(exported.plan(history(2)), first)
    exported.seed(3)
    np.testing.assert_array_equal(exported.plan(history(2)), first)


def test_corrected_and_steered_diffusion_policies_are_exported_whole(tmp_path, monkeypatch):
    base = chunked(head="diffusion", backbone="plain", depth=1, width=16, head_options={"levels": 20})
    steered = SteeredPolicy(base, SteeredPolicyConfig(hidden=(16,), noise_steps=4)).eval()
    exported = export.export_policy(steered, tmp_path / "steered")
    recent, draw = history(3), torch.randn(3, steered.actor.action_size)
    with torch.no_grad():
        start = steered.steer(steered.encode(recent), draw)
    planned = exported.plan(recent, draw.numpy())
    np.testing.assert_allclose(planned, base.plan(recent, start), atol=2e-5)

    def reuse(graph, path, write=export._write):
        """The base's graph was written above already, and writing one takes seconds."""
        if path.name != "step.onnx":
            return write(graph, path)
        shutil.copy(tmp_path / "steered" / path.name, path)
        return read_description(tmp_path / "steered")["policy"]["config"]["graphs"]["step"]

    monkeypatch.setattr(export, "_write", reuse)
    policy = ResidualPolicy(base, ResidualPolicyConfig(hidden=(16,), scale=0.5)).eval()
    nn.init.normal_(policy.actor[-1].weight)
    exported = export.export_policy(policy.requires_grad_(False), tmp_path / "residual")
    assert exported.closed_loop
    corrected = policy.refine(recent, planned[:, 0])
    np.testing.assert_allclose(exported.refine(recent, planned[:, 0]), corrected, atol=2e-5)
    assert np.abs(corrected - planned[:, 0]).max() > 0.1


def test_an_export_with_other_answers_is_refused(copied):
    import safetensors.numpy

    path = copied / "parity.safetensors"
    record = safetensors.numpy.load_file(path)
    record["actions.plan"] = record["actions.plan"] + 0.02
    safetensors.numpy.save_file(record, path)
    with pytest.raises(DataError, match="does not give the recorded answers"):
        load_policy(copied)
    del record["actions.plan"], record["noise"]
    safetensors.numpy.save_file(record, path)
    with pytest.raises(DataError, match="does not fit"):
        load_policy(copied)


def test_damaged_exports_give_one_line_errors(copied):
    for name in ("step.onnx", "parity.safetensors"):
        whole = (copied / name).read_bytes()
        (copied / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=name) as caught:
            load_policy(copied)
        assert "\n" not in str(caught.value)
        (copied / name).unlink()
        with pytest.raises(DataError, match=name):
            load_policy(copied)
        (copied / name).write_bytes(whole)
    description = json.loads((copied / "policy.json").read_text())
    description["policy"]["config"]["graphs"]["../step"] = "0"
    (copied / "policy.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match="does not describe an export"):
        load_policy(copied)


def test_a_graph_that_is_no_graph_is_refused(copied):
    import hashlib

    (copied / "step.onnx").write_bytes(b"import os")
    description = json.loads((copied / "policy.json").read_text())
    description["policy"]["config"]["graphs"]["step"] = hashlib.sha256(b"import os").hexdigest()
    (copied / "policy.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match="cannot load"):
        load_policy(copied)
    with pytest.raises(ConfigError, match="available: cpu"):
        load_policy(copied, device="tpu")


def test_loading_and_running_an_export_needs_no_torch(flow):
    code = (
        "import sys, numpy as np; from robot_rl.policies.checkpoint import load_policy; "
        f"policy = load_policy({str(flow[1])!r}); "
        "policy.plan({'state': np.zeros((1, 2, 3)), 'goal': np.zeros((1, 2, 2))}); "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == ["False"]


def test_a_directory_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="choose a new or an empty directory"):
        export.export_policy(chunked(), tmp_path / "thesis")
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter.tex"]


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch):
    save_policy(chunked(), tmp_path / "best", {"first": True})

    def full(*_):
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(DataError, match=r"cannot write the checkpoint .*No space left"):
        save_policy(chunked(1), tmp_path / "best")
    assert read_description(tmp_path / "best")["metadata"] == {"first": True}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_what_cannot_be_exported_is_refused_by_name(tmp_path):
    stochastic = chunked(head="diffusion", head_options={"eta": 1.0})
    with pytest.raises(CapabilityError, match=r"'chunked'.*eta 0"):
        export.export_policy(stochastic, tmp_path / "out")
    gaussian = GaussianPolicy(SPEC, GaussianConfig(hidden=(8,), low=(-1.0, -1.0), high=(1.0, 1.0)))
    with pytest.raises(CapabilityError, match=r"'gaussian'.*residual and steered"):
        export.export_policy(gaussian, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_replaced_by_an_export_not_even_by_its_own(tmp_path):
    save_policy(chunked(), tmp_path / "policy")
    with pytest.raises(ConfigError, match="holds a checkpoint of kind 'chunked' and no export"):
        command.run(command.Config(tmp_path / "policy", tmp_path / "policy"))
    assert (tmp_path / "policy" / "model.safetensors").exists()
