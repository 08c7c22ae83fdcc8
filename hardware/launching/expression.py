"""Evaluates the expression of ``$(eval …)``: arithmetic, comparisons and logic, without Python's `eval`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from robot_rl.core.errors import ConfigError

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.Not: operator.not_,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "float": float,
    "int": int,
    "len": len,
    "max": max,
    "min": min,
    "round": round,
    "str": str,
}
_NAMES = {"pi": math.pi, "e": math.e, "inf": math.inf}
_LONGEST = 1000


def evaluate(text: str) -> Any:
    """Return the value of a Python expression made of constants, ``+ - * / // %``, comparisons and logic.

    Also allowed are ``a if b else c``, tuples and lists, the names ``pi``, ``e`` and ``inf``, and the functions
    ``abs``, ``float``, ``int``, ``len``, ``max``, ``min``, ``round`` and ``str``.

    Raises:
        ConfigError: the text is no expression, or holds something else; the message names it.
    """
    if len(text) > _LONGEST:
        raise ConfigError(f"expression of {len(text)} characters, expected at most {_LONGEST}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"'{text}' is no expression: {error}") from error
    try:
        return _value(tree.body)
    except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"'{text}' cannot be evaluated: {error}") from error


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return tuple(map(_value, elements))
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
            return _UNARY[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            return _binary(sign, _value(left), _value(right))
        case ast.BoolOp(op=sign, values=values):
            return _logic(isinstance(sign, ast.And), values)
        case ast.Compare(left=left, ops=signs, comparators=others) if all(type(one) in _COMPARE for one in signs):
            return _compare(_value(left), signs, others)
        case ast.IfExp(test=test, body=body, orelse=otherwise):
            return _value(body if _value(test) else otherwise)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(_value, arguments))
    raise ConfigError(f"'{ast.unparse(node)}' is not allowed in an expression")


def _binary(sign: ast.operator, left: Any, right: Any) -> Any:
    # Text is only added: "a" * 10**9 would fill the memory, and "%" would format.
    if not isinstance(sign, ast.Add) and not all(isinstance(one, (int, float)) for one in (left, right)):
        raise TypeError("only numbers can be subtracted, multiplied and divided")
    return _BINARY[type(sign)](left, right)


def _logic(conjunction: bool, values: list[ast.expr]) -> Any:
    """Return what Python's ``and`` or ``or`` gives: the first value that decides, or the last."""
    value: Any = conjunction
    for one in values:
        value = _value(one)
        if bool(value) is not conjunction:
            break
    return value


def _compare(left: Any, signs: list[ast.cmpop], others: list[ast.expr]) -> bool:
    for sign, other in zip(signs, others, strict=True):
        right = _value(other)
        if not _COMPARE[type(sign)](left, right):
            return False
        left = right
    return True
