"""A deployment as two ROS 2 processes; this one watches them and holds the operator's devices."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hardware.control.executor import ExecutorConfig
from hardware.control.signals import interrupted_by_signals
from hardware.deployment.config import DeploymentConfig, robot_options
from hardware.deployment.operators import start_script
from hardware.transport import ExecutorStatus
from robot_rl.core.errors import HardwareError
from robot_rl.core.teleop import Teleop

logger = logging.getLogger(__name__)


def run_over_ros(
    config: DeploymentConfig,
    settings: ExecutorConfig,
    devices: Sequence[Teleop],
    on_status: Callable[[ExecutorStatus], None] | None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Run policy and executor as ROS 2 processes; return what both report."""
    from hardware.ros.processes import EXECUTOR_REPORT, POLICY_REPORT, RosDeployment, run_ros_deployment

    logs = config.out / "logs"
    for name in (EXECUTOR_REPORT, POLICY_REPORT):
        (logs / name).unlink(missing_ok=True)

    def listen(status: ExecutorStatus) -> None:
        if status.counters.get("chunks_received"):
            start_script(devices)
        if on_status is not None:
            on_status(status)

    deployment = RosDeployment(
        policy=config.policy,
        robot=config.robot,
        robot_options=robot_options(config),
        robot_config=config.robot_config,
        safety=config.safety,
        executor_options=dataclasses.asdict(settings),
        seconds=config.duration,
        record=config.record,
        instruction=config.task,
        log_directory=logs,
        domain_id=config.domain_id,
        policy_threads=config.policy_threads,
        policy_trace=config.policy_trace,
        real_time=config.real_time,
        verifier=config.verifier,
        retries=config.retries,
        attempt_seconds=config.attempt_seconds,
    )
    stop = threading.Event()
    with interrupted_by_signals(stop):
        run_ros_deployment(deployment, devices, listen, stop.is_set)
    executed, served = _read(logs / EXECUTOR_REPORT), _read(logs / POLICY_REPORT)
    if executed is None:
        raise HardwareError(f"the executor left no report in {logs}; see executor.log there")
    return executed, served


def _read(path: Path, patience: float = 2.0) -> dict[str, Any] | None:
    """Return a process's JSON report, waiting a little for it; None if there is none."""
    deadline = time.monotonic() + patience
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        logger.warning("no report %s: %s", path, error)
        return None
    return found
