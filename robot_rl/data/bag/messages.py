"""ROS 2 messages without ROS 2: reads message definitions and decodes CDR by table, running nothing of what it reads.

Definitions are the text of ``.msg`` files, followed by those of the types that they use, as MCAP and rosbag2 store them
(``ros2msg``). Messages are plain CDR (XCDR version 1), as ROS 2 sends them. Both come from strangers: names, nesting,
sizes and counts are bounded, and a damaged message is a `DataError`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from robot_rl.core.errors import DataError, UnknownNameError
from robot_rl.data.bag.names import printable

SEPARATOR = "=" * 80
"""Line between the definitions of two types."""
_PRIMITIVES = {
    "bool": "?",
    "byte": "B",
    "char": "B",
    "uint8": "B",
    "int8": "b",
    "uint16": "H",
    "int16": "h",
    "uint32": "I",
    "int32": "i",
    "uint64": "Q",
    "int64": "q",
    "float32": "f",
    "float64": "d",
}
_TYPE = re.compile(
    r"(?P<base>[A-Za-z][A-Za-z0-9_]*(?:/[A-Za-z][A-Za-z0-9_]*){0,2})(?:<=\d+)?"
    r"(?P<many>\[(?:(?P<count>\d{1,9})|<=\d+)?\])?"
)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_STEP = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9_]*)(?:\[(?P<first>\d{1,9})(?P<colon>:)?(?P<last>\d{1,9})?\])?")
_MAX_TEXT, _MAX_TYPES, _MAX_FIELDS, _MAX_DEPTH = 1_000_000, 500, 1000, 24
_MAX_VALUES = 1_000_000
"""Values of one message that become Python objects (arrays of numbers do not): each may take 300 bytes of memory."""
_PLACEHOLDER = ("structure_needs_at_least_one_member", "uint8")


@dataclass(frozen=True)
class Field:
    """One field of a type."""

    name: str
    """Its name."""
    base: str
    """A primitive, ``string``, or the full name of a type (``std_msgs/msg/Header``)."""
    count: int | None = None
    """Elements of an array of fixed size; -1 for any number; None for a single value."""


Types = dict[str, tuple[Field, ...]]


def full_name(name: str, package: str = "") -> str:
    """Return ``package/msg/Name`` for any of the ways to write a type: ``Name``, ``package/Name``."""
    parts = name.split("/")
    if len(parts) == 1:
        return "std_msgs/msg/Header" if name == "Header" else f"{package}/msg/{name}"
    return f"{parts[0]}/msg/{parts[-1]}"


def parse_definitions(name: str, text: str) -> Types:
    """Return the fields of the type ``name`` and of those whose definitions follow in ``text``.

    Raises:
        DataError: the text is no message definition.
    """
    if len(text) > _MAX_TEXT:
        raise DataError(f"definition of '{name}' of {len(text)} characters, more than the {_MAX_TEXT} that are read")
    blocks = re.split(r"^={40,}\s*$", text, flags=re.MULTILINE)
    if len(blocks) > _MAX_TYPES:
        raise DataError(f"definition of '{name}' with {len(blocks)} types, more than the {_MAX_TYPES} that are read")
    types = {}
    for number, block in enumerate(blocks):
        if number:
            head, _, block = block.strip().partition("\n")
            if not head.startswith("MSG:"):
                raise DataError(f"definition of '{name}': a type without its name ('{printable(head, 40)}')")
            title = full_name(printable(head[4:].strip(), 100))
        else:
            title = full_name(name)
        types.setdefault(title, _fields(title, block))
    return types


def _fields(title: str, text: str) -> tuple[Field, ...]:
    found = []
    for line in text.splitlines():
        words = line.split("#")[0].split(None, 2)
        if not words or _is_constant(words):
            continue
        kind, shown = _TYPE.fullmatch(words[0]), printable(line.strip(), 60)
        if kind is None or len(words) < 2 or not _NAME.fullmatch(words[1]):
            raise DataError(f"definition of '{title}': '{shown}' is no field")
        base = kind["base"]
        if base not in _PRIMITIVES and base not in ("string", "wstring"):
            base = full_name(base, title.split("/")[0])
        count = None if kind["many"] is None else int(kind["count"] or -1)
        if count == 0:
            raise DataError(f"definition of '{title}': '{shown}' is an array without elements")
        found.append(Field(words[1], base, count))
    _bounded(title, len(found), _MAX_FIELDS, "fields")
    return tuple(found) or (Field(*_PLACEHOLDER),)


def _bounded(name: str, count: int, limit: int, what: str) -> None:
    if count > limit:
        raise DataError(f"definition of '{name}' with {count} {what}, more than the {limit} that are read")


def _is_constant(words: list[str]) -> bool:
    """Whether a line is ``type NAME=value`` (defaults have no equals sign before their value)."""
    return len(words) > 1 and ("=" in words[1] or (len(words) > 2 and words[2].startswith("=")))


class _Cdr:
    """Position in the bytes of one message; alignment counts from the end of the encapsulation."""

    def __init__(self, data: bytes | memoryview) -> None:
        if len(data) < 4 or data[0] != 0 or data[1] not in (0, 1):
            raise DataError("is not plain CDR")
        self.data, self.position, self.order = memoryview(data)[4:], 0, "<" if data[1] else ">"
        self.values = 0

    def count_values(self, count: int) -> None:
        """Count values that become Python objects; `DataError` beyond the most that one message may have."""
        self.values += count
        if self.values > _MAX_VALUES:
            raise DataError(f"has more than the {_MAX_VALUES} values that are read")

    def align(self, size: int) -> None:
        self.position += -self.position % size

    def unpack(self, letter: str, size: int) -> Any:
        self.align(size)
        (value,) = struct.unpack_from(self.order + letter, self.data, self.position)
        self.position += size
        return value

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.position:
            raise DataError("is cut")
        found = self.data[self.position : self.position + count]
        self.position += count
        return found

    def string(self) -> str:
        return str(self.take(self.unpack("I", 4)), "utf-8", "replace").rstrip("\0")

    def count(self, smallest: int) -> int:
        """Return the length of a sequence whose elements take ``smallest`` bytes at least."""
        count = self.unpack("I", 4)
        if count * smallest > len(self.data) - self.position:
            raise DataError(f"claims {count} elements and has {len(self.data) - self.position} bytes")
        return count


Reader = Callable[[_Cdr], Any]


class MessageType:
    """Decodes the messages of one type into dictionaries.

    Numbers become Python's, arrays of numbers become NumPy arrays that share the message's memory where they can,
    strings ``str`` and nested messages dictionaries.
    """

    def __init__(self, name: str, types: Mapping[str, tuple[Field, ...]]) -> None:
        """Prepare the tables.

        Raises:
            DataError: a type is missing, contains itself, is nested too deeply, or needs ``wstring``.
        """
        self.name, self._types = full_name(name), types
        self._readers: dict[str, Reader] = {}
        self._read = self._message(self.name, 0)
        fields = types[self.name]
        self.has_header = bool(fields) and fields[0] == Field("header", "std_msgs/msg/Header")
        """Whether the first field is a header with a stamp."""

    @property
    def fields(self) -> tuple[Field, ...]:
        """Its fields in order."""
        return self._types[self.name]

    def decode(self, data: bytes | memoryview) -> dict[str, Any]:
        """Return the message as a dictionary; `DataError` if it is damaged or of another type."""
        try:
            return self._read(_Cdr(data))
        except DataError as error:
            raise DataError(f"a message of {self.name} {error}") from error
        except (struct.error, ValueError) as error:
            raise DataError(f"a message of {self.name} is cut or damaged ({error})") from error

    def stamp(self, data: bytes | memoryview) -> int | None:
        """Return the header's stamp in nanoseconds without decoding the rest; None where there is no header."""
        if not self.has_header:
            return None
        if len(data) < 12 or data[0] != 0 or data[1] not in (0, 1):
            raise DataError(f"a message of {self.name} is cut or damaged")
        seconds, nanoseconds = struct.unpack_from("<iI" if data[1] else ">iI", data, 4)
        return seconds * 1_000_000_000 + nanoseconds

    def _message(self, name: str, depth: int) -> Reader:
        if name not in self._types:
            raise DataError(f"the definition of '{name}' is missing, which '{self.name}' needs")
        if depth > _MAX_DEPTH:
            raise DataError(f"'{self.name}' is nested more than {_MAX_DEPTH} times, or contains itself")
        if name not in self._readers:  # once per type, for a stranger's may branch without end
            readers = [(field.name, self._field(field, depth)) for field in self._types[name]]

            def read(cdr: _Cdr) -> dict[str, Any]:
                cdr.count_values(len(readers))
                return {key: reader(cdr) for key, reader in readers}

            self._readers[name] = read
        return self._readers[name]

    def _field(self, field: Field, depth: int) -> Reader:
        if field.base == "wstring":
            raise DataError(f"'{self.name}' has a wstring, '{field.name}', which is not read")
        if field.base in _PRIMITIVES:
            letter = _PRIMITIVES[field.base]
            size = struct.calcsize(letter)
            if field.count is None:
                return lambda cdr: cdr.unpack(letter, size)
            return _numbers(letter, size, field.count)
        single = _Cdr.string if field.base == "string" else self._message(field.base, depth + 1)
        if field.count is None:
            return single
        return _list(single, field.count, 4 if field.base == "string" else 1)


