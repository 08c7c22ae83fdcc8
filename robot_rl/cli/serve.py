"""Serve policies to robots on other computers, over a websocket with a token; deploy and eval take its address.

Clients give ws://host:port/<policy>, where <policy> is a directory below the one that is served, and nothing if that is
a checkpoint itself. Ctrl-C ends it.
"""

from __future__ import annotations

import logging
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from robot_rl.serving.server import PolicyWebServer, ServerConfig


@dataclass(frozen=True)
class Config(ServerConfig):
    """Settings of ``robot-rl serve``."""

    policy: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Checkpoint, export, or a directory with such: clients name one of them."""


def run(config: Config) -> None:
    """Listen until Ctrl-C."""
    from robot_rl.train.progress import say

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s")
    with PolicyWebServer(config.policy, config) as server:
        say(f"Serving {config.policy} at {server.address}, token in {config.token_file}")
        threading.Event().wait()
