"""The executor process: robot, arbiter, safety chain and recorder in one loop, with ROS 2 topics around it."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from hardware.control.executor import Executor, ExecutorConfig
from hardware.options import parse_options
from hardware.recording.recorder import ExecutedStep, Recorder
from hardware.robots.build import build_robot
from hardware.ros.convert import executed_names, to_executed
from hardware.ros.endpoint import Endpoint, quality
from hardware.ros.lifecycle import ManagedConfig, run_managed_node
from hardware.ros.link import RosExecutorLink
from hardware.ros.parameters import Range
from hardware.safety.protection import Protection
from hardware.safety.settings import protection_from
from robot_rl.core.errors import ConfigError, HardwareError, UnknownNameError
from robot_rl.core.robot import Robot
from robot_rl.data.bag.names import EXECUTED, ROBOT_SPEC

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExecutorNodeConfig(ManagedConfig):
    """Settings of the executor process."""

    robot: str = "sim"
    """Name of the robot in the registry."""
    robot_options: tuple[str, ...] = ()
    """Options of the robot, each ``name=value``; the simulated robot needs ``task=...``."""
    robot_config: str = ""
    """YAML file of the robot's settings and of its cameras; empty for none."""
    safety: str = ""
    """Safety file (YAML): profile, jerk, workspace, what must stay apart, singularities, forces; empty for none."""
    executor_options: tuple[str, ...] = ()
    """Settings of the executor, each ``name=value``: tick_rate_hz, execute_steps, late_steps, interpolation, ..."""
    unattended: bool = False
    """Enable the policy as soon as it answers, without an operator; for simulated robots."""
    seconds: Annotated[float, Range(0.0)] = 0.0
    """How long to run after the policy first answered; 0 runs until interrupted."""
    record: str = ""
    """Data set directory that everything executed is recorded into; empty records nothing."""
    instruction: str = ""
    """What the robot is doing, in words, for the recording."""
    report: str = ""
    """JSON file that gets the figures of the run at its end; empty for none."""


def executor_config(texts: tuple[str, ...], unattended: bool) -> ExecutorConfig:
    """Return the executor's settings of ``("name=value", …)``.

    Raises:
        UnknownNameError: no such setting; the nearest is suggested.
        ConfigError: a value of the wrong kind.
    """
    given = parse_options(texts, "option")
    known = {field.name: field for field in dataclasses.fields(ExecutorConfig)}
    for name, value in given.items():
        if name not in known:
            raise UnknownNameError("executor setting", name, known)
        kind = type(known[name].default)
        if kind is float and type(value) is int:
            given[name] = float(value)
        elif type(value) is not kind:
            raise ConfigError(f"executor setting '{name}' is {value!r}, expected a {kind.__name__}")
    if unattended:
        given["autostart"] = True
    return ExecutorConfig(**given)


def make_robot(name: str, texts: tuple[str, ...], config: str = "") -> Robot:
    """Return the registered robot ``name`` with the settings of a file and the options ``("name=value", …)``."""
    return build_robot(name, parse_options(texts, "option"), config or None)


class ExecutorWork:
    """One robot with its executor; every activation connects the robot anew and ends with a confirmed stop."""

    def __init__(self, config: ExecutorNodeConfig, endpoint: Endpoint) -> None:
        """Make the robot, not connected, and announce what it measures and takes.

        Raises:
            HardwareError: another executor runs already.
        """
        from sensor_msgs.msg import JointState

        self.config = config
        self.settings = executor_config(config.executor_options, config.unattended)
        self._robot: Robot | None = self._make()
        self.spec = self._robot.spec
        self._protection(self._robot)  # mistakes in the safety file are found before anything is opened
        self.link = RosExecutorLink(self.spec, endpoint)
        # Reliable: one message per policy step, of which none should be missing in a recording.
        self._publish_executed = endpoint.publisher(JointState, EXECUTED, quality(64))
        self._executed_names, self._executed = executed_names(self.spec), 0
        endpoint.require_alone(ROBOT_SPEC, "executor")
        self.executor: Executor | None = None

    def start(self) -> None:
        """Connect the robot; nothing moves. `HardwareError` where it does not answer."""
        robot, self._robot = self._robot or self._make(), None
        # What was pressed or planned before belongs to another time: an old "enable" must not move anything.
        while self.link.poll_chunk() is not None or self.link.poll_operator() is not None:
            pass
        self.link.poll_estop()  # a press that was released, too; one that still holds is seen again
        protection, recorder = self._protection(robot), self._recorder(robot)
        try:
            executor = Executor(robot, self.link, self.settings, recorder=recorder, protection=protection)
            executor.journal.on_step = self._tell
            executor.connect()
        except BaseException:
            if recorder is not None:
                recorder.close()
            raise
        self.executor = executor

    def run(self, stop: threading.Event) -> None:
        """Run the robot until ``stop`` is set or the time is over; it ends with a controlled stop and a hold.

        Raises:
            HardwareError: the final stop was not confirmed.
        """
        executor = self.executor
        assert executor is not None
        try:
            executor.run(stop, self.config.seconds)
        finally:
            self.close()
        if not executor.robot_confirmed_stop:
            raise HardwareError(f"the robot '{self.config.robot}' did not confirm the final stop: treat it as live")

    def close(self) -> None:
        """Stop and disconnect the robot, and finish the record."""
        executor, self.executor = self.executor, None
        if executor is None:
            return
        try:
            executor.shut_down()
        finally:
            if executor.recorder is not None:
                executor.recorder.close()
        _finish(self.config, executor, executor.robot, executor.recorder)

    def _tell(self, step: ExecutedStep) -> None:
        """Publish an executed step; that this fails is no reason to stop the robot."""
        executor = self.executor
        if executor is None:
            return
        self._executed += 1
        try:
            self._publish_executed(to_executed(step, self._executed_names, self._executed, executor.journal.episode))
        except Exception:
            if not executor.counters["executed_step_failures"]:
                logger.exception("executed steps cannot be published")
            executor.counters["executed_step_failures"] += 1

    def _make(self) -> Robot:
        return make_robot(self.config.robot, self.config.robot_options, self.config.robot_config)

    def _protection(self, robot: Robot) -> Protection | None:
        """Return what the safety file says of ``robot``."""
        if not self.config.safety:
            return None
        return protection_from(self.config.safety, robot, 1.0 / self.settings.tick_rate_hz)

    def _recorder(self, robot: Robot) -> Recorder | None:
        config = self.config
        return Recorder(config.record, robot.spec, task=config.instruction) if config.record else None


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
    return run_managed_node("executor", ExecutorNodeConfig, ExecutorWork, argv)


if __name__ == "__main__":
    sys.exit(main())
