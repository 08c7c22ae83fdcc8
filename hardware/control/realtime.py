"""What makes the control thread wake up in time: a real-time priority where permitted, and what helps without it.

Without privileges a thread of Linux may still ask for exact timers, for a short time slice (it is then scheduled before
others that computed longer), and for a processor that the policy keeps off. None of these is a guarantee: a loop beside
other busy programs needs the real-time priority, and so do the threads that share its interpreter (`MessengerThread`).
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import platform
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 5e-4
"""How long another thread of this process (recorder, simulated robot, I/O) may keep the interpreter from the control
loop; Python's default is 5 ms, half a tick."""
_SLICE_NS = 100_000
_TIMER_SLACK_NS = 1
_PR_SET_TIMERSLACK, _PR_GET_TIMERSLACK = 29, 30
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
"""``struct sched_attr``: size, policy, flags, nice, priority, runtime, deadline, period (sched_setattr(2))."""


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


def prepare_process() -> None:
    """Make this thread, and those that it starts from now on, quick to answer; call it before middleware is started.

    A message passes through several short-lived wake-ups on each side. They get exact timers and short time slices, so
    that a computation (`computing`) does not hold them up, and the interpreter changes hands sooner.
    """
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
    set_timer_slack(_TIMER_SLACK_NS)
    set_time_slice(_SLICE_NS)


@contextmanager
def computing(pin: bool) -> Iterator[None]:
    """Run the block, the policy's inference, with usual time slices and, with ``pin``, off `control_cpu`."""
    set_time_slice(0)
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    cpu = control_cpu() if pin else None
    if cpu is not None:
        os.sched_setaffinity(0, before - {cpu})
    try:
        yield
    finally:
        if cpu is not None:
            os.sched_setaffinity(0, before)


@contextmanager
def control_thread(priority: int, pin: bool) -> Iterator[None]:
    """Run the block, the control loop, as punctually as the system permits; afterwards the thread is as it was.

    Args:
        priority: real-time priority to ask for, 0 for none.
        pin: keep to `control_cpu`, which `computing` leaves to this thread.
    """
    interval, slack = sys.getswitchinterval(), timer_slack()
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    sys.setswitchinterval(min(interval, SWITCH_SECONDS))
    gc.collect()
    gc.freeze()  # what exists by now stays, and need not be looked through on every collection
    realtime = request_realtime(priority)
    if realtime:
        MessengerThread.promote(max(1, priority - 1))
    set_timer_slack(_TIMER_SLACK_NS)
    if not realtime:
        set_time_slice(_SLICE_NS)
    cpu = control_cpu() if pin else None
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        if realtime:
            MessengerThread.promote(0)
            release_realtime()
        set_time_slice(0)
        if cpu is not None:
            os.sched_setaffinity(0, cpus)
        set_timer_slack(slack)
        sys.setswitchinterval(interval)
        gc.unfreeze()


class MessengerThread(threading.Thread):
    """A thread that takes in or hands on messages in the process of a control loop, and computes little itself.

    It shares the interpreter with the loop: were it kept from the processor by another program while it holds that, the
    loop would wait, however high its own priority. So it has the priority below while such a loop runs.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _running: ClassVar[set[int]] = set()
    """Numbers of the threads as the system knows them."""
    _priority: ClassVar[int] = 0

    @classmethod
    def promote(cls, priority: int) -> None:
        """Give all of them, and those that start from now on, the real-time ``priority``; 0 takes it away."""
        with cls._lock:
            cls._priority = priority
            for number in cls._running:
                _schedule(number, priority)

    def run(self) -> None:
        """Do the thread's work."""
        number = threading.get_native_id()
        with self._lock:
            self._running.add(number)
            if self._priority:
                _schedule(number, self._priority)
        try:
            super().run()
        finally:
            with self._lock:
                self._running.discard(number)


def _schedule(thread: int, priority: int) -> None:
    """Give ``thread`` a real-time priority, which its process may have, or a normal one with 0."""
    policy = os.SCHED_FIFO if priority else os.SCHED_OTHER
    os.sched_setscheduler(thread, policy, os.sched_param(priority))


def control_cpu() -> int | None:
    """Return the processor for the control thread: the last one that this thread may use; None if it is the only one.

    Executor and policy process find the same one without talking, because both inherit what they may use.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    cpus = os.sched_getaffinity(0)
    return max(cpus) if len(cpus) > 1 else None


def timer_slack() -> int:
    """Return by how many ns the kernel may delay this thread's timers to join them with others; 0 if unknown."""
    return max(0, int(ctypes.CDLL(None).prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0))) if sys.platform == "linux" else 0


def set_timer_slack(nanoseconds: int) -> None:
    """Set this thread's timer slack; 50 us is usual, 1 ns makes sleeps end on time. Linux only."""
    if sys.platform == "linux" and nanoseconds > 0:
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, nanoseconds, 0, 0, 0)


def set_time_slice(nanoseconds: int) -> bool:
    """Ask for time slices of ``nanoseconds`` (0: the default) at normal priority; return whether the kernel took it.

    From Linux 6.12 on, a thread that asks for a shorter slice than the one that runs is let in when it wakes up, as
    long as it has used no more than its share; no privilege is needed. Older kernels ignore the request.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if sys.platform != "linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False  # who was started with a real-time policy keeps it
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0)
    return ctypes.CDLL(None, use_errno=True).syscall(number, 0, attributes, 0) == 0
