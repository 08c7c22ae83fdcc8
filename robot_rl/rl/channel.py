"""Messages between an actor and its learner: a name, JSON facts and arrays, over a local stream socket.

Arrays travel as safetensors and facts as JSON, so that no message can run code; a message that is too large or damaged
ends the connection. NumPy only: an actor needs no torch to talk.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load, save

from robot_rl.core.errors import RobotRLError

LARGEST = 1 << 30
"""Bytes of a message beyond which the other side is not believed."""
_HEAD = struct.Struct("!II")


class ChannelError(RobotRLError):
    """The other side has gone, or does not speak this language."""


@dataclass
class Message:
    """One message."""

    kind: str
    """What it is about."""
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON values."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays by name."""


class Channel:
    """One end of a stream socket; sending and receiving may happen in different threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """Return a channel and the socket of its other end, for another process to inherit."""
        ours, theirs = socket.socketpair()
        return cls(ours), theirs

    def send(self, kind: str, facts: Mapping[str, Any] | None = None, arrays: Mapping[str, Any] | None = None) -> None:
        """Send one message; waits while the other side does not read.

        Raises:
            ChannelError: the other side has gone.
        """
        head = json.dumps({"kind": kind, "facts": dict(facts or {})}).encode()
        body = save({name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()})
        try:
            with self._sending:
                self._socket.sendall(_HEAD.pack(len(head), len(body)) + head + body)
        except OSError as error:
            raise ChannelError(f"the other side has gone: {error}") from error

    def receive(self, timeout: float | None = None) -> Message | None:
        """Return the next message, None if none began within ``timeout`` seconds (None waits for ever).

        Raises:
            ChannelError: the other side has gone, or sent something that is no message.
        """
        if timeout is not None and not self._readable(timeout):
            return None
        head_size, body_size = _HEAD.unpack(self._exactly(_HEAD.size))
        if head_size + body_size > LARGEST:
            raise ChannelError(f"a message of {head_size + body_size} bytes was announced; at most {LARGEST} are read")
        head, body = self._exactly(head_size), self._exactly(body_size)
        try:
            parsed = json.loads(head)
            return Message(str(parsed["kind"]), dict(parsed["facts"]), load(body))
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ChannelError(f"the other side sent no message: {error}") from error

    def close(self) -> None:
        """Close this end; the other side's next `receive` raises."""
        with contextlib.suppress(OSError):  # the other side may have been first
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in `receive`
        self._socket.close()

    def _readable(self, timeout: float) -> bool:
        with selectors.DefaultSelector() as selector:
            try:
                selector.register(self._socket, selectors.EVENT_READ)
            except (OSError, ValueError) as error:
                raise ChannelError(f"this side is closed: {error}") from error
            return bool(selector.select(timeout))

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._socket.recv(min(size - len(parts), 1 << 20))
            except OSError as error:
                raise ChannelError(f"the other side has gone: {error}") from error
            if not part:
                raise ChannelError("the other side has gone")
            parts += part
        return bytes(parts)
