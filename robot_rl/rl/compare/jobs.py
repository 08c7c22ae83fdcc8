"""Child processes side by side: as many at once as there are places, each with its share of the processors."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robot_rl.train.progress import progress
from robot_rl.train.run import writing

POLL_SECONDS = 0.2
"""Time between looks at what runs."""
GRACE_SECONDS = 15.0
"""Time that an interrupted child has to end in order."""


@dataclass(frozen=True)
class Job:
    """One command of ours, run by a Python process of its own."""

    name: str
    """Names it in progress and messages; unique."""
    arguments: tuple[str, ...]
    """What follows the interpreter: ``-m module …``."""
    log: Path
    """Receives its standard output and error."""
    total: int = 1
    """Size of its progress bar."""
    unit: str = "job"
    """Unit of the progress bar."""
    watch: Callable[[], tuple[int, Mapping[str, Any]]] = lambda: (0, {})
    """Returns how much is done and values worth showing; asked while the job runs."""


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    code: int
    """Exit status; negative for a signal."""
    error: str
    """Why it failed, in one line; empty where it did not."""
    seconds: float
    """Wall-clock time."""


class Places(ABC):
    """Where jobs run."""

    count: int
    """Jobs at once."""

    @abstractmethod
    def start(self, job: Job) -> Any:
        """Start ``job`` and return a handle; at most `count` are under way."""

    @abstractmethod
    def poll(self, handle: Any) -> int | None:
        """Return the exit status of a job, or None while it runs."""

    @abstractmethod
    def stop(self, handles: Sequence[Any]) -> None:
        """Interrupt jobs and wait until they have ended."""


class LocalPlaces(Places):
    """Processes on this machine; together they have its processors, and none takes another's."""

    def __init__(self, count: int = 0) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self.count = count or len(cores)
        self.threads = max(1, len(cores) // self.count)
        shares = [set(cores[i * self.threads : (i + 1) * self.threads]) for i in range(self.count)]
        # With more jobs than processors nobody is bound: the operating system shares them out.
        self._free = shares if self.count <= len(cores) else [set(cores)] * self.count
        self._taken: dict[int, set[int]] = {}

    def start(self, job: Job) -> subprocess.Popen[bytes]:
        """Start the process on the next free share of the processors."""
        share = self._free.pop(0)
        process = spawn(job.arguments, job.log, self.threads, share)
        self._taken[process.pid] = share
        return process

    def poll(self, handle: subprocess.Popen[bytes]) -> int | None:
        """Return the exit status, or None while it runs."""
        code = handle.poll()
        if code is not None and handle.pid in self._taken:
            self._free.append(self._taken.pop(handle.pid))
        return code

    def stop(self, handles: Sequence[subprocess.Popen[bytes]]) -> None:
        """Interrupt the processes, and kill what has not ended in time."""
        stop_processes(handles)


def run_jobs(jobs: Sequence[Job], places: Places, ended: Callable[[Job, Ended], Sequence[Job]]) -> None:
    """Run ``jobs`` in order, as many at once as there are places, with a progress bar for each.

    Args:
        jobs: what to run.
        places: where.
        ended: told of every end; the jobs that it returns go before those that still wait.
    """
    waiting = deque(jobs)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < places.count:
                running.append(_Running(waiting.popleft(), places))
            time.sleep(POLL_SECONDS)
            for one in list(running):
                code = one.poll()
                if code is not None:
                    running.remove(one)
                    follow = ended(one.job, one.end(code))
                    waiting.extendleft(reversed(follow))
    except BaseException:
        places.stop([one.handle for one in running])
        for one in running:
            one.end(130)
        raise


class _Running:
    """A job under way and its bar."""

    def __init__(self, job: Job, places: Places) -> None:
        self.job, self.places = job, places
        self.began, self.done = time.monotonic(), 0
        self.handle = places.start(job)
        self._stack = contextlib.ExitStack()
        self._bar = self._stack.enter_context(progress(job.name, job.total, job.unit))
        self._next_look = 0.0

    def poll(self) -> int | None:
        """Show progress once a second; return the exit status, or None while it runs."""
        code = self.places.poll(self.handle)
        if code is not None or time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + 1.0
            done, values = self.job.watch()
            done = min(max(done, self.done), self.job.total)
            if code == 0:
                done = self.job.total
            if done != self.done or code is not None:
                self._bar.advance(done - self.done, **values)
            self.done = done
        return code

    def end(self, code: int) -> Ended:
        """Close the bar and say how it ended."""
        failure = InterruptedError() if code else None
        # The bar says that it was stopped; whoever asked for the jobs decides what a failure means.
        with contextlib.suppress(InterruptedError):
            self._stack.__exit__(type(failure) if failure else None, failure, None)
        return Ended(code, failure_line(code, self.job.log), time.monotonic() - self.began)


def failure_line(code: int, log: Path) -> str:
    """Return why a process failed: its last line, or the signal that ended it; empty for exit status 0."""
    if code == 0:
        return ""
    if code < 0:
        hint = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{hint}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else f"exit status {code} without a word"


def spawn(
    arguments: Sequence[str], log: Path, threads: int, cores: set[int] | None = None, directory: str | None = None
) -> subprocess.Popen[bytes]:
    """Start ``python <arguments>`` in a process group of its own, which ends when we do.

    Args:
        arguments: what follows the interpreter.
        log: file for its output, which is written anew.
        threads: threads of its numerical libraries.
        cores: processors that it may use; None for all.
        directory: working directory, if not ours.
    """
    parent = os.getpid()
    # Loaded here: between fork and exec nothing may be imported.
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        # PR_SET_PDEATHSIG: a child must not go on writing when nobody is there to know of it.
        libc.prctl(1, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
        # A shell that runs us in the background ignores the signal by which we stop a child in order.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if cores:
            os.sched_setaffinity(0, cores)

    number = str(threads)
    limits = {"OMP_NUM_THREADS": number, "OPENBLAS_NUM_THREADS": number, "MKL_NUM_THREADS": number}
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("wb")
    with output:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | limits | {"PYTHONUNBUFFERED": "1"},
            cwd=directory,
            start_new_session=True,
            preexec_fn=prepare,
        )


def stop_processes(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt process groups as Ctrl-C does, and kill those that have not ended in time."""
    for process in processes:
        _signal(process, signal.SIGINT)
    deadline = time.monotonic() + GRACE_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
