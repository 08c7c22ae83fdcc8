"""Recordings of ROS 2 topics, ours or a stranger's: one way to read MCAP files and rosbag2 directories."""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from robot_rl.core.errors import DataError, UnknownNameError
from robot_rl.data.bag import mcap_format as mcap
from robot_rl.data.bag.definitions import standard_types
from robot_rl.data.bag.mcap_format import Channel, Schema
from robot_rl.data.bag.mcap_reader import McapReader
from robot_rl.data.bag.messages import MessageType, parse_definitions
from robot_rl.data.bag.metadata import FILE, Metadata, read_metadata
from robot_rl.data.bag.names import printable

UNFINISHED = ".part"
"""What the name of a recording ends in until it is finished."""
_SQLITE = b"SQLite format 3\0"


class RawMessage(NamedTuple):
    """One message of a recording."""

    topic: str
    """Its topic."""
    log_time: int
    """When it was received, in nanoseconds of the recorder's clock."""
    publish_time: int
    """When it was sent, in nanoseconds of the sender's clock."""
    sequence: int
    """Its publisher's number for it, counted in steps of 1; 0 where unknown."""
    data: bytes | memoryview
    """CDR with its encapsulation."""


@dataclass
class Topic:
    """One topic of a recording."""

    name: str
    """Such as ``/joint_states``."""
    type: str
    """Such as ``sensor_msgs/msg/JointState``."""
    count: int | None = None
    """Messages, or None where the recording does not say."""
    definition: str | None = None
    """Text of its type's definition, or None where the recording has none."""
    encoding: str = "cdr"
    """How its messages are encoded."""

    def message_type(self) -> MessageType:
        """Return the decoder of its messages.

        Raises:
            DataError: the type is not defined, or its messages are not CDR.
        """
        try:
            if self.encoding != "cdr":
                raise DataError(f"its messages are encoded as '{printable(self.encoding, 40)}', only CDR is read")
            if self.definition is None:
                return MessageType(self.type, standard_types(self.type))
            return MessageType(self.type, parse_definitions(self.type, self.definition))
        except DataError as error:
            raise DataError(f"topic '{self.name}': {error}") from error


class Bag(ABC):
    """A recording, opened for reading; see `open_bag`."""

    storage = ""

    def __init__(self, path: Path, files: Collection[Path], metadata: Metadata | None) -> None:
        self.path, self.files, self.metadata = path, list(files), metadata
        self.topics: dict[str, Topic] = {}

    def topic(self, name: str) -> Topic:
        """Return a topic; `UnknownNameError` with the nearest name if it was not recorded."""
        if name not in self.topics:
            raise UnknownNameError(f"topic of {self.path}", name, self.topics)
        return self.topics[name]

    def messages(self, topics: Collection[str] | None = None) -> Iterator[RawMessage]:
        """Yield the messages of ``topics`` (all by default) in the order of recording.

        Raises:
            DataError: the recording is cut or damaged.
        """
        for file in self.files:
            yield from self._messages(file, topics)

    @abstractmethod
    def _messages(self, file: Path, topics: Collection[str] | None) -> Iterator[RawMessage]:
        """Yield the messages of one file."""


class McapBag(Bag):
    """A recording in MCAP files."""

    storage = "mcap"

    def __init__(self, path: Path, files: Collection[Path], metadata: Metadata | None) -> None:
        super().__init__(path, files, metadata)
        for file in self.files:
            reader = McapReader(file)
            summary = reader.read_summary()
            if summary is None:
                for _ in reader.messages():  # names its topics, and raises where it is cut
                    pass
            for number, channel in reader.channels.items():
                topic = self.topics.setdefault(channel.topic, _topic(channel, reader.schemas.get(channel.schema)))
                count = None if summary is None else summary.counts[number]
                topic.count = None if count is None else (topic.count or 0) + count

    def _messages(self, file: Path, topics: Collection[str] | None) -> Iterator[RawMessage]:
        reader = McapReader(file)
        for channel, sequence, log_time, publish_time, data in reader.messages():
            topic = reader.channels[channel].topic
            if topics is None or topic in topics:
                yield RawMessage(topic, log_time, publish_time, sequence, data)


def _topic(channel: Channel, schema: Schema | None) -> Topic:
    if schema is None or schema.encoding != "ros2msg":
        # Without a definition that we read, the standard type of that name is taken.
        return Topic(channel.topic, "" if schema is None else schema.name, encoding=channel.encoding)
    definition = schema.data.decode("utf-8", "replace")
    return Topic(channel.topic, schema.name, definition=definition, encoding=channel.encoding)


