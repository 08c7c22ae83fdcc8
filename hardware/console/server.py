"""The console as an operator device: web server, page and desk behind the contract of `robot_rl.core.teleop.Teleop`."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardware.console.desk import Desk
from hardware.console.feed import Feed
from hardware.console.gate import Gate, guarding, is_loopback
from hardware.console.steering import make_handle
from robot_rl.core.errors import ConfigError, HardwareError, MissingDependencyError
from robot_rl.core.spec import Spec
from robot_rl.core.teleop import OperatorInput

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "ROBOT_RL_CONSOLE_TOKEN"
"""Environment variable with the console's secret: not a flag, which other users of the machine could read."""
_REFRESH_HZ = 10.0
_JOIN_SECONDS = 2.0
_COMPLAINT_SECONDS = 10.0


@dataclass(frozen=True)
class ConsoleConfig:
    """Settings of the browser console."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs a token (ROBOT_RL_CONSOLE_TOKEN)."""
    port: int = 8080
    """Port of the page; the next free one is taken where it is in use."""
    model: Path | None = None
    """MuJoCo model of a robot that is commanded by joint positions: gives the page a handle on its end effector."""
    site: str = ""
    """Site of the model that is the end effector; by default its last one."""
    joints: tuple[str, ...] = ()
    """Joints of the model in the order of the action; by default those named like its elements."""


class Console:
    """A browser page as operator device: `watch` gives it something to show, `connect` opens it."""

    def __init__(
        self,
        spec: Spec,
        config: ConsoleConfig | None = None,
        *,
        token: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Check the settings; nothing is opened yet.

        Args:
            spec: of the robot.
            config: settings.
            token: secret of the page; by default the value of `TOKEN_VARIABLE`, if any.
            clock: monotonic time in seconds.

        Raises:
            ConfigError: an address beyond this machine without a token, or a model that does not fit the robot.
        """
        self.config = config or ConsoleConfig()
        self.spec = spec
        self._token = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        self._gate = Gate(self.config.host, self._token)
        self._handle = make_handle(spec.action, self.config.model, self.config.site, self.config.joints)
        self.desk = Desk(spec.action.size, clock=clock)
        self._feed: Feed | None = None
        self._server: Any = None
        self._page: Any = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """Where to point a browser, without the token."""
        if self._server is None:
            raise ConfigError("connect the console before asking for its address")
        return f"http://{self.config.host}:{self._server.get_port()}"

    def watch(self, feed: Feed) -> None:
        """Show what ``feed`` says, and steer by the command that it knows."""
        self.desk.command = feed.command
        self._feed = feed

    def connect(self) -> None:
        """Open the page.

        Raises:
            MissingDependencyError: viser is not installed.
            HardwareError: the address cannot be listened on.
        """
        from hardware.console.page import Page

        with guarding(self._gate):
            self._server = _serve(self.config.host, self.config.port)
        self._page = Page(self._server, self.desk, self.spec, self._handle)
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        self._thread.start()
        logger.warning("console: %s%s", self.address, "/?token=…" if self._token else "")
        if not is_loopback(self.config.host):
            logger.warning("the console's traffic is not encrypted: on a network that others share, tunnel it")

    def poll(self) -> OperatorInput:
        """Return what the tabs ask for."""
        return self.desk.poll()

    def disconnect(self) -> None:
        """Close the page; safe to call twice."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)
            self._thread = None
        if self._server is not None:
            with _quiet():
                self._server.stop()
            self._server = None

    def __enter__(self) -> Console:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def _run(self) -> None:
        """Refresh the page; what fails here is told and tried again, for stop and dead-man do not depend on it."""
        quiet_until = 0.0
        while not self._ended.wait(1.0 / _REFRESH_HZ):
            if self._feed is None:
                continue
            try:
                self._page.refresh(self._feed)
            except Exception:
                if time.monotonic() >= quiet_until:
                    logger.exception("console: the page could not be brought up to date")
                    quiet_until = time.monotonic() + _COMPLAINT_SECONDS


def _serve(host: str, port: int) -> Any:
    """Return a running viser server that nobody can publish beyond its address."""
    try:
        import viser
    except ImportError as error:
        raise MissingDependencyError("viser", "console", "The browser console") from error

    class Server(viser.ViserServer):
        """viser lets every page ask for a public tunnel to the server; a robot's console has none."""

        def request_share_url(self, verbose: bool = True) -> str | None:
            """Refuse."""
            logger.warning("console: a page asked for a public address; refused")
            return None

    _require_address(host)
    with _quiet():
        return Server(host=host, port=port, verbose=False)


def _require_address(host: str) -> None:
    """Raise `HardwareError` unless this machine can listen on ``host``: viser would wait for ever."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(place)
    except OSError as error:
        raise HardwareError(f"the console cannot listen on '{host}': {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep viser from drawing its own banner over the deployment's line."""
    import rich

    console = rich.get_console()
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before
