"""The actor's end of the channel to its learner: starts the process, sends episodes, holds the newest weights."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from hardware.hil.experience import Episode
from robot_rl.core.errors import HardwareError
from robot_rl.rl.channel import Channel, ChannelError

logger = logging.getLogger(__name__)
_START_SECONDS = 300.0
_END_SECONDS = 60.0
_RESTARTS = 5
_FRAGILE_SECONDS = 30.0
"""A learner that dies within this time of its start is not started again."""


class LearnerClient:
    """One learner process, started anew when it dies.

    No call here waits for the learner but `start` and `wait`: episodes queue up, and weights lie ready when they are
    there. Episodes stay in memory until the learner has its state with them on disk, so that its death loses none.
    """

    def __init__(self, directory: Path) -> None:
        """Prepare for the learner of ``directory``, whose settings are there."""
        self.directory = directory
        self.newest: tuple[int, dict[str, np.ndarray], dict[str, Any]] | None = None
        """Version, weights and facts of the newest weights; replaced as a whole."""
        self.restarts = 0
        """How often the process died and was started again."""
        self.failure: str | None = None
        """Why there is no learner any more; the actor goes on with the weights that it has."""
        self.resumed = 0
        """Episodes that the learner knew when it was first asked."""
        self._unsaved: deque[tuple[int, Episode]] = deque()
        self._changed = threading.Condition()
        self._greeted = False
        self._next = 0
        self._sending = 0
        self._closing = False
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._threads: list[threading.Thread] = []

    # ---- life cycle -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process and wait until it says what it knows.

        Raises:
            HardwareError: it does not start; the message is the last line of its log.
        """
        self._spawn()
        for name, work in (("learner-receive", self._receive), ("learner-send", self._send)):
            thread = threading.Thread(target=work, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        with self._changed:
            ready = self._changed.wait_for(lambda: self.newest is not None or self.failure, _START_SECONDS)
        if self.failure or not ready:
            self.close()
            raise HardwareError(f"the learner did not start: {self.failure or 'it says nothing'} ({self.log_path})")

    def close(self) -> None:
        """Let the learner save its state, and end it."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._channel is not None and self.failure is None:
            try:
                self._channel.send("end")
            except ChannelError as error:
                logger.info("learner: %s", error)
        if self._process is not None:
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                logger.warning("the learner did not end within %.0f s and is killed", _END_SECONDS)
                self._process.kill()
                self._process.wait()
        if self._channel is not None:
            self._channel.close()
        for thread in self._threads:
            thread.join(2.0)

    @property
    def log_path(self) -> Path:
        """File of what the process says."""
        return self.directory / "learner.log"

    @property
    def pid(self) -> int | None:
        """Process id."""
        return None if self._process is None else self._process.pid

    # ---- experience and weights -------------------------------------------------------------------------------------

    def submit(self, episode: Episode) -> None:
        """Queue an episode for the learner; never waits."""
        with self._changed:
            self._unsaved.append((self._next, episode))
            self._next += 1
            self._changed.notify_all()

    def wait(self, behind: int, timeout: float) -> bool:
        """Wait until the learner has learned from all but ``behind`` episodes; return whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self.failure) or self._learned() >= self._next - behind, timeout)

    def _learned(self) -> int:
        return 0 if self.newest is None else int(self.newest[2]["received"])

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        channel, theirs = Channel.pair()
        command = [sys.executable, "-m", "robot_rl.rl.learner_process", str(self.directory), str(theirs.fileno())]
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log, theirs:
            # A session of its own, so that Ctrl-C reaches the actor alone, which then ends the learner in order.
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        self._channel, self._started, self._greeted = channel, time.monotonic(), False

    def _receive(self) -> None:
        """Take in what the learner says; start it anew when it has gone."""
        while not self._closing:
            assert self._channel is not None
            try:
                message = self._channel.receive(0.5)
            except ChannelError as error:
                if not self._closing:
                    self._revive(error)
                continue
            if message is None:
                continue
            with self._changed:
                if message.kind == "hello":
                    self._greet(int(message.facts["received"]))
                elif message.kind == "weights":
                    self.newest = (int(message.facts["version"]), message.arrays, message.facts)
                elif message.kind == "saved":
                    while self._unsaved and self._unsaved[0][0] < int(message.facts["received"]):
                        self._unsaved.popleft()
                self._changed.notify_all()

    def _greet(self, received: int) -> None:
        """Go on where the learner is."""
        if self._next == 0 and self.newest is None:
            self._next = self.resumed = received
        oldest = self._unsaved[0][0] if self._unsaved else self._next
        if received < oldest:
            logger.error("the learner lost %d episodes that it had saved", oldest - received)
        self._sending, self._greeted = received, True

    def _send(self) -> None:
        """Send every episode once, and again what a restarted learner does not know."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or (self._greeted and self._sending < self._next))
                if self._closing:
                    return
                number, channel = self._sending, self._channel
                episode = next((one for at, one in self._unsaved if at == number), None)
                self._sending += 1
            if episode is None or channel is None:
                continue
            try:
                channel.send("episode", {"number": number, "success": episode.success}, episode.arrays)
            except ChannelError as error:
                logger.info("learner: %s", error)  # `_receive` starts it anew, and asks for what is missing

    def _revive(self, error: ChannelError) -> None:
        assert self._process is not None
        assert self._channel is not None
        self._channel.close()
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        lived = time.monotonic() - self._started
        with self._changed:
            self._greeted = False
            # An error of its own (2), or one that comes at once, would come again.
            if code == 2 or self.restarts >= _RESTARTS or (lived < _FRAGILE_SECONDS and self.newest is None):
                self.failure = self._last_words() or str(error)
                logger.error("the learner has ended for good (exit code %d): %s", code, self.failure)
                self._closing = True
                self._changed.notify_all()
                return
            self.restarts += 1
        logger.warning("the learner died (exit code %d) and is started again; the actor goes on", code)
        self._spawn()

    def _last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").strip().splitlines() if self.log_path.exists() else []
        return lines[-1].rpartition(" ERROR ")[2] if lines else ""
