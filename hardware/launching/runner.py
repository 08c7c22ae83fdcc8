"""Runs the processes of a launch file: starts them, shows what they print, starts them again, and ends them in order.

Each process is a session of its own, so that Ctrl-C in the terminal reaches the launcher alone, which then ends every
process group with SIGINT, after 5 s with SIGTERM, and after another 5 s with SIGKILL.
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from hardware.launching.action import Action, Later, Message, Process, Shutdown
from hardware.launching.child import Child, Stream

_POLL = 0.05
"""Longest time (s) until an ended process is noticed."""
_COLOURS = (36, 32, 33, 35, 34, 96, 92, 95)
_LAUNCHER = "launch"


class Runner:
    """Runs the actions of one launch file; use `run`."""

    def __init__(self, log_directory: Path, output: TextIO | None = None) -> None:
        """Prepare; nothing is started.

        Args:
            log_directory: gets ``<name>.log`` of the processes whose output is to be logged.
            output: where lines go, standard output by default.
        """
        self.log_directory, self.output = Path(log_directory), output or sys.stdout
        self.children: list[Child] = []
        self.failed: list[str] = []
        """Labels of processes that ended by themselves with an exit code other than 0."""
        self._timers: list[tuple[float, int, Callable[[], Iterator[Action]]]] = []
        self._count = itertools.count()
        self._selector = selectors.DefaultSelector()
        self._ending = self._unlogged = False
        self._coloured = self.output.isatty() and "NO_COLOR" not in os.environ

    def run(self, actions: Iterator[Action], stop: threading.Event) -> int:
        """Do ``actions`` until every process has ended, or ``stop`` is set; return the exit code.

        The exit code is 1 if a process ended by itself with another one than 0. If the launch file turns out to be
        wrong when processes run already, these are ended, and the error is raised.
        """
        with tempfile.TemporaryDirectory(prefix="robot_rl_launch_") as directory:
            self._parameters = Path(directory)
            try:
                self._do(actions)
                while self._timers or any(child.waiting for child in self.children):
                    if stop.is_set():
                        self.shut_down("interrupted")
                    self._turn()
            finally:
                self.shut_down("the launcher ends")
                while any(child.waiting for child in self.children):
                    self._turn()
                self._selector.close()
        return int(bool(self.failed))

    def shut_down(self, reason: str) -> None:
        """Begin to end everything; safe to call twice."""
        if self._ending:
            return
        self._ending = True
        self._timers.clear()
        if any(child.waiting for child in self.children):
            self._say(_LAUNCHER, f"ending everything: {reason}")
        for child in reversed(self.children):
            child.respawn_at = None
            if not child.ended:
                child.begin_end(time.monotonic())

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _do(self, actions: Iterator[Action]) -> None:
        for action in actions:
            match action:
                case Process():
                    self.children.append(child := Child(action, self._label(action.name)))
                    self._start(child)
                case Message(text, level):
                    self._say(_LAUNCHER, text if level == "INFO" else f"{level}: {text}")
                case Shutdown(reason):
                    self.shut_down(reason)
                case Later(seconds, following):
                    heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._count), following))
            if self._ending:
                return

    def _turn(self) -> None:
        """Wait a moment for output, and look after every process and timer."""
        wait = max(0.0, min(_POLL, self._timers[0][0] - time.monotonic())) if self._timers else _POLL
        if self._selector.get_map():
            for key, _ in self._selector.select(wait):
                self._read(*key.data)
        else:
            time.sleep(wait)
        now = time.monotonic()
        for child in self.children:
            self._look_after(child, now)
        while self._timers and self._timers[0][0] <= now:
            self._do(heapq.heappop(self._timers)[2]())

    def _look_after(self, child: Child, now: float) -> None:
        if child.respawn_at is not None:
            if now >= child.respawn_at:
                self._start(child)
        elif child.ended:
            pass
        elif child.handle.poll() is not None:
            self._on_end(child, now)
        elif now >= child.signal_at:
            self._say(_LAUNCHER, f"{child.label} did not end; sent {child.signal_next(now).name}")

    def _on_end(self, child: Child, now: float) -> None:
        child.send(signal.SIGKILL)  # whatever it started and left behind goes with it
        for stream in list(child.streams):
            while stream in child.streams:
                self._read(child, stream, last=True)
        child.ended = True
        self._say(_LAUNCHER, child.describe_end())
        if self._ending:
            return
        process = child.process
        if child.handle.returncode != 0:
            self.failed.append(child.label)
        if process.required:
            self.shut_down(f"{child.label} is required and has ended")
        elif process.respawn and not 0 <= process.respawn_max_retries < child.starts:
            child.respawn_at = now + process.respawn_delay

    def _start(self, child: Child) -> None:
        child.ended = True  # until it runs
        child.respawn_at = None
        child.start(child.process.command(self._write_parameters), os.getpid())
        for stream in child.streams:
            self._selector.register(stream.file, selectors.EVENT_READ, (child, stream))
        self._say(_LAUNCHER, f"started {child.label} (pid {child.handle.pid})")

    def _write_parameters(self, content: Mapping[str, Any]) -> Path:
        path = self._parameters / f"parameters_{next(self._count)}.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        return path

    def _label(self, name: str) -> str:
        taken = {child.label for child in self.children}
        names = (name, *(f"{name}-{number}" for number in range(2, len(taken) + 3)))
        return next(one for one in names if one not in taken)

    def _read(self, child: Child, stream: Stream, last: bool = False) -> None:
        """Take in what came; ``last``: the process has ended, and what is not there now is not waited for."""
        lines, open_still = stream.read()
        for line in lines:
            self._pass_on(child, line, stream.error)
        if not open_still or (last and not lines):
            if stream.rest:
                self._pass_on(child, stream.rest.decode(errors="replace"), stream.error)
            self._selector.unregister(stream.file)
            stream.file.close()
            child.streams.remove(stream)

    def _pass_on(self, child: Child, line: str, error: bool) -> None:
        output = child.process.output
        if output in ("log", "own_log", "both", "full"):
            self._log(child.label, line)
        if output in ("screen", "both", "full") or (output == "log" and error):
            self._say(child.label, line)

    def _log(self, label: str, line: str) -> None:
        try:
            self.log_directory.mkdir(parents=True, exist_ok=True)
            with (self.log_directory / f"{label}.log").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # a full disk is no reason to end what runs
            if not self._unlogged:
                self._say(_LAUNCHER, f"lines are missing in {self.log_directory}: {error.strerror}")
            self._unlogged = True

    def _say(self, who: str, text: str) -> None:
        mark = f"[{who}]"
        if self._coloured:
            number = next((i for i, one in enumerate(self.children) if one.label == who), None)
            mark = f"\x1b[{'1' if number is None else _COLOURS[number % len(_COLOURS)]}m{mark}\x1b[0m"
        self.output.write(f"{mark} {text}\n")
        self.output.flush()


def run_launch(actions: Iterator[Action], log_directory: Path) -> int:
    """Run ``actions`` until they are done, or SIGINT or SIGTERM ends them; return the exit code.

    Raises:
        RobotRLError: the launch file turned out wrong on the way; what was started has been ended.
    """
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        return Runner(log_directory).run(actions, stop)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def describe(actions: Iterator[Action]) -> Iterator[str]:
    """Yield, one line each, what ``actions`` would do: command lines with inline parameters in braces."""
    for action in actions:
        match action:
            case Process():
                words = [word if word.startswith("{") else shlex.quote(word) for word in action.command(_in_place)]
                yield " ".join([f"[{action.name}]", *words])
            case Message(text, _):
                yield f"log: {text}"
            case Shutdown(reason):
                yield f"shutdown: {reason}"
            case Later(seconds, following):
                yield f"after {seconds:g} s:"
                yield from (f"  {line}" for line in describe(following()))


def _in_place(content: Mapping[str, Any]) -> Path:
    return Path(yaml.safe_dump(content, default_flow_style=True, width=10**6, allow_unicode=True).strip())
