"""Turns the entities of a launch file into processes to start: arguments, scopes, namespaces, parameters, remappings.

The command line of a node is the one that ROS 2's own launcher builds:

    <prefix>/lib/<pkg>/<exec> <args> --ros-args <ros_args> -r __node:=<name> -r __ns:=<namespace>
        -p <set_parameter> … --params-file <file> … --params-file <file of one inline parameter> … -r <from>:=<to> …
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hardware.launching.action import (
    OUTPUTS,
    Action,
    Later,
    LocatedError,
    Message,
    Process,
    Scope,
    Shutdown,
)
from hardware.launching.document import Entity, load, walk
from hardware.launching.substitution import Text, condition, package_prefix, yaml_value
from robot_rl.core.errors import ConfigError, RobotRLError, UnknownNameError

_DEEPEST_INCLUDE = 20


@dataclass(frozen=True)
class Argument:
    """An argument that a launch file declares."""

    name: str
    default: str | None
    """As written in the file; None if it must be given."""
    description: str
    choices: tuple[str, ...]
    where: str


class LaunchFile:
    """A launch file that was read."""

    def __init__(self, path: str | Path) -> None:
        """Read the file at ``path``.

        Raises:
            DataError: there is no such file, or it is no YAML.
            ConfigError: it holds something outside the subset; the message says file and line.
        """
        self.path = Path(path).resolve()
        self.entities = load(self.path)

    def arguments(self, depth: int = 0) -> list[Argument]:
        """Return the arguments that this file declares, and those of files that it includes and does not set there.

        The first declaration of a name counts. Files whose place depends on arguments are not looked into, nor those
        below ``depth`` 20.
        """
        found: dict[str, Argument] = {}
        for entity in walk(self.entities):
            if entity.tag == "arg":
                one = _declared(entity)
                found.setdefault(one.name, one)
            elif entity.tag == "include":
                given = [_source(one["name"]) for one in entity.attributes.get("arg", ())]
                for one in self._included(entity, depth + 1):
                    if one.name not in given:
                        found.setdefault(one.name, one)
        return list(found.values())

    def _included(self, entity: Entity, depth: int) -> list[Argument]:
        text = entity.attributes["file"]
        if any(call.name not in ("dirname", "find-pkg-share", "find-pkg-prefix") for call in text.calls()):
            return []
        try:
            path = Path(text.resolve(Scope({}, dict(os.environ), self.path.parent)))
            file = LaunchFile(path if path.is_absolute() else self.path.parent / path)
        except RobotRLError as error:
            raise LocatedError(f"{entity.where}: {error}") from error
        return file.arguments(depth) if depth < _DEEPEST_INCLUDE else []

    def actions(self, given: Mapping[str, str], environment: Mapping[str, str]) -> Iterator[Action]:
        """Yield what is to be done, in order.

        Args:
            given: values of arguments.
            environment: environment of the processes, as far as the file does not change it.

        Raises:
            UnknownNameError: the file has no such argument.
            ConfigError: an argument is missing, or something that a substitution names does not exist; with file and
                line.
        """
        known = {one.name: one for one in self.arguments()}
        for name in given:
            if name not in known:
                raise UnknownNameError(f"argument of {self.path.name}", name, known)
        scope = Scope(dict(given), dict(environment), self.path.parent)
        return _visit(self.entities, scope)


def parse_arguments(texts: Sequence[str]) -> dict[str, str]:
    """Return ``("name:=value", …)`` as a mapping; raises `ConfigError` for any other form."""
    found = {}
    for text in texts:
        name, mark, value = text.partition(":=")
        if not mark or not name:
            raise ConfigError(f"argument '{text}' is not of the form name:=value")
        found[name] = value
    return found


def _declared(entity: Entity) -> Argument:
    given = entity.attributes
    default = given.get("default")
    choices = tuple(one["value"] for one in given.get("choice", ()))
    text = None if default is None else _source(default)
    return Argument(given["name"], text, given.get("description", ""), choices, entity.where)


def _source(text: Text) -> str:
    """Return a parsed text as it may have been written, to be shown."""
    shown = ""
    for part in text.parts:
        if isinstance(part, str):
            shown += part
        else:
            shown += f"$({' '.join([part.name, *map(_source, part.arguments)])})"
    return shown


def _visit(entities: Sequence[Entity], scope: Scope) -> Iterator[Action]:
    for entity in entities:
        yield from _act(entity, scope)


def _act(entity: Entity, scope: Scope) -> Iterator[Action]:
    try:
        if _holds(entity, scope):
            yield from _ACTIONS[entity.tag](entity, scope)
    except LocatedError:
        raise
    except RobotRLError as error:
        raise LocatedError(f"{entity.where}: {error}") from error


def _holds(entity: Entity, scope: Scope) -> bool:
    given = entity.attributes
    return ("if" not in given or condition(given["if"].resolve(scope))) and not (
        "unless" in given and condition(given["unless"].resolve(scope))
    )


# ---- what each tag does ---------------------------------------------------------------------------------------------


def _arg(entity: Entity, scope: Scope) -> Iterator[Action]:
    name, default = entity.attributes["name"], entity.attributes.get("default")
    if name not in scope.variables:
        if default is None:
            text = entity.attributes.get("description", "")
            raise ConfigError(f"argument '{name}' is missing: {name}:=… {f'({text})' if text else ''}".rstrip())
        scope.variables[name] = default.resolve(scope)
    choices = [one["value"] for one in entity.attributes.get("choice", ())]
    if choices and scope.variables[name] not in choices:
        raise UnknownNameError(f"value of the argument '{name}'", scope.variables[name], choices)
    yield from ()


def _let(entity: Entity, scope: Scope) -> Iterator[Action]:
    scope.variables[entity.attributes["name"].resolve(scope)] = entity.attributes["value"].resolve(scope)
    yield from ()


def _set_env(entity: Entity, scope: Scope) -> Iterator[Action]:
    scope.environment[entity.attributes["name"].resolve(scope)] = entity.attributes["value"].resolve(scope)
    yield from ()


def _unset_env(entity: Entity, scope: Scope) -> Iterator[Action]:
    scope.environment.pop(entity.attributes["name"].resolve(scope), None)
    yield from ()


def _group(entity: Entity, scope: Scope) -> Iterator[Action]:
    yield from _visit(entity.children, scope.inner() if entity.attributes.get("scoped", True) else scope)


def _push_ros_namespace(entity: Entity, scope: Scope) -> Iterator[Action]:
    scope.namespace = _joined(scope.namespace, entity.attributes["namespace"].resolve(scope))
    yield from ()


def _set_parameter(entity: Entity, scope: Scope) -> Iterator[Action]:
    name, value = entity.attributes["name"].resolve(scope), entity.attributes["value"]
    # Unlike a node's own parameters, text without substitutions follows the rules of YAML here.
    found = yaml_value(value.resolve(scope)) if isinstance(value, Text) else _parameter(value, scope)
    scope.parameters = (*scope.parameters, (name, found))
    yield from ()


def _set_use_sim_time(entity: Entity, scope: Scope) -> Iterator[Action]:
    scope.parameters = (*scope.parameters, ("use_sim_time", _flag(entity.attributes["value"], scope)))
    yield from ()


def _set_remap(entity: Entity, scope: Scope) -> Iterator[Action]:
    scope.remaps = (*scope.remaps, _pair(entity.attributes, scope))
    yield from ()


def _log(entity: Entity, scope: Scope) -> Iterator[Action]:
    yield Message(entity.attributes["message"].resolve(scope), entity.attributes.get("level", "INFO"))


def _shutdown(entity: Entity, scope: Scope) -> Iterator[Action]:
    reason = entity.attributes.get("reason")
    yield Shutdown(reason.resolve(scope) if reason else f"asked for at {entity.where}")


def _timer(entity: Entity, scope: Scope) -> Iterator[Action]:
    period = entity.attributes["period"]
    if isinstance(period, Text):
        text = period.resolve(scope)
        try:
            period = float(text)
        except ValueError:
            raise ConfigError(f"'period' is '{text}', expected seconds") from None
    yield Later(max(0.0, period), lambda: _visit(entity.children, scope))


def _include(entity: Entity, scope: Scope) -> Iterator[Action]:
    path = Path(entity.attributes["file"].resolve(scope))
    if scope.depth >= _DEEPEST_INCLUDE:
        raise ConfigError(f"more than {_DEEPEST_INCLUDE} files include each other; does {path.name} include itself?")
    file = LaunchFile(path if path.is_absolute() else scope.directory / path)
    known = [one.name for one in file.arguments()]
    for one in entity.attributes.get("arg", ()):
        name = one["name"].resolve(scope)
        if name not in known:
            raise UnknownNameError(f"argument of {path.name}", name, known)
        scope.variables[name] = one["value"].resolve(scope)
    # An include is no scope of its own in ROS 2 either: what it sets stays, a group keeps it in.
    within = replace(scope, directory=file.path.parent, depth=scope.depth + 1)
    yield from _visit(file.entities, within)
    scope.namespace, scope.parameters, scope.remaps = within.namespace, within.parameters, within.remaps


def _executable(entity: Entity, scope: Scope) -> Iterator[Action]:
    given = entity.attributes
    words = given["cmd"].split(scope) + (given["args"].split(scope) if "args" in given else [])
    if not words:
        raise ConfigError("'cmd' is empty")
    name = given["name"].resolve(scope) if "name" in given else Path(words[0]).name
    yield Process(name, tuple(words), **_process(entity, scope))


def _node(entity: Entity, scope: Scope) -> Iterator[Action]:
    given = entity.attributes
    package, executable = given["pkg"].resolve(scope), given["exec"].resolve(scope)
    path = package_prefix(package, scope.environment) / "lib" / package / executable
    if not path.is_file():
        there = sorted(one.name for one in path.parent.glob("*")) if path.parent.is_dir() else []
        raise UnknownNameError(f"executable of the package '{package}'", executable, there)
    name = given["name"].resolve(scope) if "name" in given else ""
    namespace = given["namespace"].resolve(scope) if "namespace" in given else None
    words = [str(path)]
    for attribute, marks in (("args", []), ("ros_args", ["--ros-args"])):
        if attribute in given:
            words += [*marks, *given[attribute].split(scope)]
    words.append("--ros-args")
    if name:
        words += ["-r", f"__node:={name}"]
    joined = _joined(scope.namespace, namespace or "")
    absolute = joined if joined.startswith("/") else f"/{joined}"
    if namespace is not None or scope.namespace:
        words += ["-r", f"__ns:={absolute}"]
    for parameter, value in scope.parameters:
        words += ["-p", f"{parameter}:={value}"]
    target = f"{absolute.rstrip('/')}/{name}" if name and (namespace is not None or scope.namespace) else "/**"
    yield Process(
        name or executable,
        tuple(words),
        parameters=tuple(_parameters(given.get("param", ()), target, scope)),
        remaps=(*scope.remaps, *(_pair(one, scope) for one in given.get("remap", ()))),
        **_process(entity, scope),
    )


def _parameters(given: Sequence[Mapping[str, Any]], node: str, scope: Scope) -> Iterator[Path | Mapping[str, Any]]:
    for one in given:
        if "from" in one:
            path = Path(one["from"].resolve(scope))
            if not path.is_file():
                raise ConfigError(f"parameter file '{path}' does not exist")
            yield path
            continue
        text = one["value"]
        value = text.resolve(scope) if "type" in one else _parameter(text, scope)
        yield {node: {"ros__parameters": {one["name"].resolve(scope): value}}}


def _parameter(value: Any, scope: Scope) -> Any:
    """Return a parameter's value: plain text stays text, and what holds substitutions follows the rules of YAML."""
    if isinstance(value, Text):
        text = value.resolve(scope)
        return text if value.plain else yaml_value(text)
    if isinstance(value, list):
        found = [one.resolve(scope) if isinstance(one, Text) and one.plain else _parameter(one, scope) for one in value]
        if len({type(one) for one in found}) > 1:
            raise ConfigError(f"a list of parameters mixes kinds: {found}")
        return found
    return value


