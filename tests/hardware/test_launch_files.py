"""Launch files use only the documented subset of the YAML front end, and name nodes and parameters that exist."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
FILES = sorted(LAUNCH.glob("*.launch.yaml"))
TAGS = {
    "arg": {"name", "default", "description", "choice"},
    "let": {"name", "value"},
    "set_env": {"name", "value"},
    "unset_env": {"name"},
    "group": None,
    "push_ros_namespace": {"namespace"},
    "node": {
        *("pkg", "exec", "name", "namespace", "args", "param", "remap", "env"),
        *("output", "respawn", "respawn_delay", "if", "unless"),
    },
    "executable": {"cmd", "cwd", "name", "args", "env", "output", "if", "unless"},
    "include": {"file", "arg"},
}
SUBSTITUTIONS = {"var", "env", "find-pkg-share", "find-pkg-prefix", "dirname", "eval", "not", "and", "or", "equals"}


def entities(path):
    document = yaml.safe_load(path.read_text())
    assert list(document) == ["launch"]
    for entity in document["launch"]:
        ((tag, attributes),) = entity.items()
        yield tag, attributes


def config_class(executable):
    module = importlib.import_module(f"hardware.ros.{executable}")
    (found,) = [
        value
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
    ]
    return {field.name for field in dataclasses.fields(found)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_the_subset_is_used(path):
    declared = set()
    for tag, attributes in entities(path):
        assert tag in TAGS, f"{path.name} uses '{tag}'"
        assert TAGS[tag] is None or set(attributes) <= TAGS[tag], f"{path.name}: {tag} has {sorted(attributes)}"
        if tag in ("arg", "let"):
            declared.add(attributes["name"])
            assert tag == "let" or attributes.get("description", "").endswith("."), f"describe {attributes['name']}"
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    assert set(re.findall(r"\$\((\S+?)[ )]", text)) <= SUBSTITUTIONS
    assert set(re.findall(r"\$\(var ([^)]+)\)", text)) <= declared


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nodes_and_parameters_exist(path):
    for tag, attributes in entities(path):
        if tag != "node":
            continue
        assert attributes["pkg"] == "robot_rl"
        entry = LAUNCH / "ament" / "lib" / "robot_rl" / attributes["exec"]
        assert os.access(entry, os.X_OK), f"{entry.name} must be executable"
        known = config_class(attributes["exec"])
        for parameter in attributes.get("param", []):
            if "from" in parameter:
                file = Path(parameter["from"].replace("$(dirname)", str(LAUNCH)))
                for section in yaml.safe_load(file.read_text()).values():
                    assert set(section["ros__parameters"]) <= known
            else:
                assert parameter["name"] in known


def test_there_is_a_launch_file_and_no_python_package():
    assert FILES
    assert not list(LAUNCH.rglob("__init__.py")), "a package named 'launch' would shadow ROS 2's own"


def test_ament_package_agrees_with_the_project():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"]
    package = ElementTree.parse(LAUNCH / "ament" / "share" / "robot_rl" / "package.xml").getroot()
    assert package.findtext("name") == project["name"].replace("-", "_")
    assert package.findtext("version") == project["version"]
    needed = {name.removeprefix("ros-jazzy-").replace("-", "_") for name in project["optional-dependencies"]["ros"]}
    assert {one.text for one in package.findall("exec_depend")} <= needed


def test_ros_finds_the_package_with_the_printed_environment():
    pytest.importorskip("ament_index_python", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")
    code = "from ament_index_python import get_package_prefix as p; print(p('robot_rl'), p('rclpy'))"
    script = f'eval "$({sys.executable} -m hardware.ros.context)" && {sys.executable} -c "{code}"'
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AMENT", "ROS_", "FAST"))}
    shell = subprocess.run(["sh", "-c", script], cwd=LAUNCH.parent, env=clean, capture_output=True, text=True)
    assert shell.stdout.split() == [str(LAUNCH / "ament"), sys.prefix], shell.stderr


def test_fast_dds_profile_keeps_to_the_loopback_and_shares_no_memory():
    space = {"dds": "http://www.eprosima.com"}
    root = ElementTree.parse(LAUNCH / "fastdds.xml").getroot()
    transports = root.findall(".//dds:transport_descriptor", space)
    assert [one.findtext("dds:type", namespaces=space) for one in transports] == ["UDPv4"]
    assert [one.text for one in root.findall(".//dds:interfaceWhiteList/dds:address", space)] == ["127.0.0.1"]
    defined = {one.findtext("dds:transport_id", namespaces=space) for one in transports}
    assert {one.text for one in root.findall(".//dds:userTransports/dds:transport_id", space)} == defined
    assert root.findtext(".//dds:useBuiltinTransports", namespaces=space) == "false"
