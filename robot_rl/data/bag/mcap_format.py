"""MCAP records as bytes and back: the few of the format that a recording of ROS 2 messages needs.

Layout of the format: https://mcap.dev/spec. Every number is little-endian; strings and blocks carry their length before
them. What is read comes from anybody, so that every length is compared with what is there before it is believed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from robot_rl.core.errors import DataError, MissingDependencyError
from robot_rl.data.bag.names import printable

MAGIC = b"\x89MCAP0\r\n"
"""First and last bytes of a file."""
HEADER, FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, MESSAGE_INDEX, CHUNK_INDEX = range(1, 9)
ATTACHMENT, ATTACHMENT_INDEX, STATISTICS, METADATA, METADATA_INDEX, SUMMARY_OFFSET, DATA_END = range(9, 16)
MAX_RECORD = 1 << 30
"""Longest record (bytes) that is read."""
MAX_CHUNK = 1 << 28
"""Largest chunk (bytes) after decompression."""
_MAX_WINDOW = 1 << 27
_LATEST = (1 << 63) - 1
PREFIX = struct.Struct("<BQ")
"""Opcode and length before every record."""
MESSAGE_HEAD = struct.Struct("<HIQQ")
"""Channel, sequence, log time and publish time before a message's payload."""
CHUNK_HEAD = struct.Struct("<QQQI")
"""First and last log time, size and CRC-32 of the records without compression."""


class Message(NamedTuple):
    """One message as it was recorded."""

    channel: int
    sequence: int
    """Number that its publisher gave it, counted from 1 in steps of 1; 0 where unknown."""
    log_time: int
    """When it was received, in nanoseconds."""
    publish_time: int
    """When it was sent, in nanoseconds."""
    data: bytes | memoryview
    """Payload: CDR with its four bytes of encapsulation."""


@dataclass(frozen=True)
class Schema:
    """Type of messages."""

    name: str
    """Such as ``sensor_msgs/msg/JointState``."""
    encoding: str
    """``ros2msg`` for the text of .msg files."""
    data: bytes
    """The definition."""


@dataclass(frozen=True)
class Channel:
    """One topic."""

    topic: str
    schema: int
    """Number of its schema; 0 for none."""
    encoding: str = "cdr"
    metadata: Mapping[str, str] = field(default_factory=dict)


def record(opcode: int, *parts: bytes | memoryview) -> bytes:
    """Return a record with the concatenated ``parts`` as its content."""
    return b"".join((PREFIX.pack(opcode, sum(map(len, parts))), *parts))


def text(value: str) -> bytes:
    """Return a string with its length."""
    encoded = value.encode()
    return struct.pack("<I", len(encoded)) + encoded


def text_map(values: Mapping[str, str]) -> bytes:
    """Return pairs of strings with their length in bytes."""
    encoded = b"".join(text(key) + text(value) for key, value in values.items())
    return struct.pack("<I", len(encoded)) + encoded


def schema_record(number: int, schema: Schema) -> bytes:
    """Return the record of a schema."""
    head = struct.pack("<H", number) + text(schema.name) + text(schema.encoding)
    return record(SCHEMA, head, struct.pack("<I", len(schema.data)), schema.data)


def channel_record(number: int, channel: Channel) -> bytes:
    """Return the record of a channel."""
    head = struct.pack("<HH", number, channel.schema) + text(channel.topic) + text(channel.encoding)
    return record(CHANNEL, head, text_map(channel.metadata))


class Cursor:
    """Reads the fields of one record in order; `DataError` where it is shorter than they say."""

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self._data, self._what, self.position = memoryview(data), what, 0

    @property
    def rest(self) -> memoryview:
        """What was not read yet."""
        return self._data[self.position :]

    def take(self, count: int) -> memoryview:
        """Return the next ``count`` bytes."""
        end = self.position + count
        if end > len(self._data):
            raise DataError(f"{self._what} is cut or damaged")
        found, self.position = self._data[self.position : end], end
        return found

    def number(self, size: int) -> int:
        """Return the next unsigned integer of ``size`` bytes."""
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        """Return the next string."""
        try:
            return str(self.take(self.number(4)), "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self._what} holds text that is not UTF-8") from error

    def text_map(self) -> dict[str, str]:
        """Return the next pairs of strings."""
        inner = Cursor(self.take(self.number(4)), self._what)
        found = {}
        while inner.rest:
            key = inner.text()
            found[key] = inner.text()
        return found


