"""Records everything that is executed as a data set, with who acted and why, without ever blocking the control loop."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hardware.control.arbiter import REASONS, Mode
from hardware.safety.flags import SafetyFlag
from robot_rl.core.spec import ArraySpec, Spec

logger = logging.getLogger(__name__)
_DISK_SECONDS = 2.0
PRE_INTERVENTION_SECONDS = 1.0
"""Time before a take-over whose steps are marked: what the policy did there is what the operator did not want."""
LONGEST_EPISODE_SECONDS = 600.0
"""An episode that nobody ends is saved after this time, with no verdict, and another begun: a crash loses at most
that, and memory does not fill."""

ACTOR_CODES = {"none": -1, "policy": 0, "human": 1}
"""Code of who wrote the executed action; -1 where nobody did and the robot braked or held."""
MODE_CODES = {mode: code for code, mode in enumerate(Mode)}
"""Code of the arbiter's mode."""
REASON_CODES = {name: code for code, name in enumerate(REASONS)}
"""Code of the reason for the mode."""


@dataclass
class ExecutedStep:
    """One policy step as it really happened."""

    observation: Mapping[str, np.ndarray]
    """Observation at the beginning of the step."""
    action: np.ndarray
    """(A,) command at the end of the step: what was executed."""
    policy_action: np.ndarray
    """(A,) what the policy would have done; the executed action where it had no plan."""
    human_action: np.ndarray
    """(A,) what the operator asked for; the executed action where nobody drove."""
    writer: str
    """``policy``, ``human`` or ``none``; ``human`` if the operator drove at any tick of the step."""
    mode: Mode
    """Arbiter's mode at the end of the step."""
    reason: str
    """Why it was in that mode."""
    safety_flags: int
    """Interventions of all ticks of the step."""
    stamp: float
    """Monotonic time of the observation in seconds."""
    planned: bool = True
    """Whether the policy had a plan for this step, so that ``policy_action`` is its own."""


def recorded_extras(spec: Spec) -> dict[str, ArraySpec]:
    """Return the columns of a recording besides observation and action."""
    action = ArraySpec(spec.action.shape, "float32", spec.action.names, spec.action.unit)
    return {
        "actor": ArraySpec((1,), "int8"),
        "policy_action": action,
        "policy_planned": ArraySpec((1,), "bool"),
        "human_action": action,
        "intervention": ArraySpec((1,), "bool"),
        "pre_intervention": ArraySpec((1,), "bool"),
        "safety_flags": ArraySpec((1,), "int32"),
        "mode": ArraySpec((1,), "int8"),
        "reason": ArraySpec((1,), "int16"),
        "stamp": ArraySpec((1,), "float64", unit="s"),
    }


