"""Record ROS 2 topics, rescue cut recordings, look into them, and make them into data sets.

Recordings are rosbag2 directories with MCAP: `ros2 bag`, Foxglove and others read them. A stranger's rosbag2 (MCAP or
sqlite3) can be looked into and converted as well, with or without ROS 2 installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hardware.recording.bag_recorder import BagConfig

if TYPE_CHECKING:
    from robot_rl.data.bag.streams import Fault

_SHOWN = 20


@dataclass(frozen=True)
class Run:
    """Record topics until Ctrl-C, or for a time."""

    out: Annotated[Path, tyro.conf.Positional]
    """Directory of the recording; it must not exist, or be empty."""
    topics: tuple[str, ...] = ()
    """Topics to record, with their leading slash."""
    everything: bool = False
    """Record every topic that there is or will be."""
    exclude: str = "/rosout|/parameter_events"
    """Regular expression of topics that ``--everything`` leaves out."""
    seconds: float = 0.0
    """How long to record (s); 0 until Ctrl-C."""
    bag: BagConfig = field(default_factory=BagConfig)
    """How messages are written."""


@dataclass(frozen=True)
class Recover:
    """Rescue an MCAP recording that was cut: write all that can be read to a sound file, and say what is lost."""

    file: Annotated[Path, tyro.conf.Positional]
    """The file, or the directory of an unfinished recording; it stays as it is."""
    out: Path | None = None
    """The new file; by default the recording's proper name beside it."""


@dataclass(frozen=True)
class Info:
    """Show the topics of a recording; with --check also what is wrong with them."""

    path: Annotated[Path, tyro.conf.Positional]
    """A rosbag2 directory, an MCAP file or a sqlite3 file."""
    check: bool = False
    """Read all messages: frozen cameras, clock jumps, dropped messages. The exit status is 1 if anything is found."""
    draft: Path | None = None
    """Write a topic map to begin with to this file."""


@dataclass(frozen=True)
class Convert:
    """Make a recording into a data set that `robot-rl train` reads."""

    path: Annotated[Path, tyro.conf.Positional]
    """A rosbag2 directory, an MCAP file or a sqlite3 file; anybody's."""
    target: Annotated[Path, tyro.conf.Positional]
    """Directory of the data set."""
    map: Annotated[Path, tyro.conf.arg(name="map")]
    """Topic map (YAML): which fields become what; `robot-rl record info PATH --draft map.yaml` begins one."""
    keep: tuple[str, ...] = ()
    """Flagged spans to keep: frozen, dropped, jumps. All others are left out and cut the recording into episodes."""
    frozen_seconds: float = 0.5
    """How long (s) a sensor must say the same, while the robot acts, to be called frozen."""
    append: bool = False
    """Continue a data set with the same spec."""


Config = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Recover, tyro.conf.subcommand("recover")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
)


def run(config: Run | Recover | Info | Convert) -> int:
    """Run one of the sub-commands and return its exit status."""
    actions: dict[type, Any] = {Run: _run, Recover: _recover, Info: _info, Convert: _convert}
    return int(actions[type(config)](config))


def _run(config: Run) -> int:
    from hardware.ros.recorder_node import main

    arguments = ["--out", str(config.out), "--seconds", str(config.seconds), "--exclude", config.exclude]
    arguments += [word for topic in config.topics for word in ("--topics", topic)]
    arguments += ["--everything"] if config.everything else []
    for name, value in vars(config.bag).items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    return main(arguments)


def _recover(config: Recover) -> int:
    from robot_rl.data.bag.recover import recover
    from robot_rl.train.progress import say

    rescue = recover(config.file, config.out)
    for name, count in rescue.counts.items():
        say(f"{count:>10}  {name}")
    say(f"{sum(rescue.counts.values())} messages of {rescue.seconds:.1f} s are in {rescue.path}")
    for text in rescue.damage:
        say(f"damage: {text}", style="yellow")
    say(
        f"lost: {rescue.lost_bytes} bytes that hold no whole message"
        if rescue.lost_bytes
        else "lost: nothing in the file"
    )
    say("What had not reached the file when it was cut, a fraction of a second, it cannot know.")
    return 0


def _info(config: Info) -> int:
    from robot_rl.data.bag.bag import open_bag
    from robot_rl.data.bag.names import printable
    from robot_rl.train.progress import progress, say

    bag = open_bag(config.path)
    say(f"{bag.path}", style="bold")
    say(f"storage   {bag.storage}, {len(bag.files)} file{'s' if len(bag.files) != 1 else ''}")
    if bag.metadata is not None:
        say(f"duration  {bag.metadata.duration * 1e-9:.3f} s")
        for name, text in bag.metadata.custom.items():
            if text not in ("", "{}"):
                say(f"{printable(name):<9} {printable(text)}")
    width = max((len(name) for name in bag.topics), default=0)
    for name, topic in sorted(bag.topics.items()):
        say(f"{'?' if topic.count is None else topic.count:>9}  {name:<{width}}  {topic.type}")
    if config.draft is not None:
        from robot_rl.data.bag.topic_map import draft_topic_map

        config.draft.write_text(draft_topic_map(bag), encoding="utf-8")
        say(f"A topic map to begin with: {config.draft}")
    if not config.check:
        return 0
    from robot_rl.data.bag.check import check_bag

    with progress("check", sum(topic.count or 0 for topic in bag.topics.values()), "message") as bar:
        faults, unread = check_bag(bag, bar.advance)
    for text in unread:
        say(f"not looked at: {text}", style="dim")
    _show(faults)
    return 1 if faults else 0


def _show(faults: Iterable[Fault]) -> None:
    """List faults, the first of each kind and topic; many of one kind are counted."""
    from robot_rl.train.progress import say

    seen: Counter[tuple[str, str]] = Counter()
    for fault in faults:
        seen[fault.kind, fault.topic] += 1
        if seen[fault.kind, fault.topic] <= _SHOWN:
            say(str(fault), style="yellow")
    for (kind, topic), count in seen.items():
        if count > _SHOWN:
            say(f"… {count - _SHOWN} more: {kind} {topic}", style="yellow")
    if not seen:
        say("no frozen camera, no clock jump, no dropped message")


def _convert(config: Convert) -> int:
    from robot_rl.core.errors import UnknownNameError
    from robot_rl.data.bag.bag import open_bag
    from robot_rl.data.bag.to_dataset import Handling, convert_bag
    from robot_rl.data.bag.topic_map import IMAGES, read_topic_map
    from robot_rl.train.progress import progress, say

    kinds = ("frozen", "dropped", "jumps")
    for name in config.keep:
        if name not in kinds:
            raise UnknownNameError("kind of flagged span", name, kinds)
    topic_map = read_topic_map(config.map)
    handling = Handling(**dict.fromkeys(config.keep, "keep"), frozen_seconds=config.frozen_seconds)
    bag = open_bag(config.path)
    topics = [bag.topic(name) for name in {source.topic for source in topic_map.sources}]
    total = sum((topic.count or 0) * (1 + (topic.type in IMAGES)) for topic in topics)  # images are read twice
    with progress("convert", max(1, total), "message") as bar:
        done = convert_bag(bag, topic_map, config.target, handling=handling, append=config.append, advance=bar.advance)
    _show(done.faults)
    for reason, count in done.left_out.most_common():
        say(f"left out: {count} frames, {reason}", style="yellow")
    say(f"{done.episodes} episodes, {done.frames} frames at {topic_map.rate_hz:g} Hz in {done.root}")
    return 0
