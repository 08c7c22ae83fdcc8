"""The text of launch files: ``$(name argument …)`` is replaced by what it stands for.

=========================== =============================================================================
``$(var name)``             value of an argument or of a ``let``
``$(env NAME [default])``   environment variable
``$(find-pkg-share name)``  ``share/name`` under the prefix of a ROS 2 package
``$(find-pkg-prefix name)`` that prefix
``$(dirname)``              directory of the launch file
``$(eval expression)``      arithmetic and logic, see `hardware.launching.expression`
``$(not a)``, ``$(and a b)``, ``$(or a b)``, ``$(equals a b)``   ``true`` or ``false``
=========================== =============================================================================

Arguments are separated by spaces, may be quoted, and may hold substitutions themselves. A backslash takes the meaning
from the character after it.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from hardware.launching.expression import evaluate
from robot_rl.core.errors import ConfigError, UnknownNameError

ARGUMENTS = {
    "var": (1, 1),
    "env": (1, 2),
    "find-pkg-share": (1, 1),
    "find-pkg-prefix": (1, 1),
    "dirname": (0, 0),
    "eval": (1, 1),
    "not": (1, 1),
    "and": (2, 2),
    "or": (2, 2),
    "equals": (2, 2),
}
"""The substitutions that are read, with their least and largest number of arguments."""
_PLACEHOLDER = 0xE000
_INDEX = Path("share") / "ament_index" / "resource_index" / "packages"


class Surroundings(Protocol):
    """What substitutions refer to."""

    variables: dict[str, str]
    environment: dict[str, str]
    directory: Path


@dataclass(frozen=True)
class Call:
    """One ``$(name …)``."""

    name: str
    arguments: tuple[Text, ...]


@dataclass(frozen=True)
class Text:
    """A text of the launch file, parsed into plain parts and calls."""

    parts: tuple[str | Call, ...]

    @property
    def plain(self) -> bool:
        """Whether nothing in it is to be replaced."""
        return all(isinstance(part, str) for part in self.parts)

    def calls(self) -> Iterator[Call]:
        """Yield every call in it, those in arguments included."""
        for part in self.parts:
            if isinstance(part, Call):
                yield part
                for argument in part.arguments:
                    yield from argument.calls()

    def resolve(self, surroundings: Surroundings) -> str:
        """Return the text with every call replaced; raises `ConfigError` for what does not exist."""
        return "".join(part if isinstance(part, str) else perform(part, surroundings) for part in self.parts)

    def split(self, surroundings: Surroundings) -> list[str]:
        """Return the words of a command line; what comes out of a substitution is never split."""
        values: dict[str, str] = {}
        marked = ""
        for part in self.parts:
            if isinstance(part, Call):
                mark = chr(_PLACEHOLDER + len(values))
                values[mark] = perform(part, surroundings)
                part = mark
            marked += part
        words = shlex.split(marked)
        for mark, value in values.items():
            words = [word.replace(mark, value) for word in words]
        return words


def parse(text: str) -> Text:
    """Parse a text; raises `ConfigError` for a call that is not closed, not known or has too many arguments."""
    found, end = _template(text, 0, "")
    assert end == len(text)
    return found


def _template(text: str, start: int, quote: str) -> tuple[Text, int]:
    """Read from ``start`` to the end, or to the closing ``quote``; return the parts and where reading ended."""
    parts: list[str | Call] = []
    plain = ""
    at = start
    while at < len(text) and (not quote or text[at] != quote):
        if text.startswith("$(", at):
            if plain:
                parts.append(plain)
                plain = ""
            call, at = _call(text, at)
            parts.append(call)
            continue
        if text[at] == "\\" and at + 1 < len(text):
            at += 1
        plain += text[at]
        at += 1
    if quote and at == len(text):
        raise ConfigError(f"'{text}' has a quote {quote} that is not closed")
    return Text((*parts, plain) if plain or not parts else tuple(parts)), at


def _call(text: str, start: int) -> tuple[Call, int]:
    at = start + 2
    end = at
    while end < len(text) and (text[end].isalnum() or text[end] in "-_"):
        end += 1
    name, at = text[at:end], end
    arguments: list[Text] = []
    while at < len(text) and text[at] == " ":
        while text[at : at + 1] == " ":
            at += 1
        if text[at : at + 1] in ("'", '"'):
            argument, at = _template(text, at + 1, text[at])
            at += 1
            arguments.append(argument)
        elif text[at : at + 1] not in ("", ")"):
            argument, at = _word(text, at)
            arguments.append(argument)
    if text[at : at + 1] != ")":
        raise ConfigError(f"'{text}' has a substitution that is not closed")
    if name not in ARGUMENTS:
        raise UnknownNameError("substitution", f"$({name})", (f"$({one})" for one in ARGUMENTS))
    least, most = ARGUMENTS[name]
    if not least <= len(arguments) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise ConfigError(f"$({name}) has {len(arguments)} arguments, expected {wanted} (quote one that holds spaces)")
    if name == "equals" and Text(("",)) in arguments:
        # ROS 2's parser makes something else of an empty argument, and compares with that.
        raise ConfigError("$(equals) with an empty argument; write $(eval \"'$(var name)' == ''\")")
    return Call(name, tuple(arguments)), at + 1


def _word(text: str, at: int) -> tuple[Text, int]:
    parts: list[str | Call] = []
    while at < len(text) and text[at] not in " )":
        if text.startswith("$(", at):
            call, at = _call(text, at)
            parts.append(call)
            continue
        if text[at] in "'\"(":
            raise ConfigError(f"'{text}' has a {text[at]} within an argument: quote the whole argument")
        if text[at] == "\\" and at + 1 < len(text):
            at += 1
        parts.append(text[at])
        at += 1
    return Text(tuple(parts)), at


def perform(call: Call, surroundings: Surroundings) -> str:
    """Return what one call stands for."""
    if call.name == "dirname":
        return str(surroundings.directory)
    first, *others = (argument.resolve(surroundings) for argument in call.arguments)
    match call.name:
        case "var":
            if first not in surroundings.variables:
                raise UnknownNameError("variable", first, surroundings.variables)
            return surroundings.variables[first]
        case "env":
            if first not in surroundings.environment and not others:
                raise ConfigError(f"environment variable '{first}' is not set, and $(env {first}) gives no default")
            return surroundings.environment.get(first, *others)
        case "find-pkg-prefix":
            return str(package_prefix(first, surroundings.environment))
        case "find-pkg-share":
            return str(package_prefix(first, surroundings.environment) / "share" / first)
        case "eval":
            return str(evaluate(first))
        case "not":
            return _boolean(not _truth(first))
        case "and":
            return _boolean(_truth(first) and _truth(others[0]))
        case "or":
            return _boolean(_truth(first) or _truth(others[0]))
        case _:
            return _boolean(_equal(first, others[0]))


def package_prefix(name: str, environment: Mapping[str, str]) -> Path:
    """Return the prefix in ``AMENT_PREFIX_PATH`` that holds the ROS 2 package ``name``.

    Raises:
        ConfigError: no prefix has it; the message lists those that were searched.
    """
    prefixes = [Path(one) for one in environment.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if one]
    for prefix in prefixes:
        if (prefix / _INDEX / name).is_file():
            return prefix
    searched = ", ".join(map(str, prefixes)) or "none, AMENT_PREFIX_PATH is not set"
    raise ConfigError(f"there is no ROS 2 package '{name}' (prefixes searched: {searched})")


def condition(text: str) -> bool:
    """Return whether the text of an ``if`` or ``unless`` is true: ``true``, ``1``, ``false`` or ``0`` in any case."""
    word = text.strip().lower()
    if word not in ("true", "1", "false", "0"):
        raise ConfigError(f"condition is '{text}', expected true, 1, false or 0")
    return word in ("true", "1")


def yaml_value(text: str) -> Any:
    """Return a text by the rules of YAML: a number, true or false, text, or a list of one of these.

    Raises:
        ConfigError: it is something else; ROS 2 refuses that too.
    """
    if not text:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"'{text}' is no YAML value: {' '.join(str(error).split())}") from error
    kinds = {type(one) for one in value} if isinstance(value, list) else {type(value)}
    if len(kinds) > 1 or not kinds <= {bool, int, float, str}:
        raise ConfigError(
            f"'{text}' is no parameter: expected a number, true, false, text or a list of one kind (type: str keeps "
            "text as it is)"
        )
    return value


def _truth(text: str) -> bool:
    value = {"1": True, "0": False}.get(text.strip(), yaml_value(text))
    if not isinstance(value, bool):
        raise ConfigError(f"'{text}' is neither true nor false")
    return value


def _boolean(value: bool) -> str:
    return "true" if value else "false"


def _equal(one: str, other: str) -> bool:
    words = ("true", "false", "1", "0")
    if one.lower() in words and other.lower() in words:
        return (one.lower() in ("true", "1")) == (other.lower() in ("true", "1"))
    try:
        return math.isclose(float(one), float(other))
    except ValueError:
        return one == other