class SqliteBag(Bag):
    """A recording in sqlite3 files, opened without a way to write and without trust in what their schema says."""

    storage = "sqlite3"

    def __init__(self, path: Path, files: Collection[Path], metadata: Metadata | None) -> None:
        super().__init__(path, files, metadata)
        counts = {} if metadata is None else {topic.name: topic.count for topic in metadata.topics}
        for file in self.files:
            with closing(_connect(file)) as database, _sqlite_errors(file):
                definitions = _definitions(database)
                for name, kind, encoding in database.execute("SELECT name, type, serialization_format FROM topics"):
                    name = printable(str(name))
                    topic = Topic(name, printable(str(kind)), counts.get(name), definitions.get(kind), str(encoding))
                    self.topics.setdefault(name, topic)

    def _messages(self, file: Path, topics: Collection[str] | None) -> Iterator[RawMessage]:
        with closing(_connect(file)) as database, _sqlite_errors(file):
            rows = database.execute("SELECT id, name FROM topics")
            names = {int(number): printable(str(name)) for number, name in rows}
            chosen = [number for number, name in names.items() if topics is None or name in topics]
            marks = ",".join("?" * len(chosen))
            rows = database.execute(
                f"SELECT topic_id, timestamp, data FROM messages WHERE topic_id IN ({marks}) ORDER BY id", chosen
            )
            for number, time, data in rows:
                if not isinstance(time, int) or not isinstance(data, bytes):
                    raise DataError(f"{file}: a message is no row of time and bytes")
                yield RawMessage(names[number], time, time, 0, data)


@contextmanager
def _sqlite_errors(file: Path) -> Iterator[None]:
    """Turn what sqlite3 raises on a damaged file into a one-line `DataError`."""
    try:
        yield
    except (sqlite3.Error, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: cannot be read, it may be truncated or damaged ({printable(str(error))})") from error


def _connect(file: Path) -> sqlite3.Connection:
    for suffix in ("-wal", "-journal"):
        beside = file.with_name(file.name + suffix)
        if beside.exists() and beside.stat().st_size:
            raise DataError(f"{file}: was not closed, '{beside.name}' holds the rest: sqlite3 {file.name} .tables")
    with _sqlite_errors(file):
        database = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        database.text_factory = lambda data: data.decode("utf-8", "replace")
        database.execute("PRAGMA trusted_schema = OFF")
        database.execute("PRAGMA query_only = ON")
        database.execute("PRAGMA cell_size_check = ON")
        if hasattr(database, "setlimit"):  # Python 3.11
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, mcap.MAX_CHUNK)
        # A view could compute for ever, so that only tables are read.
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not {"topics", "messages"} <= tables:
        database.close()
        raise DataError(f"{file}: is no recording (it has no tables 'topics' and 'messages')")
    return database


def _definitions(database: sqlite3.Connection) -> dict[str, str]:
    """Return the definitions by type, which rosbag2 stores since its schema 4."""
    found = database.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'message_definitions'")
    if found.fetchone() is None:
        return {}
    rows = database.execute("SELECT topic_type, encoding, encoded_message_definition FROM message_definitions")
    return {str(kind): str(text) for kind, encoding, text in rows if encoding == "ros2msg"}


def open_bag(path: str | Path) -> Bag:
    """Open a recording.

    Args:
        path: a rosbag2 directory, an MCAP file or a sqlite3 file (``.db3``).

    Raises:
        DataError: there is no such thing, it is cut or damaged (the message says how to rescue what is there), or it is
            compressed in a way that is not read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_directory(path)
    if not path.is_file():
        raise DataError(f"{path}: does not exist")
    return _open_files(path, [path], None)


def _open_directory(path: Path) -> Bag:
    if not (path / FILE).is_file():
        unfinished = sorted(path.glob(f"*{UNFINISHED}"))
        if unfinished:
            raise DataError(f"{path}: was not finished; rescue it: robot-rl record recover {unfinished[0]}")
        files = sorted(file for file in path.iterdir() if file.suffix in (".mcap", ".db3"))
        if not files:
            raise DataError(f"{path}: is no recording (neither {FILE} nor files of messages)")
        return _open_files(path, files, None)
    metadata = read_metadata(path)
    if metadata.compression_mode not in ("", "none"):
        raise DataError(
            f"{path}: its {printable(metadata.compression_mode, 20)}s are compressed; "
            "decompress them first: ros2 bag convert"
        )
    files = [path / name for name in metadata.files]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(f"{path}: the file '{(missing or ['with messages'])[0]}' is missing")
    return _open_files(path, files, metadata)


def _open_files(path: Path, files: list[Path], metadata: Metadata | None) -> Bag:
    """Choose by content, for a name may say anything."""
    kinds: set[type[Bag]] = set()
    for file in files:
        with file.open("rb") as handle:
            start = handle.read(len(_SQLITE))
        if start.startswith(mcap.MAGIC):
            kinds.add(McapBag)
        elif start == _SQLITE:
            kinds.add(SqliteBag)
        else:
            raise DataError(f"{file}: is neither an MCAP nor a sqlite3 file")
    if len(kinds) > 1:
        raise DataError(f"{path}: holds MCAP and sqlite3 files at once")
    return kinds.pop()(path, files, metadata)
