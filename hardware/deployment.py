"""Runs a policy on a robot: builds both sides, lets them run, and reports what happened.

`deploy` is what ``robot-rl deploy`` calls, and what other programs call:

    from hardware.deployment import DeploymentConfig, deploy

    report = deploy(DeploymentConfig(
        policy=Path("runs/demo/finetuned/checkpoints/best"), task="peg_insert", transport="auto", duration=20.0,
        operator="script", record=Path("runs/demo/recording"), out=Path("runs/demo/deployment")))
    report.lateness["p99_ms"], report.safety, report.modes, report.to_json()

``operator="script"`` plays `hardware.teleop.script.DEMONSTRATION` through the real keyboard path, squeezed or stretched
to the duration: one takeover by key presses and one emergency stop with reset and enable. ``script:<file>`` plays
another one. The report is also in ``<out>/deployment.json``, and the processes' logs are in ``<out>/logs``.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from hardware.attempts import Attempt, AttemptConfig, Attempts, Reporter
from hardware.console.feed import ExecutorFeed
from hardware.console.server import Console, ConsoleConfig
from hardware.deployment_report import DeploymentReport, make_report
from hardware.executor import Executor, ExecutorConfig, ticks_per_step
from hardware.policy_process import PolicyReport, serve, trace_network
from hardware.recorder import Recorder
from hardware.robots.build import build_robot
from hardware.safety.protection import Protection
from hardware.teleop.build import build_teleop
from hardware.teleop.keyboard import KeyboardTeleop, key_map
from hardware.teleop.script import ScriptedTeleop, load_script
from hardware.transport import ExecutorStatus, InProcessTransport
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.realtime import RealTimeConfig, require_real_time
from robot_rl.core.robot import Robot
from robot_rl.core.spec import Spec
from robot_rl.core.teleop import Teleop

logger = logging.getLogger(__name__)

TRACE = "trace.npz"
"""File of a simulated robot's commands, from which it is filmed."""
SIMULATED = ("sim", "fake")
"""Robots that may run without anybody watching."""
_LAST_WORDS = 0.2
"""Seconds from the last verdict to the end, in which the executor takes it in."""
StatusListener = Callable[[ExecutorStatus], None]


@dataclass(frozen=True)
class DeploymentConfig:
    """Settings of ``robot-rl deploy``."""

    policy: str | Path
    """Checkpoint or export directory, for example runs/train/checkpoints/best, or a policy server (ws://host:port)."""
    robot: str = "sim"
    """Robot by name (`robot-rl list robots`)."""
    task: str = "peg_insert"
    """Task that the simulated robot is in (`robot-rl list tasks`)."""
    robot_config: Path | None = None
    """YAML file of the robot's settings and of its cameras; see docs/robots.md."""
    robot_options: tuple[str, ...] = ()
    """Further settings of the robot, each name=value; they win over the file's."""
    transport: Literal["auto", "ros", "inprocess"] = "auto"
    """How policy and executor talk: ros runs them as two ROS 2 processes, inprocess as threads of this one; auto takes
    ros where it is installed."""
    duration: float = 0.0
    """Seconds to run after the policy first answered; 0 runs until Ctrl-C."""
    operator: str = "keyboard"
    """Who watches: keyboard (this terminal), script (a rehearsed operator), script:FILE, another device by name:FILE
    with its settings (leader:leader.yaml), or none (with --console the page alone; without, the robot starts by itself:
    simulation only)."""
    console: bool = False
    """Open a page for browsers as one more operator device: stop, takeover, recording, cameras; see docs/console.md."""
    console_options: ConsoleConfig = field(default_factory=ConsoleConfig)
    """Where the page is, and what dragging the end effector stands on."""
    record: Path | None = None
    """Data set directory that everything executed is recorded into."""
    video: Path | None = None
    """Film of a simulated robot, an .mp4 file: rendered afterwards, bordered in the colour of who was in control."""
    out: Path = Path("runs/deploy")
    """Directory of deployment.json and the logs."""
    seed: int = 2_000_000
    """Seed of the simulated robot's first scene."""
    policy_threads: int = 1
    """Processor threads of the policy's inference; 1 leaves the others to the control loop."""
    policy_trace: bool = False
    """Run the policy's network without Python between its operations: the same numbers, about a quarter sooner."""
    domain_id: int | None = None
    """ROS 2 domain; by default ROS_DOMAIN_ID, or 0."""
    safety: Path | None = None
    """Safety file (YAML): profile, jerk, workspace, what must stay apart, singularities, forces; see docs/deployment.md
    and launch/params/safety_peg.yaml. Without it the robot's own limits and all watchdogs hold."""
    verifier: Path | None = None
    """Success classifier (robot-rl reward train) that judges each attempt; a success ends the run. Without ROS 2 only.
    In simulation add --robot-options restart=false, so that the scene stays for the next attempt."""
    retries: int = 2
    """With a verifier: attempts after the first, each after going back the way the robot came."""
    attempt_seconds: float = 20.0
    """With a verifier: an attempt that has not succeeded by then has failed."""
    real_time: RealTimeConfig = field(default_factory=RealTimeConfig)
    """How a new chunk goes on from the one that is executed while it is planned."""
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    """The control loop; execute_steps is taken from the policy."""


