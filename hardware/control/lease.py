"""One writer per robot: whoever commands a device holds a lease on it, and a second one is refused with its name.

A lease is a lock (flock) on a file of this computer that the system releases when the process ends, however it ends.
Robots that live inside the process that commands them (simulated lanes, fakes) need none.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from robot_rl.core.errors import HardwareError
from robot_rl.core.robot import Robot

_ADDRESSES = ("port", "host", "address", "url", "command_topic", "state_topic")
"""Fields of a driver's configuration that say which device it commands, the first that it has."""


def resource_of(robot: Robot) -> str:
    """Return the device that ``robot`` commands, ``""`` where another process could not command it too.

    It is the robot's attribute ``resource``, or else the address in its ``config``: whichever driver a device is
    commanded by, it is the same device.
    """
    resource = getattr(robot, "resource", None)
    if resource is not None:
        return str(resource)
    config = getattr(robot, "config", None)
    field = next((name for name in _ADDRESSES if getattr(config, name, None)), None)
    if field is None:
        return ""
    address = str(getattr(config, field))
    if field.endswith("_topic"):
        address += f" in ROS domain {os.environ.get('ROS_DOMAIN_ID') or 0}"
    elif address.startswith("/"):
        address = os.path.realpath(address)  # by whichever link it was named
    return address


class RobotLease:
    """Holds one device for this process until `release`."""

    def __init__(self, resource: str, directory: Path | None = None) -> None:
        """Take the lease.

        Args:
            resource: what is held, see `resource_of`.
            directory: of the lock files; by default one that all users of this computer share.

        Raises:
            HardwareError: another process holds it; the message says which.
        """
        self.resource = resource
        directory = directory or Path(tempfile.gettempdir()) / "robot_rl-leases"
        if not directory.exists():
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o1777)
        path = directory / (re.sub(r"[^A-Za-z0-9._-]+", "_", resource) + ".lock")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._file, 4096).decode(errors="replace")
            os.close(self._file)
            raise HardwareError(f"{resource} is controlled by {_described(holder)}: end that first") from None
        holder = {"program": _program(), "pid": os.getpid(), "since": time.strftime("%H:%M:%S")}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        """Give the lease back; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _program() -> str:
    """Return what this process is called, for the one that is refused."""
    verb = sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    return f"{Path(sys.argv[0]).name or 'python'} {verb}".strip()


def _described(holder: str) -> str:
    try:
        known = json.loads(holder)
        return f"'{known['program']}' (process {known['pid']}, since {known['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process, which has not said its name yet"
