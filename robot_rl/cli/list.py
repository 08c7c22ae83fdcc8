"""What can be named: tasks, robots, policies, heads, dataset formats and the rest, plug-ins included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from robot_rl.cli.catalog import entries, summary
from robot_rl.core.errors import UnknownNameError
from robot_rl.core.registry import GROUPS
from robot_rl.train.progress import say


@dataclass(frozen=True)
class Config:
    """Settings of ``robot-rl list``."""

    group: Annotated[str, tyro.conf.Positional] = "all"
    """What to list: all, tasks, robots, teleop, cameras, policies, heads, backbones, finetuners, datasets or
    commands."""


def run(config: Config) -> None:
    """Print one line per name, with the package that it comes from where that is not ours."""
    if config.group not in ("all", *GROUPS):
        raise UnknownNameError("group", config.group, ["all", *GROUPS])
    for group in GROUPS if config.group == "all" else (config.group,):
        found = entries(group)
        width = max(map(len, found), default=0)
        say(group, style="bold")
        for name, entry in sorted(found.items()):
            origin = entry.dist.name if entry.dist is not None else ""
            by = f"  [from {origin}]" if origin not in ("robot-rl", "robot_rl", "") else ""
            say(f"  {name:<{width}}  {summary(entry)}{by}")
        if not found:
            say("  (none)")
    if config.group in ("all", "tasks"):
        say("Any Gymnasium environment is a task too: gym:<id>, for example gym:gym_pusht/PushT-v0.", style="dim")
