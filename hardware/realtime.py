"""Real-time scheduling of the calling thread, where the system permits it."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)


def request_realtime(priority: int) -> bool:
    """Ask for first-in-first-out scheduling of this thread at ``priority`` (1 to 99); return whether it was granted.

    Linux grants it to root and to users with an ``rtprio`` limit (``/etc/security/limits.conf``). Without it the loop
    still keeps absolute deadlines, but another busy process may delay a tick by milliseconds.
    """
    if priority <= 0 or not hasattr(os, "sched_setscheduler"):
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except (PermissionError, OSError, ValueError) as error:
        logger.info("no real-time priority (%s); the loop runs at normal priority", error)
        return False
    logger.info("real-time priority %d granted", priority)
    return True


def release_realtime() -> None:
    """Give this thread normal priority again."""
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
