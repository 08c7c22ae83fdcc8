"""The recorder process: writes ROS 2 topics, as they come over the wire, into a rosbag2 directory."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hardware.recording.bag_recorder import BagConfig, BagRecorder
from hardware.ros.endpoint import Endpoint
from hardware.ros.lifecycle import ManagedConfig, run_managed_node
from hardware.ros.parameters import Range
from robot_rl.core.errors import ConfigError, DataError, HardwareError, MissingDependencyError

if TYPE_CHECKING:
    from rclpy.qos import QoSProfile
    from rclpy.subscription import Subscription
    from rclpy.topic_endpoint_info import TopicEndpointInfo

logger = logging.getLogger(__name__)

_TYPE = re.compile(r"([A-Za-z][A-Za-z0-9_]*)/msg/([A-Za-z][A-Za-z0-9_]*)")
_LARGE = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/PointCloud2")
_DEPTHS = (30, 2000)
"""Messages that the middleware keeps while we are busy: of large types, of others. One camera's 30 images are 28 MB."""
_LOOK_SECONDS = 0.5
_DRAIN_SECONDS = 5.0
_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class RecorderNodeConfig(ManagedConfig):
    """Settings of the recorder process."""

    out: str = ""
    """Directory of the recording; it must not exist, or be empty. Activated again, the node records to out_2, …"""
    topics: tuple[str, ...] = ()
    """Topics to record; a name without a slash is relative to this node's namespace. One that ends in ``/*`` stands for
    every topic below it, however many there are."""
    everything: bool = False
    """Record every topic that there is or will be."""
    exclude: str = "/rosout|/parameter_events"
    """Regular expression of topics that ``everything`` leaves out."""
    seconds: Annotated[float, Range(0.0)] = 0.0
    """How long to record (s); 0 until it is interrupted."""
    patience: Annotated[float, Range(0.0)] = 10.0
    """After this time (s), topics that nobody publishes are named in the log; they are still waited for."""
    compression: str = BagConfig.compression
    """What chunks are compressed by: zstd (its fastest level) or none."""
    chunk_kilobytes: Annotated[int, Range(1)] = BagConfig.chunk_kilobytes
    """A chunk is written when it holds this much (kB)."""
    chunk_seconds: Annotated[float, Range(0.01, 10.0)] = BagConfig.chunk_seconds
    """A chunk is written when it is this old (s); this is what a kill may cost."""
    queue_megabytes: Annotated[int, Range(1)] = BagConfig.queue_megabytes
    """Messages that may wait for the disk (MB); beyond that they are dropped, counted and named."""
    keep_free_megabytes: Annotated[int, Range(0)] = BagConfig.keep_free_megabytes
    """Recording ends, with everything kept, when the disk has less than this left (MB)."""
    report: str = ""
    """JSON file that gets the counts at the end; empty for none."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("no directory given: --out <directory>, or the parameter 'out'")
        if not self.topics and not self.everything:
            raise ConfigError("nothing to record: --topics <topic> (may be given several times), or --everything")
        try:
            re.compile(self.exclude)
        except re.error as error:
            raise ConfigError(f"exclude is no regular expression: {error}") from error
        self.bag()

    def bag(self) -> BagConfig:
        """Return how messages are written."""
        return BagConfig(
            self.compression,
            self.chunk_kilobytes,
            self.chunk_seconds,
            self.queue_megabytes,
            self.keep_free_megabytes,
        )


@dataclass
class _Recorded:
    """One topic that is being recorded."""

    number: int
    """Its number in the recorder."""
    reliable: bool
    """Whether it was asked for reliably."""
    latched: bool
    """Whether it was asked for with what late joiners get."""
    numbered: bool
    """Whether its messages have one publisher's numbers."""
    subscription: Subscription = field(init=False)
    """What brings its messages."""


