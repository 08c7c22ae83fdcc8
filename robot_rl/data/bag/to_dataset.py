"""Makes a recording of topics into a data set.

The recording is read twice: first the times and numbers of all topics, then the images that frames need, one by one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from robot_rl.core.errors import DataError
from robot_rl.data.bag.bag import Bag
from robot_rl.data.bag.first_pass import FirstPass, spec_of
from robot_rl.data.bag.frame_plan import Conversion, Handling, Piece, plan_frames
from robot_rl.data.bag.images import decode_image
from robot_rl.data.bag.streams import Fault
from robot_rl.data.bag.topic_map import TopicMap
from robot_rl.data.store import EpisodeWriter, standard_extras

__all__ = ["Conversion", "Handling", "convert_bag"]


def convert_bag(
    bag: Bag,
    topic_map: TopicMap,
    target: str | Path,
    *,
    handling: Handling | None = None,
    append: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Conversion:
    """Write the recording as a data set and return what came of it.

    A report with the map and every fault, ``recording.json``, is left in the ``meta`` directory of the data set.

    Args:
        bag: what `robot_rl.data.bag.bag.open_bag` returned.
        topic_map: which fields become what.
        target: directory to create, or to continue if ``append``.
        handling: what becomes of flagged spans.
        append: whether ``target`` is continued; it must have the same spec.
        advance: called with the number of messages read since the last call.

    Raises:
        UnknownNameError: a topic or field does not exist.
        DataError: the recording is damaged, or no frame is left; the message says why.
    """
    handling = handling or Handling()
    reader = FirstPass(bag, topic_map)
    reader.read(advance)
    conversion = Conversion(str(target))
    pieces = plan_frames(reader, topic_map, handling, conversion)
    if not pieces:
        reasons = ", ".join(f"{reason} ({count} frames)" for reason, count in conversion.left_out.most_common(4))
        raise DataError(f"{bag.path}: no frame is left: {reasons or 'its topics do not overlap in time'}")
    spec = spec_of(reader, topic_map)
    extras = {name: standard_extras(spec)[name] for name in topic_map.extras}
    extras |= {name: standard_extras(spec)[name] for name in ("actor", "stamp")}
    with EpisodeWriter(
        target,
        spec,
        task=topic_map.task,
        extras=extras,
        append=append,
        robot_type=topic_map.robot_type,
        with_success=False,
    ) as writer:
        images = _Images(bag, reader, pieces, conversion, advance)
        _write(reader, topic_map, pieces, images, writer, conversion)
    report = {"source": bag.path.name, "topic_map": asdict(topic_map), **conversion.to_json()}
    path = _free_name(Path(target) / "meta" / "recording.json")
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return conversion


def _free_name(path: Path) -> Path:
    """Return ``path``, or the first of ``name_2``, ``name_3``, … that does not exist: a data set is appended to."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem}_{number}")
    return found


class _Images:
    """Decodes the images that frames need, each once, in the order of the recording."""

    def __init__(
        self, bag: Bag, reader: FirstPass, pieces: list[Piece], conversion: Conversion, advance: Callable[[int], None]
    ) -> None:
        self._reader, self._conversion, self._advance = reader, conversion, advance
        self._tracks = {track.name: track for track in reader.tracks if track.is_image}
        self._rows = {name: reader.number(track) for name, track in self._tracks.items()}
        self._needed = {
            name: {row for piece in pieces for row in piece.rows[number].tolist()}
            for name, number in self._rows.items()
        }
        self._kept: dict[str, dict[int, np.ndarray | None]] = {name: {} for name in self._tracks}
        self._messages = bag.messages({track.source.topic for track in self._tracks.values()})
        self._count: Counter[str] = Counter()

    def frame(self, piece: Piece, k: int) -> dict[str, np.ndarray | None]:
        """Return the images of a frame by observation, None where one cannot be decoded; frames never go back."""
        return {name: self._get(name, int(piece.rows[number][k])) for name, number in self._rows.items()}

    def _get(self, name: str, row: int) -> np.ndarray | None:
        kept = self._kept[name]
        for old in [one for one in kept if one < row]:
            del kept[old]
        while row not in kept:
            self._read()
        return kept[row]

    def _read(self) -> None:
        """Decode the next message for whoever needs it."""
        message = next(self._messages)
        topic, row = message.topic, self._count[message.topic]
        self._count[topic] += 1
        self._advance(1)
        wanted = [track for track in self._tracks.values() if track.source.topic == topic]
        wanted = [track for track in wanted if row in self._needed[track.name]]
        decoded = self._reader.kinds[topic].decode(message.data) if wanted else {}
        for track in wanted:
            try:
                image = decode_image(decoded, track.source.size)
                if image.shape != track.shape:
                    raise DataError(f"an image of {image.shape}, expected {track.shape}")
            except DataError as error:
                when = (message.log_time - self._reader.zero) * 1e-9
                self._conversion.faults.append(Fault("not_decodable", topic, when, when, str(error)))
                image = None
            self._kept[track.name][row] = image


def _write(
    reader: FirstPass,
    topic_map: TopicMap,
    pieces: list[Piece],
    images: _Images,
    writer: EpisodeWriter,
    conversion: Conversion,
) -> None:
    """Write the planned frames; an image that cannot be decoded ends an episode, and the next begins after it."""
    for piece in pieces:
        vectors = {
            name: np.concatenate([track.values[piece.rows[reader.number(track)]] for track in tracks], axis=1)
            for name, tracks in reader.groups.items()
            if not tracks[0].is_image
        }
        length = 0
        for k, time in enumerate(piece.times):
            values = {name: value[k] for name, value in vectors.items()}
            pictures = images.frame(piece, k)
            if any(image is None for image in pictures.values()):
                conversion.left_out["image not decodable"] += 1
                length = _end_episode(writer, length, topic_map, conversion)
                continue
            observation = {name: pictures[name] if name in pictures else values[name] for name in topic_map.observation}
            extras = {"actor": topic_map.actor} | {name: values[name] for name in topic_map.extras}
            stamp = time + reader.zero * 1e-9
            writer.add(observation, values["action"], stamp=stamp, **extras)
            length += 1
        _end_episode(writer, length, topic_map, conversion)


def _end_episode(writer: EpisodeWriter, length: int, topic_map: TopicMap, conversion: Conversion) -> int:
    """Save the present episode if it is long enough; return the length of the next, 0."""
    if length and length / topic_map.rate_hz >= topic_map.min_seconds:
        writer.save_episode()
        conversion.episodes += 1
        conversion.frames += length
    elif length:
        writer.discard_episode()
        conversion.left_out["shorter than min_seconds"] += length
    return 0
