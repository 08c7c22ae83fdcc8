"""A deployment of several processes: starts policy and executor, watches them, and ends them in order."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hardware.console.server import Console
from hardware.ros.context import prepare_environment, require_ros
from hardware.transport import ExecutorStatus
from robot_rl.core.clock import Rate
from robot_rl.core.errors import HardwareError
from robot_rl.core.realtime import RealTimeConfig
from robot_rl.core.teleop import Teleop

if TYPE_CHECKING:
    from hardware.ros.link import RosOperatorLink

logger = logging.getLogger(__name__)

SUPERVISOR_VARIABLE = "ROBOT_RL_SUPERVISOR"
"""Environment variable with the process id of the supervisor: a child that finds it dead ends."""
ESCALATION = ((signal.SIGINT, 10.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))
"""Signals that end a child, each with the seconds that it has before the next one: a recording is saved meanwhile."""
EXECUTOR_REPORT, POLICY_REPORT = "executor.json", "policy.json"
"""Files in the log directory with the figures of the two processes, written at their end."""
_LOG_LINES = 12
_LAST_WORDS_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


def end_with_supervisor() -> None:
    """Have the kernel interrupt this process when its supervisor dies; does nothing for a process started by hand.

    Behind a shell or ``ros2 run`` it is the end of these that counts: the kernel knows a process's own parent only.
    Without it a supervisor that is killed would leave a policy and a robot running with nobody in charge. Linux only;
    elsewhere the executor still ends by its own watchdogs.
    """
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)
    if supervisor is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() != int(supervisor) and not Path(f"/proc/{supervisor}").exists():
        raise SystemExit("the supervisor ended before this process had started")


@dataclass
class Child:
    """One process of the deployment."""

    name: str
    """What it is called in messages: ``policy``, ``executor``."""
    process: subprocess.Popen[bytes]
    """Handle of the running or finished process."""
    log: Path
    """File that holds what it wrote to stdout and stderr."""

    def describe_end(self) -> str:
        """Return how the process ended and the end of its log, for a person."""
        code = self.process.poll()
        if code is None:
            return f"the {self.name} process (pid {self.process.pid}) is still running"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:] if self.log.exists() else []
        tail = "\n  ".join(["", *lines]) if lines else " (nothing)"
        return f"the {self.name} process (pid {self.process.pid}) {how}; end of {self.log}:{tail}"


class Supervisor:
    """Starts child processes, says which one died, and ends them in the reverse order of their start.

    It signals nothing but the processes that it started itself, each a session of its own, so that Ctrl-C in the
    terminal reaches the supervisor alone and the order of the shutdown is kept.
    """

    def __init__(self, log_directory: Path) -> None:
        """Remember where logs go; the directory is made if needed."""
        self.log_directory = Path(log_directory)
        self.log_directory.mkdir(parents=True, exist_ok=True)
        self.children: list[Child] = []

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Child:
        """Start ``command`` as the child ``name``, with its output in ``<log_directory>/<name>.log``."""
        path = self.log_directory / f"{name}.log"
        variables = {**os.environ, **(environment or {}), SUPERVISOR_VARIABLE: str(os.getpid())}
        with path.open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables, start_new_session=True
            )
        child = Child(name, process, path)
        self.children.append(child)
        logger.info("started %s (pid %d), log in %s", name, process.pid, path)
        return child

    def ended(self) -> Child | None:
        """Return a child that has ended by itself, or None while all run."""
        return next((child for child in self.children if child.process.poll() is not None), None)

    def stop(self, escalation: Sequence[tuple[signal.Signals, float]] = ESCALATION) -> None:
        """End every child that still runs, the last started first, each by the signals of ``escalation``."""
        for child in reversed(self.children):
            for number, patience in escalation:
                if child.process.poll() is not None:
                    break
                child.process.send_signal(number)
                try:
                    child.process.wait(patience)
                except subprocess.TimeoutExpired:
                    logger.warning("%s did not end within %.0f s of %s", child.name, patience, number.name)

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


@dataclass(frozen=True)
class RosDeployment:
    """What `run_ros_deployment` starts."""

    policy: str | Path
    """Directory of the policy's checkpoint or export, or the address of a policy server."""
    robot: str = "sim"
    """Name of the robot in the registry."""
    robot_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Options of the robot's factory, by name."""
    executor_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Fields of `hardware.control.executor.ExecutorConfig`, by name."""
    seconds: float = 0.0
    """How long to run after the policy first answered; 0 runs until it is interrupted."""
    record: Path | None = None
    """Data set directory that everything executed is recorded into; None records nothing."""
    instruction: str = ""
    """What the robot is doing, in words, for the recording."""
    log_directory: Path = Path("runs/deploy/logs")
    """Directory of the processes' logs and of their reports ``executor.json`` and ``policy.json``."""
    domain_id: int | None = None
    """DDS domain; None takes ``ROS_DOMAIN_ID``, or 0."""
    policy_threads: int = 1
    """Threads of the policy's inference; 1 leaves the other cores to the control loop."""
    policy_trace: bool = False
    """Run the policy's network without Python between its operations; see `hardware.policy_process.trace_network`."""
    operator_rate_hz: float = 50.0
    """How often the operator's device is read and sent (its heartbeat)."""
    robot_config: Path | None = None
    """YAML file of the robot's settings and of its cameras."""
    real_time: RealTimeConfig = field(default_factory=RealTimeConfig)
    """How a new chunk goes on from the running one."""
    safety: Path | None = None
    """Safety file, see `hardware.safety.settings`."""
    verifier: Path | None = None
    """Success classifier that judges each attempt; None makes none."""
    retries: int = 2
    """With a verifier: attempts after the first."""
    attempt_seconds: float = 20.0
    """With a verifier: how long an attempt may take."""


