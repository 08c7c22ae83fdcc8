"""What every node process shares: settings from flags or ROS parameters, signals, logging, exit codes."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import logging
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from hardware.realtime import prepare_process
from hardware.ros.endpoint import Endpoint
from hardware.ros.link import RosOperatorLink, RosPolicyLink
from hardware.ros.processes import end_with_supervisor
from robot_rl.core.errors import ConfigError, HardwareError, RobotRLError, UnknownNameError
from robot_rl.core.spec import Spec

if TYPE_CHECKING:
    from rclpy.node import Node

logger = logging.getLogger(__name__)
Config = TypeVar("Config")

EXIT_OK, EXIT_ERROR, EXIT_USAGE = 0, 1, 2
"""Exit codes: ended as asked (also by SIGINT or SIGTERM); failed with one line on stderr; unknown flag or value."""
_SCALARS = (str, int, float, bool)
_ROS_OWN = ("use_sim_time", "start_type_description_service", "qos_overrides")


def field_help(config_class: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, by field name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for statement, following in itertools.pairwise(body):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def parse_flags(config_class: type, argv: Sequence[str], program: str) -> tuple[dict[str, Any], list[str]]:
    """Split a command line into the fields given as flags and the part for ROS (from ``--ros-args`` on).

    Field ``log_level`` is the flag ``--log-level``; a field of type ``tuple[str, ...]`` may be given several times.
    """
    argv = list(argv)
    split = argv.index("--ros-args") if "--ros-args" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog=program,
        description=inspect.getdoc(config_class),
        argument_default=argparse.SUPPRESS,
        epilog="Every flag is also a ROS parameter of the same name (with underscores); a flag wins.",
    )
    texts = field_help(config_class)
    for field, kind in _fields(config_class):
        flag, text = "--" + field.name.replace("_", "-"), texts.get(field.name, "").replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif kind in _SCALARS:
            parser.add_argument(flag, type=kind, help=f"{text} (default: {field.default!r})".replace("%)", "%%)"))
        else:
            parser.add_argument(flag, action="append", help=text)
    return vars(parser.parse_args(argv[:split])), argv[split:]


def read_config(config_class: type[Config], node: Node, given: dict[str, Any]) -> Config:
    """Return the settings: a flag wins over a ROS parameter, which wins over the default.

    Declares every field as a read-only parameter with its docstring as the description, so that ``ros2 param
    describe`` explains it.

    Raises:
        UnknownNameError: the parameter file sets something that is no field; the nearest name is suggested.
        ConfigError: a parameter has the wrong type, or a value that the settings refuse.
    """
    from rcl_interfaces.msg import ParameterDescriptor

    texts = field_help(config_class)
    fields = {field.name: (field, kind) for field, kind in _fields(config_class)}
    overridden = set(node.list_parameters([], 0).names)
    for name in sorted(overridden):
        if name not in fields and name.split(".")[0] not in _ROS_OWN:
            raise UnknownNameError(f"parameter of node '{node.get_name()}'", name, fields)
    values = {}
    for name, (field, kind) in fields.items():
        default = given.get(name, field.default)
        plain = default if kind in _SCALARS else [*default] or [""]
        descriptor = ParameterDescriptor(description=texts.get(name, ""), read_only=True)
        if name in overridden:
            parameter = node.get_parameter(name)
            descriptor.type = parameter.type_.value
            node.set_descriptor(name, descriptor)
            value = given.get(name, parameter.value)
        else:
            value = node.declare_parameter(name, plain, descriptor).value
        values[name] = _typed(name, value, kind)
    try:
        return config_class(**values)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _fields(config_class: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(config_class)
    return [(field, hints[field.name]) for field in dataclasses.fields(config_class)]


def _typed(name: str, value: Any, kind: Any) -> Any:
    if kind not in _SCALARS:
        if isinstance(value, str) or not all(isinstance(one, str) for one in value):
            raise ConfigError(f"parameter '{name}' is {value!r}, expected a list of strings")
        return tuple(one for one in value if one)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"parameter '{name}' is {value!r}, expected a {kind.__name__}")
    return value


def options(texts: Sequence[str]) -> dict[str, Any]:
    """Return ``("name=value", …)`` as a mapping; values become numbers and booleans where they read as such."""
    found: dict[str, Any] = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not mark or not name:
            raise ConfigError(f"option '{text}' is not of the form name=value")
        try:
            found[name] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def wait_for_robot(link: RosPolicyLink | RosOperatorLink, timeout: float, stop: threading.Event) -> Spec | None:
    """Return the spec of the robot, or None where ``stop`` was set meanwhile; `HardwareError` after ``timeout`` s."""
    deadline = time.monotonic() + timeout
    while link.robot_spec is None and not stop.wait(0.02):
        if time.monotonic() > deadline:
            raise HardwareError(f"no executor announced its robot within {timeout:g} s")
    return link.robot_spec


def run_node(
    name: str,
    config_class: type[Config],
    body: Callable[[Config, Endpoint, threading.Event], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a node process: read its settings, call ``body`` until it returns, and leave the graph.

    SIGINT and SIGTERM set the event that ``body`` gets and nothing else, so that it can still publish and send a last
    command; rclpy's own handlers would have closed the context by then. A `RobotRLError` becomes one line on stderr.

    Args:
        name: default name of the node.
        config_class: frozen dataclass of the settings.
        body: the node's work; returns soon after the event is set.
        argv: command line without the program, or None for this process's own.

    Returns:
        Exit code.
    """
    given, ros_arguments = parse_flags(
        config_class, sys.argv[1:] if argv is None else argv, f"hardware.ros.{name}_node"
    )
    end_with_supervisor()
    prepare_process()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    endpoint = None
    try:
        endpoint = Endpoint(name, arguments=ros_arguments)
        body(read_config(config_class, endpoint.node, given), endpoint, stop)
    except RobotRLError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_ERROR
    finally:
        if endpoint is not None:
            endpoint.close()
    return EXIT_OK
