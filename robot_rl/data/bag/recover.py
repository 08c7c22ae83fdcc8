"""Rescues an MCAP recording that was cut or damaged: everything that can be read, in a sound file, and what is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from robot_rl.core.errors import DataError
from robot_rl.data.bag.bag import UNFINISHED
from robot_rl.data.bag.mcap_reader import McapReader
from robot_rl.data.bag.mcap_writer import McapWriter
from robot_rl.data.bag.metadata import FILE, Metadata, TopicInfo, parse_qos, to_yaml
from robot_rl.data.durable import publish


@dataclass(frozen=True)
class Rescue:
    """What came of a rescue."""

    path: Path
    """The new file."""
    counts: Mapping[str, int]
    """Messages saved, by topic."""
    seconds: float
    """Time between the first and the last of them, by the recorder's clock."""
    last: int
    """Receive time of the last message in nanoseconds; 0 where there is none."""
    lost_bytes: int
    """Bytes of the file that could not be used."""
    damage: list[str] = field(default_factory=list)
    """What was wrong with the file, one sentence each; empty if it was whole."""


def recover(file: Path, out: Path | None = None) -> Rescue:
    """Write everything readable of ``file`` to a new file; the old one stays as it is.

    Args:
        file: the file, or a directory with one unfinished file.
        out: the new file; by default the name without ``.part`` of an unfinished recording, and ``name.rescued.mcap``
            of any other. Beside an unfinished recording ``metadata.yaml`` is written as well.

    Raises:
        DataError: it is no MCAP file, holds no message, or the new one exists or cannot be written.
    """
    file = _unfinished(Path(file))
    unfinished = file.name.endswith(UNFINISHED)
    plain = file.with_name(file.name.removesuffix(UNFINISHED))
    target = out or (plain if unfinished else file.with_name(f"{file.stem}.rescued.mcap"))
    if target.exists():
        raise DataError(f"{target}: exists already; choose another (--out)")
    reader = McapReader(file, tolerant=True)
    scratch = target.with_name(f"{target.name}.rescue")
    scratch.unlink(missing_ok=True)  # of a rescue that was killed
    writer = McapWriter(scratch)
    try:
        _copy(reader, writer)
        if not writer.counts.total():
            raise DataError(
                f"{file}: holds no message that can be read ({'; '.join(reader.damage[:1]) or 'it is empty'})"
            )
        writer.add_metadata("rescue", {"damage": "\n".join(reader.damage), "lost_bytes": str(reader.lost_bytes)})
        writer.finish(target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); choose another disk (--out)") from error
    finally:
        writer.abandon()
        scratch.unlink(missing_ok=True)
    if unfinished and out is None and not (target.parent / FILE).exists():
        write_metadata(target.parent, writer, custom={"rescued": "; ".join(reader.damage) or "complete"})
    counts = {channel.topic: writer.counts[number] for number, channel in writer.channels.items()}
    seconds = (writer.end_time - writer.start_time) * 1e-9
    return Rescue(target, counts, seconds, writer.end_time, reader.lost_bytes, reader.damage)


def write_metadata(directory: Path, writer: McapWriter, custom: Mapping[str, str], distribution: str = "") -> None:
    """Write ``metadata.yaml`` for the one finished file of ``writer`` in ``directory``, in one step.

    Args:
        directory: of the recording.
        writer: after `McapWriter.finish`.
        custom: further texts.
        distribution: release of ROS 2, where it is known.
    """
    topics = []
    for number, channel in writer.channels.items():
        qos = parse_qos(channel.metadata.get("offered_qos_profiles", ""))
        schema = writer.schemas.get(channel.schema)
        kind = "" if schema is None else schema.name
        count, type_hash = writer.counts[number], channel.metadata.get("topic_type_hash", "")
        topics.append(TopicInfo(channel.topic, kind, count, channel.encoding, qos, type_hash))
    duration = writer.end_time - writer.start_time
    metadata = Metadata(
        "mcap", (writer.path.name,), tuple(topics), writer.start_time, duration, custom, distribution=distribution
    )
    temporary = directory / f"{FILE}{UNFINISHED}"
    temporary.write_text(to_yaml(metadata), encoding="utf-8")
    publish(temporary, directory / FILE)


def _unfinished(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{UNFINISHED}"))
    if len(found) != 1:
        raise DataError(f"{path}: holds {len(found)} unfinished files; name the file to rescue")
    return found[0]


def _copy(reader: McapReader, writer: McapWriter) -> None:
    numbers: dict[int, int] = {}
    for channel, sequence, log_time, publish_time, data in reader.messages():
        if channel not in numbers:
            _add_channels(reader, writer, numbers)
        writer.write(numbers[channel], log_time, data, publish_time, sequence)
    _add_channels(reader, writer, numbers)  # topics without a message, too


def _add_channels(reader: McapReader, writer: McapWriter, numbers: dict[int, int]) -> None:
    """Add the topics that were read so far."""
    for number, channel in reader.channels.items():
        if number not in numbers:
            schema = reader.schemas.get(channel.schema)
            numbers[number] = writer.add_channel(channel.topic, schema, channel.metadata, channel.encoding)
