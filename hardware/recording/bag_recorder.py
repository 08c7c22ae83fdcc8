"""Records messages of ROS 2 topics into MCAP: never waits for the disk, survives a kill, and says what it lost."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from robot_rl.core.errors import ConfigError, DataError, HardwareError

if TYPE_CHECKING:
    from robot_rl.data.bag.mcap_format import Schema

logger = logging.getLogger(__name__)

_DISK_SECONDS = 0.5
"""How often the free space is looked at."""


@dataclass(frozen=True)
class BagConfig:
    """How messages are written."""

    compression: str = "zstd"
    """What chunks are compressed by: zstd (its fastest level) or none."""
    chunk_kilobytes: int = 1000
    """A chunk is written when it holds this much; a larger message has a chunk of its own (kB)."""
    chunk_seconds: float = 0.25
    """A chunk is written when it is this old (s): what a kill may cost, and what a power failure costs at least."""
    queue_megabytes: int = 500
    """Messages that may wait for the disk (MB); beyond that they are dropped, counted and named."""
    keep_free_megabytes: int = 1000
    """Recording ends, with everything kept, when the disk has less than this left (MB)."""

    def __post_init__(self) -> None:
        if self.chunk_kilobytes < 1 or self.queue_megabytes < 1 or self.keep_free_megabytes < 0:
            raise ConfigError("chunk_kilobytes and queue_megabytes must be at least 1, keep_free_megabytes at least 0")
        if not 0 < self.chunk_seconds <= 10:
            raise ConfigError(f"chunk_seconds is {self.chunk_seconds:g}, expected more than 0 and at most 10")


class _Waiting(NamedTuple):
    """A message that waits for the disk."""

    channel: int
    log_time: int
    publish_time: int
    sequence: int
    data: bytes


class BagRecorder:
    """Writes a rosbag2 directory with one MCAP file, whose name ends in ``.part`` until it is finished.

    Two threads of its own work on it: one writes chunks, one has the disk keep them. `add` only queues.
    """

    def __init__(
        self, directory: str | Path, config: BagConfig | None = None, *, distribution: str | None = None
    ) -> None:
        """Create the directory and begin.

        Args:
            directory: of the recording; it must not exist, or be empty.
            config: how to write.
            distribution: release of ROS 2 for the metadata; ``ROS_DISTRO`` by default.

        Raises:
            DataError: the directory holds something, or nothing can be written there.
            HardwareError: its disk is nearly full already.
        """
        from robot_rl.data.bag.bag import UNFINISHED
        from robot_rl.data.bag.mcap_writer import McapWriter

        self.directory, self.config = Path(directory), config or BagConfig()
        self.dropped: Counter[str] = Counter()
        """Messages by topic that came and were not recorded: the disk was too slow, or recording had ended."""
        self.lost: Counter[str] = Counter()
        """Messages by topic that never came, known by their publisher's numbers."""
        self.stopped: str | None = None
        """Why recording ended before `close`, or None."""
        self._distribution = os.environ.get("ROS_DISTRO", "") if distribution is None else distribution
        self._prepare()
        self._target = self.directory / f"{self.directory.resolve().name}_0.mcap"
        self._writer = McapWriter(
            self._target.with_name(self._target.name + UNFINISHED),
            compression=self.config.compression,
            chunk_bytes=1000 * self.config.chunk_kilobytes,
        )
        self._topics: list[str] = []
        self._newest: dict[int, int] = {}
        self._queue: deque[_Waiting] = deque()
        self._queued = 0
        self._new: list[tuple[str, Schema | None, dict[str, str]]] = []
        self._changed, self._unsynced = threading.Condition(), threading.Event()
        self._closing, self._written = False, threading.Event()
        self._syncer = threading.Thread(target=self._sync_all, name="bag-sync", daemon=True)
        self._thread = threading.Thread(target=self._write_all, name="bag-writer", daemon=True)
        self._syncer.start()
        self._thread.start()

    @property
    def path(self) -> Path:
        """The file as it is called now."""
        return self._writer.path

    @property
    def written(self) -> dict[str, int]:
        """Messages by topic that were handed to the file."""
        return {name: self._writer.counts[number] for number, name in enumerate(self._topics)}

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._writer.size

    @property
    def waiting(self) -> int:
        """Bytes of messages that wait for the disk."""
        return self._queued

    def add_topic(
        self, name: str, kind: str, qos: Sequence[Mapping[str, Any]] = (), schema: Schema | None = None
    ) -> int:
        """Add a topic and return its number for `add`.

        Args:
            name: absolute name of the topic.
            kind: its type, such as ``sensor_msgs/msg/JointState``.
            qos: what its publishers offered, as rosbag2's metadata have it.
            schema: definition of the type; by default that of its installed package, or the one shipped.

        Raises:
            DataError: there is no definition of the type.
        """
        from robot_rl.data.bag.definitions import schema_of, type_hash
        from robot_rl.data.bag.metadata import qos_text

        schema = schema or schema_of(kind)
        metadata = {"offered_qos_profiles": qos_text(qos), "topic_type_hash": type_hash(kind)}
        with self._changed:
            self._new.append((name, schema, metadata))
            self._topics.append(name)
            return len(self._topics) - 1

    def add(
        self, topic: int, data: bytes, log_time: int | None = None, publish_time: int | None = None, sequence: int = 0
    ) -> bool:
        """Queue a message; never waits. Returns whether it was taken.

        Args:
            topic: number that `add_topic` returned.
            data: CDR with its encapsulation.
            log_time: when it was received, in nanoseconds since 1970; now by default.
            publish_time: when it was sent; the log time by default.
            sequence: its only publisher's number for it, counted in steps of 1; 0 where there is none to rely on.
        """
        log_time = time.time_ns() if log_time is None else log_time
        if sequence:
            newest = self._newest.get(topic, 0)
            if 0 < newest < sequence - 1:
                self._count(self.lost, topic, sequence - 1 - newest, "were lost on their way")
            self._newest[topic] = sequence
        with self._changed:
            fits = self._queued + len(data) <= 1_000_000 * self.config.queue_megabytes
            taken = fits and self.stopped is None and not self._closing
            if taken:
                publish_time = log_time if publish_time is None else publish_time
                self._queue.append(_Waiting(topic, log_time, publish_time, sequence, data))
                self._queued += len(data)
                self._changed.notify()
        if not taken:
            why = "come too late: recording has ended" if fits else "are dropped: the disk is too slow"
            self._count(self.dropped, topic, 1, why)
        return taken

    def close(self) -> None:
        """Write what waits, finish the file and give it its name; what was lost is logged. Safe to call twice."""
        if self._closing:
            return
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        for name, count in self.dropped.items():
            logger.warning("recording: %d messages of %s were dropped", count, name)
        for name, count in self.lost.items():
            logger.warning("recording: %d messages of %s did not arrive", count, name)

    def to_json(self) -> dict[str, Any]:
        """Return what was recorded, for a report."""
        return {
            "path": str(self.path),
            "messages": self.written,
            "bytes": self.size,
            "dropped": dict(self.dropped),
            "lost": dict(self.lost),
            "stopped": self.stopped,
        }

    def _prepare(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if any(self.directory.iterdir()):
                raise DataError(f"{self.directory}: is not empty; a recording needs a directory of its own")
        except OSError as error:
            raise DataError(f"{self.directory}: cannot be written ({error.strerror})") from error
        if self._free() < 1_000_000 * self.config.keep_free_megabytes:
            raise HardwareError(
                f"{self.directory}: its disk has {self._free() / 1e6:.0f} MB left, "
                f"less than the {self.config.keep_free_megabytes} MB to keep free"
            )

    def _free(self) -> int:
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize

    def _count(self, counter: Counter[str], topic: int, count: int, what: str) -> None:
        name = self._topics[topic]
        if not counter[name]:
            logger.warning("recording: messages of %s %s", name, what)
        counter[name] += count

    def _write_all(self) -> None:
        """Write chunks until `close` or until the disk has no room, then finish; the writer thread."""
        try:
            try:
                self._write_messages()
            finally:
                self._written.set()
                self._unsynced.set()
                self._syncer.join()
            self._finish()
        except Exception as error:  # whatever it is, the robot goes on and the chunks so far are on the disk
            self._stop(f"{type(error).__name__}: {error}")
            self._writer.abandon()
            self._queue.clear()
            logger.exception("recording ended; what was written can be rescued: robot-rl record recover %s", self.path)

    def _write_messages(self) -> None:
        writer, age, due = self._writer, self.config.chunk_seconds, 0.0
        look = 0.0
        while True:
            with self._changed:
                if not self._queue and not self._closing and self.stopped is None:
                    self._changed.wait(max(0.0, due - time.monotonic()) if writer.pending else _DISK_SECONDS)
                found = self._queue.popleft() if self._queue else None
                self._queued -= len(found.data) if found else 0
                added, self._new = self._new, []
                ended = found is None and (self._closing or self.stopped is not None)
            for topic in added:
                writer.add_channel(*topic)
            now = time.monotonic()
            if found is not None:
                if not writer.pending:
                    due = now + age
                full = writer.write(found.channel, found.log_time, found.data, found.publish_time, found.sequence)
                if full:
                    due = now + age
                    self._unsynced.set()
            if writer.pending and now >= due:
                writer.flush()
                self._unsynced.set()
            if now >= look:
                look = now + _DISK_SECONDS
                self._watch_disk()
            if ended:
                return

    def _watch_disk(self) -> None:
        free = self._free()
        if self.stopped is None and free < 1_000_000 * self.config.keep_free_megabytes:
            self._stop(f"the disk is nearly full: {free / 1e6:.0f} MB left")
            logger.error("recording ended: %s; everything so far is kept", self.stopped)

    def _stop(self, reason: str) -> None:
        with self._changed:
            self.stopped = self.stopped or reason

    def _finish(self) -> None:
        from robot_rl.data.bag.recover import write_metadata

        facts = {"dropped": json.dumps(self.dropped), "lost": json.dumps(self.lost), "stopped": self.stopped or ""}
        self._writer.add_metadata("recording", facts)
        self._writer.finish(self._target)
        write_metadata(self.directory, self._writer, facts, self._distribution)

    def _sync_all(self) -> None:
        """Have the disk keep each chunk, without holding up the next; the second thread."""
        while self._unsynced.wait() and not self._written.is_set():
            self._unsynced.clear()
            try:
                self._writer.sync()
            except OSError as error:
                self._stop(f"the disk does not keep what is written ({error.strerror})")
                return
