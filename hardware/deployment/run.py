"""Runs a policy on a robot: builds both sides, lets them run, and reports what happened.

`deploy` is what ``robot-rl deploy`` calls, and what other programs call:

    from hardware.deployment.config import DeploymentConfig
    from hardware.deployment.run import deploy

    report = deploy(DeploymentConfig(
        policy=Path("runs/demo/finetuned/checkpoints/best"), task="peg_insert", transport="auto", duration=20.0,
        operator="script", record=Path("runs/demo/recording"), out=Path("runs/demo/deployment")))
    report.lateness["p99_ms"], report.safety, report.modes, report.to_json()

``operator="script"`` plays `hardware.teleop.script.DEMONSTRATION` through the real keyboard path, squeezed or stretched
to the duration: one takeover by key presses and one emergency stop with reset and enable. ``script:<file>`` plays
another one. The report is also in ``<out>/deployment.json``, and the processes' logs are in ``<out>/logs``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from hardware.control.executor import ticks_per_step
from hardware.deployment.config import TRACE, DeploymentConfig, make_robot, protection
from hardware.deployment.in_process import run_in_process
from hardware.deployment.operators import connected_operator, opened_console
from hardware.deployment.over_ros import run_over_ros
from hardware.deployment.report import DeploymentReport, make_report
from hardware.policy_process import trace_network
from hardware.transport import ExecutorStatus
from robot_rl.core.errors import ConfigError
from robot_rl.core.realtime import require_real_time


def deploy(config: DeploymentConfig, on_status: Callable[[ExecutorStatus], None] | None = None) -> DeploymentReport:
    """Run a policy on a robot and return what happened; see the module's docstring.

    Args:
        config: what to run.
        on_status: called about ten times per second with the executor's status, in another thread.

    Raises:
        SpecMismatchError: the policy does not fit the robot; the message lists the differences.
        MissingDependencyError: transport ``ros`` was asked for and is not installed.
        DataError: nothing can be written where the report or the film is to be.
        HardwareError: a process died, or the robot or the operator's device does not work.
    """
    from robot_rl.train.run import make_directories

    make_directories(config.out, *([config.video.parent] if config.video is not None else []))
    if config.verifier is not None and config.real_time.method != "off":
        raise ConfigError("attempts with a verifier run in closed loop and continue no chunk: --real-time.method off")
    transport, note = choose_transport(config.transport)
    policy = _load(config)
    robot = make_robot(config)
    policy.spec.require(robot.spec, f"policy '{config.policy}'", f"robot '{config.robot}' ({config.task})")
    ticks_per_step(config.executor.tick_rate_hz, robot.spec.rate_hz)
    protection(config, robot)
    verifier = None if config.verifier is None else _load_verifier(config, robot)
    require_real_time(policy, config.real_time)
    closed = bool(policy.closed_loop) or config.verifier is not None
    delay = 0 if config.real_time.method == "off" else config.real_time.max_delay
    status_rate = config.executor.status_rate_hz
    settings = dataclasses.replace(
        config.executor,
        # Attempts of another process learn from the status where the robot was led.
        status_rate_hz=status_rate if verifier is None else max(status_rate, robot.spec.rate_hz),
        late_steps=max(config.executor.late_steps, delay),
        execute_steps=1 if closed else policy.execute_steps,
        autostart=config.executor.autostart or (config.operator == "none" and not config.console),
    )
    with connected_operator(config, robot.spec) as teleop, opened_console(config, robot.spec) as console:
        devices = [device for device in (teleop, console) if device is not None]
        if transport == "ros":
            _close(robot)
            if hasattr(policy, "close"):
                policy.close()  # the policy process connects by itself
            del policy, robot
            executed, served = run_over_ros(config, settings, devices, on_status)
        else:
            executed, served = run_in_process(config, settings, policy, robot, devices, on_status, verifier)
    report = make_report(executed, served, transport, note, config.out / "deployment.json")
    report.path.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    if config.video is not None:
        from hardware.deployment.film import film

        film(config.out / TRACE, config.video, config.record)
    return report


def choose_transport(wanted: str) -> tuple[str, str]:
    """Return the transport to use and, where it is not ROS 2, the sentence that says so."""
    from hardware.ros.context import available, require_ros

    if wanted == "ros":
        require_ros("The ROS 2 transport")
        return "ros", ""
    if wanted == "auto" and available():
        return "ros", ""
    if wanted == "auto":
        return "inprocess", "ROS 2 is not installed: policy and executor ran in one process, and nothing was published."
    return "inprocess", "As asked for, policy and executor ran in one process, without ROS 2."


def _load(config: DeploymentConfig) -> Any:
    from robot_rl.policies.checkpoint import load_policy

    policy = load_policy(config.policy, threads=config.policy_threads)
    if config.policy_trace:
        trace_network(policy)
    return policy


def _load_verifier(config: DeploymentConfig, robot: Any) -> Any:
    from robot_rl.policies.success import load_classifier

    assert config.verifier is not None
    verifier = load_classifier(config.verifier)
    verifier.spec.require(robot.spec, f"classifier '{config.verifier}'", f"robot '{config.robot}' ({config.task})")
    return verifier


def _close(robot: Any) -> None:
    """Release what a robot holds that was never connected."""
    environment = getattr(robot, "env", None)
    if environment is not None:
        environment.close()
