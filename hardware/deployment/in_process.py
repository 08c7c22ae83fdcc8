"""A deployment in one process: policy and executor are threads, and attempts with a verifier are possible."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hardware.attempts import AttemptConfig, judged_attempts
from hardware.console.feed import ExecutorFeed
from hardware.console.server import Console
from hardware.control.executor import Executor, ExecutorConfig
from hardware.control.signals import interrupted_by_signals
from hardware.deployment.config import DeploymentConfig, protection
from hardware.deployment.operators import start_script
from hardware.policy_process import PolicyReport, serve
from hardware.recording.recorder import Recorder
from hardware.transport import ExecutorStatus, InProcessTransport
from robot_rl.core.errors import HardwareError
from robot_rl.core.robot import Robot
from robot_rl.core.teleop import Teleop


def run_in_process(
    config: DeploymentConfig,
    settings: ExecutorConfig,
    policy: Any,
    robot: Robot,
    devices: Sequence[Teleop],
    on_status: Callable[[ExecutorStatus], None] | None,
    verifier: Any = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run policy and executor as threads, with a ``verifier`` until its attempts are over; return what both report."""
    transport = InProcessTransport()
    stop, policy_stop = threading.Event(), threading.Event()
    served: list[PolicyReport | None] = []
    failures: list[BaseException] = []

    def guarded(work: Callable[[], PolicyReport | None]) -> None:
        try:
            served.append(work())
        except BaseException as error:
            failures.append(error)

    # To the very end: a second Ctrl-C must not skip the stop of the robot, nor the end of the record.
    with interrupted_by_signals(stop), contextlib.ExitStack() as ending:
        recorder = Recorder(config.record, robot.spec, task=config.task) if config.record else None
        if recorder is not None:
            ending.callback(recorder.close)
        executor = Executor(
            robot,
            transport.executor,
            settings,
            teleop=devices,
            recorder=recorder,
            protection=protection(config, robot),
        )
        for device in devices:
            if isinstance(device, Console):
                device.watch(ExecutorFeed(executor, transport))
        if verifier is not None:
            policy = judged_attempts(
                policy,
                verifier,
                AttemptConfig(config.retries, config.attempt_seconds),
                send=transport.send_operator,
                driven=lambda: executor.arbiter.writer == "policy",
                place=lambda: executor.safety.command.copy(),
                over=stop.set,
            )
        how = {"seed": config.seed, "pin": settings.pin, "real_time": config.real_time}
        answer = partial(serve, policy, transport.policy, policy_stop, **how)
        inference = threading.Thread(target=guarded, args=(answer,), name="policy")
        loop = threading.Thread(target=guarded, args=(lambda: executor.run(stop, config.duration),), name="executor")
        executor.connect()
        try:
            inference.start()
            loop.start()
            _watch(loop, failures, executor, transport, devices, on_status)
        finally:
            stop.set()
            loop.join(5.0)
            policy_stop.set()
            executor.shut_down()
            inference.join(5.0)
    if failures:
        raise HardwareError(f"the deployment failed: {failures[0]}") from failures[0]
    report = executor.report()
    report["recording"] = None if recorder is None else recorder.to_json()
    report["episode_success"] = [bool(outcome) for outcome in getattr(robot, "outcomes", [])]
    done = next((one for one in served if one is not None), PolicyReport())
    return report, done.to_json()


def _watch(
    loop: threading.Thread,
    failures: Sequence[BaseException],
    executor: Executor,
    transport: InProcessTransport,
    devices: Sequence[Teleop],
    on_status: Callable[[ExecutorStatus], None] | None,
) -> None:
    """Pass statuses on while the loop runs and nothing failed; the script's clock starts with the policy's answer."""
    shown = None
    while loop.is_alive() and not failures:
        loop.join(0.05)
        if executor.ready.is_set():
            start_script(devices)
        if on_status is not None and transport.status is not shown:
            shown = transport.status
            if shown is not None:
                on_status(shown)
