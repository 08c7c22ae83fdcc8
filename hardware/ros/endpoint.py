"""A ROS 2 node with its I/O thread: what every link stands on."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hardware.control.realtime import MessengerThread
from hardware.ros.context import open_context
from robot_rl.core.errors import HardwareError

if TYPE_CHECKING:
    from rclpy.publisher import Publisher
    from rclpy.qos import QoSProfile
    from rclpy.subscription import Subscription

logger = logging.getLogger(__name__)

_JOIN_SECONDS = 2.0
_FLUSH_SECONDS = 0.2
_MOST_COMPLAINTS = 100
"""Causes of dropped messages that are logged: a stranger can make every one differ."""
UNNAMED = "_NODE_NAME_UNKNOWN_"
"""Name of a node whose topics were discovered before the node."""


def quality(depth: int, *, reliable: bool = True, latched: bool = False) -> QoSProfile:
    """Return keep-last quality of service of ``depth`` messages; ``latched`` repeats them to late joiners."""
    from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=depth,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


class Endpoint:
    """One ROS 2 context, one node and one I/O thread that runs its callbacks.

    The thread spins a single-threaded executor: the events executor deadlocks and the multi-threaded one costs more
    for no less jitter. A message that cannot be used is counted in `rejected`, logged once per cause, and dropped.
    """

    def __init__(
        self,
        name: str,
        *,
        namespace: str = "robot_rl",
        domain_id: int | None = None,
        arguments: list[str] | None = None,
        managed: bool = False,
    ) -> None:
        """Open the context and the node; the thread starts with `start` or with the first link.

        Args:
            name: node name; ``__node`` in ``arguments`` overrides it.
            namespace: prefix of all topics; ``__ns`` in ``arguments`` overrides it.
            domain_id: DDS domain, or None for ``ROS_DOMAIN_ID``.
            arguments: command line with ``--ros-args …``.
            managed: make a lifecycle node (see `hardware.ros.lifecycle`).
        """
        self._context = open_context(domain_id, arguments)
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.lifecycle import LifecycleNode
        from rclpy.node import Node

        # Overrides are declared as they come, so that a misspelt one is seen and refused instead of ignored.
        self.node: Node = (LifecycleNode if managed else Node)(
            name, namespace=namespace, context=self._context, automatically_declare_parameters_from_overrides=True
        )
        self.rejected = 0
        """Messages that were dropped because they could not be used."""
        self._complaints: set[str] = set()
        self._publishers: list[Publisher] = []
        self._subscriptions: list[Subscription[Any]] = []
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._thread = MessengerThread(target=self._spin, name=f"ros-{name}", daemon=True)
        self._closed = False

    def start(self) -> None:
        """Start the I/O thread; does nothing if it runs."""
        if not self._thread.is_alive() and not self._closed:
            self._thread.start()

    def publisher(self, message_type: type, topic: str, profile: QoSProfile) -> Callable[[Any], None]:
        """Return a function that publishes ``message_type``; once that is given back it does nothing."""
        publisher = self.node.create_publisher(message_type, topic, profile)
        self._publishers.append(publisher)

        def publish(message: Any) -> None:
            if not self._closed and publisher in self._publishers:
                publisher.publish(message)

        return publish

    def subscribe(self, message_type: type, topic: str, callback: Callable[[Any], None], profile: QoSProfile) -> None:
        """Call ``callback`` with every message, in the I/O thread."""

        def guarded(message: Any) -> None:
            try:
                callback(message)
            except Exception as error:  # whatever a stranger sent: this thread also hears the e-stop
                self.rejected += 1
                cause = f"{type(error).__name__}: {error}"
                if cause not in self._complaints and len(self._complaints) < _MOST_COMPLAINTS:
                    self._complaints.add(cause)
                    logger.warning("message on '%s' dropped: %s", topic, cause)

        self._subscriptions.append(self.node.create_subscription(message_type, topic, guarded, profile))

    def run_in_thread(self, function: Callable[[], Any]) -> None:
        """Call ``function`` in the I/O thread, soon."""
        self._executor.create_task(function)

    def release(self) -> None:
        """Let the last messages arrive, and give back every publisher and subscription; the node stays."""
        self._flush(_FLUSH_SECONDS)
        for publisher in self._publishers:
            self.node.destroy_publisher(publisher)
        for subscription in self._subscriptions:
            self.node.destroy_subscription(subscription)
        self._publishers.clear()
        self._subscriptions.clear()

    def require_alone(self, topic: str, what: str, patience: float = 0.6) -> None:
        """Refuse to be the second who publishes ``topic``; call it after creating one's own publisher.

        Two executors would command one robot, and two policies would alternate: there is one writer or none.

        Args:
            topic: relative name.
            what: what the node is, for the message.
            patience: seconds in which others are discovered; they announce themselves every 0.2 s.

        Raises:
            HardwareError: another node publishes it; the message names that node.
        """
        node, deadline = self.node, time.monotonic() + patience
        own = [_path(node.get_namespace(), node.get_name())]
        while True:
            found = [_path(one.node_namespace, one.node_name) for one in node.get_publishers_info_by_topic(topic)]
            others = Counter(found) - Counter(own)  # another node may bear the same name
            named = sorted(one for one in others if UNNAMED not in one)
            over = time.monotonic() >= deadline
            if named or (others and over):
                who = ", ".join(f"'{one}'" for one in named) or "a node that has not said its name yet"
                raise HardwareError(
                    f"another {what} publishes '{node.resolve_topic_name(topic)}' already, {who}: end it, or choose "
                    "another namespace or ROS domain (one that was killed is forgotten after 5 s)"
                )
            if over:
                return
            time.sleep(0.02)

    def close(self) -> None:
        """Let the last messages arrive, stop the I/O thread and leave the graph; safe to call twice.

        The thread ends before the context goes: a thread that still spins at interpreter exit aborts the process.
        """
        if self._closed:
            return
        self._closed = True
        self._flush(_FLUSH_SECONDS)
        self._executor.shutdown(timeout_sec=_JOIN_SECONDS)
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)
            if self._thread.is_alive():
                logger.error("the ROS 2 I/O thread did not end within %.0f s", _JOIN_SECONDS)
        self.node.destroy_node()
        machine = getattr(self.node, "_state_machine", None)
        if machine is not None:
            # rclpy's lifecycle node keeps its state machine, and with it its place in the graph, until the garbage
            # collector finds the node: others would go on seeing a node that has ended.
            machine.destroy_when_not_in_use()
        self._context.try_shutdown()

    def _flush(self, seconds: float) -> None:
        """Wait until readers have what was published, for at most ``seconds`` in all: a hanging one never gets it."""
        from rclpy.duration import Duration

        deadline = time.monotonic() + seconds
        for publisher in self._publishers:
            publisher.wait_for_all_acked(Duration(seconds=max(0.0, deadline - time.monotonic())))

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except Exception:
            # Ages grow from here on, and the watchdogs of whoever polls the link turn them into a stop.
            if not self._closed:
                logger.exception("the ROS 2 I/O thread ended")


def _path(namespace: str, name: str) -> str:
    return f"{namespace.rstrip('/')}/{name}"
