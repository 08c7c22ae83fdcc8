"""``metadata.yaml`` of a rosbag2 directory: written as version 9, read in any version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from robot_rl.core.errors import DataError
from robot_rl.data.bag.names import printable
from robot_rl.data.bag.plain_yaml import load_plain, plain_text

FILE = "metadata.yaml"
"""Name of the file in the directory of a recording."""
_ROOT = "rosbag2_bagfile_information"
_MAX_BYTES = 1 << 22


@dataclass(frozen=True)
class TopicInfo:
    """What the metadata say about one topic."""

    name: str
    """Such as ``/joint_states``."""
    type: str
    """Such as ``sensor_msgs/msg/JointState``."""
    count: int = 0
    """Messages."""
    serialization: str = "cdr"
    """Encoding of the messages."""
    qos: Sequence[Mapping[str, Any]] = ()
    """Quality of service that each publisher offered, as rosbag2 writes it."""
    type_hash: str = ""
    """Hash of the type, or empty."""


@dataclass(frozen=True)
class Metadata:
    """What the file says."""

    storage: str
    """``mcap`` or ``sqlite3``."""
    files: tuple[str, ...]
    """Names of the files with messages, in order."""
    topics: tuple[TopicInfo, ...] = ()
    """The topics."""
    start: int = 0
    """Earliest receive time in nanoseconds."""
    duration: int = 0
    """From the earliest to the latest receive time, in nanoseconds."""
    custom: Mapping[str, str] = field(default_factory=dict)
    """Further texts by name."""
    compression: str = ""
    """``zstd`` where rosbag2 compressed on its own; chunks of MCAP are not meant."""
    compression_mode: str = ""
    """``file`` or ``message`` then."""
    distribution: str = ""
    """Release of ROS 2."""

    @property
    def count(self) -> int:
        """Messages of all topics."""
        return sum(topic.count for topic in self.topics)


def qos_text(qos: Sequence[Mapping[str, Any]]) -> str:
    """Return offered quality of service as MCAP's channels carry it."""
    return yaml.safe_dump(list(qos), sort_keys=False) if qos else ""


def parse_qos(given: Any) -> tuple[Mapping[str, Any], ...]:
    """Return offered quality of service, given as a list or as its text; nothing where it is neither."""
    try:
        found = load_plain(given) if isinstance(given, str) else given
    except DataError:
        return ()
    return tuple(one for one in found if isinstance(one, dict)) if isinstance(found, (list, tuple)) else ()


def to_yaml(metadata: Metadata) -> str:
    """Return the text of a ``metadata.yaml`` of version 9."""

    def span() -> dict[str, Any]:  # a new one each time: rosbag2's files have no references
        return {
            "duration": {"nanoseconds": metadata.duration},
            "starting_time": {"nanoseconds_since_epoch": metadata.start},
            "message_count": metadata.count,
        }

    content = {
        "version": 9,
        "storage_identifier": metadata.storage,
        **span(),
        "topics_with_message_count": [
            {
                "topic_metadata": {
                    "name": topic.name,
                    "type": topic.type,
                    "serialization_format": topic.serialization,
                    "offered_qos_profiles": [dict(one) for one in topic.qos],
                    "type_description_hash": topic.type_hash,
                },
                "message_count": topic.count,
            }
            for topic in metadata.topics
        ],
        "compression_format": "",
        "compression_mode": "",
        "relative_file_paths": list(metadata.files),
        "files": [{"path": name, **span()} for name in metadata.files[:1]],
        "custom_data": dict(metadata.custom) or None,
        "ros_distro": metadata.distribution,
    }
    return yaml.safe_dump({_ROOT: content}, sort_keys=False, allow_unicode=True)


def read_metadata(directory: Path) -> Metadata:
    """Return what the metadata of a recording say.

    Raises:
        DataError: the file is missing, damaged, or names files outside of its directory.
    """
    path = directory / FILE
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: is larger than the {_MAX_BYTES} bytes that are read")
        return _metadata(load_plain(path.read_text(encoding="utf-8"))[_ROOT])
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DataError(f"{path}: is no metadata of rosbag2 ({type(error).__name__}: {reason})") from error


def _metadata(content: Mapping[str, Any]) -> Metadata:
    topics = []
    for item in content["topics_with_message_count"]:
        about = item["topic_metadata"]
        topics.append(
            TopicInfo(
                name=plain_text(about["name"], "a topic's name"),
                type=plain_text(about["type"], "a topic's type"),
                count=int(item["message_count"]),
                serialization=plain_text(about.get("serialization_format", "cdr"), "serialization_format"),
                qos=parse_qos(about.get("offered_qos_profiles")),
                type_hash=plain_text(about.get("type_description_hash", ""), "type_description_hash"),
            )
        )
    files = tuple(plain_text(name, "a file's name") for name in content["relative_file_paths"])
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"names the file '{printable(name, 100)}', which is outside of the recording")
    return Metadata(
        storage=plain_text(content["storage_identifier"], "storage_identifier"),
        files=files,
        topics=tuple(topics),
        start=int(content["starting_time"]["nanoseconds_since_epoch"]),
        duration=int(content["duration"]["nanoseconds"]),
        custom={
            plain_text(key, "a key"): plain_text(value, "custom_data")
            for key, value in (content.get("custom_data") or {}).items()
        },
        compression=plain_text(content.get("compression_format"), "compression_format").lower(),
        compression_mode=plain_text(content.get("compression_mode"), "compression_mode").lower(),
        distribution=plain_text(content.get("ros_distro"), "ros_distro"),
    )
