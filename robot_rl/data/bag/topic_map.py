"""Topic maps: which fields of which topics become which observations and actions of a data set, and in what rhythm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from robot_rl.core.errors import ConfigError, RobotRLError, UnknownNameError
from robot_rl.data.bag.bag import Bag, Topic
from robot_rl.data.bag.executor_map import executor_map
from robot_rl.data.bag.plain_yaml import load_plain, plain_text
from robot_rl.data.store import ACTORS

HOLDS = ("previous", "nearest", "next")
"""Which message stands for an instant: the last before it, the nearest, the first after it."""
STAMPS = ("header", "receive", "aligned")
"""What tells the time of a message: its header, when it was received, or its header moved to the receiver's clock."""
EXTRAS = ("reward", "actor", "policy_action", "intervention", "safety_flags")
"""Further columns that a topic may fill."""
IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
"""Types that become images."""
_MAX_BYTES = 1 << 20
_ANY_TIME = 1e9


@dataclass(frozen=True)
class Source:
    """A part of an observation or action: fields of one topic."""

    topic: str
    """Absolute name of the topic."""
    fields: tuple[str, ...] = ()
    """Where the numbers are: ``position``, ``pose.pose.position``, ``points[0].positions``, ``data[0:3]``; not used for
    images."""
    names: tuple[str, ...] = ()
    """Elements to take, by the message's own ``name`` or ``joint_names``, in this order. In the data set, names such as
    ``state/x`` of an observation ``state`` are without that prefix."""
    unit: str = ""
    """Unit of the elements; comma-separated if they differ."""
    frame: str = ""
    """Coordinate frame."""
    size: tuple[int, int] | None = None
    """(height, width) that images are scaled to; None leaves them as they are."""
    hold: str = "previous"
    """One of `HOLDS`."""
    tolerance: float = 0.05
    """Longest time (s) between an instant and the message that stands for it."""
    stamp: str = "header"
    """One of `STAMPS`."""


@dataclass(frozen=True)
class TopicMap:
    """How a recording becomes a data set."""

    rate_hz: float
    """Frames per second of the data set."""
    observation: Mapping[str, tuple[Source, ...]]
    """Parts of each observation, laid end to end."""
    action: tuple[Source, ...]
    """Parts of the action, laid end to end."""
    extras: Mapping[str, tuple[Source, ...]] = field(default_factory=dict)
    """Parts of further columns, of `EXTRAS`."""
    episodes: Source | None = None
    """Number that is not zero while an episode runs, and that changes where the next one begins; without it the whole
    recording is one, cut where data are bad."""
    instants: str = ""
    """Topic whose messages are the instants of the frames, wherever one is within half a frame of the even rhythm; by
    default the rhythm alone counts."""
    task: str = ""
    """Instruction of the episodes."""
    actor: str = "human"
    """Who acted: one of `ACTORS`; the extra ``actor``, a code for every frame, takes its place."""
    robot_type: str = "robot"
    """Name of the robot."""
    min_seconds: float = 1.0
    """Shorter pieces (s) are left out."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate_hz) and 0 < self.rate_hz <= 1000):
            raise ConfigError(f"rate_hz is {self.rate_hz:g}, expected more than 0 and at most 1000")
        if not self.observation or not self.action:
            raise ConfigError("a topic map needs at least one observation and an action")
        if self.actor not in ACTORS:
            raise UnknownNameError("actor", self.actor, ACTORS)
        for name in self.extras:
            if name not in EXTRAS:
                raise UnknownNameError("extra of a topic map", name, EXTRAS)
        if self.instants:
            known = {source.topic for source in self.sources}
            if self.instants not in known:
                raise UnknownNameError("topic of the map for its instants", self.instants, known)

    @property
    def sources(self) -> list[Source]:
        """Every part of everything."""
        groups = [*self.observation.values(), self.action, *self.extras.values()]
        found = [source for group in groups for source in group]
        return found if self.episodes is None else [*found, self.episodes]


def read_topic_map(path: str | Path) -> TopicMap:
    """Read a topic map from a YAML file.

    Raises:
        ConfigError: the file cannot be read, or a setting cannot work; the message says where.
        UnknownNameError: a key is misspelt.
    """
    path = Path(path).expanduser()
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError("is larger than a topic map can be")
        return parse_topic_map(load_plain(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text") from error
    except RobotRLError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_topic_map(content: Any) -> TopicMap:
    """Return the topic map of YAML's mappings and lists; errors as for `read_topic_map`."""
    keys = ("rate_hz", "observation", "action", "extras", "episodes", "instants", "task", "actor", "robot_type")
    given = _mapping(content, "the topic map", (*keys, "min_seconds", "tolerance"))
    common = _number(given.get("tolerance", Source.tolerance), "tolerance")
    for key in ("rate_hz", "observation", "action"):
        if key not in given:
            raise ConfigError(f"'{key}' is missing")
    observation = _mapping(given["observation"], "observation", None)
    extras = _mapping(given.get("extras") or {}, "extras", None)
    episodes = given.get("episodes")
    return TopicMap(
        rate_hz=_number(given["rate_hz"], "rate_hz"),
        observation={key: _sources(one, key, "previous", common) for key, one in observation.items()},
        action=_sources(given["action"], "action", "next", common),
        extras={key: _sources(one, key, "next", common) for key, one in extras.items()},
        episodes=None if episodes is None else _sources(episodes, "episodes", "previous", _ANY_TIME)[0],
        instants=plain_text(given.get("instants", ""), "instants"),
        task=plain_text(given.get("task", ""), "task"),
        actor=plain_text(given.get("actor", TopicMap.actor), "actor"),
        robot_type=plain_text(given.get("robot_type", TopicMap.robot_type), "robot_type"),
        min_seconds=_number(given.get("min_seconds", TopicMap.min_seconds), "min_seconds"),
    )


