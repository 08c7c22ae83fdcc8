"""The executor process: robot, arbiter, safety chain and recorder in one loop, with ROS 2 topics around it."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardware.executor import Executor, ExecutorConfig
from hardware.recorder import Recorder
from hardware.ros.endpoint import Endpoint
from hardware.ros.link import ROBOT_SPEC, RosExecutorLink
from hardware.ros.node import options, run_node
from robot_rl.core.errors import ConfigError, HardwareError, UnknownNameError
from robot_rl.core.registry import load
from robot_rl.core.robot import Robot

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExecutorNodeConfig:
    """Settings of the executor process."""

    robot: str = "sim"
    """Name of the robot in the registry."""
    robot_options: tuple[str, ...] = ()
    """Options of the robot, each ``name=value``; the simulated robot needs ``task=...``."""
    executor_options: tuple[str, ...] = ()
    """Settings of the executor, each ``name=value``: tick_rate_hz, execute_steps, late_steps, interpolation, ..."""
    autostart: bool = False
    """Enable the policy as soon as it answers, without an operator; for simulated robots."""
    seconds: float = 0.0
    """How long to run after the policy first answered; 0 runs until interrupted."""
    record: str = ""
    """Data set directory that everything executed is recorded into; empty records nothing."""
    instruction: str = ""
    """What the robot is doing, in words, for the recording."""
    report: str = ""
    """JSON file that gets the figures of the run at its end; empty for none."""


def executor_config(texts: tuple[str, ...], autostart: bool) -> ExecutorConfig:
    """Return the executor's settings of ``("name=value", …)``.

    Raises:
        UnknownNameError: no such setting; the nearest is suggested.
        ConfigError: a value of the wrong kind.
    """
    given = options(texts)
    known = {field.name: field for field in dataclasses.fields(ExecutorConfig)}
    for name, value in given.items():
        if name not in known:
            raise UnknownNameError("executor setting", name, known)
        kind = type(known[name].default)
        if kind is float and type(value) is int:
            given[name] = float(value)
        elif type(value) is not kind:
            raise ConfigError(f"executor setting '{name}' is {value!r}, expected a {kind.__name__}")
    if autostart:
        given["autostart"] = True
    return ExecutorConfig(**given)


def make_robot(name: str, texts: tuple[str, ...]) -> Robot:
    """Return the registered robot ``name``, built with the options ``("name=value", …)``."""
    factory = load("robots", name)
    try:
        return factory(**options(texts))
    except TypeError as error:
        if "argument" in str(error):
            raise ConfigError(f"robot '{name}': {error}; give it as --robot-options name=value") from error
        raise


def run(config: ExecutorNodeConfig, endpoint: Endpoint, stop: threading.Event) -> None:
    """Run the robot until ``stop`` is set or the time is over; it ends with a controlled stop and a hold.

    Raises:
        HardwareError: the robot does not connect, another executor runs already, or the final stop was not confirmed.
    """
    settings = executor_config(config.executor_options, config.autostart)
    robot = make_robot(config.robot, config.robot_options)
    link = RosExecutorLink(robot.spec, endpoint)
    endpoint.require_alone(ROBOT_SPEC, "executor")
    recorder = Recorder(config.record, robot.spec, task=config.instruction) if config.record else None
    executor = Executor(robot, link, settings, recorder=recorder)
    executor.connect()
    try:
        executor.run(stop, config.seconds)
    finally:
        executor.shut_down()
        if recorder is not None:
            recorder.close()
        _finish(config, executor, robot, recorder)
    if not executor.robot_confirmed_stop:
        raise HardwareError(f"the robot '{config.robot}' did not confirm the final stop: treat it as live")


def _finish(config: ExecutorNodeConfig, executor: Executor, robot: Robot, recorder: Recorder | None) -> None:
    """Log what happened, and write the report if one was asked for."""
    report: dict[str, Any] = executor.report()
    if recorder is not None:
        report["recording"] = recorder.to_json()
    outcomes = getattr(robot, "outcomes", None)
    if outcomes is not None:
        report["episode_success"] = [bool(outcome) for outcome in outcomes]
    logger.info(
        "%d ticks, %d missed, lateness %s, chunks %s, safety %s",
        *(report["ticks"], report["missed_ticks"], executor.lateness.summary("lateness")),
        *(report["chunks"], report["safety"]),
    )
    if config.report:
        path = Path(config.report)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the executor process and return its exit code."""
    return run_node("executor", ExecutorNodeConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
