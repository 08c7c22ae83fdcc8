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

PATIENT = """
import sys
from functools import partial
from types import SimpleNamespace
from hardware.cli import deploy
from hardware.control.executor import ExecutorConfig
from robot_rl.cli.main import main
from robot_rl.core.registry import register
patient = ExecutorConfig(realtime_priority=0, max_state_age=2.0, late_steps=8, operator_timeout=2.0)
config = partial(deploy.Config, executor=patient)
register("commands", "deploy", SimpleNamespace(Config=config, deploy_shown=deploy.deploy_shown))
sys.exit(main())
"""
"""``robot-rl`` that deploys with generous ages: a machine that runs other programs may stall any process for a moment,
and what is held then is not handed back to the policy."""
COMMAND = [sys.executable, "-c", PATIENT, "demo", "--quick", "--out", "demo"]


def whole(test):
    """Mark a test of the one demo that all of them share; the runner keeps the tests of a file on one worker."""
    return pytest.mark.slow(pytest.mark.ros(pytest.mark.timeout(900)(test)))


@pytest.fixture(scope="module")
def environment(new_domain):
    return os.environ | {"OMP_NUM_THREADS": "1", "ROS_DOMAIN_ID": str(new_domain())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment):
    """Run the quick demo once, with an interrupt while it trains; returns its directory and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    with subprocess.Popen(
        COMMAND, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as first:
        try:
            # At its first checkpoint, after 25 of 150 steps: it has something to go on from, and far to go.
            saved = Paths(folder / "demo").base / "checkpoints" / "trainer" / "state.safetensors"
            while not saved.exists():
                assert first.poll() is None, first.communicate()
                time.sleep(0.002)
            first.send_signal(signal.SIGINT)
            _, error = first.communicate(timeout=120)
        finally:
            first.kill()
    second = subprocess.run(COMMAND, cwd=folder, env=environment, capture_output=True, text=True, timeout=480)
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
def test_a_second_run_reuses_everything(finished, environment):
    folder, *_ = finished
    before = (folder / "demo" / "report.html").stat().st_mtime
    again = subprocess.run(COMMAND, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
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
    for histogram in ("Lateness of control ticks", "Observation to the plan made from it"):
        chart = page.split(f"<h3>{histogram}</h3>")[1].split("</figure>")[0]
        assert chart.count('<rect class="bar"') > 1
    facts = json.loads((paths.deployment / "deployment.json").read_text())
    assert facts["safety"]["emergency_stop"] > 0
    for name, count in facts["safety"].items():
        assert f"<tr><td>{name.replace('_', ' ')}</td><td>{count}</td></tr>" in page


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