def read_schema(content: bytes | memoryview) -> tuple[int, Schema]:
    """Return number and schema of a record's content."""
    cursor = Cursor(content, "a schema")
    number, name, encoding = cursor.number(2), cursor.text(), cursor.text()
    return number, Schema(printable(name), encoding, bytes(cursor.take(cursor.number(4))))


def read_channel(content: bytes | memoryview) -> tuple[int, Channel]:
    """Return number and channel of a record's content."""
    cursor = Cursor(content, "a channel")
    number, schema, topic, encoding = cursor.number(2), cursor.number(2), cursor.text(), cursor.text()
    return number, Channel(printable(topic), schema, encoding, cursor.text_map())


def read_message(content: memoryview) -> Message:
    """Return the message of a record's content; its payload shares the memory."""
    if len(content) < MESSAGE_HEAD.size:
        raise DataError("a message is cut or damaged")
    message = Message(*MESSAGE_HEAD.unpack_from(content), content[MESSAGE_HEAD.size :])
    if max(message.log_time, message.publish_time) > _LATEST:
        raise DataError("a message is from a time that there is not")
    return message


def compress(name: str, data: bytes) -> bytes:
    """Return ``data`` compressed by ``zstd`` (its fastest level) or not at all (empty ``name``)."""
    if not name:
        return data
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependencyError("zstandard", "record", "A compressed recording") from error
    return zstandard.ZstdCompressor(level=-1).compress(data)


def decompress(name: str, data: memoryview, size: int, *, cut: bool = False) -> bytes:
    """Return the ``size`` bytes that were compressed as ``data``.

    Args:
        name: ``zstd``, ``lz4`` or empty.
        data: what was stored.
        size: bytes before compression, as the file says.
        cut: whether the end of ``data`` may be missing; then what can be had of it is returned.

    Raises:
        DataError: the data are damaged, larger than `MAX_CHUNK` or of another size.
        MissingDependencyError: the package for this compression is not installed.
    """
    if size > MAX_CHUNK:
        raise DataError(f"a chunk of {size} bytes is larger than the {MAX_CHUNK} that are read")
    if name == "":
        found = bytes(data[:size])
    elif name == "zstd":
        found = _zstd(data, size)
    elif name == "lz4":
        found = _lz4(data, size)
    else:
        raise DataError(f"a chunk is compressed by '{printable(name, 20)}'; known: zstd, lz4")
    if len(found) != size and not cut:
        raise DataError(f"a chunk holds {len(found)} bytes and should hold {size}")
    return found


def _zstd(data: memoryview, size: int) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependencyError("zstandard", "record", "This recording") from error
    parts, missing = [], size
    try:
        # Read as a stream: `decompress` would believe a frame that claims to hold terabytes.
        with zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(data) as reader:
            while missing and (part := reader.read(min(missing, 1 << 20))):
                parts.append(part)
                missing -= len(part)
    except zstandard.ZstdError as error:
        if not parts:
            raise DataError(f"a chunk cannot be decompressed ({error})") from error
    return b"".join(parts)


def _lz4(data: memoryview, size: int) -> bytes:
    try:
        import lz4.frame
    except ImportError as error:
        raise MissingDependencyError("lz4", "record", "This recording") from error
    try:
        return lz4.frame.LZ4FrameDecompressor().decompress(data, max_length=size)
    except (RuntimeError, EOFError) as error:
        raise DataError(f"a chunk cannot be decompressed ({error})") from error


def checksum(data: bytes | memoryview) -> int:
    """Return the CRC-32 of ``data``, as chunks carry it."""
    return zlib.crc32(data)
