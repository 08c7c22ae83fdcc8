"""The executor: the one loop that writes commands to a robot, and the last word on every one of them.

Each tick, at absolute deadlines: observe the robot; read operator and emergency stop; let the arbiter decide who
writes; at the start of a policy step send the observation and take in the chunks that came back; ask the writer for a
command; pass it through the safety chain; send it. Safety sits here, in the same thread as the last writer.

Between two ticks it waits for the next, or for a chunk: one that arrives then may replace the present tick's command at
once (`Executor.replace_command`) instead of waiting up to a tick. Only while the policy drives, only on a robot that
takes a second command, at most once per tick; ticks, steps and what is played in them are the same with and without.

With a lock-step link and a virtual clock, `Executor.tick` is called by a test instead of `Executor.run`, and plays
exactly the actions that evaluation plays.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hardware.control.arbiter import DRIVEN, Arbiter, ArbiterConfig, Mode
from hardware.control.journal import RunTimes, StepJournal, report_of, status_of
from hardware.control.lease import RobotLease, resource_of
from hardware.control.loop import ControlLoop
from hardware.control.operator import OperatorInbox
from hardware.control.playback import Playback
from hardware.control.port import RobotPort
from hardware.control.settings import ExecutorConfig, rate_elements, stop_kind, ticks_per_step, tolerances
from hardware.control.statistics import Durations
from hardware.control.targets import Targets
from hardware.recording.recorder import Recorder
from hardware.safety.chain import SafetyChain, Situation, Verdict
from hardware.safety.flags import HOLDING_FAULTS, STOPPING_FAULTS, SafetyFlag, cause_of
from hardware.safety.protection import Protection
from hardware.transport import ExecutorLink, ExecutorStatus
from robot_rl.core.robot import Robot, RobotState, StampedObservation, StopKind
from robot_rl.core.teleop import OperatorEvent, Teleop

logger = logging.getLogger(__name__)

__all__ = ["Executor", "ExecutorConfig", "ticks_per_step"]


class Executor:
    """Runs one robot. Call `connect`, then `run` (or `tick` in lock-step), then `shut_down`."""

    def __init__(
        self,
        robot: Robot,
        link: ExecutorLink,
        config: ExecutorConfig | None = None,
        *,
        teleop: Teleop | Sequence[Teleop] | None = None,
        recorder: Recorder | None = None,
        protection: Protection | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up the loop; nothing moves and nothing is opened yet.

        Args:
            robot: what is commanded; its spec's rate is the policy's.
            link: the executor's end of a transport.
            config: settings.
            teleop: connected local operator device, or several.
            recorder: where executed steps go.
            protection: what the safety chain is told besides the robot's limits; see `hardware.safety.settings`.
            clock: monotonic time in seconds.

        Raises:
            ConfigError: the tick rate is no whole multiple of the policy's rate.
        """
        config = config or ExecutorConfig()
        self.robot, self.link, self.config, self.recorder, self.now = robot, link, config, recorder, clock
        self.ticks_per_step = ticks_per_step(config.tick_rate_hz, robot.spec.rate_hz)
        self.dt = 1.0 / config.tick_rate_hz
        tolerated = tolerances(config, robot.spec.rate_hz)
        known = protection or Protection(robot.limits)
        self.safety = SafetyChain(known.limits, self.dt, tolerated, known.guards, rate_elements(robot), known.forces)
        self.arbiter = Arbiter(
            ArbiterConfig(
                takeover_by_motion=config.takeover_by_motion,
                heartbeat_timeout=config.operator_timeout,
                align_seconds=config.blend_seconds,
            )
        )
        size = robot.spec.action.size
        self.playback = Playback(
            size, self.ticks_per_step, config.execute_steps, config.late_steps, config.interpolation
        )
        self.operator = OperatorInbox(link, teleop, size, clock, config.operator_timeout)
        self.targets = Targets(robot, config, self.arbiter, self.playback, self.operator, self.safety)
        self.counters: Counter[str] = Counter()
        """Chunks and steps by what happened to them."""
        self.port = RobotPort(robot, self.counters, stop_kind(config.stop_kind))
        self.lateness, self.latency, self.work = Durations(), Durations(), Durations()
        """Lateness of ticks; age of the newest observation when a tick's command is sent; time that ticks take."""
        self.round_trip, self.reaction = Durations(), Durations()
        """From an observation to the arrival of its chunk, and to the first command sent from that chunk."""
        self.missed_ticks = 0
        self.times, self.journal = RunTimes(), StepJournal(recorder)
        self.ready = threading.Event()
        """Set when the first chunk has arrived."""
        self._lease: RobotLease | None = None
        self._may_stop = bool(getattr(robot, "accepts_replacement", False))
        self._may_replace = config.replace_within_tick and self._may_stop
        self._tick = 0
        self._phase, self._tick_time = 0, -np.inf
        self.replaceable = False
        """Whether a chunk may replace the present tick's command now."""
        self._filtered = False
        self._accepted: float | None = None
        self._flushed, self._new_episode = False, False
        self._next_status = -np.inf
        self._mode = Mode.IDLE

    # ---- life cycle -------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Connect the robot and take its present place as the first command.

        Raises:
            HardwareError: the robot does not answer, or another process controls it.
        """
        resource = resource_of(self.robot)
        self._lease = RobotLease(resource) if resource else None
        try:
            self.port.connect()
            try:
                self.safety.anchor(self.robot.hold_command())
            except BaseException:
                self.robot.disconnect()
                raise
        except BaseException:
            self._give_up_lease()
            raise
        self.times.connected = self.now()

    def run(self, stop: threading.Event, seconds: float = 0.0, patience: float = 120.0) -> None:
        """Tick in real time until ``stop`` is set, or for ``seconds`` (if positive) after the policy first answered.

        Args:
            stop: ends the loop.
            seconds: how long to run, 0 for no limit.
            patience: seconds to wait for the policy's first answer where ``seconds`` limits the run.
        """
        ControlLoop(self).run(stop, seconds, patience)

    def shut_down(self) -> None:
        """Ask the robot to stop, and disconnect it; the report says whether it confirmed."""
        self.port.stop()
        self._publish(self.now())
        try:
            self.robot.disconnect()
        finally:
            self._give_up_lease()
        if isinstance(self.recorder, Recorder):
            self.recorder.note_run(self.report())

    @property
    def robot_confirmed_stop(self) -> bool | None:
        """Whether the robot confirmed the stop at the end."""
        return self.port.confirmed_stop

    def _give_up_lease(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    # ---- one tick ---------------------------------------------------------------------------------------------------

    def tick(self, closing: bool = False) -> Verdict:
        """Run one tick and return what was sent; ``closing`` ignores the operator's wishes except a stop.

        An exception anywhere in the tick is a latched stop, and the brake is sent all the same.
        """
        now = self.now()
        self.replaceable, self._filtered = False, False
        try:
            return self._run_tick(now, closing)
        except Exception:
            logger.exception("executor: exception; the robot is stopped")
            self.arbiter.stop(now, "exception")
            self.safety.note(SafetyFlag.EXCEPTION, now)
            if self._filtered:
                verdict = self.safety.stop(now)  # instead of what this tick may have sent, not on top of it
            else:
                verdict = self.safety.filter(None, Situation(now, self.port.observation, estop=True))
            self._send(verdict.command, replacement=self._filtered)
            self._cut_power()
            return Verdict(verdict.command, verdict.flags | SafetyFlag.EXCEPTION)
        finally:
            self._tick += 1

    def _run_tick(self, now: float, closing: bool) -> Verdict:
        flags = self.port.observe(lambda: self._restart(now))
        events, estop = self.operator.poll()
        if closing:
            events = tuple(event for event in events if event is OperatorEvent.EMERGENCY_STOP)
        elif self.config.autostart and self.arbiter.reason == "started" and self.ready.is_set():
            events = (*events, OperatorEvent.ENABLE)
        self._verdicts(events, now)
        stopped_by = self.arbiter.reason if self.arbiter.mode is Mode.STOPPED else ""
        mode = self.arbiter.update(now, self.operator.reading, events, estop)
        elsewhere = stopped_by == "tracking_error" or self.port.powerless
        if mode is Mode.IDLE and stopped_by and (elsewhere or not self.safety.moving):
            # The old command is where the robot could not go, or where it was before it sagged or was pushed away.
            self.port.powerless = False
            self.safety.anchor(self.robot.hold_command())
        phase = self._tick % self.ticks_per_step
        self._phase, self._tick_time = phase, now
        if phase == 0:
            self._begin_step(now)
        self._take_chunks(now, phase)
        self._enter(now)
        target, stamp, starved = self.targets.wanted(now, phase, self.safety.command)
        verdict = self.safety.filter(target, self._situation(now, stamp))
        self._filtered = True
        flags |= verdict.flags | starved
        flags |= self._send(verdict.command)
        arbiter = self.arbiter
        self.journal.tick(flags, arbiter.mode, arbiter.reason, arbiter.writer, self.targets.human)
        self._judge(flags, now)
        self.replaceable = self._may_replace and not closing and arbiter.mode in DRIVEN
        if now >= self._next_status or self.arbiter.mode is not self._mode:
            self._publish(now)
        return Verdict(verdict.command, int(flags))

    def replace_command(self) -> bool:
        """Let a chunk that came between two ticks replace the command of the present tick; return whether one did.

        The tick is done over as if the chunk had been there at its time: same step and place in the step, same action
        of the chunk, same blending, and the safety chain filters from the state before the tick (see
        `hardware.safety.chain` for why the pair keeps every limit). Whatever speaks against it leaves the command in
        force, and the chunk to the next tick: a chunk that is discarded, a pressed emergency stop, a command that would
        brake. An exception is a latched stop, and the next tick sends the brake.
        """
        now = self.now()
        if not self.replaceable:
            return False
        try:
            return self._replace(now)
        except Exception:
            logger.exception("executor: exception between ticks; the robot is stopped")
            self.replaceable = False
            self.arbiter.stop(now, "exception")
            self.safety.note(SafetyFlag.EXCEPTION, now)
            return False

    def stop_between_ticks(self) -> bool:
        """Latch an emergency stop that was pressed between two ticks, and brake instead of the present tick's command.

        It brakes at once only on a robot that takes a second command; on others the next tick does, even if the stop
        has been released by then. Returns whether it braked.
        """
        if self.arbiter.mode is Mode.STOPPED:
            return False
        now = self.now()
        self.replaceable = False
        self.arbiter.stop(now, "emergency_stop")
        if not self._may_stop:
            return False
        try:
            verdict = self.safety.stop(now)
            flags = verdict.flags | SafetyFlag.REPLACED_WITHIN_TICK | self._send(verdict.command, replacement=True)
            self.journal.tick(flags, self.arbiter.mode, self.arbiter.reason, self.arbiter.writer, None)
        except Exception:
            logger.exception("executor: exception between ticks; the next tick brakes")
            self.safety.note(SafetyFlag.EXCEPTION, now)
        self._cut_power()
        self._publish(now)
        return True

    def _replace(self, now: float) -> bool:
        if not self._take_chunks(now, self._phase):
            return False
        self.replaceable = False
        if self.link.poll_estop():
            self.stop_between_ticks()
            return False
        if self.robot.state() is not RobotState.READY:
            return False
        target, stamp, starved = self.targets.wanted(self._tick_time, self._phase, self.safety.previous)
        if target is None or starved:
            return False
        verdict = self.safety.replace(target, self._situation(now, stamp))
        if verdict is None:
            return False
        flags = verdict.flags | SafetyFlag.REPLACED_WITHIN_TICK | self._send(verdict.command, replacement=True)
        self.counters["chunks_acted_within_tick"] += 1
        arbiter = self.arbiter
        self.journal.tick(flags, arbiter.mode, arbiter.reason, arbiter.writer, None)
        self._judge(flags, now)
        return True

    def _restart(self, now: float) -> None:
        """Go on in a scene that was set up anew: a new episode for policy and record."""
        self.journal.finish(self.safety.command, self.playback.action())
        self.safety.anchor(self.robot.hold_command())
        outcomes = getattr(self.robot, "outcomes", [])
        self.journal.end_episode(outcomes[-1] if outcomes else None)
        if self.arbiter.mode in DRIVEN or self.arbiter.plan_requested:
            self.arbiter.request_plan(now, "episode_restart")
        self._flushed, self._new_episode = False, True
        self._tick = 0

    def _begin_step(self, now: float) -> None:
        """Start a policy step: close the record of the last one, and send the observation."""
        self.journal.finish(self.safety.command, self.playback.action())
        self.playback.advance()
        if self._new_episode or (self.arbiter.plan_requested and not self._flushed):
            self._flushed = self.arbiter.plan_requested
            self.playback.flush(self.port.observation.stamp, self._new_episode or self.arbiter.reason == "enabled")
            self._new_episode = False
        self.journal.begin(self.port.observation)
        if self.arbiter.mode is not Mode.STOPPED:
            observed = self.port.observation
            self.link.send_observation(
                StampedObservation(observed.values, self.playback.step, observed.stamp, observed.stamps)
            )

    def _take_chunks(self, now: float, phase: int) -> bool:
        """Hand the chunks that came to the playback; return whether it took any."""
        taken = False
        while (chunk := self.link.poll_chunk()) is not None:
            self.counters["chunks_received"] += 1
            if self.times.ready is None:
                self.times.ready = now
                self.ready.set()
            problem = self.playback.accept(chunk, phase)
            if problem:
                self.counters[f"chunks_{problem}"] += 1
                logger.info(
                    "chunk of step %d discarded at step %d: %s", chunk.observation_seq, self.playback.step, problem
                )
                continue
            self.round_trip.add(now - chunk.observation_stamp)
            self.counters["chunks_accepted"] += 1
            self.counters["chunks_entered_late"] += self.playback.step > chunk.observation_seq
            self._accepted, taken = chunk.observation_stamp, True
        return taken

    def _enter(self, now: float) -> None:
        """Give control to the policy once it has planned from an observation made after it was asked."""
        if not self.arbiter.plan_requested:
            self._flushed = False
        elif self._flushed and not self.playback.starved:
            self.arbiter.plan_ready(now)
            self._flushed = False
            self.targets.begin_blend()

    def _situation(self, now: float, stamp: float) -> Situation:
        positions = self.config.tracking_seconds > 0 and not self.targets.resting.all()
        measured = self.port.measured() if positions else None
        return Situation(now, self.port.observation, self.arbiter.writer, stamp, self.arbiter.estop_latched, measured)

    def _send(self, command: np.ndarray, replacement: bool = False) -> int:
        failed = self.port.send(command)
        if failed:
            return failed
        now = self.now()
        if not replacement:
            self.latency.add(now - self.port.observation.stamp)
        if self._accepted is not None and self.arbiter.mode in DRIVEN:
            self.reaction.add(now - self._accepted)
        self._accepted = None
        return 0

    def _judge(self, flags: int, now: float) -> None:
        """Turn what went wrong into a change of mode; the command of this tick is a brake already."""
        extra = flags & (SafetyFlag.POLICY_STARVED | SafetyFlag.ROBOT_FAULT)
        if extra:
            self.safety.note(extra, now)
        if flags & STOPPING_FAULTS and self.arbiter.mode is not Mode.STOPPED:
            self.arbiter.stop(now, cause_of(flags & STOPPING_FAULTS))
        elif flags & HOLDING_FAULTS:
            resumable = not flags & HOLDING_FAULTS & ~SafetyFlag.POLICY_STARVED
            self.arbiter.hold(now, cause_of(flags & HOLDING_FAULTS), resumable)
        self._cut_power()

    def _cut_power(self) -> None:
        """Switch the drives off in a latched stop, where that is how the robot is to be stopped."""
        if self.arbiter.mode is Mode.STOPPED and self.port.stop_kind is StopKind.DRIVES_OFF and not self.port.powerless:
            self.port.stop()

    # ---- record and status ------------------------------------------------------------------------------------------

    def _verdicts(self, events: tuple[OperatorEvent, ...], now: float) -> None:
        for event in events:
            self.times.events.append((now, event))
            self.journal.record(event)

    def _publish(self, now: float) -> None:
        """Tell whoever listens; that this fails is no reason to stop the robot."""
        self._mode = self.arbiter.mode
        self._next_status = now + 1.0 / self.config.status_rate_hz
        try:
            self.link.publish_status(self.status(now))
        except Exception:
            if not self.counters["status_failures"]:
                logger.exception("the status cannot be published")
            self.counters["status_failures"] += 1

    def status(self, now: float) -> ExecutorStatus:
        """Return what the executor is doing at the monotonic time ``now``."""
        return status_of(self, now)

    def report(self) -> dict[str, Any]:
        """Return JSON-ready figures of the whole run; times are seconds since the policy first answered."""
        return report_of(self, self.now())
