"""What is plugged in, described without importing it: entry points and the first sentences of their docstrings."""

from __future__ import annotations

import ast
import importlib.util
import re
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path


def entries(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of the registry group ``group`` by name."""
    return {entry.name: entry for entry in entry_points(group=f"robot_rl.{group}")}


def summary(entry: EntryPoint) -> str:
    """Return the first sentence about what ``entry`` names, read from its source file.

    A class speaks for itself; of a function that makes something, the docstring of its module says what is made. Each
    stands in for the other where it is empty. A module that is not there or cannot be read is named: one broken plug-in
    must not hide the others.
    """
    try:
        spec = importlib.util.find_spec(entry.module)  # runs the package above the module
        if spec is None or spec.origin is None:
            return f"(missing: {entry.module})"
        if not spec.origin.endswith(".py"):
            return ""
        module = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except ModuleNotFoundError as error:
        return f"(missing: {error.name or entry.module})"
    except Exception as error:
        reason = " ".join(str(error).split())
        return f"(broken: {entry.module}: {type(error).__name__}: {reason[:120]})"
    docstring = ast.get_docstring(module)
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == entry.attr:
            docstring = ast.get_docstring(node) or docstring
        elif isinstance(node, ast.FunctionDef) and node.name == entry.attr:
            docstring = docstring or ast.get_docstring(node)
    return _first_sentence(docstring or "")


def _first_sentence(docstring: str) -> str:
    """Return the first sentence of the first paragraph, without its full stop."""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"\.(?:\s|$)", paragraph, maxsplit=1)[0]
