"""What the executor and the policy process say to each other, whatever carries it.

Three streams and nothing else: observations go to the policy, chunks come back, and a status is published; operator
readings and an emergency stop may also arrive here (a local device works as well). Rules that every carrier keeps:

* No call blocks the executor: ``send_*`` and ``publish_*`` queue or drop, ``poll_*`` return at once, and ``wait_*``
  return in time for the next tick.
* ``poll_chunk`` and ``poll_operator`` hand over each message once, oldest first; the caller drains them every tick.
* ``StampedObservation.seq`` is the policy step; a chunk repeats it in ``observation_seq``. A sequence number that does
  not grow starts a new episode (the policy forgets its history); a gap means that steps passed unseen.
* Stamps are the machine's monotonic clock in seconds (shared by all processes of one machine).
* Loss is allowed: the executor judges by age and sequence number, never by a "connected" flag.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from robot_rl.core.policy import ActionChunk
from robot_rl.core.robot import StampedObservation
from robot_rl.core.teleop import OperatorInput

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class ExecutorStatus:
    """What the executor is doing, published a few times per second and on every change of mode."""

    mode: str
    """State of the arbiter: ``idle``, ``align``, ``auto``, ``hold``, ``human`` or ``stopped``."""
    writer: str
    """Who writes commands now: ``policy``, ``human`` or ``none``."""
    reason: str
    """Why the arbiter is in this mode, by name."""
    seq: int
    """Policy step of the newest observation."""
    stamp: float = 0.0
    """Monotonic time of this status in seconds."""
    estop_latched: bool = False
    """Whether an emergency stop is latched (reset, then enable, to go on)."""
    counters: dict[str, int] = field(default_factory=dict)
    """How often each safety stage intervened and each kind of chunk was discarded, by name."""
    loop: dict[str, float] = field(default_factory=dict)
    """Loop statistics: ``rate_hz``, ``missed_ticks``, and p50, p99 and maximum (``lateness_p99_ms``) of ``lateness``,
    ``work`` (what a tick takes), ``latency`` (observation to command) and ``round_trip`` (observation to chunk)."""
    command: list[float] = field(default_factory=list)
    """(A,) the newest command, in the action's units."""
    measured: list[float] = field(default_factory=list)
    """(A,) the command that would hold the robot where it is; empty where it does not say."""
    speed: list[float] = field(default_factory=list)
    """(A,) speed of a full operator deflection, in the action's units per second; zero for elements that are rates."""
    recording: dict[str, Any] = field(default_factory=dict)
    """Recording as `hardware.recording.recorder.Recorder.status` says; empty where nothing is recorded."""


