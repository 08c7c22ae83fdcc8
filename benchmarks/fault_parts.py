"""The parts that `fault_matrix` breaks, each a process: a policy, a camera and an operator that can be told to fail.

They talk JSON, one object per line. ``{"fault": name}`` on their input makes them hang, freeze, jump, send NaN, lose
half of what they say, or say it 300 ms late; to be killed or stopped they need do nothing.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hardware.cameras.base import BaseCamera, CameraConfig

HORIZON, FREQUENCY = 8, 0.5
CAMERA_RATE, OPERATOR_RATE = 30.0, 50.0
DELAY = 0.3


def swing_chunk(base: np.ndarray, swing: np.ndarray, rate: float, seq: int) -> np.ndarray:
    """Return the actions (8, A) of policy step ``seq`` and the next ones: slow swings about ``base`` (A,)."""
    phase = 2 * np.pi * FREQUENCY * (seq + np.arange(HORIZON)) / rate
    return base + swing * np.sin(phase)[:, None]


class Part:
    """One of the processes, from the outside."""

    def __init__(self, role: str, options: dict[str, Any]) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), role, json.dumps(options)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        self._thread: threading.Thread | None = None

    def tell(self, **said: Any) -> None:
        """Say something; lost if the process does not read."""
        assert self.process.stdin is not None
        try:
            os.write(self.process.stdin.fileno(), (json.dumps(said) + "\n").encode())
        except OSError:
            return  # it is dead, or its pipe is full because it does not read: the fault under test

    def listen(self, hear: Callable[[dict[str, Any]], None]) -> None:
        """Call ``hear`` with everything that the process says."""

        def work() -> None:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                if line.endswith(b"\n"):  # a killed process may end in the middle of one
                    hear(json.loads(line))

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def fail(self, fault: str) -> None:
        """Break it."""
        if fault == "kill":
            self.process.kill()
        elif fault == "stop":
            self.process.send_signal(signal.SIGSTOP)
        else:
            self.tell(fault=fault)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait(10.0)
        if self._thread is not None:
            self._thread.join(5.0)


class PartCamera(BaseCamera):
    """A camera whose images come from such a process: only their stamps travel, the rest is noise."""

    def __init__(self, part: Part) -> None:
        super().__init__(CameraConfig(64, 48))
        self._part, self._random = part, np.random.default_rng(0)

    def _start(self) -> None:
        self._part.listen(self._hear)

    def _hear(self, said: dict[str, Any]) -> None:
        self._take(self._random.integers(0, 255, (48, 64, 3)).astype(np.uint8), float(said["stamp"]))

    def disconnect(self) -> None:
        """End the process."""
        self._part.close()


# ---- inside the processes --------------------------------------------------------------------------------------------


class Mouth:
    """Says things as the present fault has it."""

    def __init__(self) -> None:
        self.fault = ""
        self._last: dict[str, Any] = {}
        self._late: deque[tuple[float, dict[str, Any]]] = deque()

    def say(self, said: dict[str, Any]) -> None:
        """Say something, or what the fault makes of it."""
        if self.fault == "freeze":
            said = self._last
        elif self.fault == "drop" and random.random() < 0.5:
            return
        elif self.fault == "delay":
            self._late.append((time.monotonic() + DELAY, said))
            return
        self._last = said
        self._write(said)

    def say_late(self) -> None:
        """Say what has waited long enough."""
        while self._late and self._late[0][0] <= time.monotonic():
            self._write(self._late.popleft()[1])

    def _write(self, said: dict[str, Any]) -> None:
        os.write(1, (json.dumps(said) + "\n").encode())


def hear(mouth: Mouth, patience: float) -> list[dict[str, Any]]:
    """Return what was said to this process within ``patience`` seconds; obey faults."""
    if not select.select([0], [], [], max(0.0, patience))[0]:
        return []
    data = os.read(0, 65536)
    if not data:
        raise SystemExit(0)
    found = [json.loads(line) for line in data.decode().splitlines()]
    for one in found:
        mouth.fault = one.get("fault", mouth.fault)
    if mouth.fault == "disconnect":
        raise SystemExit(0)
    while mouth.fault == "hang":
        pass
    return found


def policy(mouth: Mouth, options: dict[str, Any]) -> None:
    """Answer every step with a chunk."""
    base, swing = np.array(options["base"]), np.array(options["swing"])
    while True:
        for said in hear(mouth, 0.01):
            if "seq" not in said:
                continue
            actions = swing_chunk(base, swing, options["rate"], said["seq"])
            actions = actions * np.nan if mouth.fault == "nan" else actions + 1e3 * (mouth.fault == "jump")
            mouth.say({"actions": actions.tolist(), "seq": said["seq"], "stamp": said["stamp"]})
        mouth.say_late()


def camera(mouth: Mouth, options: dict[str, Any]) -> None:
    """Take an image now and then."""
    due = time.monotonic()
    while True:
        hear(mouth, due - time.monotonic())
        mouth.say_late()
        if time.monotonic() >= due:
            due += 1.0 / CAMERA_RATE
            mouth.say({"stamp": time.monotonic() + 5.0 * (mouth.fault == "jump")})


def operator(mouth: Mouth, options: dict[str, Any]) -> None:
    """Wish for a motion once told to."""
    due, seq, drive = time.monotonic(), 0, 0.0
    while True:
        for said in hear(mouth, due - time.monotonic()):
            drive = said.get("drive", drive)
        mouth.say_late()
        if time.monotonic() >= due:
            due, seq = due + 1.0 / OPERATOR_RATE, seq + 1
            wish = float("nan") if mouth.fault == "nan" else 1e6 if mouth.fault == "jump" else drive
            mouth.say({"stamp": time.monotonic(), "seq": seq, "motion": [wish] * options["size"]})


if __name__ == "__main__":
    {"policy": policy, "camera": camera, "operator": operator}[sys.argv[1]](Mouth(), json.loads(sys.argv[2]))
