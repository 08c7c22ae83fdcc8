"""Who may open the console: the page's own origin, and beyond this machine only who brings the token.

A web page from anywhere may open a websocket to this machine's loopback address: browsers do not forbid that, so the
server must. A request from a page of another origin is refused, and without a token so is one that came under another
name than this machine's (a name that an attacker resolves to the loopback address).

The token comes once, in the address that the operator opens (``/?token=…``); the answer replaces it by a cookie that
scripts cannot read and other sites cannot send.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from robot_rl.core.errors import ConfigError, HardwareError

SHORTEST_TOKEN = 16
"""Characters that a token must have at least."""
_COOKIE = "robot_rl_console"


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Verdict:
    """What to do with a request."""

    status: HTTPStatus | None = None
    """Answer with this status; None lets the request pass."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers of the answer."""
    text: str = ""
    """Body of the answer."""


_PASS = Verdict()


class Gate:
    """Judges each request before any of it is answered."""

    def __init__(self, host: str, token: str = "") -> None:
        """Choose the rules.

        Args:
            host: address that the server listens on.
            token: secret that requests must know; may be empty only on the loopback address.

        Raises:
            ConfigError: an address beyond this machine without a token, or a token that is easily guessed.
        """
        if not token and not is_loopback(host):
            raise ConfigError(
                f"the console on '{host}' would be open to others: set ROBOT_RL_CONSOLE_TOKEN, or keep it on 127.0.0.1"
            )
        if token and len(token) < SHORTEST_TOKEN:
            raise ConfigError(f"the console's token has {len(token)} characters, expected at least {SHORTEST_TOKEN}")
        self._token, self._session = token.encode(), secrets.token_urlsafe(32)

    def judge(self, target: str, headers: Mapping[str, str]) -> Verdict:
        """Return what to do with a request for ``target`` (path and query), by its ``headers``."""
        host = headers.get("Host", "")
        origin = headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return _refused(f"a page of {origin} may not use this console")
        if not self._token:
            name = urlsplit(f"//{host}").hostname or ""
            return _PASS if is_loopback(name) else _refused(f"this console is not '{name}'; open it as localhost")
        if self._knows_session(headers.get("Cookie", "")):
            return _PASS
        address = urlsplit(target)
        for given in parse_qs(address.query).get("token", []):
            if secrets.compare_digest(given.encode(), self._token):
                cookie = f"{_COOKIE}={self._session}; HttpOnly; SameSite=Strict; Path=/"
                return Verdict(HTTPStatus.SEE_OTHER, {"Location": address.path or "/", "Set-Cookie": cookie})
        return _refused("this console wants a token: open it as /?token=…")

    def _knows_session(self, header: str) -> bool:
        try:
            given = SimpleCookie(header).get(_COOKIE)
        except CookieError:
            return False
        return given is not None and secrets.compare_digest(given.value.encode(), self._session.encode())


def _refused(why: str) -> Verdict:
    return Verdict(HTTPStatus.FORBIDDEN, {"Content-Type": "text/plain; charset=utf-8"}, f"Refused: {why}.\n")


@contextmanager
def guarding(gate: Gate) -> Iterator[None]:
    """Put ``gate`` before the viser server that is started inside the block.

    viser has no hook before the handshake, so its call to open the socket is given one. If it does not come through
    here, the block fails: a console without its gate must not run.
    """
    import websockets.asyncio.server as websockets_server

    original = websockets_server.serve
    guarded = []

    def serve(handler: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if not str(getattr(handler, "__module__", "")).startswith("viser."):
            return original(handler, *arguments, **options)
        guarded.append(handler)
        options["process_request"] = _before(gate, options.get("process_request"))
        return original(handler, *arguments, **options)

    websockets_server.serve = serve  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        websockets_server.serve = original  # type: ignore[misc]
    if not guarded:
        raise HardwareError("this version of viser cannot be guarded; install the one of the extra 'console'")


def _before(gate: Gate, following: Callable[..., Any] | None) -> Callable[..., Any]:
    def process_request(connection: Any, request: Any) -> Any:
        verdict = gate.judge(request.path, request.headers)
        if verdict.status is None:
            return None if following is None else following(connection, request)
        answer = connection.respond(verdict.status, verdict.text)
        for name, value in verdict.headers.items():
            if name in answer.headers:
                del answer.headers[name]  # setting adds a second one
            answer.headers[name] = value
        return answer

    return process_request