@runtime_checkable
class ExecutorLink(Protocol):
    """The executor's end."""

    def send_observation(self, observation: StampedObservation) -> None:
        """Offer an observation to the policy; never blocks and never raises when nobody listens."""

    def poll_chunk(self) -> ActionChunk | None:
        """Return the oldest chunk not yet read, or None."""

    def wait_chunk(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for a chunk; return whether one is there. An emergency stop ends the wait."""

    def wait_estop(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for an emergency stop to be pressed; return whether one is."""

    def poll_operator(self) -> OperatorInput | None:
        """Return the oldest operator reading not yet read, or None; its stamp is the time of receipt here."""

    def poll_estop(self) -> bool:
        """Return whether an emergency stop is, or was since the last call, asked for through this link."""

    def publish_status(self, status: ExecutorStatus) -> None:
        """Tell whoever listens; never blocks."""

    def close(self) -> None:
        """Release what the link holds."""


@runtime_checkable
class PolicyLink(Protocol):
    """The policy process's end."""

    def receive_observation(self, timeout: float) -> StampedObservation | None:
        """Wait up to ``timeout`` seconds for the oldest observation not yet read; None if none came."""

    def send_chunk(self, chunk: ActionChunk) -> None:
        """Send a chunk to the executor; never blocks."""

    def close(self) -> None:
        """Release what the link holds."""


class StopButton:
    """A remote emergency stop of which no press is missed: it reads as pressed while it is, and once more after it.

    One thread sets it and one polls it.
    """

    def __init__(self) -> None:
        self._pressed, self._presses, self._seen = False, 0, 0

    def set(self, pressed: bool) -> None:
        """Press or release it."""
        self._presses += pressed
        self._pressed = pressed

    def poll(self) -> bool:
        """Return whether it is pressed, or was since the last call."""
        presses = self._presses
        unseen, self._seen = presses != self._seen, presses
        return self._pressed or unseen

    @property
    def waiting(self) -> bool:
        """What `poll` would return."""
        return self._pressed or self._presses != self._seen


class InProcessTransport:
    """Both ends in one process, over bounded queues: `executor` and `policy` are the links.

    It is one machine and one process only: no isolation between a policy that hangs and the control loop. With
    ``on_observation`` the exchange is synchronous (lock-step): the callable runs inside ``send_observation`` and is
    expected to serve the policy once, so that its chunk is there when the executor polls.
    """

    def __init__(self, depth: int = 8, on_observation: Callable[[], None] | None = None, quiet: bool = False) -> None:
        """Make the queues.

        Args:
            depth: messages that a queue keeps; the oldest is dropped beyond that.
            on_observation: serves the policy within `send_observation` (lock-step).
            quiet: leave out the warning that ROS is absent.
        """
        self.on_observation = on_observation
        self.status: ExecutorStatus | None = None
        """The status published last."""
        self.dropped = 0
        """Observations that the policy never read because newer ones pushed them out."""
        self._observations: deque[StampedObservation] = deque(maxlen=depth)
        self._chunks: deque[ActionChunk] = deque(maxlen=depth)
        self._operator: deque[OperatorInput] = deque(maxlen=64)
        self._arrived = threading.Condition()
        self._answered = threading.Event()
        self._estop = StopButton()
        self.executor = InProcessExecutorLink(self)
        self.policy = InProcessPolicyLink(self)
        if not quiet:
            logger.warning(
                "IN-PROCESS TRANSPORT: no ROS 2 here. Policy and executor share one process on this machine; "
                "nothing is published, and a hanging policy can disturb the control loop."
            )

    def send_operator(self, reading: OperatorInput) -> None:
        """Hand an operator's reading to the executor, as a remote console would."""
        self._operator.append(reading)

    def set_estop(self, pressed: bool) -> None:
        """Press or release a remote emergency stop (the executor's latch stays until it is reset)."""
        self._estop.set(pressed)
        self._answered.set()


class InProcessExecutorLink:
    """The `ExecutorLink` of an `InProcessTransport`."""

    def __init__(self, transport: InProcessTransport) -> None:
        self._transport = transport

    def send_observation(self, observation: StampedObservation) -> None:
        """Queue the observation and, in lock-step, let the policy answer at once."""
        transport = self._transport
        with transport._arrived:
            transport.dropped += len(transport._observations) == transport._observations.maxlen
            transport._observations.append(observation)
            transport._arrived.notify()
        if transport.on_observation is not None:
            transport.on_observation()

    def poll_chunk(self) -> ActionChunk | None:
        """Return the oldest chunk not yet read, or None."""
        return _pop(self._transport._chunks)

    def wait_chunk(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for a chunk; return whether one is there."""
        return wait_for(self._transport._chunks, self._transport._answered, timeout)

    def poll_operator(self) -> OperatorInput | None:
        """Return the oldest operator reading not yet read, or None."""
        return _pop(self._transport._operator)

    def wait_estop(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for the remote emergency stop; return whether it is pressed."""
        return wait_until(lambda: self._transport._estop.waiting, self._transport._answered, timeout)

    def poll_estop(self) -> bool:
        """Return whether the remote emergency stop is pressed, or was since the last call."""
        return self._transport._estop.poll()

    def publish_status(self, status: ExecutorStatus) -> None:
        """Keep the status for whoever looks at `InProcessTransport.status`."""
        self._transport.status = status

    def close(self) -> None:
        """Nothing to release."""


class InProcessPolicyLink:
    """The `PolicyLink` of an `InProcessTransport`."""

    def __init__(self, transport: InProcessTransport) -> None:
        self._transport = transport

    def receive_observation(self, timeout: float) -> StampedObservation | None:
        """Wait up to ``timeout`` seconds for an observation."""
        transport = self._transport
        with transport._arrived:
            if not transport._observations and timeout > 0:
                transport._arrived.wait(timeout)
            return _pop(transport._observations)

    def send_chunk(self, chunk: ActionChunk) -> None:
        """Queue the chunk for the executor."""
        self._transport._chunks.append(chunk)
        self._transport._answered.set()

    def close(self) -> None:
        """Nothing to release."""


def wait_for(queue: deque[T], filled: threading.Event, timeout: float) -> bool:
    """Wait up to ``timeout`` seconds for something in ``queue``, whose writer sets ``filled``; return whether it is."""
    filled.clear()
    if not queue and timeout > 0:
        filled.wait(timeout)
    return bool(queue)


def wait_until(happened: Callable[[], bool], changed: threading.Event, timeout: float) -> bool:
    """Wait up to ``timeout`` seconds for ``happened()``, asked whenever ``changed`` is set; return whether it did."""
    end = time.monotonic() + timeout
    while not happened():
        left = end - time.monotonic()
        if left <= 0:
            return False
        changed.clear()
        if not happened():
            changed.wait(left)
    return True


def _pop(queue: deque[T]) -> T | None:
    try:
        return queue.popleft()
    except IndexError:
        return None
