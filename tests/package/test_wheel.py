"""The wheel, built and installed alone: what it contains and whether its command works."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMOKE = """
import json, robot_rl, sim, hardware
from importlib.metadata import entry_points
from robot_rl.core.paths import data_file
groups = sorted(group for group in entry_points().groups if group.startswith("robot_rl."))
broken = {}
for group in groups:
    for entry in entry_points(group=group):
        try:
            entry.load()
        except Exception as error:
            broken[f"{group}:{entry.name}"] = repr(error)
files = [robot_rl.__file__, sim.__file__, hardware.__file__, str(data_file("assets")), str(data_file("launch"))]
print(json.dumps({"files": files, "groups": groups, "broken": broken}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("*.whl"))


def test_top_level_names_are_exactly_ours(wheel):
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"robot_rl", "sim", "hardware"}


def test_the_wheel_holds_data_and_no_rubbish(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("robot_rl/_data/assets/") for name in names)
    assert any(name.startswith("robot_rl/_data/launch/") for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".npz", ".mp4", ".safetensors"))]
    assert sum(info.compress_size for info in zipfile.ZipFile(wheel).infolist()) < 20_000_000


def test_the_wheel_holds_the_ros_package(wheel):
    """The ament prefix has the launch files themselves where the checkout has links, and scripts stay executable."""
    archive = zipfile.ZipFile(wheel)
    prefix = "robot_rl/_data/launch/ament"
    for path in [*(ROOT / "launch").glob("*.launch.yaml"), ROOT / "package.xml"]:
        place = "share/robot_rl" if path.name == "package.xml" else "share/robot_rl/launch"
        assert archive.read(f"{prefix}/{place}/{path.name}") == path.read_bytes()
    for path in (ROOT / "launch" / "params").iterdir():
        for place in ("robot_rl/_data/launch/params", f"{prefix}/share/robot_rl/launch/params"):
            assert f"{place}/{path.name}" in archive.namelist()
    assert f"{prefix}/share/ament_index/resource_index/packages/robot_rl" in archive.namelist()
    scripts = [one for one in archive.infolist() if one.filename.startswith(f"{prefix}/lib/robot_rl/")]
    assert {Path(one.filename).name for one in scripts} == {
        path.name for path in (ROOT / "launch" / "ament" / "lib" / "robot_rl").iterdir()
    }
    assert all(one.external_attr >> 16 & 0o111 for one in scripts)


def test_the_wheel_works_alone(wheel, tmp_path):
    """In an environment that holds the wheel, sees our dependencies, and has no way to the checkout."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    installed = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*installed, str(wheel)], check=True, capture_output=True)
    # Folders named in a .pth file do not have their own .pth files read, so the editable install stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    result = subprocess.run([str(python), "-c", SMOKE], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(site) for file in found["files"]), found["files"]
    assert {"robot_rl.commands", "robot_rl.tasks", "robot_rl.policies", "robot_rl.heads"} <= set(found["groups"])
    assert found["broken"] == {}

    command = [str(environment / "bin" / "robot-rl"), "launch", "deploy", "policy:=x", "--print"]
    # Another test of this process may have told it of the checkout's ROS 2 package.
    alone = {name: value for name, value in os.environ.items() if name != "AMENT_PREFIX_PATH"}
    launched = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert f"{site}/robot_rl/_data/launch/ament/lib/robot_rl/policy_node --ros-args" in launched.stdout, launched.stderr

    command = [str(environment / "bin" / "robot-rl"), "--help"]
    help_text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "usage: robot-rl <command>" in help_text
    assert "missing" not in help_text