class TopicRecorder:
    """Subscribes to topics as they appear, with the quality of service that all of their publishers offer."""

    def __init__(self, endpoint: Endpoint, recorder: BagRecorder, config: RecorderNodeConfig) -> None:
        self._endpoint, self._recorder, self._config = endpoint, recorder, config
        resolved = endpoint.node.resolve_topic_name
        self._wanted = {resolved(name) for name in config.topics if not name.endswith("/*")}
        self._below = tuple(resolved(name.removesuffix("/*")) + "/" for name in config.topics if name.endswith("/*"))
        self._exclude = re.compile(config.exclude)
        self._topics: dict[str, _Recorded] = {}
        self._refused: set[str] = set()

    @property
    def missing(self) -> list[str]:
        """Topics that were asked for and that nobody has published."""
        return sorted(self._wanted - set(self._topics) - self._refused)

    def look(self) -> None:
        """Subscribe to what has appeared, and again to what is offered differently now.

        Raises:
            DataError: the type of a topic that was asked for is not installed.
        """
        for name, kinds in self._endpoint.node.get_topic_names_and_types():
            wanted = name in self._wanted or name.startswith(self._below)
            wanted = wanted or (self._config.everything and not self._exclude.fullmatch(name))
            if not wanted or name in self._refused:
                continue
            publishers = self._endpoint.node.get_publishers_info_by_topic(name)
            if not publishers:
                continue
            try:
                self._record(name, kinds, publishers)
            except (DataError, MissingDependencyError) as error:
                if name in self._wanted:
                    raise
                self._refused.add(name)
                logger.warning("%s is not recorded: %s", name, error)

    def release(self) -> None:
        """Record what has arrived, and end every subscription."""
        self._end(list(self._topics.values()))
        self._topics.clear()

    def _record(self, name: str, kinds: Sequence[str], publishers: Sequence[TopicEndpointInfo]) -> None:
        if len(kinds) > 1:
            raise DataError(f"topic '{name}' has several types: {', '.join(kinds)}")
        profile = _profile(kinds[0], publishers)
        reliable, latched = _strength(profile)
        present = self._topics.get(name)
        if present is not None:
            present.numbered &= len(publishers) == 1
            if (present.reliable, present.latched) == (reliable, latched):
                return
            self._end([present])
            logger.info("%s: a publisher offers another quality of service, subscribed again", name)
            number = present.number
        else:
            number = self._recorder.add_topic(name, kinds[0], [qos_entry(one.qos_profile) for one in publishers])
            logger.info("recording %s (%s)", name, kinds[0])
        topic = _Recorded(number, reliable, latched, len(publishers) == 1)
        topic.subscription = self._endpoint.node.create_subscription(
            _message_type(kinds[0]), name, partial(self._received, topic), profile, raw=True
        )
        self._topics[name] = topic

    def _end(self, topics: Sequence[_Recorded]) -> None:
        """Have the I/O thread record what the middleware still holds of ``topics``, and end their subscriptions."""
        done = threading.Event()

        def drain() -> None:
            for topic in topics:
                for _ in range(_DEPTHS[True]):  # more than it holds: whoever goes on sending is not waited for
                    with topic.subscription.handle:
                        found = topic.subscription.handle.take_message(topic.subscription.msg_type, True)
                    if found is None:
                        break
                    self._received(topic, *found)
            done.set()

        if topics:
            self._endpoint.run_in_thread(drain)
            if not done.wait(_DRAIN_SECONDS):
                logger.error("the last messages could not be fetched within %.0f s", _DRAIN_SECONDS)
        for topic in topics:
            self._endpoint.node.destroy_subscription(topic.subscription)

    def _received(self, topic: _Recorded, data: bytes, info: dict[str, Any]) -> None:
        """Queue one message; runs in the I/O thread."""
        sequence = info.get("publication_sequence_number") or 0
        self._recorder.add(
            topic.number,
            data,
            info["received_timestamp"] or time.time_ns(),
            info["source_timestamp"] or None,
            sequence if topic.numbered else 0,
        )


