"""Human-in-the-loop learning: an actor on the executor's path and a learner in its own process.

`learn` is what ``robot-rl hil`` calls, and what other programs call:

    from hardware.hil.config import HILConfig
    from hardware.hil.session import learn

    report = learn(HILConfig(demos=Path("demos"), task="peg_insert", clock="fast", operator="scripted", minutes=20))
    report.validations[-1].success, report.policy
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from hardware.attempts import AttemptConfig, Attempts, Reporter
from hardware.control.executor import Executor, ExecutorConfig
from hardware.control.signals import interrupted_by_signals
from hardware.hil.acting import ActingPolicy
from hardware.hil.config import HILConfig, HILReport, Validation, check
from hardware.hil.experience import Episode, Experience, Sinks
from hardware.hil.learner import LearnerClient
from hardware.hil.lockstep import LockStep, SimulatedClock
from hardware.hil.operator import ScriptedOperator
from hardware.hil.validation import run_alone
from hardware.options import parse_options
from hardware.policy_process import serve
from hardware.recording.recorder import Recorder
from hardware.teleop.build import build_teleop
from hardware.transport import InProcessTransport
from robot_rl.core.errors import HardwareError
from robot_rl.core.robot import Robot
from robot_rl.core.spec import Spec
from robot_rl.core.teleop import Teleop

logger = logging.getLogger(__name__)

TRAINING_SEED, VALIDATION_SEED = 100_000, 900_000
"""First scene seeds of learning and of validation."""
PROGRESS = "actor.json"
"""File of what the actor has done so far, from which a killed run continues."""
_AHEAD = 1
"""Episodes that a simulated actor may be ahead of its learner."""
_PATIENCE = 600.0


def learn(config: HILConfig, on_episode: Callable[[HILReport, Episode], None] | None = None) -> HILReport:
    """Learn as configured and return what came of it; see the module's docstring.

    Args:
        config: what to learn.
        on_episode: called after each episode.

    Raises:
        ConfigError: settings that do not go together.
        SpecMismatchError: demonstrations or policy do not fit the robot; the differences are listed.
        HardwareError: the learner does not start, or has ended for good.
    """
    check(config)
    from robot_rl.train.run import Run

    free = ("resume", "minutes", "steps", "record", "operator", "threads", "stop_at")
    with Run.create(config.out, config, seed=config.seed, resume=config.resume, ignore=free) as run:
        return _Session(config, run, on_episode).execute()


class _Session:
    """One run under way."""

    def __init__(self, config: HILConfig, run: Any, on_episode: Callable[[HILReport, Episode], None] | None) -> None:
        self.config, self.run, self._on_episode = config, run, on_episode
        self.report = HILReport(policy=config.out / "checkpoints" / "best")
        self.simulated = config.robot == "sim"
        self.own_scene = config.reward == "task"
        self._before, self._began = 0.0, time.monotonic()
        self._validated, self._best = 0, -1.0
        self._finished: list[Episode] = []
        self._attempts: Attempts | None = None
        self._read_progress()

    # ---- budget and progress ----------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    @property
    def spent(self) -> bool:
        """Whether the budget is used up."""
        config, report = self.config, self.report
        by_steps = config.steps > 0 and report.steps >= config.steps
        by_time = config.minutes > 0 and self.seconds >= 60 * config.minutes
        good = bool(report.validations) and report.validations[-1].success >= config.stop_at
        return by_steps or by_time or good or self.learner.failure is not None

    def _read_progress(self) -> None:
        path = self.config.out / PROGRESS
        if not path.exists():
            return
        found = json.loads(path.read_text())
        self._before, self._validated, self._best = found["seconds"], found["validated"], found["best"]
        validations = [Validation(**one) for one in found["validations"]]
        for name in ("steps", "human_steps", "episodes", "takeovers", "learner_restarts"):
            setattr(self.report, name, found[name])
        self.report.validations = validations

    def _write_progress(self) -> None:
        from robot_rl.train.run import write_json

        self.report.seconds = self.seconds
        plain = {**dataclasses.asdict(self.report), "policy": str(self.report.policy)}
        write_json(self.config.out / PROGRESS, {**plain, "validated": self._validated, "best": self._best})

    # ---- life cycle -------------------------------------------------------------------------------------------------

    def execute(self) -> HILReport:
        """Run until the budget is spent."""
        config = self.config
        self.clock: Any = SimulatedClock() if config.clock == "fast" else time.monotonic
        robot = self._robot(TRAINING_SEED * (1 + config.seed % 7) + self.report.episodes, restart=self.own_scene)
        self.learner = LearnerClient(config.out / "learner")
        self._settings(robot).write(self.learner.directory)
        with ExitStack() as stack:
            stack.callback(self._close_unused, robot)
            stack.callback(self.learner.close)
            self.learner.start()
            from robot_rl.rl.learner_process import INITIAL

            initial = self.learner.directory / "checkpoints" / INITIAL
            self.acting = ActingPolicy.load(initial, self.learner, config.seed + self.report.episodes)
            recorder = None
            if config.record is not None:
                recorder = Recorder(config.record, robot.spec, task=config.task)
                stack.callback(recorder.close)
            if config.clock == "fast":
                self._run_fast(robot, recorder)
            else:
                self._run_real(robot, recorder)
            self._finish()
        if self.learner.failure is not None:
            raise HardwareError(f"the learner has ended for good: {self.learner.failure} ({self.learner.log_path})")
        return self.report

    def _robot(self, seed: int, restart: bool) -> Robot:
        from hardware.robots.build import build_robot

        config = self.config
        options: dict[str, Any] = {}
        if self.simulated:
            options = {"task": config.task, "seed": seed, "tick_rate_hz": config.executor.tick_rate_hz}
            options |= {"lock_step": config.clock == "fast", "clock": self.clock, "restart": restart}
        options |= parse_options(config.robot_options, "robot option")
        return build_robot(config.robot, options, config.robot_config)

    def _close_unused(self, robot: Any) -> None:
        if hasattr(robot, "env") and not self._connected:
            robot.env.close()

    _connected = False

    def _settings(self, robot: Robot) -> Any:
        """Return what the learner process must know."""
        from robot_rl.rl.learner_process import LearnerSettings, method_settings

        config = self.config
        options, settings = config.options, method_settings(config.method, config.options)
        if getattr(settings, "relative_to", "") and not settings.reach:
            # What the robot can reach in one step: further away nothing happens that does not happen there.
            reach = np.asarray(robot.limits.velocity, float) / robot.spec.rate_hz
            options = (*options, "reach=" + ",".join(f"{value:.6g}" for value in reach))
        return LearnerSettings(
            config.method,
            numbers_of(robot.spec).to_json(),
            str(config.demos.absolute()),
            str(config.policy.absolute()) if config.policy is not None else "",
            options,
            config.pretrain,
            seed=config.seed,
            threads=config.threads,
            device=config.device,
        )

    def _executor_config(self, policy: Any, autostart: bool) -> ExecutorConfig:
        closed = bool(policy.closed_loop)
        changes: dict[str, Any] = {"execute_steps": 1 if closed else policy.execute_steps, "autostart": autostart}
        if self.config.operator == "scripted":
            changes["status_rate_hz"] = max(self.config.executor.status_rate_hz, policy.spec.rate_hz)
        return dataclasses.replace(self.config.executor, **changes)

    def _protection(self, robot: Robot) -> Any:
        if self.config.safety is None:
            return None
        from hardware.safety.settings import protection_from

        return protection_from(self.config.safety, robot, 1.0 / self.config.executor.tick_rate_hz)

    def _parts(self, robot: Any, transport: InProcessTransport, recorder: Recorder | None) -> tuple[Any, Sinks, Any]:
        """Return the policy that is served, where steps go, and the operator's device."""
        config, policy = self.config, self.acting
        if not self.own_scene:
            kind, _, path = config.reward.partition(":")
            verifier = None
            if kind == "classifier":
                from robot_rl.policies.success import load_classifier

                verifier = load_classifier(path)
                verifier.spec.require(robot.spec, "the success classifier", "the robot")
            waits = config.wait_after_attempt and not self.simulated
            reporter = Reporter(transport.send_operator, robot.spec.action.size, self.clock, waits)
            self._attempts = Attempts(
                policy,
                AttemptConfig(-1, config.attempt_seconds),
                verifier,
                listen=reporter,
                driven=lambda: transport.status is not None and transport.status.writer != "none",
                obeyed=lambda: transport.status is not None and transport.status.writer == "policy",
                place=lambda: None if transport.status is None else np.array(transport.status.command, np.float32),
                again=True,
            )
        experience = Experience(numbers_of(robot.spec), self._ended, lambda: not self._trying)
        teleop: Teleop | None = None
        if config.operator not in ("scripted", "none"):
            teleop = build_teleop(config.operator, robot.spec.action.size, config=config.operator_config)
        elif self.simulated:
            corrects = config.operator == "scripted" and config.method != "serl"
            habits = dataclasses.replace(config.habits, corrects=config.habits.corrects and corrects)
            teleop = ScriptedOperator(
                robot, lambda: transport.status, habits, seed=config.seed + self.report.episodes, clock=self.clock
            )
        return self._attempts or policy, Sinks(experience, recorder), teleop

    # ---- running ----------------------------------------------------------------------------------------------------

    def _run_fast(self, robot: Any, recorder: Recorder | None) -> None:
        transport = InProcessTransport(quiet=True)
        policy, sinks, teleop = self._parts(robot, transport, recorder)
        settings = self._executor_config(policy, autostart=True)
        self._connected = True
        around: dict[str, Any] = {"teleop": teleop, "recorder": sinks, "protection": self._protection(robot)}
        path = LockStep(robot, policy, settings, self.clock, transport, **around)
        stop = threading.Event()
        try:
            with interrupted_by_signals(stop):
                while not stop.is_set() and not self.spent:
                    path.tick()
                    if self._finished:
                        self._take_stock()
                        if not self.learner.wait(_AHEAD, _PATIENCE):
                            raise HardwareError(f"the learner does not keep up ({self.learner.log_path})")
        finally:
            path.close()
            if recorder is not None:
                recorder.note_run(path.executor.report())

    def _run_real(self, robot: Any, recorder: Recorder | None) -> None:
        transport = InProcessTransport(quiet=True)
        policy, sinks, teleop = self._parts(robot, transport, recorder)
        settings = self._executor_config(policy, autostart=self.config.operator in ("scripted", "none"))
        around: dict[str, Any] = {"teleop": teleop, "recorder": sinks, "protection": self._protection(robot)}
        executor = Executor(robot, transport.executor, settings, **around)
        stop, policy_stop = threading.Event(), threading.Event()
        failures: list[BaseException] = []

        def guarded(work: Callable[[], Any]) -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)
                stop.set()

        threads = [
            threading.Thread(target=guarded, args=(work,), name=name, daemon=True)
            for name, work in (
                ("policy", lambda: serve(policy, transport.policy, policy_stop, seed=self.config.seed)),
                ("executor", lambda: executor.run(stop)),
            )
        ]
        with ExitStack() as stack:
            if teleop is not None:
                teleop.connect()
                stack.callback(teleop.disconnect)
            self._connected = True
            # A second Ctrl-C does not cut the braking short.
            stack.enter_context(interrupted_by_signals(stop))
            executor.connect()
            try:
                for thread in threads:
                    thread.start()
                while not stop.wait(0.1) and not self.spent:
                    self._take_stock()
            finally:
                stop.set()
                threads[1].join(5.0)
                executor.shut_down()
                if recorder is not None:
                    recorder.note_run(executor.report())
                policy_stop.set()
                threads[0].join(5.0)
        if failures:
            raise HardwareError(f"the actor failed: {failures[0]}") from failures[0]

    @property
    def _trying(self) -> bool:
        """Whether what is executed belongs to an attempt, and not to the way back from one."""
        return self._attempts is None or self._attempts.under_way

    def _ended(self, episode: Episode) -> None:
        """Take in an episode, in the control loop's thread: nothing here waits."""
        if self._attempts is not None and self._trying:
            self._attempts.judge(episode.success)  # the operator's mark: the attempt is over
        self.learner.submit(episode)
        self._finished.append(episode)

    def _take_stock(self) -> None:
        """Count, log and validate what has ended."""
        config, report = self.config, self.report
        while self._finished:
            episode = self._finished.pop(0)
            report.episodes += 1
            report.steps += episode.steps
            report.human_steps += episode.human_steps
            report.takeovers += episode.takeovers
            report.learner_restarts = self.learner.restarts
            newest = self.learner.newest
            metrics = {} if newest is None else {f"learner_{k}": v for k, v in newest[2]["metrics"].items()}
            metrics |= {"success": float(episode.success), "length": float(episode.steps)}
            metrics |= {"intervention": episode.human_steps / episode.steps, "takeovers": float(episode.takeovers)}
            self.run.log(metrics | {"seconds": self.seconds}, report.steps, "episode")
            if self._on_episode is not None:
                self._on_episode(report, episode)
            self._write_progress()
        every = config.validate_every if config.clock == "fast" else 0
        if every > 0 and report.steps >= self._validated + every:
            self._validated = report.steps // every * every
            self._validate()

    def _validate(self) -> None:
        """See how the policy does alone, and keep it if it is the best so far."""
        from robot_rl.policies.checkpoint import save_policy

        policy, count = self.acting.frozen(), self.config.validation_episodes
        options = parse_options(self.config.robot_options, "robot option")
        outcomes = run_alone(
            policy, self.config.task, self.config.executor, count, VALIDATION_SEED, options, self._protection
        )
        success = sum(outcomes) / count
        done = Validation(self.report.steps, self.seconds, success, count)
        self.report.validations.append(done)
        self.run.log({"success": success, "episodes": float(count), "seconds": done.seconds}, done.steps, "eval")
        if success >= self._best:
            self._best = success
            save_policy(policy, self.config.out / "checkpoints" / "best", {"hil": dataclasses.asdict(done)})
        self._write_progress()

    def _finish(self) -> None:
        """Keep the last policy, and count what has ended meanwhile."""
        from robot_rl.policies.checkpoint import save_policy

        self._take_stock()
        policy = self.acting.frozen()
        last = save_policy(policy, self.config.out / "checkpoints" / "last", {"hil": {"steps": self.report.steps}})
        if not self.report.validations:
            self.report.policy = last
        self._write_progress()


def numbers_of(spec: Spec) -> Spec:
    """Return ``spec`` without its images, from which nothing is learned here."""
    return spec.select(tuple(key for key, array in spec.observation.items() if not array.is_image))
