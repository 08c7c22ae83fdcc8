"""The three packages: what importing them loads, which folders are no packages, what they export."""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("robot_rl", "sim", "hardware")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
ENTRIES = sorted(
    (entry for group in entry_points().groups if group.startswith("robot_rl.") for entry in entry_points(group=group)),
    key=lambda entry: (entry.group, entry.name),
)


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(result.stdout.split())


def test_importing_the_packages_loads_neither_torch_nor_ros():
    assert not loaded_after("import robot_rl, sim, hardware") & {"torch", "rclpy", "mujoco", "cv2", "av"}


@pytest.mark.parametrize("package", ["robot_rl/core", "hardware"])
def test_core_and_hardware_import_nothing_heavy_and_parse_as_python_3_10(package):
    heavy = {"torch", "rclpy", "mujoco", "gymnasium", "cv2", "av", "pyarrow", "sim", "warp"}
    for file in (ROOT / package).rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 10))
        roots = set()
        for node in tree.body:
            if isinstance(node, ast.Import):
                roots |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots.add(node.module.partition(".")[0])
        if file.is_relative_to(ROOT / "hardware" / "ros"):
            roots -= {"rclpy"}  # the adapter itself, which nothing imports unasked
        assert not roots & heavy, f"{file.relative_to(ROOT)} imports {roots & heavy}"


@pytest.mark.parametrize("folder", ["launch", "assets", "tests", "benchmarks"])
def test_folders_that_are_no_packages(folder):
    assert not list((ROOT / folder).rglob("__init__.py")), f"an __init__.py in {folder}/ would shadow a real package"


def test_test_files_have_unique_names():
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def test_every_exported_name_resolves():
    exporting = [file for file in FILES if "__all__" in file.read_text(encoding="utf-8")]
    for file in exporting:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = importlib.import_module(name)
        missing = [export for export in module.__all__ if not hasattr(module, export)]
        assert not missing, f"{name}.__all__ names {missing}"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.group}-{entry.name}")
def test_every_entry_point_loads(entry):
    loaded = entry.load()
    if entry.group == "robot_rl.commands":
        assert loaded.__doc__
        assert callable(loaded.run)
        assert loaded.Config is not None
