"""Two processes that learn one policy: their updates are those of one process with both batches."""

import dataclasses
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from robot_rl.rl.on_policy.decisions import Rollout
from robot_rl.train import distributed
from robot_rl.train.run import read_metrics

WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What two processes have left, in a directory."""
    for _ in range(5):
        out = tmp_path_factory.mktemp("two")
        codes, said = run_two(out)
        if codes == [0, 0]:
            return out
        if "EADDRINUSE" not in said and "address already in use" not in said.lower():
            break  # else somebody took the port before the first process did
    raise AssertionError(f"exit codes {codes}\n{said}")


def run_two(out):
    """Run two processes that leave their results in ``out``; returns their exit codes and what they said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(out)],
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = processes
    try:
        said = first.communicate(timeout=240)[0]
        if first.returncode:
            second.kill()  # it would wait for the first one
        said += second.communicate(timeout=240)[0]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def together(first: Rollout, second: Rollout) -> Rollout:
    """Put the lanes of two roll-outs side by side."""
    lanes = first.reward.shape[1]
    joined = {"trace": {k: torch.cat([first.trace[k], second.trace[k]], 1) for k in first.trace}}
    for field in dataclasses.fields(Rollout):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if field.name == "final":
            joined["final"] = [*one, *((slots, index + lanes, inputs) for slots, index, inputs in other)]
        elif field.name == "carried_score":
            assert one is None
            assert other is None
        elif field.name != "trace":
            joined[field.name] = torch.cat([one, other], 0 if field.name in ("last", "last_input") else 1)
    return Rollout(**joined)


def test_an_update_of_two_is_that_of_one_with_both_batches(left, worker):
    learners = [worker.make_learner(0), worker.make_learner(1)]
    with torch.no_grad():  # the second process starts from the first one's weights
        for mine, theirs in zip(learners[1].actor.parameters(), learners[0].actor.parameters(), strict=True):
            mine.copy_(theirs)
    rollouts = [learner.collect() for learner in learners]
    assert all(rollout.truncated.any() for rollout in rollouts)
    whole = worker.make_learner(0, lanes=2 * worker.LANES)
    counts = [learner.reward_scale.moments for learner in learners]
    total = counts[0][0] + counts[1][0]
    mean = sum(c[0] * c[1] for c in counts) / total
    whole.reward_scale.moments = np.array([total, mean, sum(c[2] + c[0] * (c[1] - mean) ** 2 for c in counts)])
    before = [p.detach().clone() for p in whole.actor.parameters()]
    whole.update(together(*rollouts), 0.0)
    expected = worker.weights(whole)
    learners[0].update(rollouts[0], 0.0)
    alone = worker.weights(learners[0])
    found = [load_file(left / f"update_{rank}.safetensors") for rank in range(2)]
    for name, values in expected.items():
        torch.testing.assert_close(found[0][name], values, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(found[1][name], found[0][name], rtol=0, atol=0)
    moved = max((expected[f"actor.{i}"] - p).abs().max().item() for i, p in enumerate(before))
    apart = max((alone[name] - values).abs().max().item() for name, values in expected.items())
    assert moved > 1e-4
    assert apart > 1e-4, "one batch alone leads elsewhere"


def test_sums_over_processes_are_those_over_all_elements(left):
    every = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 10.0, 20.0])
    for rank in range(2):
        facts = json.loads((left / f"facts_{rank}.json").read_text())
        assert facts["moments"] == pytest.approx([every.mean().item(), every.std().item()])
        assert facts["pooled"] == pytest.approx([7, every.mean().item(), (every - every.mean()).square().sum().item()])
        assert facts["gradient"] == pytest.approx([(1 + 3 * 4) / 4, (2 - 3 * 4) / 4])
        assert facts["mean"] == pytest.approx(0.75)
        assert facts["broadcast"] == [[0.0, 0.0], [0]]
        assert facts["from_first"] == 7.0
        assert "only on-policy methods" in facts["refused"]


def test_the_first_process_decides_and_saves_for_both(left, worker):
    per_iteration = 2 * worker.LANES * worker.CONFIG.rollout_steps
    for rank in range(2):
        facts = json.loads((left / f"facts_{rank}.json").read_text())
        assert facts["steps"] == [4 * per_iteration, 6 * per_iteration], "both lanes count, and a resumed run goes on"
    first, second = (load_file(left / f"session_{rank}.safetensors") for rank in range(2))
    for name, values in first.items():
        torch.testing.assert_close(second[name], values, rtol=0, atol=0)
    assert (left / "run" / "checkpoints" / "best" / "policy.json").exists()
    assert [row["step"] for row in read_metrics(left / "run", "finetune")] == [per_iteration * k for k in range(1, 7)]
    other = left / "run" / "ranks" / "1"
    assert other.exists()
    assert not (other / "checkpoints").exists()
    assert not read_metrics(other)


def test_a_process_that_is_alone_computes_as_ever(tmp_path):
    values = torch.tensor([1.0, 2.0, 4.0])
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([3.0])
    distributed.all_reduce_gradients([parameter], weight=5)
    assert (distributed.start(), distributed.world()) == (0, 1)
    assert parameter.grad.item() == 3.0
    assert distributed.mean(2.0, 7.0) == distributed.from_first(2.0) == 2.0
    assert distributed.moments(values)[1] == values.std()
    assert distributed.directory(tmp_path) == distributed.first_directory(tmp_path) == tmp_path
