"""The demo, end to end: interrupted, continued, reused, and what it leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from robot_rl.cli import demo
from robot_rl.cli.demo import QUICK, Config, Paths, Settings

COMMAND = [str(Path(sys.executable).parent / "robot-rl"), "demo", "--quick", "--out", "demo"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ROS_DOMAIN_ID": "93"}


def whole(test):
    """Mark a test of the one demo that all of them share; the runner keeps the tests of a file on one worker."""
    return pytest.mark.slow(pytest.mark.ros(test))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the quick demo once, with an interrupt while it trains; returns its directory and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    first = subprocess.Popen(
        COMMAND, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in first.stdout:
        if line.startswith("[2/7]"):
            break
    time.sleep(1.0)
    first.send_signal(signal.SIGINT)
    _, error = first.communicate(timeout=60)
    second = subprocess.run(COMMAND, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert second.returncode == 0, second.stdout + second.stderr
    return folder, first.returncode, error, second.stdout


@whole
def test_an_interrupt_says_how_to_continue_and_loses_nothing(finished):
    _, status, error, printed = finished
    assert status == 130
    assert error.splitlines()[-1].endswith("Continue with: robot-rl demo --out demo --quick")
    assert "Traceback" not in error
    assert "[1/7] Collect demonstrations: kept from before" in printed
    assert "[2/7] Train a flow policy, continued" in printed


@whole
def test_a_second_run_reuses_everything(finished):
    folder, *_ = finished
    before = (folder / "demo" / "report.html").stat().st_mtime
    again = subprocess.run(COMMAND, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert again.stdout.count("kept from before") == 7
    assert (folder / "demo" / "report.html").stat().st_mtime == before
    assert again.stdout.splitlines()[-1] == "Report: demo/report.html"


@whole
def test_what_it_leaves_is_complete(finished):
    from robot_rl.data.dataset import open_dataset
    from robot_rl.policies.checkpoint import load_policy

    folder, *_ = finished
    paths = Paths(folder / "demo")
    assert open_dataset(paths.demonstrations).num_episodes == QUICK.demonstrations
    base, tuned = (load_policy(run / "checkpoints" / "best") for run in (paths.base, paths.tuned))
    assert tuned.base is not None
    assert base.spec.differences(tuned.spec) == []
    before, after = (json.loads(paths.evaluation(when).read_text()) for when in ("before", "after"))
    assert before["per_episode"]["seed"] == after["per_episode"]["seed"] == list(range(1_000_000, 1_000_008))
    page = paths.report.read_text()
    assert page.count("data:video/mp4;base64,") == 3
    assert not re.search(r'(?:src|href)="(?!data:)', page)


@whole
def test_the_deployment_had_a_takeover_and_a_stop_that_latched(finished):
    from robot_rl.data.dataset import open_dataset

    folder, *_ = finished
    paths = Paths(folder / "demo")
    facts = json.loads((paths.deployment / "deployment.json").read_text())
    if pytest.importorskip("rclpy"):
        assert facts["transport"] == "ros"
    changes = [(change["mode"], change["reason"]) for change in facts["mode_changes"]]
    modes = [mode for mode, _ in changes]
    assert "human" in modes
    stop = changes.index(("stopped", "emergency_stop"))
    assert changes[stop + 1] == ("idle", "reset"), "only a reset unlatches"
    assert changes[stop + 2] == ("hold", "enabled"), "and nothing moves before it is enabled"
    assert "auto" in modes[stop + 2 :]
    assert facts["final_stop_confirmed"]
    recorded = open_dataset(paths.deployment / "recording").load(keys=()).extras["actor"]
    assert {0, 1} <= set(np.unique(recorded)), "policy and human are both in the recording"


def test_changed_sizes_change_the_stages_that_depend_on_them(tmp_path):
    def settings_of(settings):
        return {stage.name: stage.settings for stage in demo._Demo(Config(tmp_path), settings).stages()}

    first, second = settings_of(Settings()), settings_of(Settings(finetune_minutes=1.0))
    assert {name for name in first if first[name] != second[name]} == {"finetune"}
    other = demo._Demo(Config(tmp_path, seed=1), Settings()).stages()
    assert {stage.name for stage in other if stage.settings != first[stage.name]} == {"collect", "train", "finetune"}


def test_the_hint_repeats_the_options():
    assert demo.resume_hint(Config(Path("a b"), quick=True, seed=2)).endswith(
        "robot-rl demo --out 'a b' --quick --seed 2"
    )
