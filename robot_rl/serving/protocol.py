"""What a policy server and its client say: msgpack maps over a websocket, arrays as raw bytes, never pickle.

The client opens ``ws://host:port/<policy>`` with the token as bearer authorisation, so that nothing of a stranger's is
ever parsed. It sends ``hello`` with the version of the protocol and gets ``policy``: spec, history, horizon. Then each
``plan``, ``refine`` and ``seed`` has a number, which the ``result`` or ``error`` repeats.
"""

from __future__ import annotations

import importlib.util
import math
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.core.errors import ConfigError, DataError, MissingDependencyError
from robot_rl.core.realtime import Commitment, RealTimeConfig

PROTOCOL = 1
"""Version; both sides must have the same."""
LARGEST_MESSAGE = 16 * 2**20
"""Bytes of a message; a longer one ends the connection."""
TOKEN_FILE = Path("runs/serve.token")
"""Where server and client look for the token, unless told otherwise."""
_ARRAY = "array"
_KINDS = ("<f4", "<f8", "|u1", "<i4", "<i8", "|b1")


def require_packages() -> None:
    """Raise `MissingDependencyError` unless websockets and msgpack are installed."""
    for package in ("websockets", "msgpack"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "serve", "A policy on another computer")


def read_token(path: Path) -> str:
    """Return the token in ``path``; raises `ConfigError` where there is none."""
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the token file {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(token) < 16 or not token.isascii() or not token.isprintable():
        raise ConfigError(f"the token in {path} must be one line of 16 or more printable characters")
    return token


def limit_sending(connection: Any, seconds: float) -> None:
    """Let no send over ``connection`` take longer than ``seconds``.

    A peer that reads nothing fills the buffers, and sending would then wait for ever, with all that keeps watch.
    """
    whole, part = divmod(seconds, 1.0)
    limit = struct.pack("ll", int(whole), max(1, int(part * 1e6)))
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def encode(message: Mapping[str, Any]) -> bytes:
    """Return a message as bytes; arrays may stand anywhere in it."""
    import msgpack

    packed: bytes = msgpack.packb(message, default=_pack)
    return packed


def decode(data: bytes | str) -> dict[str, Any]:
    """Return the message in ``data``; raises `DataError` for whatever is none."""
    import msgpack

    if isinstance(data, str):
        raise DataError("a message must be binary")
    try:
        message = msgpack.unpackb(data, object_hook=_unpack, strict_map_key=True)
    except DataError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"not a message of this protocol: {str(error)[:80]}") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise DataError("a message must be a map with a type")
    return message


def pack_commitment(commitment: Commitment | None) -> dict[str, Any] | None:
    """Return what stands for ``commitment`` in a message."""
    if commitment is None:
        return None
    how = commitment.how
    return {
        "actions": np.asarray(commitment.actions, np.float32),
        "remaining": np.asarray(commitment.remaining, np.int64),
        "delay": int(commitment.delay),
        "way": how.way,
        "max_weight": float(how.max_weight),
    }


def unpack_commitment(found: Any, batch: int, horizon: int, size: int) -> Commitment | None:
    """Return the commitment in a message; raises `DataError` if it does not fit B plans (H, A)."""
    if found is None:
        return None
    try:
        actions, remaining, delay = found["actions"], found["remaining"], int(found["delay"])
        how = RealTimeConfig.of(found["way"], max(1, delay), float(found["max_weight"]))
        fits = actions.shape == (batch, horizon, size) and remaining.shape == (batch,) and 0 <= delay <= horizon
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"this is no running chunk: {str(error)[:80]}") from error
    if not fits or not np.isfinite(actions).all():
        raise DataError(f"a running chunk must be finite and have the shape {(batch, horizon, size)}")
    return Commitment(actions, remaining, delay, how)


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = np.ascontiguousarray(value)
        return {_ARRAY: value.dtype.str, "shape": list(value.shape), "data": value.tobytes()}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a message cannot hold a {type(value).__name__}")


def _unpack(found: dict[str, Any]) -> Any:
    if _ARRAY not in found:
        return found
    kind, shape, data = found[_ARRAY], found.get("shape"), found.get("data")
    if kind not in _KINDS or not isinstance(shape, list) or not isinstance(data, bytes) or len(shape) > 8:
        raise DataError("a message holds an array of an unknown kind")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise DataError("a message holds an array without a shape")
    if math.prod(shape) * np.dtype(kind).itemsize != len(data):
        raise DataError(f"a message holds an array of {len(data)} bytes that says it is {kind} of shape {shape}"[:200])
    return np.frombuffer(data, kind).reshape(shape).copy()
