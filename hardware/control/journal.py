"""What the executor remembers of a run: executed steps for the record, and figures for status and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware.control.arbiter import Mode
from hardware.recording.recorder import ExecutedStep, Recorder
from hardware.transport import ExecutorStatus
from robot_rl.core.robot import StampedObservation
from robot_rl.core.teleop import OperatorEvent

if TYPE_CHECKING:
    from hardware.control.executor import Executor

_NOTHING = StampedObservation({}, -1, -np.inf)


class StepJournal:
    """Collects the ticks of a policy step and hands the step to the recorder when it is over."""

    def __init__(self, recorder: Recorder | None) -> None:
        self.acted: Counter[str] = Counter()
        """Policy steps by who wrote their command; steps while idle are not counted."""
        self.episode = 1
        """Number of the present episode."""
        self.on_step: Callable[[ExecutedStep], None] | None = None
        """Is called with every executed step, within the tick; it must neither wait nor raise."""
        self._recorder = recorder
        self._observation = _NOTHING
        self._flags, self._human = 0, False
        self._mode, self._reason, self._writer = Mode.IDLE, "", "none"
        self._human_target: np.ndarray | None = None

    def begin(self, observation: StampedObservation) -> None:
        """Start the step that is decided upon from ``observation``."""
        self._observation = observation

    def tick(self, flags: int, mode: Mode, reason: str, writer: str, human_target: np.ndarray | None) -> None:
        """Note one tick: what intervened, who wrote and why, and the operator's command (A,) if there was one."""
        self._flags |= int(flags)
        self._human |= mode is Mode.HUMAN
        self._mode, self._reason, self._writer, self._human_target = mode, reason, writer, human_target

    def finish(self, command: np.ndarray, planned: np.ndarray | None) -> None:
        """End the step: ``command`` (A,) was sent last, ``planned`` (A,) is what the policy wanted."""
        observation, flags, human = self._observation, self._flags, self._human
        self._observation, self._flags, self._human = _NOTHING, 0, False
        if self._mode is Mode.IDLE or not observation.values:
            return
        writer = "human" if human else self._writer
        self.acted[writer] += 1
        if self._recorder is None and self.on_step is None:
            return
        step = ExecutedStep(
            observation=observation.values,
            action=command,
            policy_action=command if planned is None else planned,
            human_action=command if self._human_target is None else self._human_target,
            writer=writer,
            mode=self._mode,
            reason=self._reason,
            safety_flags=flags,
            stamp=observation.stamp,
            planned=planned is not None,
        )
        if self._recorder is not None:
            self._recorder.add(step)
        if self.on_step is not None:
            self.on_step(step)

    def end_episode(self, success: bool | None) -> None:
        """End the episode; the record saves its steps with the verdict on them."""
        self.episode += 1
        if self._recorder is not None:
            self._recorder.end_episode(success)

    def record(self, event: OperatorEvent) -> None:
        """Start, stop or discard recording, or judge the episode, as the operator asks; other events do nothing."""
        recorder = self._recorder
        if event in (OperatorEvent.SUCCESS, OperatorEvent.FAILURE):
            self.end_episode(event is OperatorEvent.SUCCESS)
        elif recorder is None:
            return
        elif event is OperatorEvent.RECORD_START:
            recorder.start()
        elif event is OperatorEvent.RECORD_STOP:
            recorder.pause()
        elif event is OperatorEvent.RECORD_DISCARD:
            recorder.discard()


class RunTimes:
    """When what happened, on the executor's monotonic clock in seconds."""

    def __init__(self) -> None:
        self.connected = 0.0
        self.begun: float | None = None
        """Start of the first tick."""
        self.ready: float | None = None
        """Arrival of the first chunk."""
        self.ended: float | None = None
        """End of the last tick."""
        self.events: list[tuple[float, OperatorEvent]] = []
        """What the operator asked for."""


def status_of(executor: Executor, now: float) -> ExecutorStatus:
    """Return what ``executor`` is doing at the monotonic time ``now``."""
    loop = {"rate_hz": _measured_rate(executor, now), "missed_ticks": float(executor.missed_ticks)}
    for name in ("lateness", "work", "latency", "round_trip"):
        loop |= getattr(executor, name).summary(name)
    measured = executor.port.measured()
    return ExecutorStatus(
        mode=executor.arbiter.mode.value,
        writer=executor.arbiter.writer,
        reason=executor.arbiter.reason,
        seq=executor.playback.step,
        stamp=now,
        estop_latched=executor.arbiter.estop_latched,
        counters={**executor.counters, **executor.safety.counts},
        loop=loop,
        command=executor.safety.command.tolist(),
        measured=[] if measured is None else np.asarray(measured, float).tolist(),
        speed=executor.targets.speed.tolist(),
        recording={} if executor.recorder is None else executor.recorder.status(),
    )


def report_of(executor: Executor, now: float) -> dict[str, Any]:
    """Return JSON-ready figures of the whole run; times are seconds since the policy first answered."""
    times, counters = executor.times, executor.counters
    zero = times.connected if times.ready is None else times.ready
    changes = [(times.connected, Mode.IDLE, "started"), *executor.arbiter.changes]
    return {
        "seconds": (now if times.ended is None else times.ended) - zero,
        "tick_rate_hz": executor.config.tick_rate_hz,
        "policy_rate_hz": executor.robot.spec.rate_hz,
        "measured_rate_hz": _measured_rate(executor, now),
        "ticks": executor.lateness.count,
        "missed_ticks": executor.missed_ticks,
        "lateness": executor.lateness.to_json(),
        "work": executor.work.to_json(),
        "observation_to_command": executor.latency.to_json(),
        "observation_to_chunk": executor.round_trip.to_json(),
        "observation_to_planned_command": executor.reaction.to_json(),
        "chunks": {name: count for name, count in counters.items() if name.startswith("chunks")},
        "safety": dict(executor.safety.counts),
        "robot_failures": {name: count for name, count in counters.items() if name.endswith("failures")},
        "acted": dict(executor.journal.acted),
        "mode_changes": [
            {"time": round(when - zero, 4), "mode": mode.value, "reason": reason} for when, mode, reason in changes
        ],
        "events": [{"time": round(when - zero, 4), "event": event.value} for when, event in times.events],
        "final_stop_confirmed": executor.robot_confirmed_stop,
    }


def _measured_rate(executor: Executor, now: float) -> float:
    """Return ticks per second since the first one."""
    if executor.times.begun is None or executor.lateness.count < 2:
        return 0.0
    end = now if executor.times.ended is None else executor.times.ended
    return executor.lateness.count / max(end - executor.times.begun + executor.dt, executor.dt)
