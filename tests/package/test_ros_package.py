"""robot_rl as a ROS 2 package: what colcon builds, and what the wheel holds of it."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BESIDE = {".hypothesis", ".import_linter_cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", "MUJOCO_LOG.TXT"}
"""What other tests and checks may leave in the checkout meanwhile; a build leaves none of it."""
NODES = sorted(path.stem for path in (ROOT / "hardware" / "ros").glob("*_node.py"))


@pytest.fixture
def colcon(tmp_path):
    """An environment of its own with colcon, which wants an old setuptools."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=True)
    install = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    wanted = ["colcon-common-extensions", "setuptools>=77,<80"]
    try:
        subprocess.run([*install, *wanted], check=True, capture_output=True, text=True, timeout=240)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        lines = [line for line in str(error.stderr or error).splitlines() if not line.startswith("WARNING")]
        pytest.skip(f"colcon cannot be installed here: {' '.join(lines[-1:])}")
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_colcon_builds_a_package_that_runs(colcon, tmp_path):
    """What is built stands by itself: index, launch files, scripts with the caller's Python, and all data files."""
    space = tmp_path / "space"
    space.mkdir()
    command = [str(colcon / "colcon"), "--log-base", "log", "build", "--paths", str(ROOT), "--build-base", "build"]
    before = {path.name for path in ROOT.iterdir()} | BESIDE
    built = subprocess.run(
        [*command, "--install-base", "install"],
        cwd=space,
        env={**os.environ, "PATH": f"{colcon}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert {path.name for path in ROOT.iterdir()} | BESIDE == before, "the checkout is left alone"
    prefix = space / "install" / "robot_rl"
    assert (prefix / "share" / "ament_index" / "resource_index" / "packages" / "robot_rl").is_file()
    assert (prefix / "share" / "robot_rl" / "package.xml").read_text() == (ROOT / "package.xml").read_text()
    shipped = {path.name for path in (ROOT / "launch").glob("*.launch.yaml")}
    assert {path.name for path in (prefix / "share" / "robot_rl" / "launch").glob("*.launch.yaml")} == shipped
    for name in (*NODES, "robot-rl"):
        script = prefix / "lib" / "robot_rl" / name
        assert script.read_text().startswith("#!/usr/bin/env python3\n"), name
        assert os.access(script, os.X_OK), name
    # What colcon built comes before the checkout that this Python has installed.
    (site,) = (prefix / "lib").glob("python*/site-packages")
    environment = {**os.environ, "PYTHONPATH": str(site), "AMENT_PREFIX_PATH": str(prefix)}
    code = "from robot_rl.core.paths import data_file as f; print(f('launch', 'fastdds.xml'), f('assets'))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=space, env=environment, capture_output=True, text=True, check=True
    )
    assert all(Path(path).is_relative_to(site) for path in found.stdout.split())
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "robot_rl.cli.main", "launch", "--print"),
            *(str(prefix / "share" / "robot_rl" / "launch" / "deploy.launch.yaml"), "policy:=x"),
        ],
        cwd=space,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{prefix / 'lib' / 'robot_rl' / 'policy_node'} --ros-args" in launched.stdout
