"""The whole deployment in one process: rehearsed operator, simulated robot in real time, record and report."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hardware.cli import deploy as command
from hardware.cli.deploy import shown
from hardware.control.executor import ExecutorConfig
from hardware.control.statistics import Durations
from hardware.deployment.config import DeploymentConfig, make_robot
from hardware.deployment.run import choose_transport, deploy
from hardware.teleop.script import ScriptedTeleop
from hardware.transport import ExecutorStatus
from robot_rl.core import registry
from robot_rl.core.errors import (
    ConfigError,
    MissingDependencyError,
    RobotRLError,
    SpecMismatchError,
    UnknownNameError,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch = pytest.importorskip("torch")
    from robot_rl.core.registry import make_env
    from robot_rl.data.normalizer import Normalizer
    from robot_rl.policies.checkpoint import save_policy
    from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy

    torch.manual_seed(0)
    env = make_env("navigate", 1, threads=1)
    policy = ChunkedPolicy(env.spec, ChunkedConfig(width=32, depth=1, sample_steps=1), Normalizer(env.spec))
    env.close()
    return save_policy(policy.eval(), tmp_path_factory.mktemp("policy") / "best")


# Generous ages: a machine that runs other programs beside these tests may stall any thread for a moment.
PATIENT = ExecutorConfig(realtime_priority=0, max_state_age=2.0, late_steps=8, operator_timeout=2.0)


def test_a_rehearsed_operator_in_real_time(checkpoint, tmp_path):
    from robot_rl.data.dataset import open_dataset

    report = deploy(
        DeploymentConfig(
            policy=checkpoint,
            task="navigate",
            transport="inprocess",
            duration=5.0,
            operator="script",
            record=tmp_path / "record",
            out=tmp_path / "out",
            executor=PATIENT,
        )
    )
    events = ["enable", "take over", "hand back", "emergency stop", "reset", "enable"]
    assert [event for _, event in report.events] == events
    assert "STOPPED" in [mode for _, _, mode in report.modes]
    assert report.final_stop_confirmed
    late = report.lateness["max_ms"] / 1e3
    assert 5.0 <= report.seconds <= 5.5 + 2 * late
    ticks = report.lateness["count"]
    assert report.rate_hz * (ticks + report.missed_ticks) / ticks == pytest.approx(100.0, rel=0.05)
    assert report.chunks["chunks_accepted"] > 3
    assert report.policy["inference"]["count"] > 3
    assert json.loads(report.path.read_text())["note"] == report.note != ""
    dataset = open_dataset(tmp_path / "record")
    assert dataset.num_frames == report.recording["steps"] > 20
    assert "5 s over inprocess" in report.summary()


@pytest.mark.parametrize("absent", ["rclpy", "trajectory_msgs", None])
def test_auto_takes_ros_where_all_of_it_is_installed(absent, monkeypatch):
    monkeypatch.setattr("hardware.ros.context.find_spec", lambda package: None if package == absent else object())
    if absent is None:
        assert choose_transport("auto") == choose_transport("ros") == ("ros", "")
        return
    transport, note = choose_transport("auto")
    assert transport == "inprocess"
    assert note.startswith("ROS 2 is not installed")
    with pytest.raises(MissingDependencyError, match=absent):
        choose_transport("ros")


def test_a_deployment_that_falls_back_says_so_loudly(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hardware.ros.context.find_spec", lambda package: None)
    command.run(
        command.Config(
            policy=checkpoint,
            task="navigate",
            transport="auto",
            duration=0.5,
            operator="none",
            out=tmp_path / "out",
            executor=PATIENT,
        )
    )
    report = json.loads((tmp_path / "out" / "deployment.json").read_text())
    assert report["transport"] == "inprocess"
    assert report["note"].startswith("ROS 2 is not installed: policy and executor ran in one process")
    assert report["note"] in capsys.readouterr().out.splitlines(), "a line of its own"


class Person(ScriptedTeleop):
    """Someone who presses a key on seeing the mode that it is for, and again until the mode changes."""

    PLAN = (("idle", "n"), ("auto", "w"), ("human", "b"), ("auto", " "), ("stopped", "r"), ("idle", "n"), ("auto", ""))

    def __init__(self, action_size):
        super().__init__(action_size, [])
        self.stage, self.modes = 0, []

    def see(self, status):
        self.modes.append(status.mode)
        last = len(self.PLAN) - 1
        if self.stage < last and status.mode == self.PLAN[self.stage + 1][0]:
            self.stage += 1
            if self.stage == last:
                os.kill(os.getpid(), signal.SIGINT)
        if status.mode == self.PLAN[self.stage][0]:
            os.write(self._master, self.PLAN[self.stage][1].encode())


def test_takeover_and_emergency_stop_through_keys_in_whatever_time_it_takes(checkpoint, tmp_path, monkeypatch):
    people = []
    monkeypatch.setitem(
        registry._overrides, ("teleop", "person"), lambda size: people.append(Person(size)) or people[0]
    )
    report = deploy(
        DeploymentConfig(
            policy=checkpoint,
            task="navigate",
            transport="inprocess",
            duration=100.0,
            operator="person",
            out=tmp_path / "out",
            executor=PATIENT,
        ),
        lambda status: people[0].see(status),
    )
    assert report.seconds < 100.0, "it went through its plan and asked for the end"
    changes = iter([change["mode"] for change in report.mode_changes])
    wanted = ("idle", "hold", "align", "auto", "human", "hold", "align", "auto", "stopped", "idle", "hold", "align")
    assert all(mode in changes for mode in (*wanted, "auto", "hold"))
    assert report.mode_changes[-1]["reason"] == "shutdown"
    assert "ALIGN" not in {mode for _, _, mode in report.modes}, "drawn as the policy's"
    assert set(people[0].modes) >= {"idle", "auto", "human", "stopped"}
    assert report.final_stop_confirmed


def test_the_page_alone_is_an_operator(checkpoint, tmp_path, monkeypatch):
    """What tabs do is said to the desk directly; a browser presses the buttons in test_console_browser."""
    pytest.importorskip("viser")
    import hardware.deployment.operators
    from hardware.console.server import Console, ConsoleConfig
    from hardware.robots.sim import SimRobot
    from robot_rl.core.teleop import OperatorEvent

    consoles, told = [], []

    class Tab(Console):
        def connect(self):
            super().connect()
            consoles.append(self)

    plan = [
        ("idle", lambda desk: desk.ask(OperatorEvent.ENABLE, 1)),
        ("auto", lambda desk: desk.hold(1)),
        ("human", lambda desk: desk.ask(OperatorEvent.EMERGENCY_STOP, 2)),
    ]

    def see(status):
        told.append(status)
        if plan and status.mode == plan[0][0]:
            assert plan[0][1](consoles[0].desk) == ""
        elif plan and len(plan) > 1 and status.mode == plan[1][0]:
            plan.pop(0)
        elif status.mode == "stopped":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(hardware.deployment.operators, "Console", Tab)
    monkeypatch.setitem(registry._overrides, ("robots", "arm"), lambda: SimRobot("navigate"))
    report = deploy(
        DeploymentConfig(
            policy=checkpoint,
            robot="arm",
            transport="inprocess",
            duration=100.0,
            operator="none",
            console=True,
            console_options=ConsoleConfig(port=8580),
            out=tmp_path / "out",
            executor=PATIENT,
        ),
        see,
    )
    assert report.seconds < 100.0
    assert [event for _, event in report.events][:2] == ["enable", "take over"], "nothing began by itself"
    assert report.events[-1][1] == "emergency stop"
    assert (told[-1].mode, told[-1].estop_latched) == ("stopped", True)
    assert len(told[-1].command) == len(told[-1].measured) == len(told[-1].speed) == 2
    assert consoles[0]._server is None, "closed with the deployment"


def test_a_policy_for_another_robot_is_refused_with_the_differences(checkpoint, tmp_path):
    with pytest.raises(SpecMismatchError, match="observation 'lidar' is missing"):
        deploy(DeploymentConfig(checkpoint, task="peg_insert", transport="inprocess", out=tmp_path))


def test_mistakes_in_the_settings_are_named(checkpoint, tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'sim'"):
        make_robot(DeploymentConfig(checkpoint, robot="simm"))
    with pytest.raises(RobotRLError, match="colour"):
        make_robot(DeploymentConfig(checkpoint, task="navigate", robot_options=("colour=red",)))
    with pytest.raises(ConfigError, match="name=value"):
        make_robot(DeploymentConfig(checkpoint, robot_options=("fast",)))
    odd = ExecutorConfig(tick_rate_hz=95.0)
    with pytest.raises(ConfigError, match="whole multiple"):
        deploy(DeploymentConfig(checkpoint, task="navigate", transport="inprocess", out=tmp_path, executor=odd))


def test_a_real_robot_needs_an_operator(checkpoint, tmp_path, monkeypatch):
    from hardware.robots.sim import SimRobot

    monkeypatch.setitem(registry._overrides, ("robots", "arm"), lambda: SimRobot("navigate"))
    config = DeploymentConfig(checkpoint, robot="arm", operator="none", transport="inprocess", out=tmp_path)
    with pytest.raises(ConfigError, match="'arm' needs an operator"):
        deploy(config)


def test_the_live_line_says_who_drives_and_why():
    status = ExecutorStatus("auto", "policy", "hand_back", 3, counters={"chunks_accepted": 4, "velocity_limited": 2})
    assert shown(status) == {"mode": "AUTO (hand back)", "rate": "0 Hz", "late": "0.00 ms", "safety": "2"}


def test_durations_give_percentiles_within_a_bin():
    durations = Durations()
    for k in range(1, 1001):
        durations.add(k * 1e-5)
    assert durations.percentile(50) == pytest.approx(5e-3, rel=0.07)
    assert durations.percentile(99) == pytest.approx(9.9e-3, rel=0.07)
    assert durations.maximum == 1e-2
    found = durations.to_json()
    assert sum(found["bin_counts"]) == found["count"] == 1000
    durations.add(-1.0)
    durations.add(1e9)
    assert durations.maximum == 1e9
    assert Durations().percentile(99) == 0.0


def test_importing_hardware_loads_no_torch_ros_or_simulator():
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "hardware").rglob("*.py")
        if "ros" not in path.parts
    )
    assert "hardware.control.executor" in modules
    code = (
        f"import sys, importlib\nfor name in {modules!r} + ['robot_rl.core.bridge']: importlib.import_module(name)\n"
        "heavy = {'torch', 'rclpy', 'mujoco', 'pyarrow'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ, timeout=60)


def test_a_safety_file_reaches_the_chain_and_its_mistakes_come_before_anything_starts(checkpoint, tmp_path):
    path = tmp_path / "safety.yaml"
    path.write_text("velocity: 0.05\njerk: 50.0\n")
    report = deploy(
        DeploymentConfig(
            policy=checkpoint,
            task="navigate",
            transport="inprocess",
            duration=3.0,
            operator="none",
            safety=path,
            out=tmp_path / "out",
            executor=PATIENT,
        )
    )
    assert report.safety["velocity_limited"] + report.safety.get("jerk_limited", 0) > 10
    path.write_text("velocty: 0.05\n")
    with pytest.raises(UnknownNameError, match="Did you mean 'velocity'"):
        deploy(DeploymentConfig(checkpoint, task="navigate", transport="inprocess", safety=path, out=tmp_path))
