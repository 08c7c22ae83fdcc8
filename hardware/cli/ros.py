"""What a terminal needs for ROS 2's own tools, and tidying up after processes that were killed.

`eval "$(robot-rl ros env)"` lets `ros2 run robot_rl …` and `ros2 launch robot_rl …` find our package, and lets
`ros2 topic …` see our topics.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from hardware.ros.context import exports
from hardware.ros.shared_memory import stale_files


@dataclass(frozen=True)
class Env:
    """Print the shell commands that prepare a terminal; what you have set stays."""

    domain_id: int | None = None
    """ROS 2 domain; by default ROS_DOMAIN_ID stays as it is."""
    images: bool = False
    """Take the Fast DDS profile for cameras and recorders."""


@dataclass(frozen=True)
class Clean:
    """Remove shared-memory files of Fast DDS that no process uses."""

    dry_run: bool = False
    """Only name them."""


Config = Annotated[Env, tyro.conf.subcommand("env")] | Annotated[Clean, tyro.conf.subcommand("clean")]


def run(config: Env | Clean) -> None:
    """Run one of the sub-commands."""
    if isinstance(config, Env):
        sys.stdout.write("".join(f"{line}\n" for line in exports(config.domain_id, config.images)))
        return
    found = stale_files()
    for path in found:
        if not config.dry_run:
            path.unlink(missing_ok=True)
    verb = "would be removed" if config.dry_run else "removed"
    sys.stdout.write("".join(f"{path}\n" for path in found) + f"{len(found)} stale files {verb}\n")
