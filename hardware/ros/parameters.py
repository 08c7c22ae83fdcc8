"""Settings of a node from its command line and its ROS parameters, both described by one dataclass.

The docstring under a field is the flag's help and the parameter's description; a number that is bounded is annotated
``Annotated[float, Range(0.1, 1000.0)]``, which both keep to.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from robot_rl.core.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from rcl_interfaces.msg import ParameterDescriptor
    from rclpy.node import Node

Config = TypeVar("Config")
_SCALARS = (str, int, float, bool)
_ROS_OWN = ("use_sim_time", "start_type_description_service", "qos_overrides")


class Range(NamedTuple):
    """Smallest and largest value of a number."""

    low: float
    high: float = math.inf

    def require(self, name: str, value: float) -> None:
        """Raise `ConfigError` unless ``value`` lies within."""
        if not self.low <= value <= self.high:
            bound = f"{self.low:g} or more" if math.isinf(self.high) else f"{self.low:g} to {self.high:g}"
            raise ConfigError(f"{name} is {value:g}, expected {bound}")


class Setting(NamedTuple):
    """One field of a dataclass of settings."""

    name: str
    kind: Any
    default: Any
    text: str
    range: Range | None

    @property
    def plain(self) -> bool:
        """Whether it is one value and no list of texts."""
        return self.kind in _SCALARS

    @property
    def parameter(self) -> Any:
        """Its default as the value of a parameter; ROS 2 knows no empty list without a type."""
        return self.default if self.plain else [*self.default] or [""]

    def typed(self, value: Any) -> Any:
        """Return ``value`` as the field's type; raises `ConfigError` where that is another one, or out of range."""
        if not self.plain:
            if isinstance(value, str) or not all(isinstance(one, str) for one in value):
                raise ConfigError(f"parameter '{self.name}' is {value!r}, expected a list of strings")
            return tuple(one for one in value if one)
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind:
            raise ConfigError(f"parameter '{self.name}' is {value!r}, expected a {self.kind.__name__}")
        if self.range is not None:
            self.range.require(self.name, value)
        return value


def settings_of(config_class: type) -> dict[str, Setting]:
    """Return the fields of a dataclass of settings, by name."""
    hints = get_type_hints(config_class, include_extras=True)
    texts = field_help(config_class)
    found = {}
    for field in dataclasses.fields(config_class):
        kind, bounds = hints[field.name], None
        if get_origin(kind) is Annotated:
            kind, *extras = get_args(kind)
            bounds = next((one for one in extras if isinstance(one, Range)), None)
        found[field.name] = Setting(field.name, kind, field.default, texts.get(field.name, ""), bounds)
    return found


def field_help(config_class: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, by field name; those that it inherits come first."""
    found = {}
    for one in reversed([one for one in config_class.__mro__ if dataclasses.is_dataclass(one)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body  # type: ignore[attr-defined]
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
    for one in settings_of(config_class).values():
        flag, text = "--" + one.name.replace("_", "-"), one.text.replace("%", "%%")
        if one.kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif one.plain:
            shown = f"{text} (default: {one.default!r})".replace("%)", "%%)")
            parser.add_argument(flag, type=one.kind, help=shown)
        else:
            parser.add_argument(flag, action="append", help=text)
    return vars(parser.parse_args(argv[:split])), argv[split:]


def declare_parameters(config_class: type, node: Node, given: dict[str, Any], read_only: bool = True) -> None:
    """Declare every field as a parameter with its docstring as the description, and its range.

    Args:
        config_class: dataclass of the settings.
        node: node that declared its overrides as they came.
        given: fields given as flags, which win over the parameter files.
        read_only: whether ``ros2 param set`` is refused for good.

    Raises:
        UnknownNameError: the parameter file sets something that is no field; the nearest name is suggested.
        ConfigError: a parameter has the wrong type, or is out of its range.
    """
    settings = settings_of(config_class)
    overridden = set(node.list_parameters([], 0).names)
    for name in sorted(overridden):
        if name not in settings and name.split(".")[0] not in _ROS_OWN:
            raise UnknownNameError(f"parameter of node '{node.get_name()}'", name, settings)
    for name, setting in settings.items():
        value = setting.parameter
        if name in overridden:
            value = setting.typed(node.get_parameter(name).value)
            node.undeclare_parameter(name)
        if name in given:
            value = setting.typed(given[name])
        value = value if setting.plain else [*value] or [""]
        node.declare_parameter(name, value, _descriptor(setting, read_only), ignore_override=True)


def read_config(config_class: type[Config], node: Node, given: dict[str, Any]) -> Config:
    """Return the settings: a flag wins over a ROS parameter, which wins over the default.

    Declares the parameters (`declare_parameters`) unless that has been done.

    Raises:
        UnknownNameError: the parameter file sets something that is no field; the nearest name is suggested.
        ConfigError: a parameter has the wrong type, or a value that the settings refuse.
    """
    settings = settings_of(config_class)
    # Overrides are parameters before we declare them; only what we declared has a description.
    first = next(iter(settings))
    if not node.has_parameter(first) or not node.describe_parameter(first).description:
        declare_parameters(config_class, node, given)
    values = {name: setting.typed(node.get_parameter(name).value) for name, setting in settings.items()}
    try:
        return config_class(**values)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _descriptor(setting: Setting, read_only: bool) -> ParameterDescriptor:
    from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor

    descriptor = ParameterDescriptor(description=setting.text, read_only=read_only)
    if setting.range is not None and setting.kind is float:
        low, high = map(float, setting.range)
        descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high)]
    elif setting.range is not None:
        low, high = setting.range.low, min(setting.range.high, 2**63 - 1)
        descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=1)]
    return descriptor
