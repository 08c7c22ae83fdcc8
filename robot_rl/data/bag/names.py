"""Names that come from a stranger's file and are shown to people."""

from __future__ import annotations


def printable(name: str, longest: int = 256) -> str:
    """Return a name as a terminal may show it: one line of at most ``longest`` characters, without control codes."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:longest])
