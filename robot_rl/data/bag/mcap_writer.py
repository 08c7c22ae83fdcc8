"""Writes MCAP files whose finished chunks survive whatever happens to the process."""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from robot_rl.core.errors import ConfigError, DataError
from robot_rl.data.bag import mcap_format as mcap
from robot_rl.data.bag.mcap_format import Channel, Schema
from robot_rl.data.durable import sync

COMPRESSIONS = ("zstd", "none")
"""What chunks can be compressed by."""


class McapWriter:
    """Writes messages in chunks; schemas and channels stand before the chunks, so that a cut file still names them.

    The file is ordinary from the first byte on; only the index at its end is missing until `finish`.
    """

    def __init__(self, path: Path, *, compression: str = "zstd", chunk_bytes: int = 1_000_000) -> None:
        """Create the file.

        Args:
            path: the file; it must not exist.
            compression: one of `COMPRESSIONS`.
            chunk_bytes: size at which a chunk is written; a larger message has a chunk of its own.

        Raises:
            DataError: the file exists or cannot be created.
        """
        if compression not in COMPRESSIONS:
            raise ConfigError(f"compression is '{compression}', expected one of: {', '.join(COMPRESSIONS)}")
        self.path, self.chunk_bytes = Path(path), chunk_bytes
        self.counts: Counter[int] = Counter()
        """Messages by channel."""
        self.start_time, self.end_time = 0, 0
        """Earliest and latest log time in nanoseconds; 0 before the first message."""
        self.size = 0
        """Bytes written."""
        self._compression = "" if compression == "none" else compression
        mcap.compress(self._compression, b"")  # is its package there?
        self._schemas: list[Schema] = []
        self._channels: list[Channel] = []
        self._chunk: list[bytes | memoryview] = []
        self._pending, self._indices = 0, dict[int, list[tuple[int, int]]]()
        self._chunk_indices: list[bytes] = []
        self._metadata_indices: list[bytes] = []
        try:
            self._file = self.path.open("xb", buffering=0)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be created ({error.strerror})") from error
        self._append(mcap.MAGIC + mcap.record(mcap.HEADER, mcap.text("ros2"), mcap.text("robot_rl")))

    @property
    def channels(self) -> dict[int, Channel]:
        """The topics by number."""
        return dict(enumerate(self._channels))

    @property
    def schemas(self) -> dict[int, Schema]:
        """The types by number, counted from 1."""
        return dict(enumerate(self._schemas, 1))

    def add_channel(
        self, topic: str, schema: Schema | None, metadata: Mapping[str, str] | None = None, encoding: str = "cdr"
    ) -> int:
        """Add a topic, whose type may be unknown, and return the number of its channel."""
        self.flush()
        if schema is not None and schema not in self._schemas:
            self._schemas.append(schema)
            self._append(mcap.schema_record(len(self._schemas), schema))
        number = 0 if schema is None else self._schemas.index(schema) + 1
        channel = Channel(topic, number, encoding, dict(metadata or {}))
        self._channels.append(channel)
        self._append(mcap.channel_record(len(self._channels) - 1, channel))
        return len(self._channels) - 1

    def write(
        self, channel: int, log_time: int, data: bytes | memoryview, publish_time: int | None = None, sequence: int = 0
    ) -> bool:
        """Add a message to the present chunk; return whether a chunk was written.

        Args:
            channel: number that `add_channel` returned.
            log_time: when it was received, in nanoseconds.
            data: CDR with its encapsulation.
            publish_time: when it was sent, in nanoseconds; the log time by default.
            sequence: its publisher's number for it.
        """
        size = mcap.PREFIX.size + mcap.MESSAGE_HEAD.size + len(data)
        full = bool(self._chunk) and self._pending + size > self.chunk_bytes
        if full:
            self.flush()
        publish_time = log_time if publish_time is None else publish_time
        head = mcap.PREFIX.pack(mcap.MESSAGE, mcap.MESSAGE_HEAD.size + len(data))
        head += mcap.MESSAGE_HEAD.pack(channel, sequence & 0xFFFFFFFF, log_time, publish_time)
        self._indices.setdefault(channel, []).append((log_time, self._pending))
        self._chunk += (head, data)
        self._pending += size
        self.counts[channel] += 1
        self.start_time = min(self.start_time or log_time, log_time)
        self.end_time = max(self.end_time, log_time)
        return full

    @property
    def pending(self) -> int:
        """Bytes of messages that are not in the file yet."""
        return self._pending

    def flush(self) -> None:
        """Write the present chunk, if it holds anything."""
        if not self._chunk:
            return
        records = b"".join(self._chunk)
        indices, self._indices, self._chunk, self._pending = self._indices, {}, [], 0
        times = [time for found in indices.values() for time, _ in found]
        stored = mcap.compress(self._compression, records)
        head = mcap.CHUNK_HEAD.pack(min(times), max(times), len(records), zlib.crc32(records))
        head += mcap.text(self._compression) + struct.pack("<Q", len(stored))
        start = self.size
        chunk = mcap.record(mcap.CHUNK, head, stored)
        offsets, index_records, position = {}, [], start + len(chunk)
        for channel, entries in indices.items():
            body = b"".join(struct.pack("<QQ", *entry) for entry in entries)
            index_records.append(mcap.record(mcap.MESSAGE_INDEX, struct.pack("<HI", channel, len(body)), body))
            offsets[channel] = position
            position += len(index_records[-1])
        self._append(b"".join((chunk, *index_records)))
        places = b"".join(struct.pack("<HQ", *pair) for pair in offsets.items())
        self._chunk_indices.append(
            mcap.record(
                mcap.CHUNK_INDEX,
                struct.pack("<QQQQI", min(times), max(times), start, len(chunk), len(places)),
                places,
                struct.pack("<Q", position - start - len(chunk)),
                mcap.text(self._compression),
                struct.pack("<QQ", len(stored), len(records)),
            )
        )

    def sync(self) -> None:
        """Wait until the disk has what was written; may run in another thread than `write`."""
        os.fdatasync(self._file.fileno())

    def add_metadata(self, name: str, values: Mapping[str, str]) -> None:
        """Write a named set of texts."""
        self.flush()
        found = mcap.record(mcap.METADATA, mcap.text(name), mcap.text_map(values))
        self._metadata_indices.append(
            mcap.record(mcap.METADATA_INDEX, struct.pack("<QQ", self.size, len(found)), mcap.text(name))
        )
        self._append(found)

    def finish(self, target: Path | None = None) -> None:
        """Write the index, bring everything to the disk, and rename the file to ``target`` if one is given."""
        self.flush()
        self._append(mcap.record(mcap.DATA_END, struct.pack("<I", 0)))
        self._append(self._summary(self.size))
        os.fsync(self._file.fileno())
        self._file.close()
        if target is not None:
            os.replace(self.path, target)
            sync(target.parent)
            self.path = target

    def abandon(self) -> None:
        """Close the file as it is, without its index."""
        self._file.close()

    def _summary(self, start: int) -> bytes:
        """Return everything from the summary to the end of the file; it begins at byte ``start``."""
        statistics = struct.pack(
            "<QHIIIIQQI",
            self.counts.total(),
            len(self._schemas),
            len(self._channels),
            0,
            len(self._metadata_indices),
            len(self._chunk_indices),
            self.start_time,
            self.end_time,
            10 * len(self._channels),
        ) + b"".join(struct.pack("<HQ", number, self.counts[number]) for number in range(len(self._channels)))
        groups = {
            mcap.SCHEMA: [mcap.schema_record(number, one) for number, one in self.schemas.items()],
            mcap.CHANNEL: [mcap.channel_record(number, one) for number, one in self.channels.items()],
            mcap.STATISTICS: [mcap.record(mcap.STATISTICS, statistics)],
            mcap.CHUNK_INDEX: self._chunk_indices,
            mcap.METADATA_INDEX: self._metadata_indices,
        }
        parts, offsets, position = [], [], start
        for opcode, records in groups.items():
            found = b"".join(records)
            if found:
                offsets.append(mcap.record(mcap.SUMMARY_OFFSET, struct.pack("<BQQ", opcode, position, len(found))))
                parts.append(found)
                position += len(found)
        summary = b"".join(parts + offsets) + mcap.PREFIX.pack(mcap.FOOTER, 20) + struct.pack("<QQ", start, position)
        return summary + struct.pack("<I", zlib.crc32(summary)) + mcap.MAGIC

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:  # a raw file may take a part only
                view = view[self._file.write(view) :]
        except OSError:
            os.ftruncate(self._file.fileno(), self.size)  # half a chunk helps nobody
            raise
        self.size += len(data)
