"""Launch files: the subset, nodes and parameters that exist, and runs; the package that ROS 2 sees."""

import importlib
import inspect
import mmap
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from hardware.launching.action import Process
from hardware.launching.plan import LaunchFile
from hardware.ros.parameters import settings_of
from robot_rl.data.bag.bag import open_bag

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
FILES = sorted(LAUNCH.glob("*.launch.yaml"))
GIVEN = {"policy": "some/checkpoint", "out": "some/bag", "teleop": "script", "bag": "some/bag", "console": "true"}
ROOT = LAUNCH.parent


def processes(path):
    """What a launch file would start, with every argument that has no default given."""
    file = LaunchFile(path)
    given = {one.name: GIVEN[one.name] for one in file.arguments() if one.name in GIVEN}
    environment = {"AMENT_PREFIX_PATH": str(LAUNCH / "ament")}
    return [one for one in file.actions(given, environment) if isinstance(one, Process)]


def config_class(executable):
    module = importlib.import_module(f"hardware.ros.{executable}")
    (found,) = [
        value
        for name, value in vars(module).items()
        if name.endswith("NodeConfig") and value.__module__ == module.__name__
    ]
    return settings_of(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_the_subset_is_used_and_arguments_are_described(path):
    for argument in LaunchFile(path).arguments():
        assert argument.description.endswith("."), f"describe {argument.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nodes_and_parameters_exist(path):
    found = processes(path)
    assert found
    for process in found:
        entry = Path(process.words[0])
        assert entry.parent == LAUNCH / "ament" / "lib" / "robot_rl"
        assert os.access(entry, os.X_OK), f"{entry.name} must be executable"
        known = config_class(entry.name)
        for one in process.parameters:
            content = yaml.safe_load(one.read_text()) if isinstance(one, Path) else one
            for section in content.values():
                for name, value in section["ros__parameters"].items():
                    known[name].typed(value)


def test_arguments_reach_files_that_are_included():
    """An include is no scope of its own: what the outer file declares is the inner one's too."""
    inner = {one.name: one for name in ("bringup", "policy") for one in arguments(name)}
    outer = {one.name: one for one in arguments("deploy")}
    assert set(inner) - set(outer) <= {"params", "policy_params"}, "the outer file should offer these too"
    for name in set(inner) & set(outer) - {"robot_options"}:
        assert outer[name].default == inner[name].default, name


def arguments(name):
    return LaunchFile(LAUNCH / f"{name}.launch.yaml").arguments()


def end(process):
    """End a launcher in every case; what it has started only it can end."""
    process.terminate()  # without effect on one that has ended
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


@pytest.mark.ros
@pytest.mark.timeout(300)
def test_human_in_the_loop_runs_from_its_launch_file(tmp_path, new_domain):
    """Robot, policy, scripted operator and recorder start, work together, and end in order; all from the command."""
    pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")
    from hardware.robots.fake import FakeRobot
    from robot_rl.policies.checkpoint import save_policy
    from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy

    save_policy(ChunkedPolicy(FakeRobot(2).spec, ChunkedConfig(width=16, depth=1)), tmp_path / "policy")
    # The policy may take long to load: enable, and then hand back to it until it has a plan.
    (tmp_path / "keys.txt").write_text("".join(f"{0.5 * n:.1f} {'b' if n > 1 else 'n'}\n" for n in range(1, 300)))
    command = [
        *(sys.executable, "-m", "robot_rl.cli.main", "launch", "hil", f"policy:={tmp_path / 'policy'}"),
        *("robot:=fake", "robot_options:=['size=2']", f"bag:={tmp_path / 'bag'}", "teleop:=script"),
        *(f"teleop_options:=['script={tmp_path / 'keys.txt'}', 'autostart=true']", f"--logs={tmp_path}"),
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AMENT", "ROS_", "FAST"))}
    lines = []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**clean, "ROS_DOMAIN_ID": str(new_domain())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("[teleop]") and "auto (" in line:
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, "\n".join(lines)
    finally:
        end(process)
        process.stdout.close()
    text = "\n".join(lines)
    assert all(f"[launch] {name} ended with exit code 0" in lines for name in ("executor", "policy", "teleop")), text
    assert "[launch] recorder ended with exit code 0" in lines, text
    recorded = open_bag(tmp_path / "bag").topics
    assert all(recorded[f"/robot_rl/{name}"].count for name in ("observation", "executed", "status", "robot_spec"))


@pytest.mark.ros
@pytest.mark.timeout(400)
def test_simulated_robot_runs_from_its_launch_file(tmp_path, new_domain):
    pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")
    log = tmp_path / "launch.txt"
    code = f"""
import signal, subprocess, sys, time
from hardware.ros.link import RosOperatorLink
{inspect.getsource(end)}
program = [sys.executable, "-m", "robot_rl.cli.main", "launch"]
command = [*program, "simulated_robot", "task:=navigate", "--logs={tmp_path}"]
with open({str(log)!r}, "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
    try:
        link = RosOperatorLink()
        try:
            spec = link.wait_for_robot(90)
            deadline = time.monotonic() + 90
            while link.status is None and time.monotonic() < deadline:
                time.sleep(0.01)
            print(f"STATUS {{link.status and link.status.mode}} {{spec.action.size}}", flush=True)
        finally:
            link.close()
        process.send_signal(signal.SIGINT)
        ended = process.wait(60)
    finally:
        end(process)
sys.exit(ended)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AMENT", "ROS_", "FAST"))}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**clean, "ROS_DOMAIN_ID": str(new_domain())},
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    shown = log.read_text()
    assert ran.returncode == 0, ran.stdout + ran.stderr + shown
    assert "STATUS idle 2" in ran.stdout, shown
    assert "[launch] executor ended with exit code 0" in shown


def test_there_is_a_launch_file_and_no_python_package():
    assert FILES
    assert not list(LAUNCH.rglob("__init__.py")), "a package named 'launch' would shadow ROS 2's own"


def test_ros_package_agrees_with_the_project():
    """One package.xml, at the root, where colcon looks; it names what the adapter imports."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    package = ElementTree.parse(ROOT / "package.xml").getroot()
    assert package.findtext("name") == project["name"].replace("-", "_")
    assert package.findtext("version") == project["version"]
    assert package.findtext("export/build_type") == "ament_python"
    sources = "\n".join(path.read_text() for path in (ROOT / "hardware" / "ros").glob("*.py"))
    imported = set(re.findall(r"from (\w+_(?:msgs|interfaces))\.", sources)) | {"rclpy"}
    depends = {one.text for one in package.findall("exec_depend")}
    assert imported == depends, "package.xml should name what hardware/ros imports"
    installed = {name.removeprefix("ros-jazzy-").replace("-", "_") for name in project["optional-dependencies"]["ros"]}
    with_rclpy = {"builtin_interfaces", "rcl_interfaces"}
    assert depends <= installed | with_rclpy


def test_ament_prefix_holds_every_launch_file():
    """``ros2 launch robot_rl …`` looks below share/robot_rl, and does not follow links of directories there."""
    share = LAUNCH / "ament" / "share" / "robot_rl"
    assert (share / "package.xml").resolve() == ROOT / "package.xml"
    for folder, there in ((share / "launch", FILES), (share / "launch" / "params", (LAUNCH / "params").iterdir())):
        links = {path.name: path.resolve() for path in folder.iterdir() if path.is_file()}
        assert links == {path.name: path for path in there}, f"{folder} should link to each file"
    scripts = {path.name for path in (LAUNCH / "ament" / "lib" / "robot_rl").iterdir()}
    assert scripts == {path.stem for path in (ROOT / "hardware" / "ros").glob("*_node.py")}


def test_ros_finds_the_package_with_the_printed_environment():
    pytest.importorskip("ament_index_python", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")
    code = "from ament_index_python import get_package_prefix as p; print(p('robot_rl'), p('rclpy'))"
    printed = f"{sys.executable} -m robot_rl.cli.main ros env --domain-id 7"
    script = f'eval "$({printed})" && echo $ROS_DOMAIN_ID && {sys.executable} -c "{code}"'
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AMENT", "ROS_", "FAST"))}
    shell = subprocess.run(["sh", "-c", script], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert shell.stdout.split() == ["7", str(LAUNCH / "ament"), sys.prefix], shell.stderr
    shell = subprocess.run(["sh", "-c", f"{printed} --images"], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert f"export FASTRTPS_DEFAULT_PROFILES_FILE={LAUNCH / 'fastdds_images.xml'}" in shell.stdout


def test_stale_shared_memory_is_found_and_removed(tmp_path, monkeypatch, capsys):
    """Files that a process holds open or mapped stay; a stranger's are not looked at."""
    from hardware.cli import ros
    from hardware.ros.shared_memory import stale_files

    for name in ("fastrtps_abc", "sem.fastrtps_abc_mutex", "fastrtps_port7411_el", "else"):
        (tmp_path / name).write_bytes(b"x" * 100)
    with (tmp_path / "fastrtps_port7411_el").open("rb"), (tmp_path / "fastrtps_abc").open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 100)
        file.close()
        assert [path.name for path in stale_files(tmp_path)] == ["sem.fastrtps_abc_mutex"]
        mapped.close()
    assert len(stale_files(tmp_path)) == 3
    monkeypatch.setattr(ros, "stale_files", lambda: stale_files(tmp_path))
    ros.run(ros.Clean(dry_run=True))
    assert "3 stale files would be removed" in capsys.readouterr().out
    ros.run(ros.Clean())
    assert [path.name for path in tmp_path.iterdir()] == ["else"]


def test_doctor_says_how_ros_is_set_up(monkeypatch, tmp_path):
    rclpy = pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")
    from hardware.cli import checks

    monkeypatch.setattr(os, "environ", {**os.environ, "ROS_DOMAIN_ID": "23", "ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF"})
    # A real node would fix this process's transport, which Fast DDS reads once, to the settings of this test.
    monkeypatch.setattr(checks, "open_context", lambda: SimpleNamespace(try_shutdown=lambda: None))
    monkeypatch.setattr(rclpy, "create_node", lambda *_, **__: SimpleNamespace(destroy_node=lambda: None))
    (tmp_path / "fastrtps_abc").write_bytes(b"x" * 3_000_000)
    monkeypatch.setattr(checks, "stale_files", lambda: [tmp_path / "fastrtps_abc"])
    found = list(checks.ros())
    text = "\n".join(" ".join(one) for one in found)
    assert "domain: 23" in text
    assert "processes on this machine will not find each other" in text
    assert "1 shared-memory files (3 MB)" in text
    assert "Fast DDS profile: " in text


def test_fast_dds_profile_keeps_to_the_loopback_and_shares_no_memory():
    space = {"dds": "http://www.eprosima.com"}
    root = ElementTree.parse(LAUNCH / "fastdds.xml").getroot()
    transports = root.findall(".//dds:transport_descriptor", space)
    assert [one.findtext("dds:type", namespaces=space) for one in transports] == ["UDPv4"]
    assert [one.text for one in root.findall(".//dds:interfaceWhiteList/dds:address", space)] == ["127.0.0.1"]
    defined = {one.findtext("dds:transport_id", namespaces=space) for one in transports}
    assert {one.text for one in root.findall(".//dds:userTransports/dds:transport_id", space)} == defined
    assert root.findtext(".//dds:useBuiltinTransports", namespaces=space) == "false"
