"""The executor's work between two activations."""

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")

from hardware.robots.fake import FakeRobot
from hardware.ros.endpoint import Endpoint
from hardware.ros.executor_node import ExecutorNodeConfig, ExecutorWork
from robot_rl.core.errors import HardwareError

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures("ros_domain")]


def test_an_activation_that_failed_leaves_the_record_to_the_next(tmp_path, monkeypatch):
    def refuse(robot):
        raise HardwareError("nobody answers")

    endpoint = Endpoint("executor")
    try:
        work = ExecutorWork(ExecutorNodeConfig(robot="fake", record=str(tmp_path / "record")), endpoint)
        with monkeypatch.context() as broken:
            broken.setattr(FakeRobot, "connect", refuse)
            with pytest.raises(HardwareError, match="nobody answers"):
                work.start()
        work.start()
        work.close()
    finally:
        endpoint.close()
