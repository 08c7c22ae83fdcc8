"""The first pass over a recording: times and numbers of every topic that a topic map names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from robot_rl.core.errors import ConfigError, DataError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.bag.bag import Bag
from robot_rl.data.bag.images import decode_image
from robot_rl.data.bag.messages import MessageType, numbers, same_content
from robot_rl.data.bag.streams import Stream
from robot_rl.data.bag.topic_map import IMAGES, Source, TopicMap


class Track:
    """One source with its stream and what was read of it."""

    def __init__(self, name: str, source: Source, kind: MessageType, stream: Stream) -> None:
        self.name, self.source, self.kind, self.stream = name, source, kind, stream
        self.is_image = kind.name in IMAGES
        self.values: Any = []
        """(n, d) numbers; of images nothing."""
        self.finite = np.zeros(0, bool)
        """(n,) whether they are finite."""
        self.shape: tuple[int, ...] = ()
        self._problem = ""
        self._layout: tuple[list[str], list[int]] = ([], [])
        if not self.is_image and not source.fields:
            fields = ", ".join(one.name for one in kind.fields)
            raise ConfigError(f"'{name}' says no field of '{source.topic}' ({kind.name}), which has: {fields}")

    def add(self, message: Mapping[str, Any]) -> None:
        """Read the values of a message."""
        if self.is_image:
            if not self.shape:
                self._look(message)
            return
        parts = [numbers(message, path) for path in self.source.fields]
        if self.source.names:
            parts = [part[self._places(message, len(part))] for part in parts]
        self.values.append(np.concatenate(parts))

    def finish(self) -> None:
        """Join the values; `DataError` where messages differ in size, or no image could be decoded."""
        if self.is_image:
            if not self.shape:
                raise DataError(f"'{self.name}': no image of '{self.source.topic}' can be decoded: {self._problem}")
            return
        sizes = Counter(len(value) for value in self.values)
        if len(sizes) > 1:
            raise DataError(
                f"'{self.name}': messages of '{self.source.topic}' hold {' or '.join(map(str, sizes))} numbers"
            )
        with np.errstate(over="ignore"):
            self.values = np.stack(self.values).astype(np.float32)
        self.finite = np.isfinite(self.values).all(axis=1)
        self.shape = self.values.shape[1:]

    def _look(self, message: Mapping[str, Any]) -> None:
        """Learn the shape of the images from the first that can be decoded."""
        try:
            self.shape = decode_image(message, self.source.size).shape
        except DataError as error:
            self._problem = str(error)

    def _places(self, message: Mapping[str, Any], count: int) -> list[int]:
        given = message.get("name", message.get("joint_names"))
        if not isinstance(given, list):
            raise ConfigError(f"'{self.name}': messages of '{self.source.topic}' name no elements")
        if given != self._layout[0]:
            missing = [name for name in self.source.names if name not in given]
            if missing:
                known = ", ".join(map(str, given[:20]))
                raise DataError(f"'{self.name}': '{self.source.topic}' has no element '{missing[0]}'; it has: {known}")
            self._layout = (given, [given.index(name) for name in self.source.names])
        if max(self._layout[1]) >= count:
            raise DataError(
                f"'{self.name}': a message of '{self.source.topic}' has {count} numbers for {len(given)} names"
            )
        return self._layout[1]


class FirstPass:
    """Times and numbers of every topic that the map names."""

    def __init__(self, bag: Bag, topic_map: TopicMap) -> None:
        self.bag = bag
        groups = [*topic_map.observation.items(), ("action", topic_map.action), *topic_map.extras.items()]
        if topic_map.episodes is not None:
            groups.append(("episodes", (topic_map.episodes,)))
        topics = dict.fromkeys(source.topic for _, sources in groups for source in sources)
        self.kinds = {name: bag.topic(name).message_type() for name in topics}
        self.streams = {name: Stream(name) for name in topics}
        self.groups = {
            name: [Track(name, one, self.kinds[one.topic], self.streams[one.topic]) for one in sources]
            for name, sources in groups
        }
        self.zero = 0
        """Receive time of the first message (ns)."""
        for name, tracks in self.groups.items():
            if any(track.is_image for track in tracks) and (len(tracks) > 1 or name not in topic_map.observation):
                raise ConfigError(f"'{name}': an image is an observation of its own")

        self.tracks = [track for tracks in self.groups.values() for track in tracks]
        """Every source."""

    def number(self, track: Track) -> int:
        """Return the position of ``track`` in `tracks`."""
        return self.tracks.index(track)

    def read(self, advance: Callable[[int], None]) -> None:
        """Read the recording; ``advance`` is called with the number of messages read since its last call.

        Raises:
            DataError: a message is damaged or does not hold what the map says, or a topic has none.
        """
        last: dict[str, dict[str, Any]] = {}
        by_topic = {name: [track for track in self.tracks if track.source.topic == name] for name in self.streams}
        for order, message in enumerate(self.bag.messages(self.streams)):
            kind, stream = self.kinds[message.topic], self.streams[message.topic]
            self.zero = self.zero or message.log_time
            decoded = kind.decode(message.data)
            same = message.topic in last and same_content(decoded, last[message.topic])
            stream.add(order, kind.stamp(message.data), message.log_time, message.sequence, same)
            last[message.topic] = decoded
            try:
                for track in by_topic[message.topic]:
                    track.add(decoded)
            except DataError as error:
                when = (message.log_time - self.zero) * 1e-9
                raise DataError(f"'{message.topic}' at {when:.3f} s: {error}") from error
            advance(1)
        for name, stream in self.streams.items():
            if not len(stream):
                raise DataError(f"{self.bag.path}: holds no message of '{name}'")
        for track in self.tracks:
            track.finish()


def spec_of(reader: FirstPass, topic_map: TopicMap) -> Spec:
    """Return the spec of the data set, once the recording was read."""
    observation = {}
    for name in topic_map.observation:
        tracks = reader.groups[name]
        if tracks[0].is_image:
            observation[name] = ArraySpec(tracks[0].shape, "uint8", frame=tracks[0].source.frame)
        else:
            observation[name] = _vector_spec(tracks)
    return Spec(observation, _vector_spec(reader.groups["action"]), topic_map.rate_hz)


def _vector_spec(tracks: list[Track]) -> ArraySpec:
    size = sum(track.shape[0] for track in tracks)
    given = [(track, name) for track in tracks for name in track.source.names * len(track.source.fields)]
    names = [name.removeprefix(f"{track.name}/") for track, name in given]
    units = [track.source.unit for track in tracks for _ in range(track.shape[0])]
    unit = units[0] if len(set(units)) == 1 else ",".join(units)
    frames = {track.source.frame for track in tracks}
    unique = len(names) == size and len(set(names)) == size and names != [str(index) for index in range(size)]
    return ArraySpec(
        (size,), names=tuple(names) if unique else (), unit=unit, frame=frames.pop() if len(frames) == 1 else ""
    )