class Recorder:
    """Writes executed steps in a background thread; when its queue is full, steps are dropped and counted."""

    def __init__(self, root: str | Path, spec: Spec, *, task: str = "", depth: int = 400) -> None:
        """Create the data set, or continue one.

        Args:
            root: directory of the data set.
            spec: of the robot, at the policy's rate.
            task: instruction of the episodes.
            depth: steps that the queue holds (20 s at 20 Hz).

        Raises:
            DataError: the directory holds something else.
            SpecMismatchError: it holds recordings of another robot.
        """
        from robot_rl.data.store import EpisodeWriter

        root = Path(root)
        append = (root / "meta" / "info.json").exists()
        self.root, self.dropped, self.written, self.episodes = root, 0, 0, 0
        self.failure: Exception | None = None
        self.active = True
        """Whether executed steps are recorded now; see `start` and `pause`."""
        self.free_bytes = 0
        """Space left on the disk, as of the last look."""
        self._look_at_disk()
        # Steps are written this much later, because only what follows tells whether somebody took over.
        self._window = max(1, round(PRE_INTERVENTION_SECONDS * spec.rate_hz))
        self._held: deque[ExecutedStep] = deque()
        self._longest = max(1, round(LONGEST_EPISODE_SECONDS * spec.rate_hz))
        self._pending = 0
        self._writer = EpisodeWriter(root, spec, task=task, extras=recorded_extras(spec), append=append)
        # The disk is asked in this thread and never in the control loop, which a network disk could hold up.
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def add(self, step: ExecutedStep) -> None:
        """Queue one step, unless recording is paused; never blocks."""
        if self.active:
            self._put("step", step)

    def start(self) -> None:
        """Record again, a new episode."""
        self.active = True

    def pause(self) -> None:
        """Save the present episode, with no verdict, and record no more until `start`."""
        self.active = False
        self.end_episode()

    def discard(self) -> None:
        """Forget the steps since the last episode."""
        self._put("discard", None)

    def end_episode(self, success: bool | None = None) -> None:
        """Save what was added since the last episode, with the operator's or the task's verdict."""
        self._put("end", success)

    def note_run(self, figures: Mapping[str, Any]) -> None:
        """Keep the figures of a run (lateness, missed ticks, interventions) as a line of ``meta/runs.jsonl``."""
        self._put("run", dict(figures))

    def close(self, timeout: float = 30.0) -> None:
        """Save the present episode, write what is queued and end; waits up to ``timeout`` seconds."""
        with contextlib.suppress(queue.Full):  # where the disk hangs, which is said below
            self._queue.put(("end", None), timeout=timeout)
            self._queue.put(("close", None), timeout=timeout)
            self._thread.join(timeout)
        if self._thread.is_alive():
            logger.error("recorder: did not finish within %.0f s", timeout)
        if self.dropped:
            logger.warning("recorder: %d steps were dropped because the disk was too slow", self.dropped)

    def to_json(self) -> dict[str, Any]:
        """Return what was recorded, for the report."""
        failure = None if self.failure is None else str(self.failure)
        return {
            "path": str(self.root),
            "steps": self.written,
            "dropped": self.dropped,
            "episodes": self.episodes,
            "failure": failure,
        }

    def status(self) -> dict[str, Any]:
        """Return what an operator must know, for the status."""
        known = self.to_json()
        return {**known, "active": self.active and self.failure is None, "free_bytes": self.free_bytes}

    def _put(self, kind: str, value: Any) -> None:
        try:
            self._queue.put_nowait((kind, value))
        except queue.Full:
            self.dropped += kind == "step"
            if kind != "step":
                logger.error("recorder: '%s' came while the disk was too slow, and is lost", kind)

    def _next(self) -> tuple[str, Any]:
        """Return what is next in the queue, and look at the disk every now and then."""
        while True:
            if self.failure is None and time.monotonic() >= self._next_look:
                self._guarded(self._look_at_disk)
            try:
                return self._queue.get(timeout=_DISK_SECONDS)
            except queue.Empty:
                continue

    def _look_at_disk(self) -> None:
        self._next_look = time.monotonic() + _DISK_SECONDS
        place = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        self.free_bytes = shutil.disk_usage(place).free

    def _run(self) -> None:
        self._guarded(self._write_labels)
        while True:
            kind, value = self._next()
            if kind == "close":
                break
            if self.failure is None or kind == "run":
                self._guarded(self._do, kind, value)
            else:
                self.dropped += kind == "step"
        self._guarded(self._writer.close)

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            logger.exception("recorder: recording ended; the robot goes on")
            self.failure = self.failure or error

    def _do(self, kind: str, value: Any) -> None:
        if kind == "step":
            self._take(value)
            self._pending += 1
            self.written += 1
            if self._pending - len(self._held) >= self._longest:
                self._save(None)
        elif kind == "discard":
            self._held.clear()
            self._writer.discard_episode()
            self.written -= self._pending
            self._pending = 0
        elif kind == "run":
            with (self.root / "meta" / "runs.jsonl").open("a") as file:
                file.write(json.dumps(value) + "\n")
        elif self._pending:
            while self._held:
                self._write(self._held.popleft(), False)
            self._save(value)

    def _save(self, success: bool | None) -> None:
        """Save the episode; steps that are held back belong to the next one."""
        self._writer.save_episode(success=success)
        self.episodes += 1
        self._pending = len(self._held)

    def _take(self, step: ExecutedStep) -> None:
        """Hold the step back until it is known whether somebody took over soon after it."""
        if step.writer == "human":
            while self._held:
                held = self._held.popleft()
                self._write(held, held.writer == "policy")
        self._held.append(step)
        if len(self._held) > self._window:
            self._write(self._held.popleft(), False)

    def _write(self, step: ExecutedStep, pre_intervention: bool) -> None:
        self._writer.add(
            step.observation,
            step.action.astype(np.float32),
            actor=ACTOR_CODES[step.writer],
            policy_action=step.policy_action,
            policy_planned=step.planned,
            human_action=step.human_action,
            intervention=step.writer == "human",
            pre_intervention=pre_intervention,
            safety_flags=step.safety_flags,
            mode=MODE_CODES[step.mode],
            reason=REASON_CODES[step.reason],
            stamp=step.stamp,
        )

    def _write_labels(self) -> None:
        from robot_rl.data.durable import write_json
        from robot_rl.data.store import SCRATCH

        labels = {
            "actor": ACTOR_CODES,
            "mode": {mode.value: code for mode, code in MODE_CODES.items()},
            "reason": REASON_CODES,
            "safety_flags": {flag.name.lower(): int(flag) for flag in SafetyFlag if flag.name},
        }
        write_json(self.root / "meta" / "labels.json", labels, self.root / SCRATCH)