def _process(entity: Entity, scope: Scope) -> dict[str, Any]:
    """Return what nodes and executables share."""
    given = entity.attributes
    output = given["output"].resolve(scope) if "output" in given else "log"
    if output not in OUTPUTS:
        raise UnknownNameError("output", output, OUTPUTS)
    environment = dict(scope.environment)
    for one in given.get("env", ()):
        environment[one["name"].resolve(scope)] = one["value"].resolve(scope)
    plain = ("respawn_delay", "respawn_max_retries", "sigkill_timeout", "sigterm_timeout")
    return {
        "environment": environment,
        "where": entity.where,
        "cwd": Path(given["cwd"].resolve(scope)) if "cwd" in given else None,
        "output": output,
        "respawn": _flag(given.get("respawn", False), scope),
        "required": given.get("on_exit") == "shutdown",
        **{name: given[name] for name in plain if name in given},
    }


def _flag(value: bool | Text, scope: Scope) -> bool:
    return value if isinstance(value, bool) else condition(value.resolve(scope))


def _pair(given: Mapping[str, Text], scope: Scope) -> tuple[str, str]:
    return given["from"].resolve(scope), given["to"].resolve(scope)


def _joined(outer: str, inner: str) -> str:
    """Return the namespace ``inner`` within ``outer``; one that begins with a slash stands by itself."""
    if inner.startswith("/") or not outer:
        return inner if inner == "/" else inner.rstrip("/")
    return f"{outer.rstrip('/')}/{inner}".rstrip("/")


_ACTIONS: dict[str, Callable[[Entity, Scope], Iterator[Action]]] = {
    "arg": _arg,
    "let": _let,
    "set_env": _set_env,
    "unset_env": _unset_env,
    "group": _group,
    "push_ros_namespace": _push_ros_namespace,
    "node": _node,
    "executable": _executable,
    "include": _include,
    "timer": _timer,
    "log": _log,
    "shutdown": _shutdown,
    "set_parameter": _set_parameter,
    "set_remap": _set_remap,
    "set_use_sim_time": _set_use_sim_time,
}
