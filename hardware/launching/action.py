"""What launching a file comes down to: processes to start, lines to show, ends, and what begins later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robot_rl.core.errors import ConfigError

OUTPUTS = ("screen", "log", "both", "own_log", "full")
"""Values of ``output``: in all but ``log`` and ``own_log`` what a process prints goes to the terminal."""


class LocatedError(ConfigError):
    """An error that names the file and the line that it comes from."""


@dataclass
class Scope:
    """What holds at one place of a launch file."""

    variables: dict[str, str]
    """Arguments and ``let``, by name."""
    environment: dict[str, str]
    """Environment of the processes."""
    directory: Path
    """Directory of the launch file."""
    namespace: str = ""
    """What ``push_ros_namespace`` set."""
    parameters: tuple[tuple[str, Any], ...] = ()
    """What ``set_parameter`` set: names and values, for every node."""
    remaps: tuple[tuple[str, str], ...] = ()
    """What ``set_remap`` set."""
    depth: int = 0
    """How many files include this one."""

    def inner(self) -> Scope:
        """Return a copy that can be changed without changing this one."""
        return replace(self, variables=dict(self.variables), environment=dict(self.environment))


@dataclass(frozen=True)
class Process:
    """A process to start, and what to do when it ends."""

    name: str
    """How it is called in the output."""
    words: tuple[str, ...]
    """Command line up to the parameters."""
    environment: Mapping[str, str]
    """Its whole environment."""
    where: str
    """File and line of the entity."""
    parameters: tuple[Path | Mapping[str, Any], ...] = ()
    """Parameter files, and inline parameters as the content of such a file, in order: the last one wins."""
    remaps: tuple[tuple[str, str], ...] = ()
    """Remappings (from, to)."""
    cwd: Path | None = None
    """Working directory, by default that of the launcher."""
    output: str = "log"
    """Where its output goes, one of `OUTPUTS`."""
    respawn: bool = False
    """Whether it is started again when it ends."""
    respawn_delay: float = 0.0
    """Seconds before that."""
    respawn_max_retries: int = -1
    """How often at most; below 0 always."""
    required: bool = False
    """Whether its end ends everything (``on_exit: shutdown``)."""
    sigterm_timeout: float = 5.0
    """Seconds between SIGINT and SIGTERM when it is ended."""
    sigkill_timeout: float = 5.0
    """Seconds between SIGTERM and SIGKILL."""

    def command(self, write: Callable[[Mapping[str, Any]], Path]) -> list[str]:
        """Return the command line; ``write`` puts inline parameters into a file and returns its path."""
        words = list(self.words)
        for one in self.parameters:
            words += ["--params-file", str(one if isinstance(one, Path) else write(one))]
        for source, target in self.remaps:
            words += ["-r", f"{source}:={target}"]
        return words


@dataclass(frozen=True)
class Message:
    """A line to show."""

    text: str
    """The line."""
    level: str = "INFO"
    """``DEBUG``, ``INFO``, ``WARNING`` or ``ERROR``."""


@dataclass(frozen=True)
class Shutdown:
    """Everything is to end."""

    reason: str
    """Why."""


@dataclass(frozen=True)
class Later:
    """Actions that begin after a while."""

    seconds: float
    """How long after this place was reached."""
    actions: Callable[[], Iterator[Action]]
    """Gives them."""


Action = Process | Message | Shutdown | Later