def _sources(content: Any, where: str, hold: str, tolerance: float) -> tuple[Source, ...]:
    items = content if isinstance(content, list) else [content]
    if not items:
        raise ConfigError(f"'{where}' is empty")
    return tuple(_source(item, where, hold, tolerance) for item in items)


def _source(content: Any, where: str, hold: str, tolerance: float) -> Source:
    keys = ("topic", "field", "fields", "names", "unit", "frame", "size", "hold", "tolerance", "stamp")
    given = _mapping(content, where, keys)
    if "topic" not in given:
        raise ConfigError(f"'{where}' names no topic")
    fields = given.get("fields", given.get("field", ()))
    size = given.get("size")
    if size is not None:
        whole = isinstance(size, list) and len(size) == 2 and all(isinstance(one, int) for one in size)
        if not whole or not all(0 < one <= 8192 for one in size):
            raise ConfigError(f"'{where}': size is not [height, width], at most 8192 each")
        size = (size[0], size[1])
    source = Source(
        topic=plain_text(given["topic"], f"{where}: topic"),
        fields=(fields,) if isinstance(fields, str) else _texts(fields, f"{where}: fields"),
        names=_texts(given.get("names", ()), f"{where}: names"),
        unit=plain_text(given.get("unit", ""), "unit"),
        frame=plain_text(given.get("frame", ""), "frame"),
        size=size,
        hold=plain_text(given.get("hold", hold), "hold"),
        tolerance=_number(given.get("tolerance", tolerance), f"{where}: tolerance"),
        stamp=plain_text(given.get("stamp", Source.stamp), "stamp"),
    )
    if source.hold not in HOLDS:
        raise UnknownNameError(f"hold of '{where}'", source.hold, HOLDS)
    if source.stamp not in STAMPS:
        raise UnknownNameError(f"stamp of '{where}'", source.stamp, STAMPS)
    return source


def _mapping(content: Any, where: str, keys: tuple[str, ...] | None) -> dict[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{where} is a {type(content).__name__}, expected names with values")
    for key in content:
        if keys is not None and key not in keys:
            raise UnknownNameError(f"key of {where}", key, keys)
    return content


def _texts(content: Any, where: str) -> tuple[str, ...]:
    if not isinstance(content, (list, tuple)) or not all(isinstance(one, str) for one in content):
        raise ConfigError(f"{where} is a {type(content).__name__}, expected a list of names")
    return tuple(content)


def _number(content: Any, where: str) -> float:
    if isinstance(content, bool) or not isinstance(content, (int, float)) or math.isnan(content) or content < 0:
        shown = content if isinstance(content, (str, int, float)) else type(content).__name__
        raise ConfigError(f"{where} is {shown}, expected a number that is not negative")
    return float(content)


def draft_topic_map(bag: Bag, rate_hz: float = 20.0) -> str:
    """Return a topic map to begin with, as YAML: cameras and joint states observe, what is named a command acts.

    Of a recording of our own executor it is complete, with everything as the executor's own record has it.
    """
    known = executor_map(bag)
    if known is not None:
        head = "# What an executor executed, and what it saw: see hardware/recording/recorder.py for the codes.\n"
        return head + yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    observation, actions = {}, []
    for name, topic in sorted(bag.topics.items()):
        entry = _draft(topic)
        words = set(name.lower().replace("/", "_").split("_"))
        if entry is None:
            continue
        if words & {"command", "commands", "cmd", "action", "trajectory", "target", "vel"}:
            actions.append(entry)
        else:
            prefix = "images." if topic.type in IMAGES else ""
            parts = [part for part in name.split("/") if part not in ("", "image", "image_raw", "compressed", "color")]
            observation[prefix + "_".join(parts or ["camera"])] = entry
    action: Any = actions[0] if len(actions) == 1 else actions or {"topic": "/…", "field": "…"}
    content = {"rate_hz": rate_hz, "tolerance": 0.05, "task": "", "observation": observation, "action": action}
    head = "# A draft: check what observes and what acts, the units, the elements (names: […]) and the rate.\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _draft(topic: Topic) -> dict[str, Any] | None:
    fields = {
        "sensor_msgs/msg/JointState": ("position", "rad"),
        "trajectory_msgs/msg/JointTrajectory": ("points[0].positions", "rad"),
        "std_msgs/msg/Float64MultiArray": ("data", ""),
        "geometry_msgs/msg/Twist": ("linear", "m/s"),
        "geometry_msgs/msg/TwistStamped": ("twist.linear", "m/s"),
        "geometry_msgs/msg/PoseStamped": ("pose", ""),
        "geometry_msgs/msg/WrenchStamped": ("wrench", ""),
        "nav_msgs/msg/Odometry": ("pose.pose", ""),
    }
    if topic.type in IMAGES:
        return {"topic": topic.name}
    if topic.type not in fields:
        return None
    path, unit = fields[topic.type]
    return {"topic": topic.name, "field": path, **({"unit": unit} if unit else {})}
