"""Serves policies to robots on other computers, or to other processes of this one.

Every connection has a policy of its own (weights and stream of noises), which goes back to a pool when it ends. What a
client sends cannot harm the others: the token is checked before anything is read, messages are bounded, and whatever
does not fit ends that connection only.
"""

from __future__ import annotations

import hmac
import http
import ipaddress
import logging
import os
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.core.errors import ConfigError, DataError, RobotRLError
from robot_rl.core.ranges import require_positive, require_range
from robot_rl.policies.checkpoint import load_policy
from robot_rl.serving.protocol import (
    LARGEST_MESSAGE,
    PROTOCOL,
    TOKEN_FILE,
    decode,
    encode,
    limit_sending,
    read_token,
    require_packages,
    unpack_commitment,
)

logger = logging.getLogger(__name__)
LARGEST_BATCH = 256
"""Plans in one request."""


@dataclass(frozen=True)
class ServerConfig:
    """How a policy server listens."""

    host: str = "127.0.0.1"
    """Address to listen on. Beyond this computer the connection is not encrypted: use a tunnel (ssh -L) or a proxy that
    speaks wss."""
    port: int = 8765
    """Port; 0 takes a free one."""
    token_file: Path = TOKEN_FILE
    """File with the token that clients must show; made, readable by you only, if it does not exist."""
    device: str = "cpu"
    """Where policies run, for example cuda."""
    threads: int = 0
    """Processor threads of the inference; 0 leaves them to torch."""
    max_clients: int = 4
    """Connections at the same time."""
    handshake_seconds: float = 5.0
    """Time in which a client must have introduced itself."""
    ping_seconds: float = 10.0
    """How often (s) a client is asked whether it is there; for as long, an answer or the taking of a reply may take."""

    def __post_init__(self) -> None:
        require_range(self, "port", high=65535)
        require_range(self, "threads", "handshake_seconds")
        require_range(self, "max_clients", low=1)
        require_positive(self, "ping_seconds")