def run_ros_deployment(
    deployment: RosDeployment,
    devices: Sequence[Teleop] = (),
    on_status: Callable[[ExecutorStatus], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ExecutorStatus | None:
    """Run a policy on a robot as two ROS 2 processes until time or attempts are over, a process ends, or Ctrl-C.

    This process supervises: it starts the policy node and the executor node with their logs, reads ``devices``
    and sends their readings and e-stop over ROS 2, and passes each new status on. At the end it interrupts the executor
    first, which stops the robot in a controlled way and holds, and then the policy.

    Args:
        deployment: what to run.
        devices: connected operator devices; none for no operator here.
        on_status: called with every new `ExecutorStatus`, about ten times per second.
        should_stop: asked at every pass (50 Hz); True ends the deployment.

    Returns:
        The executor's last status, None if it never published one.

    Raises:
        MissingDependencyError: ROS 2 is not installed.
        HardwareError: a process died; the message names it and shows the end of its log.
    """
    require_ros("A ROS 2 deployment")
    prepare_environment(deployment.domain_id)
    from hardware.ros.endpoint import Endpoint
    from hardware.ros.link import RosOperatorLink
    from hardware.ros.watch import remote_feed

    link = RosOperatorLink(Endpoint("console", domain_id=deployment.domain_id))
    for device in devices:
        if isinstance(device, Console):
            device.watch(remote_feed(link))
    try:
        with Supervisor(deployment.log_directory) as supervisor:
            supervisor.start("policy", policy_command(deployment))
            supervisor.start("executor", executor_command(deployment))
            _watch(supervisor, link, deployment, devices, on_status, should_stop)
        return link.status
    finally:
        link.close()


def policy_command(deployment: RosDeployment) -> list[str]:
    """Return the command line of the policy process."""
    attempts = []
    if deployment.verifier is not None:
        attempts += ["--verifier", str(deployment.verifier), "--retries", str(deployment.retries)]
        attempts += ["--attempt-seconds", str(float(deployment.attempt_seconds))]
    return [
        *(sys.executable, "-m", "hardware.ros.policy_node"),
        *("--policy", str(deployment.policy)),
        *("--threads", str(deployment.policy_threads)),
        *("--report", str(deployment.log_directory / POLICY_REPORT)),
        *(["--pin"] if deployment.executor_options.get("pin") else []),
        *(["--trace"] if deployment.policy_trace else []),
        *attempts,
        *("--real-time", deployment.real_time.way),
        *("--real-time-max-delay", str(deployment.real_time.max_delay)),
        *("--real-time-max-weight", str(deployment.real_time.max_weight)),
    ]


def executor_command(deployment: RosDeployment) -> list[str]:
    """Return the command line of the executor process."""
    command = [sys.executable, "-m", "hardware.ros.executor_node", "--robot", deployment.robot]
    if deployment.robot_config is not None:
        command += ["--robot-config", str(deployment.robot_config)]
    if deployment.safety is not None:
        command += ["--safety", str(deployment.safety)]
    for flag, options in (
        ("robot-options", deployment.robot_options),
        ("executor-options", deployment.executor_options),
    ):
        for name, value in options.items():
            command += [f"--{flag}", f"{name}={value}"]
    if deployment.seconds:
        command += ["--seconds", str(float(deployment.seconds))]
    if deployment.record is not None:
        command += ["--record", str(deployment.record)]
    if deployment.instruction:
        command += ["--instruction", deployment.instruction]
    return [*command, "--report", str(deployment.log_directory / EXECUTOR_REPORT)]


def _watch(
    supervisor: Supervisor,
    link: RosOperatorLink,
    deployment: RosDeployment,
    devices: Sequence[Teleop],
    on_status: Callable[[ExecutorStatus], None] | None,
    should_stop: Callable[[], bool] | None,
) -> None:
    """Carry operator and status between console and executor until the deployment is over."""
    rate = Rate(deployment.operator_rate_hz)
    shown: ExecutorStatus | None = None
    while should_stop is None or not should_stop():
        rate.wait()
        for device in devices:
            link.send_operator(device.poll())
        if on_status is not None and link.status is not None and link.status is not shown:
            shown = link.status
            on_status(shown)
        ended = supervisor.ended()
        if ended is not None:
            # The executor ends when the time is over, a policy with a verifier after its last attempt.
            if ended.process.returncode == 0 and (ended.name == "executor" or deployment.verifier is not None):
                return
            # A dead policy is noticed by the executor's own watchdog; let it stop and say why before it is ended too.
            time.sleep(_LAST_WORDS_SECONDS)
            raise HardwareError(ended.describe_end())
