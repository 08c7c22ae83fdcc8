"""Reads MCAP files record by record, in the order of recording, whole or damaged."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from robot_rl.core.errors import DataError
from robot_rl.data.bag import mcap_format as mcap
from robot_rl.data.bag.mcap_format import Channel, Cursor, Message, Schema

_CHUNK_START = re.compile(rb"\x06.{36}(?:\x00{4}|\x03\x00{3}lz4|\x04\x00{3}zstd)", re.DOTALL)
_BLOCK = 1 << 24
_FOOTER_SIZE = mcap.PREFIX.size + 20 + len(mcap.MAGIC)


@dataclass
class Summary:
    """What the index at the end of a finished file says."""

    counts: Counter[int] = field(default_factory=Counter)
    """Messages by channel."""
    start_time: int = 0
    """Earliest log time in nanoseconds."""
    end_time: int = 0
    """Latest log time in nanoseconds."""


class McapReader:
    """The messages of one file.

    A strict reader raises `DataError` at the first damage. A ``tolerant`` one says in `damage` what it met, takes what
    can be had of a chunk that is cut, and goes on at the next chunk whose checksum agrees.
    """

    def __init__(self, path: Path, *, tolerant: bool = False) -> None:
        self.path, self.tolerant = Path(path), tolerant
        self.schemas: dict[int, Schema] = {}
        """Types by number: those read so far, or all after `read_summary`."""
        self.channels: dict[int, Channel] = {}
        """Topics by number: those read so far, or all after `read_summary`."""
        self.damage: list[str] = []
        """What was met that should not be there, one sentence each."""
        self.lost_bytes = 0
        """Bytes that could not be used."""
        self.metadata: dict[str, dict[str, str]] = {}
        """Named sets of texts."""
        self.complete = False
        """Whether the end of the data section was reached."""
        try:
            self.size = self.path.stat().st_size
            with self.path.open("rb") as file:
                start = file.read(len(mcap.MAGIC))
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        if start != mcap.MAGIC:
            raise DataError(f"{self.path}: is no MCAP file (it does not begin as one)")

    def messages(self) -> Iterator[Message]:
        """Yield every message in the order of the file."""
        with self.path.open("rb") as file:
            file.seek(len(mcap.MAGIC))
            position = len(mcap.MAGIC)
            while True:
                try:
                    opcode, length = self._prefix(file, position)
                except DataError as error:
                    position = self._complain(file, position, error)
                    if position < 0:
                        return
                    continue
                if opcode == mcap.DATA_END:
                    self.complete = True
                    return
                end = min(position + mcap.PREFIX.size + length, self.size)
                content = memoryview(file.read(end - position - mcap.PREFIX.size))
                try:
                    yield from self._record(opcode, content, length)
                except DataError as error:
                    if not self.tolerant:
                        raise DataError(f"{self.path}: at byte {position}: {error}") from error
                    self._note(position, end, error)
                position = end

    def read_summary(self) -> Summary | None:
        """Return what the file's end says and learn its topics, or None where the file has no sound end."""
        with self.path.open("rb") as file:
            file.seek(max(0, self.size - _FOOTER_SIZE))
            end = file.read()
            if len(end) < _FOOTER_SIZE or end[-8:] != mcap.MAGIC or mcap.PREFIX.unpack_from(end) != (mcap.FOOTER, 20):
                return None
            start = int.from_bytes(end[9:17], "little")
            if not len(mcap.MAGIC) <= start < self.size - _FOOTER_SIZE:
                return None
            file.seek(start)
            data = memoryview(file.read(min(self.size - _FOOTER_SIZE - start, mcap.MAX_RECORD)))
        summary, position = None, 0
        try:
            while position < len(data):
                cursor = Cursor(data[position:], "the summary")
                opcode, length = cursor.number(1), cursor.number(8)
                content = cursor.take(length)
                position += mcap.PREFIX.size + length
                if opcode == mcap.STATISTICS:
                    summary = _read_statistics(content)
                else:
                    self._definition(opcode, content)
        except DataError:
            return None
        return summary

    def _prefix(self, file: BinaryIO, position: int) -> tuple[int, int]:
        """Return opcode and length of the record at ``position``, where the file is; the length is plausible."""
        prefix = file.read(mcap.PREFIX.size)
        if len(prefix) < mcap.PREFIX.size:
            raise DataError("the file ends without its index: it is cut")
        opcode, length = mcap.PREFIX.unpack(prefix)
        left = self.size - position - mcap.PREFIX.size
        if not mcap.HEADER <= opcode <= mcap.DATA_END and opcode < 0x80:
            raise DataError(f"there is no record (opcode {opcode})")
        if length > mcap.MAX_RECORD:
            raise DataError(f"a record claims {length} bytes, more than the {mcap.MAX_RECORD} that are read")
        # A cut chunk gives what it has; of everything else a part is nothing.
        if length > left and not (self.tolerant and opcode == mcap.CHUNK):
            raise DataError(f"a record of {length} bytes is cut after {left}")
        return opcode, length

    def _record(self, opcode: int, content: memoryview, length: int) -> Iterator[Message]:
        if opcode == mcap.CHUNK:
            yield from self._chunk(content, length)
        elif opcode == mcap.MESSAGE:
            yield self._message(content)
        elif opcode == mcap.METADATA:
            cursor = Cursor(content, "metadata")
            name = cursor.text()
            self.metadata[name] = cursor.text_map()
        else:
            self._definition(opcode, content)

    def _definition(self, opcode: int, content: memoryview) -> None:
        if opcode == mcap.SCHEMA:
            number, schema = mcap.read_schema(content)
            self.schemas.setdefault(number, schema)
        elif opcode == mcap.CHANNEL:
            number, channel = mcap.read_channel(content)
            self.channels.setdefault(number, channel)

    def _message(self, content: memoryview) -> Message:
        message = mcap.read_message(content)
        if message.channel not in self.channels:
            raise DataError(f"a message of the unknown channel {message.channel}")
        return message

    def _chunk(self, content: memoryview, length: int) -> Iterator[Message]:
        """Yield the messages of a chunk, of which only the beginning may be there."""
        cut = len(content) < length
        cursor = Cursor(content, "a chunk")
        _, _, size, crc = mcap.CHUNK_HEAD.unpack(cursor.take(mcap.CHUNK_HEAD.size))
        compression, stored = cursor.text(), cursor.number(8)
        if not cut and stored != len(cursor.rest):
            raise DataError(f"a chunk of {len(cursor.rest)} bytes claims {stored}")
        records = memoryview(mcap.decompress(compression, cursor.rest, size, cut=cut))
        if not cut and crc and mcap.checksum(records) != crc:
            raise DataError("the checksum of a chunk differs; its messages are not used")
        position, used = 0, 0
        while position + mcap.PREFIX.size <= len(records):
            opcode, inner = mcap.PREFIX.unpack_from(records, position)
            start, position = position + mcap.PREFIX.size, position + mcap.PREFIX.size + inner
            if position > len(records):
                break
            used = position
            if opcode == mcap.MESSAGE:
                yield self._message(records[start:position])
            else:
                self._definition(opcode, records[start:position])
        if used < size:
            raise DataError(f"a chunk ends {size - used} bytes before its last message does")

    def _complain(self, file: BinaryIO, position: int, error: DataError) -> int:
        """Raise, or note the damage and return where the next sound chunk begins; -1 for nowhere."""
        if not self.tolerant:
            hint = "; see: robot-rl record recover" if self.size > len(mcap.MAGIC) else ""
            raise DataError(f"{self.path}: at byte {position}: {error}{hint}") from error
        found = self._next_chunk(file, position + 1)
        self._note(position, self.size if found < 0 else found, error)
        file.seek(max(found, 0))
        return found

    def _note(self, start: int, end: int, error: DataError) -> None:
        self.lost_bytes += end - start
        where = f"bytes {start} to {end}" if end > start else f"at byte {start}"
        self.damage.append(f"{where}: {error}")

    def _next_chunk(self, file: BinaryIO, position: int) -> int:
        """Return where the first chunk at or after ``position`` begins whose checksum agrees, or -1."""
        overlap = mcap.PREFIX.size + 40
        while position < self.size:
            file.seek(position)
            block = file.read(_BLOCK + overlap)
            for match in _CHUNK_START.finditer(block):
                if match.start() < _BLOCK and self._is_chunk(file, position + match.start()):
                    return position + match.start()
            position += _BLOCK
        return -1

    def _is_chunk(self, file: BinaryIO, position: int) -> bool:
        file.seek(position)
        opcode, length = mcap.PREFIX.unpack(file.read(mcap.PREFIX.size))
        if opcode != mcap.CHUNK or length > min(mcap.MAX_RECORD, self.size - position):
            return False
        try:
            cursor = Cursor(file.read(length), "a chunk")
            _, _, size, crc = mcap.CHUNK_HEAD.unpack(cursor.take(mcap.CHUNK_HEAD.size))
            compression = cursor.text()
            cursor.number(8)
            return crc != 0 and mcap.checksum(mcap.decompress(compression, cursor.rest, size)) == crc
        except DataError:
            return False


def _read_statistics(content: memoryview) -> Summary:
    cursor = Cursor(content, "the statistics")
    cursor.take(8 + 2 + 4 * 4)
    start, end = cursor.number(8), cursor.number(8)
    inner = Cursor(cursor.take(cursor.number(4)), "the statistics")
    counts: Counter[int] = Counter()
    while inner.rest:
        number = inner.number(2)
        counts[number] = inner.number(8)
    return Summary(counts, start, end)
