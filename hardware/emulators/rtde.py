"""An emulated controller of Universal Robots, as far as its real-time data exchange (RTDE, port 30004) goes.

    python -m hardware.emulators.rtde --host 127.0.0.77

The outputs of protocol version 2 are served to any client: the joints, the modes and the safety bits. Programs and
their inputs are not: what moves the arm are lines of standard input, ``goal`` with six angles in rad, ``hold``,
``mode`` and ``safety`` with a number. It is a process of its own because the library's client keeps the interpreter to
itself while it waits for an answer.
"""

from __future__ import annotations

import argparse
import socketserver
import struct
import sys
import threading
import time
from typing import Any

import numpy as np

_FORMATS = {"DOUBLE": "d", "VECTOR6D": "6d", "INT32": "i", "UINT32": "I"}
_TYPES = {
    "timestamp": "DOUBLE",
    "actual_q": "VECTOR6D",
    "actual_qd": "VECTOR6D",
    "robot_mode": "INT32",
    "safety_mode": "INT32",
    "safety_status_bits": "UINT32",
}
SPEED = 2.0
"""Speed of the joints in rad/s."""


class RtdeController(socketserver.ThreadingTCPServer):
    """Joints that servo towards a goal, and what the controller says of them."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, host: str, port: int = 30004) -> None:
        self.host = host
        self.place, self.goal, self.speed = np.zeros(6), np.zeros(6), np.zeros(6)
        self.mode, self.safety_mode, self.safety_bits = 7, 1, 1
        self._begun = self._moved = time.monotonic()
        self._lock = threading.Lock()
        super().__init__((host, port), _Client)

    def servo(self, goal: np.ndarray | None) -> None:
        """Servo towards ``goal`` (6,) in rad, or stay where the arm is."""
        with self._lock:
            self.goal = self.place.copy() if goal is None else np.array(goal, float)

    def outputs(self) -> dict[str, Any]:
        """Return the values of all outputs as of now."""
        with self._lock:
            now = time.monotonic()
            elapsed, self._moved = max(now - self._moved, 1e-6), now
            before = self.place
            self.place = before + np.clip(self.goal - before, -SPEED * elapsed, SPEED * elapsed)
            self.speed = (self.place - before) / elapsed
            return {
                "timestamp": (now - self._begun,),
                "actual_q": self.place.tolist(),
                "actual_qd": self.speed.tolist(),
                "robot_mode": (self.mode,),
                "safety_mode": (self.safety_mode,),
                "safety_status_bits": (self.safety_bits,),
            }


class _Client(socketserver.BaseRequestHandler):
    """One client: answers its requests, and streams once it has asked to start."""

    server: RtdeController

    def handle(self) -> None:
        self.variables: list[str] = []
        self.period, self.sending = 0.008, False
        self.gate = threading.Lock()
        threading.Thread(target=self._stream, daemon=True).start()
        buffer = b""
        while True:
            try:
                data = self.request.recv(4096)
            except ConnectionError:
                return
            if not data:
                return
            buffer += data
            while len(buffer) >= 3 and len(buffer) >= (size := struct.unpack(">H", buffer[:2])[0]):
                kind, payload, buffer = buffer[2:3], buffer[3:size], buffer[size:]
                self._answer(kind, payload)

    def finish(self) -> None:
        self.sending = False

    def _answer(self, kind: bytes, payload: bytes) -> None:
        if kind == b"V":
            self._send(kind, struct.pack(">B", payload == struct.pack(">H", 2)))
        elif kind == b"v":
            self._send(kind, struct.pack(">4I", 5, 12, 0, 0))
        elif kind == b"O":
            self.period = 1.0 / struct.unpack(">d", payload[:8])[0]
            self.variables = payload[8:].decode().strip(",").split(",")  # clients may end with a comma
            types = [_TYPES.get(name, "NOT_FOUND") for name in self.variables]
            self._send(kind, b"\x01" + ",".join(types).encode())
        elif kind in (b"S", b"P"):
            self._send(kind, b"\x01")
            self.sending = kind == b"S"

    def _stream(self) -> None:
        while True:
            time.sleep(self.period)
            if not self.sending:
                continue
            values = self.server.outputs()
            packed = [struct.pack(">" + _FORMATS[_TYPES[name]], *values[name]) for name in self.variables]
            try:
                self._send(b"U", b"\x01" + b"".join(packed))
            except OSError:  # the client has gone
                return

    def _send(self, kind: bytes, payload: bytes) -> None:
        with self.gate:
            self.request.sendall(struct.pack(">H", len(payload) + 3) + kind + payload)


def main() -> None:
    """Emulate until standard input ends."""
    parser = argparse.ArgumentParser(description="An emulated controller of Universal Robots.")
    parser.add_argument("--host", default="127.0.0.77")
    controller = RtdeController(parser.parse_args().host)
    threading.Thread(target=controller.serve_forever, args=(0.05,), daemon=True).start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        word, *numbers = line.split()
        if word == "goal":
            controller.servo(np.array([float(number) for number in numbers]))
        elif word == "hold":
            controller.servo(None)
        elif word == "mode":
            controller.mode = int(numbers[0])
        elif word == "safety":
            controller.safety_bits = int(numbers[0])
    controller.shutdown()


if __name__ == "__main__":
    main()