class PolicyWebServer:
    """Serves the checkpoint ``root``, or any checkpoint in the directory ``root``.

    Use as a context manager, or call `start`, then `stop`.
    """

    def __init__(self, root: str | Path, config: ServerConfig | None = None) -> None:
        """Look at ``root`` and the token; nothing listens yet.

        Raises:
            ConfigError: there is no such directory, or the token file cannot be used.
            MissingDependencyError: websockets or msgpack are not installed.
        """
        require_packages()
        self.config = config or ServerConfig()
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise ConfigError(f"no checkpoint or directory of checkpoints: {root}")
        self._token = _token(self.config.token_file)
        self._idle: list[tuple[tuple[Path, int], Any]] = []
        self._lock = threading.Lock()
        self._clients: set[Any] = set()
        self._server: Any = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """``ws://host:port`` under which it listens."""
        host, port = self._server.socket.getsockname()[:2]
        return f"ws://{host}:{port}" if ":" not in host else f"ws://[{host}]:{port}"

    def start(self) -> None:
        """Listen, in a thread of its own."""
        from websockets.sync.server import serve

        config = self.config
        if not _loopback(config.host):
            logger.warning("listening on %s: whoever has the token can use the policy; not encrypted", config.host)
        try:
            self._server = serve(
                self._handle,
                config.host,
                config.port,
                process_request=self._admit,
                compression=None,
                max_size=LARGEST_MESSAGE,
                max_queue=4,
                open_timeout=config.handshake_seconds,
                close_timeout=1.0,
                ping_interval=config.ping_seconds,
                ping_timeout=config.ping_seconds,
                server_header=None,
                logger=logging.getLogger(f"{__name__}.websocket"),
            )
        except OSError as error:
            raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}") from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="policy-server", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close every connection and stop listening."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join(5.0)
            with self._lock:
                clients = list(self._clients)
            for connection in clients:
                connection.close(1001)

    def __enter__(self) -> PolicyWebServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    # ---- before anything is parsed ----------------------------------------------------------------------------------

    def _admit(self, connection: Any, request: Any) -> Any:
        """Return None to go on with the handshake, or the refusal as an HTTP response."""
        shown = request.headers.get("Authorization", "")
        if not hmac.compare_digest(shown.encode(), f"Bearer {self._token}".encode()):
            logger.warning("refused a client without the token")
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "wrong token\n")
        try:
            self._checkpoint(request.path)
        except DataError as error:
            return connection.respond(http.HTTPStatus.NOT_FOUND, f"{error}\n")
        with self._lock:
            if len(self._clients) >= self.config.max_clients:
                return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "as many clients as are allowed\n")
        return None

    def _checkpoint(self, path: str) -> Path:
        """Return the directory that a request's path names; raises `DataError` if it is not one below the root."""
        name = urllib.parse.unquote(urllib.parse.urlsplit(path).path).strip("/")
        try:
            found = (self.root / name).resolve()
        except (OSError, ValueError) as error:
            raise DataError("no such policy") from error
        if not found.is_relative_to(self.root) or not (found / "policy.json").is_file():
            raise DataError(f"no policy '{name[:80]}' here")
        return found

    # ---- one connection ---------------------------------------------------------------------------------------------

    def _handle(self, connection: Any) -> None:
        """Serve one client until it goes or breaks the protocol."""
        with self._lock:
            if len(self._clients) >= self.config.max_clients:
                connection.close(1013, "as many clients as are allowed")
                return
            self._clients.add(connection)
        try:
            limit_sending(connection, self.config.ping_seconds)
            self._converse(connection)
        finally:
            with self._lock:
                self._clients.discard(connection)

    def _converse(self, connection: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            hello = decode(connection.recv(timeout=self.config.handshake_seconds))
            if hello["type"] != "hello" or hello.get("protocol") != PROTOCOL:
                raise DataError(f"this server speaks protocol {PROTOCOL}, not {str(hello.get('protocol'))[:20]}")
            with self._policy(self._checkpoint(connection.request.path)) as policy:
                connection.send(encode({"type": "policy", "protocol": PROTOCOL, **described(policy)}))
                for data in connection:
                    connection.send(encode(self._answer(policy, decode(data))))
        except (ConnectionClosed, TimeoutError) as error:
            logger.info("a client has gone: %s", error or "no hello")
        except RobotRLError as error:
            logger.warning("a connection is ended: %s", error)
            _say_goodbye(connection, str(error))
        except Exception:
            logger.exception("a connection is ended by a defect of the server")
            _say_goodbye(connection, "a defect of the server, see its log")

    @contextmanager
    def _policy(self, path: Path) -> Iterator[Any]:
        """Yield the policy of a checkpoint that no other connection uses; it is kept for the next one."""
        key, policy = (path, (path / "policy.json").stat().st_mtime_ns), None
        with self._lock:
            for index, (found, _) in enumerate(self._idle):
                if found == key:
                    policy = self._idle.pop(index)[1]
                    break
        if policy is None:
            policy = load_policy(path, self.config.device, self.config.threads or None)
        try:
            yield policy
        finally:
            with self._lock:
                self._idle = [*self._idle, (key, policy)][-self.config.max_clients :]

    def _answer(self, policy: Any, request: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to one request; a request that asks for what cannot be gets an error and no more."""
        number, begun = request.get("id"), time.perf_counter()
        if not isinstance(number, int):
            raise DataError("a request must have a number")
        kinds: dict[str, Callable[[Any, dict[str, Any]], np.ndarray | None]] = {
            "plan": _plan,
            "refine": _refine,
            "seed": _seed,
        }
        try:
            if request["type"] not in kinds:
                raise DataError(f"unknown request '{request['type'][:20]}'; known: {', '.join(kinds)}")
            actions = kinds[request["type"]](policy, request)
        except (RobotRLError, ValueError, TypeError, RuntimeError, KeyError) as error:
            logger.warning("refused a request: %s", error)
            return {"type": "error", "id": number, "message": " ".join(str(error).split())[:300]}
        return {"type": "result", "id": number, "actions": actions, "seconds": time.perf_counter() - begun}


def described(policy: Any) -> dict[str, Any]:
    """Return what a client must know of a policy."""
    return {
        "spec": policy.spec.to_json(),
        "obs_steps": policy.obs_steps,
        "horizon": policy.horizon,
        "execute_steps": policy.execute_steps,
        "closed_loop": bool(policy.closed_loop),
        "real_time": list(getattr(policy, "real_time", ())),
        "prefix_steps": int(getattr(policy, "prefix_steps", 0)),
    }


def _history(policy: Any, request: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the checked history of a request."""
    history = request.get("history")
    if not isinstance(history, dict) or set(history) != set(policy.spec.observation):
        raise DataError(f"a history must hold {', '.join(policy.spec.observation)}")
    batch = {len(value) for value in history.values() if isinstance(value, np.ndarray) and value.ndim >= 1}
    if len(batch) != 1 or not 1 <= next(iter(batch)) <= LARGEST_BATCH:
        raise DataError(f"a history must be of 1 to {LARGEST_BATCH} lanes")
    for key, spec in policy.spec.observation.items():
        value = history[key]
        if value.shape[1:2] != (policy.obs_steps,):
            raise DataError(f"'{key}' must hold {policy.obs_steps} observations per lane")
        spec.validate(value, key, batch_dims=2)
    return history


def _plan(policy: Any, request: dict[str, Any]) -> np.ndarray:
    history = _history(policy, request)
    batch = len(next(iter(history.values())))
    commitment = unpack_commitment(request.get("commitment"), batch, policy.horizon, policy.spec.action.size)
    noise = request.get("noise")
    options: dict[str, Any] = {}
    if noise is not None:
        if not isinstance(noise, np.ndarray) or len(noise) != batch or not np.isfinite(noise).all():
            raise DataError(f"a start noise must be finite and of {batch} lanes")
        options["noise"] = noise
    if commitment is not None:
        options["commitment"] = commitment
    return np.asarray(policy.plan(history, **options), np.float32)


def _refine(policy: Any, request: dict[str, Any]) -> np.ndarray:
    history, actions = _history(policy, request), request.get("actions")
    if not isinstance(actions, np.ndarray):
        raise DataError("a correction needs actions")
    policy.spec.action.validate(actions, "actions", batch_dims=1)
    if len(actions) != len(next(iter(history.values()))):
        raise DataError("as many actions as lanes are needed")
    return np.asarray(policy.refine(history, actions), np.float32)


def _seed(policy: Any, request: dict[str, Any]) -> None:
    policy.seed(int(request["seed"]))


def _say_goodbye(connection: Any, message: str) -> None:
    from websockets.exceptions import ConnectionClosed

    try:
        connection.send(encode({"type": "error", "id": None, "message": message[:300]}))
        connection.close(1008)
    except (ConnectionClosed, OSError):
        logger.debug("the client had gone before it could be told")


def _token(path: Path) -> str:
    """Return the token of ``path``, making it if there is no such file."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot make the token file {path}: {error.strerror}") from error
    return read_token(path)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