def deploy(config: DeploymentConfig, on_status: StatusListener | None = None) -> DeploymentReport:
    """Run a policy on a robot and return what happened; see the module's docstring.

    Args:
        config: what to run.
        on_status: called about ten times per second with the executor's status, in another thread.

    Raises:
        SpecMismatchError: the policy does not fit the robot; the message lists the differences.
        MissingDependencyError: transport ``ros`` was asked for and is not installed.
        HardwareError: a process died, or the robot or the operator's device does not work.
    """
    if config.verifier is not None and config.real_time.method != "off":
        raise ConfigError("attempts with a verifier run in closed loop and continue no chunk: --real-time.method off")
    transport, note = choose_transport(config.transport if config.verifier is None else _without_ros(config.transport))
    policy = _load(config)
    robot = make_robot(config)
    policy.spec.require(robot.spec, f"policy '{config.policy}'", f"robot '{config.robot}' ({config.task})")
    ticks_per_step(config.executor.tick_rate_hz, robot.spec.rate_hz)
    _protection(config, robot)
    require_real_time(policy, config.real_time)
    closed = bool(policy.closed_loop) or config.verifier is not None
    delay = 0 if config.real_time.method == "off" else config.real_time.max_delay
    settings = dataclasses.replace(
        config.executor,
        late_steps=max(config.executor.late_steps, delay),
        execute_steps=1 if closed else policy.execute_steps,
        autostart=config.executor.autostart or (config.operator == "none" and not config.console),
    )
    config.out.mkdir(parents=True, exist_ok=True)
    with _operator(config, robot.spec) as teleop, _console(config, robot.spec) as console:
        devices = [device for device in (teleop, console) if device is not None]
        if transport == "ros":
            _close(robot)
            if hasattr(policy, "close"):
                policy.close()  # the policy process connects by itself
            del policy, robot
            executed, served = _over_ros(config, settings, devices, on_status)
        else:
            executed, served = _in_process(config, settings, policy, robot, devices, on_status)
    report = make_report(executed, served, transport, note, config.out / "deployment.json")
    report.path.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    if config.video is not None:
        from hardware.film import film

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


def _without_ros(wanted: str) -> str:
    if wanted == "ros":
        raise ConfigError("attempts with a verifier run without ROS 2: --transport inprocess")
    return "inprocess"


def _protection(config: DeploymentConfig, robot: Robot) -> Protection | None:
    """Return what the safety file says of the robot; its mistakes are found before anything is started."""
    if config.safety is None:
        return None
    from hardware.safety.settings import protection_from

    return protection_from(config.safety, robot, 1.0 / config.executor.tick_rate_hz)


def make_robot(config: DeploymentConfig) -> Robot:
    """Build the robot, not connected; raises `RobotRLError` for a setting that it does not know."""
    return build_robot(config.robot, _robot_options(config), config.robot_config)


def _robot_options(config: DeploymentConfig) -> dict[str, Any]:
    """Return the robot's options by name; values become numbers and booleans where they read as such."""
    found: dict[str, Any] = {}
    if config.video is not None and config.robot != "sim":
        raise ConfigError(f"--video films the simulated robot 'sim', not '{config.robot}'")
    if config.robot == "sim":
        found = {"task": config.task, "seed": config.seed, "tick_rate_hz": config.executor.tick_rate_hz}
        if config.video is not None:
            found["trace"] = str(config.out / TRACE)
    for text in config.robot_options:
        name, mark, value = text.partition("=")
        if not mark or not name:
            raise ConfigError(f"robot option '{text}' is not of the form name=value")
        try:
            found[name] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _load(config: DeploymentConfig) -> Any:
    from robot_rl.policies.checkpoint import load_policy

    policy = load_policy(config.policy, threads=config.policy_threads)
    if config.policy_trace:
        trace_network(policy)
    return policy


def _close(robot: Any) -> None:
    """Release what a robot holds that was never connected."""
    environment = getattr(robot, "env", None)
    if environment is not None:
        environment.close()


@contextmanager
def _operator(config: DeploymentConfig, spec: Spec) -> Iterator[Teleop | None]:
    """Connect the operator's device; its terminal is restored whatever happens."""
    kind, _, script = config.operator.partition(":")
    teleop: Teleop
    if kind == "none" and config.console:
        yield None
        return
    if kind == "none":
        if config.robot not in SIMULATED:
            raise ConfigError(f"the robot '{config.robot}' needs an operator; 'none' is for {', '.join(SIMULATED)}")
        logger.warning("NO OPERATOR: the robot starts by itself, and nobody can take over")
        yield None
        return
    if kind == "keyboard":
        teleop = KeyboardTeleop(spec.action.size)
        logger.info("%s", key_map(spec.action.size, spec.action.names))
    elif kind == "script":
        teleop = ScriptedTeleop(
            spec.action.size, load_script(script or "demonstration", spec.action.size, config.duration)
        )
    else:
        teleop = build_teleop(kind, spec.action.size, config=script or None)
    teleop.connect()
    try:
        yield teleop
    finally:
        teleop.disconnect()


