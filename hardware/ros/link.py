"""The links of `hardware.transport` over ROS 2 topics.

=================== =========== ====================================================================
topic               from → to   quality of service
=================== =========== ====================================================================
observation         executor →  reliable, last 8: a policy reads every step in order
observation/<image> executor →  best effort, newest only: a lost image is replaced by the next one
chunk               policy →    reliable, last 8
operator            teleop →    reliable, last 64: a key press must not be lost
estop               teleop →    reliable, latched: a late joiner learns of a pressed e-stop at once
status              executor →  reliable, last 16
executed            executor →  reliable, last 64, by `hardware.ros.executor_node`
robot_spec          executor →  reliable, latched: what the robot measures and takes
=================== =========== ====================================================================

Names are relative, so that a namespace or a remapping moves them. Keep-last writers never wait for a reader: when one
hangs, its oldest messages are replaced. Callbacks only convert and queue; whoever owns the link polls.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any

from hardware.ros import convert
from hardware.ros.endpoint import Endpoint, quality
from hardware.transport import ExecutorStatus, StopButton, wait_for, wait_until
from robot_rl.core.errors import HardwareError
from robot_rl.core.policy import ActionChunk
from robot_rl.core.robot import StampedObservation
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.core.teleop import OperatorEvent, OperatorInput
from robot_rl.data.bag.names import OBSERVATION, ROBOT_SPEC, image_topic

logger = logging.getLogger(__name__)

CHUNK, OPERATOR, ESTOP, STATUS = "chunk", "operator", "estop", "status"
_RESET_DELAY = 0.1
_SAME_TIME = 1e-6
_REMEMBERED = 64


class RosExecutorLink:
    """`ExecutorLink` over ROS 2: publishes what the robot measures, and queues what comes in."""

    def __init__(self, spec: Spec, endpoint: Endpoint | None = None) -> None:
        """Open the topics and announce ``spec``, the robot's.

        Args:
            spec: what the robot measures and takes.
            endpoint: node to use, or None for one named ``executor``; `close` closes it in both cases.
        """
        self.endpoint = endpoint or Endpoint("executor")
        from diagnostic_msgs.msg import DiagnosticArray
        from sensor_msgs.msg import Image, JointState, Joy
        from std_msgs.msg import Bool, String
        from trajectory_msgs.msg import JointTrajectory

        self._spec = spec
        self._layout = convert.VectorLayout(spec)
        self._action_names = convert.element_names("action", spec.action)
        self._images = {key: one.frame for key, one in spec.observation.items() if one.is_image}
        self._image_stamps: dict[str, float] = {}
        self._chunks: deque[ActionChunk] = deque(maxlen=8)
        self._answered = threading.Event()
        self._operator: deque[OperatorInput] = deque(maxlen=64)
        self._estop = StopButton()
        self._sent: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)
        self.chunk_received = 0.0
        """Monotonic time (s) when the last chunk arrived, by this process's own clock; 0 before the first."""

        endpoint = self.endpoint
        self._publish_vectors = endpoint.publisher(JointState, OBSERVATION, quality(8))
        self._publish_images = {
            key: endpoint.publisher(Image, image_topic(key), quality(1, reliable=False)) for key in self._images
        }
        self._publish_status = endpoint.publisher(DiagnosticArray, STATUS, quality(16))
        self._publish_spec = endpoint.publisher(String, ROBOT_SPEC, quality(1, latched=True))
        endpoint.subscribe(JointTrajectory, CHUNK, self._on_chunk, quality(8))
        endpoint.subscribe(Joy, OPERATOR, self._on_operator, quality(64))
        endpoint.subscribe(Bool, ESTOP, self._on_estop, quality(8, latched=True))
        self._publish_spec(convert.to_json_string(spec.to_json()))
        endpoint.start()

    def send_observation(self, observation: StampedObservation) -> None:
        """Publish the images that are new since the last call, then the vectors; never waits for a reader."""
        for key, frame in self._images.items():
            stamp = observation.stamps.get(key, observation.stamp)
            if key in observation.values and self._image_stamps.get(key) != stamp:
                self._image_stamps[key] = stamp
                self._publish_images[key](convert.to_image(observation.values[key], stamp, observation.seq, frame))
        self._sent.append((observation.seq, observation.stamp))
        self._publish_vectors(self._layout.pack(observation))

    def poll_chunk(self) -> ActionChunk | None:
        """Return the oldest chunk not yet read, or None."""
        return self._chunks.popleft() if self._chunks else None

    def wait_chunk(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for a chunk; return whether one is there."""
        return wait_for(self._chunks, self._answered, timeout)

    def poll_operator(self) -> OperatorInput | None:
        """Return the oldest operator reading not yet read, or None; its stamp is the time of receipt here."""
        return self._operator.popleft() if self._operator else None

    def wait_estop(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for the e-stop topic to say pressed; return whether it does."""
        return wait_until(lambda: self._estop.waiting, self._answered, timeout)

    def poll_estop(self) -> bool:
        """Return whether the newest message on the e-stop topic says pressed, or one since the last call did."""
        return self._estop.poll()

    def publish_status(self, status: ExecutorStatus) -> None:
        """Publish the status as a diagnostic message named ``robot_rl executor``."""
        self._publish_status(convert.to_diagnostics(status))

    def close(self) -> None:
        """Leave the graph."""
        self.endpoint.close()

    def _on_chunk(self, message: Any) -> None:
        chunk = convert.from_trajectory(message, self._action_names)
        # The message's time is rounded to 1 ns; the executor compares stamps exactly, so it gets its own back. One that
        # differs by more belongs to an earlier observation of the same number, and stays what it is.
        for seq, stamp in reversed(self._sent.copy()):
            if seq == chunk.observation_seq and abs(stamp - chunk.observation_stamp) < _SAME_TIME:
                chunk.observation_stamp = stamp
                break
        self._chunks.append(chunk)
        self._answered.set()
        self.chunk_received = time.monotonic()

    def _on_operator(self, message: Any) -> None:
        # The receiver's own clock decides the age of the heartbeat: a sender cannot vouch for itself.
        self._operator.append(replace(convert.from_joy(message), stamp=time.monotonic()))

    def _on_estop(self, message: Any) -> None:
        news = message.data and not self._estop.waiting
        self._estop.set(bool(message.data))
        self._answered.set()
        if news:
            logger.warning("emergency stop pressed on topic '%s'", ESTOP)


class RosPolicyLink:
    """`PolicyLink` over ROS 2: queues observations in order and publishes chunks."""

    def __init__(
        self, endpoint: Endpoint | None = None, image_keys: tuple[str, ...] | None = None, depth: int = 8
    ) -> None:
        """Open the topics; the robot's spec arrives with `wait_for_robot`.

        Args:
            endpoint: node to use, or None for one named ``policy``; `close` closes it in both cases.
            image_keys: images to subscribe to, or None for all that the robot has.
            depth: observations kept while the policy is busy; beyond that the oldest is dropped.
        """
        self.endpoint = endpoint or Endpoint("policy")
        from std_msgs.msg import String
        from trajectory_msgs.msg import JointTrajectory

        self.robot_spec: Spec | None = None
        """What the robot measures and takes, once it has announced itself."""
        self.dropped = 0
        """Observations that were replaced by newer ones before they were read."""
        self._image_keys = image_keys
        self._assembler: convert.Assembler | None = None
        self._action_names: list[str] = []
        self._observations: deque[StampedObservation] = deque(maxlen=depth)
        self._arrived = threading.Condition()
        self._publish_chunk = self.endpoint.publisher(JointTrajectory, CHUNK, quality(8))
        self.endpoint.subscribe(String, ROBOT_SPEC, self._on_spec, quality(1, latched=True))
        self.endpoint.start()

    def wait_for_robot(self, timeout: float) -> Spec:
        """Return the robot's spec, waiting up to ``timeout`` seconds for an executor to announce it.

        Raises:
            HardwareError: no executor announced itself in time.
        """
        with self._arrived:
            if not self._arrived.wait_for(lambda: self.robot_spec is not None, timeout):
                topic = self.endpoint.node.resolve_topic_name(ROBOT_SPEC)
                raise HardwareError(f"no executor announced its robot on '{topic}' within {timeout:g} s")
        assert self.robot_spec is not None
        return self.robot_spec

    def receive_observation(self, timeout: float) -> StampedObservation | None:
        """Wait up to ``timeout`` seconds for the oldest observation not yet read; None if none came."""
        with self._arrived:
            if not self._observations and timeout > 0:
                self._arrived.wait_for(lambda: bool(self._observations), timeout)
            return self._observations.popleft() if self._observations else None

    def send_chunk(self, chunk: ActionChunk) -> None:
        """Publish a chunk; before the robot is known there is nobody to send it to."""
        if self.robot_spec is not None:
            self._publish_chunk(convert.to_trajectory(chunk, self._action_names, self.robot_spec.rate_hz))

    def close(self) -> None:
        """Leave the graph."""
        self.endpoint.close()

    def _on_spec(self, message: Any) -> None:
        spec = Spec.from_json(convert.from_json_string(message))
        if self.robot_spec is not None:
            # A restarted executor may go on with the same robot; another robot needs another policy process.
            self.robot_spec.require(spec, "The robot that this policy serves", "the one announced now")
            return
        wanted = {
            key: one
            for key, one in spec.observation.items()
            if not one.is_image or self._image_keys is None or key in self._image_keys
        }
        self._assembler = convert.Assembler(Spec(wanted, spec.action, spec.rate_hz))
        self._action_names = convert.element_names("action", spec.action)
        self._subscribe_observations(wanted)
        with self._arrived:
            self.robot_spec = spec
            self._arrived.notify_all()

    def _subscribe_observations(self, wanted: dict[str, ArraySpec]) -> None:
        from sensor_msgs.msg import Image, JointState

        subscribe = self.endpoint.subscribe
        for key in (key for key, one in wanted.items() if one.is_image):
            subscribe(Image, image_topic(key), partial(self._on_image, key), quality(1, reliable=False))
        subscribe(JointState, OBSERVATION, self._on_vectors, quality(8))

    def _on_vectors(self, message: Any) -> None:
        if self._assembler is not None:
            self._queue(self._assembler.add_vectors(message))

    def _on_image(self, key: str, message: Any) -> None:
        if self._assembler is not None:
            self._queue(self._assembler.add_image(key, message))

    def _queue(self, observation: StampedObservation | None) -> None:
        if observation is None:
            return
        with self._arrived:
            self.dropped += len(self._observations) == self._observations.maxlen
            self._observations.append(observation)
            self._arrived.notify_all()


class RosOperatorLink:
    """An operator's end: sends readings and the e-stop, and shows the executor's status."""

    def __init__(self, endpoint: Endpoint | None = None) -> None:
        """Open the topics.

        Args:
            endpoint: node to use, or None for one named ``teleop``; `close` closes it in both cases.
        """
        self.endpoint = endpoint or Endpoint("teleop")
        from diagnostic_msgs.msg import DiagnosticArray
        from sensor_msgs.msg import Joy
        from std_msgs.msg import Bool, String

        self.status: ExecutorStatus | None = None
        """The newest status of the executor."""
        self.status_received = 0.0
        """Monotonic time (s) when it arrived; 0 before the first."""
        self.robot_spec: Spec | None = None
        """What the robot measures and takes, once it has announced itself."""
        self._announced = threading.Event()
        self._pressed = False
        self._reset_due: float | None = None
        self._newest: dict[str, tuple[float, bool]] = {}
        self._publish_operator = self.endpoint.publisher(Joy, OPERATOR, quality(64))
        self._publish_estop = self.endpoint.publisher(Bool, ESTOP, quality(1, latched=True))
        self.endpoint.subscribe(DiagnosticArray, STATUS, self._on_status, quality(16))
        self.endpoint.subscribe(String, ROBOT_SPEC, self._on_spec, quality(1, latched=True))
        self.endpoint.start()

    def wait_for_robot(self, timeout: float) -> Spec:
        """Return the robot's spec; raises `HardwareError` if no executor announced it within ``timeout`` seconds."""
        if not self._announced.wait(timeout) or self.robot_spec is None:
            topic = self.endpoint.node.resolve_topic_name(ROBOT_SPEC)
            raise HardwareError(f"no executor announced its robot on '{topic}' within {timeout:g} s")
        return self.robot_spec

    def send_operator(self, reading: OperatorInput) -> None:
        """Send one reading of the operator's device, and what its events mean for the e-stop.

        An emergency stop also presses the latched e-stop topic, so that an executor that starts later knows of it. A
        reset releases that topic first and follows `_RESET_DELAY` later: the two travel on different topics, and a
        reset that overtakes the release would be refused.

        The receiver stamps readings when they arrive, so one that is not newer than the last (a device that was lost)
        is not sent unless it asks for something: silence is what the executor recognises as a lost operator. That the
        dead-man switch was let go is sent at any rate.
        """
        newest, held = self._newest.get(reading.source, (-math.inf, False))
        let_go = held and not reading.enabled
        if reading.stamp <= newest and not let_go and not reading.events and self._reset_due is None:
            return
        self._newest[reading.source] = (max(newest, reading.stamp), reading.enabled)
        events = list(reading.events)
        if OperatorEvent.EMERGENCY_STOP in events:
            self.set_estop(True)
            self._reset_due = None
        elif OperatorEvent.RESET in events and self._pressed:
            self.set_estop(False)
            self._reset_due = time.monotonic() + _RESET_DELAY
            events.remove(OperatorEvent.RESET)
        elif self._reset_due is not None and time.monotonic() >= self._reset_due:
            self._reset_due = None
            events.insert(0, OperatorEvent.RESET)
        self._publish_operator(convert.to_joy(replace(reading, events=tuple(events))))

    def set_estop(self, pressed: bool) -> None:
        """Press or release the e-stop.

        Only changes are published, never an initial "released": a console that starts must not undo what another one
        pressed. Releasing starts nothing: the executor stays stopped until reset and re-enable.
        """
        if pressed or self._pressed:
            self._publish_estop(convert.to_bool(pressed))
        self._pressed = pressed

    def close(self) -> None:
        """Leave the graph."""
        self.endpoint.close()

    def _on_status(self, message: Any) -> None:
        self.status = convert.from_diagnostics(message)
        self.status_received = time.monotonic()

    def _on_spec(self, message: Any) -> None:
        self.robot_spec = Spec.from_json(convert.from_json_string(message))
        self._announced.set()
