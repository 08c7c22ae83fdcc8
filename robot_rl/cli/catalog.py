"""What is plugged in, described without importing it: entry points and the first lines of their docstrings."""

from __future__ import annotations

import ast
import importlib.util
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path


def entries(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of the registry group ``group`` by name."""
    return {entry.name: entry for entry in entry_points(group=f"robot_rl.{group}")}


def summary(entry: EntryPoint) -> str:
    """Return the first line of the docstring of what ``entry`` names, read from its source file.

    The object's own docstring comes first, the module's where it has none; a module that is not there is named.
    """
    try:
        spec = importlib.util.find_spec(entry.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return f"(missing: {entry.module})"
    module = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    docstring = ast.get_docstring(module)
    for node in module.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == entry.attr:
            docstring = ast.get_docstring(node) or docstring
    return (docstring or "").partition("\n")[0].rstrip(".")
