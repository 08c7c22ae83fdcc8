"""How arithmetic is compiled: for stated types, when its module is imported, never inside a control tick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba import types

F = TypeVar("F", bound=Callable[..., Any])

NUMBER, INTEGER, TRUTH = types.float64, types.int64, types.boolean
VECTOR, MATRIX = (types.Array(types.float64, rank, "A", readonly=True) for rank in (1, 2))
"""Arguments: arrays of float64 of any layout, which are not written."""
INTEGERS, INTEGER_MATRIX = (types.Array(types.int64, rank, "A", readonly=True) for rank in (1, 2))
NEW_VECTOR, NEW_MATRIX, NEW_BLOCK = (types.Array(types.float64, rank, "C") for rank in (1, 2, 3))
NEW_INTEGER_MATRIX = types.Array(types.int64, 2, "C")
"""Results, and arguments that are written: laid out as numpy lays out new arrays."""
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "boundscheck": True}
"""Divisions by zero give what numpy gives; an index beyond an array is an error, never a look at foreign memory."""


def compiled(signature: Any, **options: Any) -> Callable[[F], F]:
    """Return a decorator that compiles a function for ``signature`` at once; the machine code is kept on disk.

    ``options`` are those of `numba.njit` and take precedence over what holds for all.

    Kept code is renewed when the file of its function changes, and only that file is looked at: what a compiled
    function calls, and every constant in it, belongs into the same file. Where nothing can be written, each start
    compiles anew, in seconds.
    """
    return _kept(numba.njit, signature, **(_OPTIONS | options))


def compiled_ufunc(signature: Any) -> Callable[[F], F]:
    """Return a decorator as `compiled` does, which makes a ufunc of a function of numbers."""
    return _kept(numba.vectorize, [signature])


def part_of_compiled(function: F) -> F:
    """Decorate what compiled functions of the same file call; it is compiled with them."""
    return cast(F, numba.njit(**_OPTIONS)(function))


def _kept(compiler: Any, signature: Any, **options: Any) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        try:
            return cast(F, compiler(signature, cache=True, **options)(function))
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return cast(F, compiler(signature, **options)(function))

    return decorate