def _message_type(kind: str) -> type:
    """Return the Python class of a message type; only its support for the middleware is used."""
    found = _TYPE.fullmatch(kind)
    if found is None:
        raise DataError(f"'{kind[:100]}' is no message type")
    package, name = found.groups()
    try:
        return getattr(import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(package, "ros", f"Recording messages of type '{kind}'") from error


def _profile(kind: str, publishers: Sequence[TopicEndpointInfo]) -> QoSProfile:
    """Return the strongest quality of service that every one of ``publishers`` offers."""
    from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

    offered = [one.qos_profile for one in publishers]
    reliable = all(one.reliability == ReliabilityPolicy.RELIABLE for one in offered)
    latched = all(one.durability == DurabilityPolicy.TRANSIENT_LOCAL for one in offered)
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=_DEPTHS[kind not in _LARGE],
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


def _strength(profile: QoSProfile) -> tuple[bool, bool]:
    from rclpy.qos import DurabilityPolicy, ReliabilityPolicy

    return (
        profile.reliability == ReliabilityPolicy.RELIABLE,
        profile.durability == DurabilityPolicy.TRANSIENT_LOCAL,
    )


def qos_entry(profile: QoSProfile) -> dict[str, Any]:
    """Return a quality of service as rosbag2's metadata have it."""

    def span(duration: Any) -> dict[str, int]:
        seconds, nanoseconds = divmod(duration.nanoseconds, 1_000_000_000)
        return {"sec": seconds, "nsec": nanoseconds}

    return {
        "history": profile.history.short_key,
        "depth": profile.depth,
        "reliability": profile.reliability.short_key,
        "durability": profile.durability.short_key,
        "deadline": span(profile.deadline),
        "lifespan": span(profile.lifespan),
        "liveliness": profile.liveliness.short_key,
        "liveliness_lease_duration": span(profile.liveliness_lease_duration),
        "avoid_ros_namespace_conventions": profile.avoid_ros_namespace_conventions,
    }


class RecorderWork:
    """Records while the node is active; each activation makes a recording of its own."""

    def __init__(self, config: RecorderNodeConfig, endpoint: Endpoint) -> None:
        self.config, self.endpoint = config, endpoint
        self.recorder: BagRecorder | None = None
        """The present recording, or the last."""
        self._count = 0

    def start(self) -> None:
        """Create the recording.

        Raises:
            DataError: its directory holds something, or cannot be written.
            HardwareError: the disk is nearly full.
        """
        name = self.config.out if not self._count else f"{self.config.out}_{self._count + 1}"
        self.recorder = BagRecorder(name, self.config.bag())
        self._count += 1

    def run(self, stop: threading.Event) -> None:
        """Record until ``stop`` is set or the time is over; whatever ends it, the file is finished.

        Raises:
            DataError: the type of a topic is not installed.
            HardwareError: recording ended by itself, because the disk is nearly full or failed; what there is, is kept.
        """
        recorder = self.recorder
        assert recorder is not None
        topics = TopicRecorder(self.endpoint, recorder, self.config)
        try:
            self._watch(topics, recorder, stop)
        finally:
            topics.release()
            recorder.close()
            logger.info("%s in %s", progress(recorder), recorder.path)
            if self.config.report:
                path = Path(self.config.report)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(recorder.to_json(), indent=2) + "\n")
        if recorder.stopped is not None:
            raise HardwareError(f"recording ended early: {recorder.stopped}; what came before is in {recorder.path}")

    def close(self) -> None:
        """Finish a recording that was created and never run."""
        if self.recorder is not None:
            self.recorder.close()

    def _watch(self, topics: TopicRecorder, recorder: BagRecorder, stop: threading.Event) -> None:
        """Look for topics and say how it goes."""
        config, begun = self.config, time.monotonic()
        patience, report_due = begun + config.patience, begun + _REPORT_SECONDS
        while not stop.is_set() and recorder.stopped is None:
            topics.look()
            now = time.monotonic()
            if config.seconds and now - begun >= config.seconds:
                return
            if now >= patience:
                patience = float("inf")
                for name in topics.missing:
                    logger.warning("nobody publishes %s so far", name)
            if now >= report_due:
                report_due = now + _REPORT_SECONDS
                logger.info("%s", progress(recorder))
            left = begun + config.seconds - now if config.seconds else _LOOK_SECONDS
            stop.wait(min(_LOOK_SECONDS, left))


def progress(recorder: BagRecorder) -> str:
    """Return what was recorded so far, in one line."""
    counts = recorder.written
    lost = {"dropped": recorder.dropped.total(), "lost on their way": recorder.lost.total()}
    extra = "".join(f", {count} {how}" for how, count in lost.items() if count)
    return f"{sum(counts.values())} messages of {len(counts)} topics, {recorder.size / 1e6:.1f} MB{extra}"


def main(argv: list[str] | None = None) -> int:
    """Run the recorder process and return its exit code."""
    return run_managed_node("recorder", RecorderNodeConfig, RecorderWork, argv)


if __name__ == "__main__":
    sys.exit(main())
