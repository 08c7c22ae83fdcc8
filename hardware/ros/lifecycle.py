"""Lifecycle-managed nodes: what others configure, activate, deactivate and clean up (``ros2 lifecycle set …``).

================= ==========================================================================================
state             what a node of ours does there
================= ==========================================================================================
unconfigured      has its parameters, which may be set
inactive          has read them and made its `Work`: a policy is loaded and warm, a robot's spec is announced
active            works, in the process's main thread
finalized         the process ends
================= ==========================================================================================

With the parameter ``autostart`` (the default) a node configures and activates itself, and a failure ends the process
with one line. Without it the node waits for transitions, and one that fails can be asked for again.

Transitions arrive in the I/O thread, which asks the main thread to do them and waits. Leaving the active state means
that the work has ended in order: an executor has braked and holds.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from hardware.ros.endpoint import Endpoint
from hardware.ros.node import EXIT_ERROR, EXIT_OK, open_process
from hardware.ros.parameters import declare_parameters, parse_flags, read_config
from robot_rl.core.errors import RobotRLError

if TYPE_CHECKING:
    from rcl_interfaces.msg import SetParametersResult

logger = logging.getLogger(__name__)
Config = TypeVar("Config", bound="ManagedConfig")
_POLL = 0.05


@dataclass(frozen=True)
class ManagedConfig:
    """Settings of every managed node."""

    autostart: bool = field(default=True, kw_only=True)
    """Configure and activate the node at its start; otherwise it waits for lifecycle transitions."""


class Work(Protocol):
    """What a node does, made when it is configured; all methods are called in the main thread."""

    def start(self) -> None:
        """Get ready to work; a `RobotRLError` refuses the activation."""

    def run(self, stop: threading.Event) -> None:
        """Work until ``stop`` is set, and leave everything at rest; a return without it ends the process."""

    def close(self) -> None:
        """Release what is held, except topics."""


class ManagedNode(Generic[Config]):
    """One lifecycle node: carries its transitions to the main thread, which is in `serve`."""

    def __init__(
        self,
        endpoint: Endpoint,
        config_class: type[Config],
        configure: Callable[[Config, Endpoint], Work],
        given: dict[str, Any],
    ) -> None:
        """Declare the parameters; nothing happens before `serve`.

        Args:
            endpoint: made with ``managed=True``.
            config_class: frozen dataclass of the settings.
            configure: makes the work from the settings.
            given: settings given as flags.

        Raises:
            UnknownNameError: a parameter that is no setting.
            ConfigError: a parameter of the wrong type, or out of its range.
        """
        self.endpoint, self._class, self._make = endpoint, config_class, configure
        self.error: RobotRLError | None = None
        """What ended the process, if something did."""
        declare_parameters(config_class, endpoint.node, given, read_only=False)
        self._work: Work | None = None
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._over = threading.Event()
        self._starting = bool(endpoint.node.get_parameter("autostart").value)
        endpoint.node.add_on_set_parameters_callback(self._on_set_parameters)
        _attach(self, endpoint.node)

    def serve(self) -> None:
        """Do what transitions ask for, until the node is shut down, its work ends, or `interrupt` is called."""
        self.endpoint.start()
        if self._starting:
            self.endpoint.run_in_thread(self._autostart)
        try:
            while not self._over.is_set():
                try:
                    job = self._jobs.get(timeout=_POLL)
                except queue.Empty:
                    continue
                job()
        finally:
            self._over.set()
            self._idle.set()
            self._close()

    def interrupt(self) -> None:
        """End the work in order, and `serve`; for signal handlers."""
        self._over.set()
        self._stop.set()

    # ---- transitions, in the I/O thread -----------------------------------------------------------------------------

    def configure(self) -> bool:
        """Read the parameters and make the work; return whether that succeeded."""
        return self._ask(self._configure)

    def activate(self) -> bool:
        """Let the work begin; return whether it could."""
        return self._ask(self._activate)

    def deactivate(self) -> bool:
        """Let the work end in order, and wait for that; return whether nothing went wrong."""
        self._stop.set()
        while not self._idle.wait(_POLL):
            pass
        return self.error is None

    def clean_up(self) -> bool:
        """Release everything, so that the node can be configured anew."""
        return self._ask(self._close)

    def shut_down(self) -> bool:
        """End the work in order and then the process."""
        done = self.deactivate()
        self.interrupt()
        return done

    def _autostart(self) -> None:
        node: Any = self.endpoint.node
        node.trigger_configure()
        if self._work is not None:
            node.trigger_activate()
        self._starting = False

    def _ask(self, job: Callable[[], None]) -> bool:
        """Have the main thread do ``job`` and wait for it; return whether it raised no `RobotRLError`."""
        done, problems = threading.Event(), []

        def work() -> None:
            try:
                job()
            except RobotRLError as error:
                problems.append(error)
            finally:
                done.set()

        self._jobs.put(work)
        while not done.wait(_POLL):
            if self._over.is_set():
                return False
        for error in problems:
            if self._starting:
                self._fail(error)
            else:
                logger.error("%s", error)
        return not problems

    # ---- jobs, in the main thread -----------------------------------------------------------------------------------

    def _configure(self) -> None:
        try:
            self._work = self._make(read_config(self._class, self.endpoint.node, {}), self.endpoint)
        except BaseException:
            self.endpoint.release()
            raise

    def _activate(self) -> None:
        assert self._work is not None
        self._work.start()
        self._stop.clear()
        self._idle.clear()
        self._jobs.put(self._run)
        if self._over.is_set():
            self._stop.set()

    def _run(self) -> None:
        assert self._work is not None
        try:
            self._work.run(self._stop)
        except RobotRLError as error:
            self._fail(error)
        finally:
            if not self._stop.is_set():
                self._over.set()
            self._idle.set()

    def _close(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.close()
            self.endpoint.release()

    def _fail(self, error: RobotRLError) -> None:
        self.error = self.error or error
        self._over.set()

    def _on_set_parameters(self, _: Any) -> SetParametersResult:
        from rcl_interfaces.msg import SetParametersResult

        if self._work is None:
            return SetParametersResult(successful=True)
        return SetParametersResult(
            successful=False, reason="settings are read when the node is configured: clean it up first"
        )


def _attach(managed: ManagedNode[Any], node: Any) -> None:
    """Make ``node`` ask ``managed`` for its transitions."""
    from rclpy.lifecycle import TransitionCallbackReturn
    from rclpy.lifecycle.managed_entity import ManagedEntity

    def answer(done: bool) -> TransitionCallbackReturn:
        return TransitionCallbackReturn.SUCCESS if done else TransitionCallbackReturn.FAILURE

    class Entity(ManagedEntity):
        def on_configure(self, state: Any) -> TransitionCallbackReturn:
            return answer(managed.configure())

        def on_activate(self, state: Any) -> TransitionCallbackReturn:
            return answer(managed.activate())

        def on_deactivate(self, state: Any) -> TransitionCallbackReturn:
            return answer(managed.deactivate())

        def on_cleanup(self, state: Any) -> TransitionCallbackReturn:
            return answer(managed.clean_up())

        def on_shutdown(self, state: Any) -> TransitionCallbackReturn:
            return answer(managed.shut_down())

    node.add_managed_entity(Entity())
    # rclpy raises into the executor for a transition that is not possible now; that would end the I/O thread, and with
    # it the way of an emergency stop.
    service = node._service_change_state
    inner = service.callback

    def guarded(request: Any, response: Any) -> Any:
        try:
            return inner(request, response)
        except Exception as error:
            logger.warning("lifecycle transition refused: %s", " ".join(str(error).split()))
            response.success = False
            return response

    service.callback = guarded


def run_managed_node(
    name: str,
    config_class: type[Config],
    configure: Callable[[Config, Endpoint], Work],
    argv: Sequence[str] | None = None,
) -> int:
    """Run the process of a managed node until it is shut down, interrupted, or done.

    SIGINT and SIGTERM end the work in order. A `RobotRLError` becomes one line on stderr.

    Args:
        name: default name of the node.
        config_class: frozen dataclass of the settings.
        configure: makes the node's work from its settings.
        argv: command line without the program, or None for this process's own.

    Returns:
        Exit code.
    """
    given, ros_arguments = parse_flags(
        config_class, sys.argv[1:] if argv is None else argv, f"hardware.ros.{name}_node"
    )
    interrupted = threading.Event()
    managed: ManagedNode[Config] | None = None

    def interrupt() -> None:
        interrupted.set()
        if managed is not None:
            managed.interrupt()

    open_process(interrupt)
    endpoint = None
    try:
        endpoint = Endpoint(name, arguments=ros_arguments, managed=True)
        managed = ManagedNode(endpoint, config_class, configure, given)
        if not interrupted.is_set():
            managed.serve()
        if managed.error is not None:
            raise managed.error
    except RobotRLError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_ERROR
    finally:
        if endpoint is not None:
            endpoint.close()
    return EXIT_OK
