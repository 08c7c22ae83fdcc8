"""A deployment as threads of one process: how it ends when a part of it fails, or somebody is impatient."""

import os
import signal

import pytest

from hardware.control.executor import ExecutorConfig
from hardware.deployment import in_process
from hardware.deployment.config import DeploymentConfig
from hardware.robots.fake import FakeRobot
from robot_rl.core.errors import HardwareError

SETTINGS = ExecutorConfig(realtime_priority=0, autostart=True)


def run(robot, tmp_path, serve, monkeypatch):
    monkeypatch.setattr(in_process, "serve", serve)
    config = DeploymentConfig("checkpoint", record=tmp_path / "record", out=tmp_path)
    return in_process.run_in_process(config, SETTINGS, None, robot, (), None)


@pytest.mark.timeout(60)
def test_a_policy_that_fails_ends_the_run(tmp_path, monkeypatch):
    def serve(*_, **__):
        raise RuntimeError("no such layer")

    robot = FakeRobot()
    with pytest.raises(HardwareError, match="the deployment failed: no such layer"):
        run(robot, tmp_path, serve, monkeypatch)
    assert robot.stops


def test_a_robot_that_does_not_connect_leaves_the_record_to_the_next_run(tmp_path, monkeypatch):
    robot = FakeRobot()

    def refuse():
        raise HardwareError("nobody answers")

    monkeypatch.setattr(robot, "connect", refuse)
    for _ in range(2):
        with pytest.raises(HardwareError, match="nobody answers"):
            run(robot, tmp_path, lambda *_, **__: None, monkeypatch)


@pytest.mark.timeout(60)
def test_a_second_interruption_skips_neither_the_stop_nor_the_record(tmp_path, monkeypatch):
    robot = FakeRobot()

    def serve(policy, link, stop, **_):
        while link.receive_observation(1.0) is None:
            pass
        os.kill(os.getpid(), signal.SIGINT)
        stop.wait()

    disconnect = robot.disconnect

    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        disconnect()

    monkeypatch.setattr(robot, "disconnect", interrupted)
    executed, _ = run(robot, tmp_path, serve, monkeypatch)
    assert executed["final_stop_confirmed"]
    assert executed["recording"]["failure"] is None
    assert len((tmp_path / "record" / "meta" / "runs.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "record" / ".recording").exists()
