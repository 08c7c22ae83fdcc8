"""Names in recordings: the topics of our own executor, and a stranger's names as people may be shown them."""

from __future__ import annotations

import re

OBSERVATION, EXECUTED, ROBOT_SPEC = "observation", "executed", "robot_spec"
"""Topics of an executor, in its namespace: what its robot measures, what was executed, and what the robot is."""


def image_topic(key: str) -> str:
    """Return the topic of an image observation: ``images.front`` becomes ``observation/images/front``."""
    return f"{OBSERVATION}/" + re.sub(r"[^A-Za-z0-9_/]", "_", key.replace(".", "/"))


def printable(name: str, longest: int = 256) -> str:
    """Return a name as a terminal may show it: one line of at most ``longest`` characters, without control codes."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:longest])
