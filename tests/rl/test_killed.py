"""Fine-tuning that is killed, as a process of its own, goes on where its saved state is."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from robot_rl.cli.main import main
from robot_rl.core import registry
from robot_rl.policies.checkpoint import load_policy
from robot_rl.rl.state import load_state
from robot_rl.rl.testing import OffsetEnv
from robot_rl.train.run import read_metrics

torch.set_num_threads(1)

PROGRAM = """
import sys
from robot_rl.cli.main import main
from robot_rl.core.registry import register
from robot_rl.rl.testing import OffsetEnv
register("tasks", "offset", OffsetEnv)
sys.exit(main())
"""
SETTINGS = {
    "ppo": ("lanes=4", "rollout_steps=8", "policy.hidden=8", "value_hidden=8", "epochs=1"),
    "rlpd": ("lanes=4", "block=8", "hidden=8", "core.hidden=8", "start_steps=32", "batch_size=8", "critics=2"),
}
"""An iteration is 32 steps, and learns from the first one on."""


@pytest.mark.parametrize("method", SETTINGS)
def test_a_killed_run_goes_on_where_its_state_was_saved(method, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command = ["finetune", "--task", "offset", "--method", method, "--out", str(out), "--threads", "1"]
    command += ["--evaluations", "1", "--eval-episodes", "4", "--options", *SETTINGS[method]]
    endless = [sys.executable, "-c", PROGRAM, *command, "--steps", "100000000"]
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            # It saves at once and then every minute, so that there are soon rows of what was not saved.
            deadline = time.monotonic() + 60
            while not (out / "learner.safetensors").exists() or len(read_metrics(out, "finetune")) < 3:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    before, logged = load_state(out / "learner.safetensors")[1], read_metrics(out)
    assert before["steps"] < logged[-1]["step"]

    monkeypatch.setitem(registry._overrides, ("tasks", "offset"), OffsetEnv)
    steps = int(before["steps"]) + 128
    assert main([*command, "--steps", str(steps), "--resume"]) in (0, None)
    rows = read_metrics(out, "finetune")
    saved = [row for row in logged if row["step"] <= before["steps"]]
    assert read_metrics(out)[: len(saved)] == saved
    assert [row["step"] for row in rows] == list(range(32, steps + 1, 32))
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    after = load_state(out / "learner.safetensors")[1]
    counter = "iterations" if method == "ppo" else "updates"
    assert after[counter] > before[counter] > 0
    assert after["steps"] == steps
    assert [row["step"] for row in read_metrics(out, "eval")] == [0, steps]
    load_policy(out / "checkpoints" / "best")
