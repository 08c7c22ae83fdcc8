"""Start the nodes of a ROS 2 launch file (YAML), without ROS 2's launch tools.

FILE is a path, or the name of a file that comes with robot_rl (bringup, policy, record, hil, simulated_robot, deploy).
Arguments follow as name:=value. What is read is a subset of the format; anything else is refused with file and line.
Ctrl-C ends every process: SIGINT, after 5 s SIGTERM, after another 5 s SIGKILL.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hardware.launching.plan import LaunchFile, parse_arguments
from hardware.launching.runner import describe, run_launch
from hardware.ros.context import prepare_environment
from robot_rl.core.errors import DataError, UnknownNameError
from robot_rl.core.paths import data_file

SUFFIX = ".launch.yaml"
"""How launch files end."""


@dataclass(frozen=True)
class Config:
    """Settings of ``robot-rl launch``."""

    file: Annotated[str, tyro.conf.Positional]
    """Launch file: a path, or the name of one that comes with robot_rl."""
    arguments: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Arguments of the launch file, each name:=value."""
    show_args: bool = False
    """Show the arguments of the launch file and start nothing."""
    print: bool = False
    """Show the command lines and start nothing."""
    logs: Path = Path("runs/launch")
    """Directory of the output that is not shown (``output: log``)."""


def run(config: Config) -> int:
    """Start what the file says and return the exit code: 1 if a process failed."""
    file = LaunchFile(find(config.file))
    if config.show_args:
        sys.stdout.write("\n".join(_describe_arguments(file)) + "\n")
        return 0
    prepare_environment()
    given = parse_arguments(config.arguments)
    # The entry scripts begin with `env python3`: they shall find the Python that runs this.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    actions = file.actions(given, {**os.environ, "PATH": path})
    if config.print:
        sys.stdout.write("\n".join(describe(actions)) + "\n")
        return 0
    return run_launch(actions, config.logs)


def shipped() -> dict[str, Path]:
    """Return the launch files that come with robot_rl, by name."""
    return {path.name.removesuffix(SUFFIX): path for path in sorted(data_file("launch").glob(f"*{SUFFIX}"))}


def find(name: str) -> Path:
    """Return the launch file ``name``: a path, or the name of a shipped one.

    Raises:
        DataError: the path does not exist.
        UnknownNameError: no launch file of that name is shipped.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        raise DataError(f"launch file {name} does not exist")
    known = shipped()
    if name not in known:
        raise UnknownNameError("launch file", name, known)
    return known[name]


def _describe_arguments(file: LaunchFile) -> list[str]:
    lines = [f"Arguments of {file.path.name} (name:=value)"]
    for one in file.arguments():
        default = "must be given" if one.default is None else f"default: '{one.default}'"
        choices = f"; one of {', '.join(one.choices)}" if one.choices else ""
        lines += [f"  {one.name} ({default}{choices})"] + ([f"      {one.description}"] if one.description else [])
    return lines if len(lines) > 1 else [f"{file.path.name} has no arguments"]