def _numbers(letter: str, size: int, count: int) -> Reader:
    kind = {"<": np.dtype("<" + letter), ">": np.dtype(">" + letter)}

    def read(cdr: _Cdr) -> np.ndarray:
        number = cdr.count(size) if count < 0 else count
        if number:
            cdr.align(size)
        return np.frombuffer(cdr.take(number * size), kind[cdr.order])

    return read


def _list(single: Reader, count: int, smallest: int) -> Reader:
    def read(cdr: _Cdr) -> list[Any]:
        number = cdr.count(smallest) if count < 0 else count
        cdr.count_values(number)
        return [single(cdr) for _ in range(number)]

    return read


def same_content(one: Any, other: Any) -> bool:
    """Whether two decoded messages of one type say the same, apart from their headers.

    Their bytes cannot be compared: what ROS 2 puts between two fields to align them is left to chance.
    """
    if isinstance(one, dict):
        return all(same_content(value, other[key]) for key, value in one.items() if key != "header")
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_content, one, other))
    return bool(one == other)


def _steps(path: str) -> Iterator[re.Match[str]]:
    for part in path.split("."):
        step = _STEP.fullmatch(part)
        if step is None:
            raise DataError(f"field '{path}' is not of the form name, name[index] or name[first:last], joined by dots")
        yield step


