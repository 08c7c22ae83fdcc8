"""Errors that a user can mend: one complete line, naming what was wrong, what was expected and what exists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN_DIFFERENCES = 3
"""Differences of two interfaces that a message lists; the rest is counted."""


class RobotRLError(Exception):
    """Base of every error caused by input rather than by a defect; the command line prints it without a traceback."""


class UnknownNameError(RobotRLError):
    """A name that is not registered; the message suggests the nearest one and lists what exists."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        nearest = difflib.get_close_matches(name, self.known, n=1, cutoff=0.5)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        listing = ", ".join(self.known) or "none"
        super().__init__(f"Unknown {kind} '{name}'.{hint} Available: {listing}.")


class SpecMismatchError(RobotRLError):
    """Two interfaces that had to agree do not; the message lists the first differences, the attribute all of them."""

    def __init__(self, left: str, right: str, differences: list[str]) -> None:
        self.differences = differences
        more = len(differences) - SHOWN_DIFFERENCES
        rest = f"; … and {more} more" if more > 0 else ""
        super().__init__(f"{left} does not fit {right}: {'; '.join(differences[:SHOWN_DIFFERENCES])}{rest}.")


class DataError(RobotRLError):
    """A file or array that cannot be used: missing, truncated, of the wrong shape or not finite."""


class ConfigError(RobotRLError):
    """A setting, or a combination of settings, that cannot work."""


class CapabilityError(RobotRLError):
    """A component was asked for something that it cannot do; the message lists the components that can."""


class MissingDependencyError(RobotRLError):
    """An optional package is needed; the message says which extra installs it, or which distribution asks for it."""

    def __init__(self, package: str, extra: str, purpose: str, distribution: str = "") -> None:
        if distribution:
            super().__init__(
                f"{purpose} of the distribution '{distribution}' needs the package '{package}', which is not "
                f"installed: install what '{distribution}' requires."
            )
        else:
            super().__init__(f"{purpose} needs the package '{package}': pip install 'robot-rl[{extra}]'.")


class HardwareError(RobotRLError):
    """A robot, camera or operator device failed or did not answer in time."""
