"""A policy on a servo arm with a camera, from a file of settings to the report: the same road as in simulation."""

import time

import numpy as np
import pytest
from driver_benches import ServoBench

from hardware.control.executor import ExecutorConfig
from hardware.deployment.config import DeploymentConfig
from hardware.deployment.run import deploy
from hardware.robots.build import build_robot
from hardware.robots.servo_arm import SO101
from hardware.servo.family import FEETECH


@pytest.fixture
def settings(tmp_path):
    cv2 = pytest.importorskip("cv2")
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter.fourcc(*"MJPG"), 30, (64, 48))
    for k in range(30):
        writer.write(np.full((48, 64, 3), 8 * k, np.uint8))
    writer.release()
    bench = ServoBench(tmp_path, FEETECH, SO101)
    path = tmp_path / "so101.yaml"
    path.write_text(
        f"port: {bench.bus.port}\ncalibration: {bench.path}\nrate_hz: 20\n"
        f"cameras:\n  front: {{kind: opencv, source: {film}, width: 64, height: 48}}\n"
    )
    yield bench, path
    bench.close()


def test_a_policy_drives_an_arm_over_its_bus_and_everything_is_recorded(settings, tmp_path):
    torch = pytest.importorskip("torch")
    from robot_rl.data.dataset import open_dataset
    from robot_rl.data.normalizer import Normalizer
    from robot_rl.policies.checkpoint import save_policy
    from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy

    bench, path = settings
    torch.manual_seed(0)
    spec = build_robot("so101", config=path).spec.select(("state",))
    policy = ChunkedPolicy(spec, ChunkedConfig(width=32, depth=1, sample_steps=1), Normalizer(spec))
    checkpoint = save_policy(policy.eval(), tmp_path / "policy")

    script = tmp_path / "keys.txt"
    script.write_text("0.1 n\n")
    report = deploy(
        DeploymentConfig(
            policy=checkpoint,
            robot="so101",
            robot_config=path,
            task="wave",
            transport="inprocess",
            duration=2.0,
            operator=f"script:{script}",
            record=tmp_path / "record",
            out=tmp_path / "out",
            # Generous ages: a machine that runs other programs beside these tests may stall any thread for a moment.
            executor=ExecutorConfig(
                realtime_priority=0, max_state_age=1.0, max_camera_age=2.0, late_steps=8, tracking_seconds=2.0
            ),
        )
    )
    assert report.final_stop_confirmed
    assert "AUTO" in [mode for _, _, mode in report.modes], report.mode_changes
    moved = [abs(servo.reading - 2048) for servo in bench.bus.servos.values()]
    assert max(moved) > 20, "the arm was moved over the bus"
    assert all(servo.get("torque") for servo in bench.bus.servos.values()), "it is held at the end, and does not fall"
    dataset = open_dataset(tmp_path / "record")
    assert {"state", "images.front"} <= set(dataset.spec.observation)
    assert dataset.num_frames == report.recording["steps"] > 10
    begun = time.monotonic()
    bench.robot.connect()  # the port was let go
    assert time.monotonic() - begun < 5.0
