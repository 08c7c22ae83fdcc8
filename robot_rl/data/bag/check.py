"""Checks of a recording before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from robot_rl.core.errors import DataError
from robot_rl.data.bag.bag import Bag, Topic
from robot_rl.data.bag.messages import MessageType, same_content
from robot_rl.data.bag.streams import FROZEN_SECONDS, Fault, Stream, describe, find_events, frozen_spans
from robot_rl.data.bag.topic_map import IMAGES


def check_bag(
    bag: Bag, advance: Callable[[int], None] = lambda _: None, frozen_seconds: float = FROZEN_SECONDS
) -> tuple[list[Fault], list[str]]:
    """Read a whole recording and return its faults in order of time, and why topics were not looked at.

    Only cameras can be called frozen here: whether a still joint should have moved, a topic map knows.

    Args:
        bag: the recording.
        advance: called with the number of messages read since the last call.
        frozen_seconds: how long (s) a camera must show the same picture to be called frozen.

    Raises:
        DataError: the recording is damaged.
    """
    unread: list[str] = []
    found = {name: _message_type(topic, unread) for name, topic in bag.topics.items()}
    kinds = {name: kind for name, kind in found.items() if kind is not None}
    streams = {name: Stream(name) for name in kinds}
    last: dict[str, dict[str, Any]] = {}
    zero = 0
    for order, message in enumerate(bag.messages(kinds)):
        kind, name = kinds[message.topic], message.topic
        zero = zero or message.log_time
        same = False
        if kind.name in IMAGES:
            decoded = kind.decode(message.data)
            same = name in last and same_content(decoded, last[name])
            last[name] = decoded
        streams[name].add(order, kind.stamp(message.data), message.log_time, message.sequence, same)
        advance(1)
    faults = [
        fault
        for stream in streams.values()
        if len(stream)
        for fault in describe(stream, zero, frozen_spans(stream, frozen_seconds), find_events(stream))
    ]
    return sorted(faults, key=lambda fault: fault.start), unread


def _message_type(topic: Topic, unread: list[str]) -> MessageType | None:
    """Return the decoder of a topic; None, and the reason added to ``unread``, where there is none."""
    try:
        return topic.message_type()
    except DataError as error:
        unread.append(str(error))
        return None