@contextmanager
def _console(config: DeploymentConfig, spec: Spec) -> Iterator[Console | None]:
    """Open the page, if one is wanted."""
    if not config.console:
        yield None
        return
    with Console(spec, config.console_options) as console:
        yield console


def _start_script(devices: Sequence[Teleop]) -> None:
    for device in devices:
        if isinstance(device, ScriptedTeleop):
            device.start()


def _in_process(
    config: DeploymentConfig,
    settings: ExecutorConfig,
    policy: Any,
    robot: Robot,
    devices: Sequence[Teleop],
    on_status: StatusListener | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run policy and executor as threads; return what both report."""
    transport = InProcessTransport()
    recorder = Recorder(config.record, robot.spec, task=config.task) if config.record else None
    protection = _protection(config, robot)
    executor = Executor(robot, transport.executor, settings, teleop=devices, recorder=recorder, protection=protection)
    for device in devices:
        if isinstance(device, Console):
            device.watch(ExecutorFeed(executor, transport))
    stop, policy_stop, served = threading.Event(), threading.Event(), []
    attempts = None
    if config.verifier is not None:
        policy = attempts = _attempts(config, policy, robot, transport, executor, stop)
    failures: list[BaseException] = []

    def guarded(work: Callable[[], PolicyReport | None]) -> None:
        try:
            served.append(work())
        except BaseException as error:
            failures.append(error)

    inference = threading.Thread(
        target=guarded,
        args=(
            lambda: serve(
                policy, transport.policy, policy_stop, seed=config.seed, pin=settings.pin, real_time=config.real_time
            ),
        ),
        name="policy",
    )
    loop = threading.Thread(target=guarded, args=(lambda: executor.run(stop, config.duration),), name="executor")
    executor.connect()
    try:
        with interrupted_by_signals(stop):
            inference.start()
            loop.start()
            _watch(loop, executor, transport, devices, on_status)
    finally:
        stop.set()
        loop.join(5.0)
        executor.shut_down()
        policy_stop.set()
        inference.join(5.0)
        if recorder is not None:
            recorder.close()
    if failures:
        raise HardwareError(f"the deployment failed: {failures[0]}") from failures[0]
    report = executor.report()
    report["recording"] = None if recorder is None else recorder.to_json()
    report["episode_success"] = [bool(outcome) for outcome in getattr(robot, "outcomes", [])]
    report["attempts"] = [] if attempts is None else [dataclasses.asdict(one) for one in attempts.attempts]
    done = next((one for one in served if one is not None), PolicyReport())
    return report, done.to_json()


def _attempts(
    config: DeploymentConfig,
    policy: Any,
    robot: Robot,
    transport: InProcessTransport,
    executor: Executor,
    stop: threading.Event,
) -> Attempts:
    """Let the policy make attempts until the verifier is content, or there are no retries left, which ends the run."""
    from robot_rl.policies.success import load_classifier

    assert config.verifier is not None
    verifier = load_classifier(config.verifier)
    verifier.spec.require(robot.spec, f"classifier '{config.verifier}'", f"robot '{config.robot}' ({config.task})")
    tell = Reporter(transport.send_operator, robot.spec.action.size)

    def listen(what: str, attempt: Attempt | None) -> None:
        tell(what, attempt)
        if what == "finished":
            threading.Timer(_LAST_WORDS, stop.set).start()

    return Attempts(
        policy,
        AttemptConfig(config.retries, config.attempt_seconds),
        verifier,
        listen=listen,
        driven=lambda: executor.arbiter.writer == "policy",
        place=lambda: executor.safety.command.copy(),
    )


def _watch(
    loop: threading.Thread,
    executor: Executor,
    transport: InProcessTransport,
    devices: Sequence[Teleop],
    on_status: StatusListener | None,
) -> None:
    """Pass statuses on while the loop runs; the script's clock starts when the policy has answered."""
    shown = None
    while loop.is_alive():
        loop.join(0.05)
        if executor.ready.is_set():
            _start_script(devices)
        if on_status is not None and transport.status is not shown:
            shown = transport.status
            if shown is not None:
                on_status(shown)


@contextmanager
def interrupted_by_signals(stop: threading.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM set ``stop`` while the block runs, so that the robot brakes and holds before the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _over_ros(
    config: DeploymentConfig, settings: ExecutorConfig, devices: Sequence[Teleop], on_status: StatusListener | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Run policy and executor as ROS 2 processes; return what both report."""
    from hardware.ros.processes import EXECUTOR_REPORT, POLICY_REPORT, RosDeployment, run_ros_deployment

    logs = config.out / "logs"
    for name in (EXECUTOR_REPORT, POLICY_REPORT):
        (logs / name).unlink(missing_ok=True)

    def listen(status: ExecutorStatus) -> None:
        if status.counters.get("chunks_received"):
            _start_script(devices)
        if on_status is not None:
            on_status(status)

    deployment = RosDeployment(
        policy=config.policy,
        robot=config.robot,
        robot_options=_robot_options(config),
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