def extract(message: Any, path: str) -> Any:
    """Return the part of a decoded message that ``path`` names, such as ``points[0].positions`` or ``data[0:3]``.

    Raises:
        UnknownNameError: there is no such field; the message suggests the nearest.
        DataError: the path is malformed, or the array is shorter.
    """
    for step in _steps(path):
        if not isinstance(message, dict):
            raise DataError(f"field '{path}': '{step['name']}' is asked of what has no fields")
        if step["name"] not in message:
            raise UnknownNameError(f"field of '{path}'", step["name"], message)
        message = message[step["name"]]
        if step["first"] is None:
            continue
        if isinstance(message, (dict, str)) or not hasattr(message, "__len__"):
            raise DataError(f"field '{path}': '{step['name']}' is no array")
        first, length = int(step["first"]), len(message)
        last = length if step["colon"] and step["last"] is None else int(step["last"] or first + 1)
        if not first < last <= length:
            raise DataError(f"field '{path}': '{step['name']}' has {length} elements")
        message = message[first:last] if step["colon"] else message[first]
    return message


def numbers(message: Mapping[str, Any], path: str) -> np.ndarray:
    """Return the numbers (n,) float64 at ``path``; those of a message such as ``Vector3`` follow in its own order.

    Raises:
        DataError: there is text, or an array of messages.
    """
    return np.asarray(list(_flatten(extract(message, path), path)), np.float64)


def _flatten(value: Any, path: str) -> Iterator[float]:
    if isinstance(value, np.ndarray):
        yield from value.tolist()
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _flatten(inner, path)
    elif isinstance(value, (bool, int, float)):
        yield value
    else:
        raise DataError(f"field '{path}' is not made of numbers ({type(value).__name__})")
