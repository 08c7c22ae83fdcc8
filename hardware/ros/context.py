"""The ROS 2 environment of a process: discovery, domain, package paths, transport; and what is wrong with it."""

from __future__ import annotations

import os
import random
import shlex
import socket
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from robot_rl.core.errors import ConfigError, MissingDependencyError, RobotRLError
from robot_rl.core.paths import data_file

if TYPE_CHECKING:
    from rclpy.context import Context

PACKAGES = (
    "rclpy",
    "builtin_interfaces",
    "diagnostic_msgs",
    "sensor_msgs",
    "std_msgs",
    "trajectory_msgs",
)
"""Python packages of ROS 2 that the adapter imports."""
MAX_DOMAIN = 101
"""Largest domain id whose ports stay below Linux' ephemeral range."""
IMAGES_PROFILE = "fastdds_images.xml"
"""Fast DDS profile with shared memory, for camera drivers and recorders."""
_PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
_MARKER = Path("share") / "ament_index" / "resource_index" / "packages" / "robot_rl"
_RANGE = "ROS_AUTOMATIC_DISCOVERY_RANGE"


def require_ros(purpose: str = "The ROS 2 transport") -> None:
    """Raise `MissingDependencyError` naming the first ROS 2 package that is not installed."""
    for package in PACKAGES:
        if find_spec(package) is None:
            raise MissingDependencyError(package, "ros", purpose)


def available() -> bool:
    """Return whether every ROS 2 package that the adapter needs is installed (imports none of them)."""
    return all(find_spec(package) is not None for package in PACKAGES)


def prepare_environment(domain_id: int | None = None) -> None:
    """Set what ROS 2 reads from this process's environment; child processes inherit it.

    What the user has set stays, except the domain where ``domain_id`` is given.

    * ``AMENT_PREFIX_PATH``: pip's wheels do not set it, and package look-ups fail without; also names the prefix
      ``launch/ament``, in which ``ros2 run robot_rl …`` finds our nodes.
    * Fast DDS profile ``launch/fastdds.xml``: loopback only, so that a robot is not commanded from the next desk by
      accident, and no shared memory, whose locks would let a hanging policy process block the control loop. This needs
      the discovery range ``SYSTEM_DEFAULT``; any other one adds shared memory.
      The user may choose ``launch/fastdds_images.xml`` instead, for cameras and recorders: see docs/recording.md.
    * With another middleware or a profile of the user's own: the discovery range ``LOCALHOST``, a filter and no fence.

    Raises:
        ConfigError: ``domain_id`` is not in 0 … 101.
    """
    if domain_id is not None:
        if not 0 <= domain_id <= MAX_DOMAIN:
            raise ConfigError(f"ROS domain id {domain_id} is not in 0 … {MAX_DOMAIN}")
        os.environ["ROS_DOMAIN_ID"] = str(domain_id)
    wanted = [data_file("launch", "ament"), Path(sys.prefix)]
    prefixes = [part for part in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if part]
    if any((Path(one) / _MARKER).is_file() for one in prefixes):
        wanted = wanted[1:]  # the package that colcon built, say: what the user has set stays
    new = [str(one) for one in wanted if (one / "share" / "ament_index").is_dir() and str(one) not in prefixes]
    os.environ["AMENT_PREFIX_PATH"] = os.pathsep.join(new + prefixes)
    profile = str(data_file("launch", "fastdds.xml"))
    if not any(variable in os.environ for variable in _PROFILE_VARIABLES):
        os.environ.update(dict.fromkeys(_PROFILE_VARIABLES, profile))
    ours = {profile, str(data_file("launch", IMAGES_PROFILE))}
    loopback_only = _fast_dds() and os.environ.get(_PROFILE_VARIABLES[0]) in ours
    os.environ.setdefault(_RANGE, "SYSTEM_DEFAULT" if loopback_only else "LOCALHOST")


def free_domain(among: Iterable[int] = range(1, MAX_DOMAIN + 1)) -> int:
    """Return a domain id that no process of this machine uses now, for tests and demonstrations side by side.

    A participant binds UDP port 7400 + 250 * domain for discovery (DDS interoperability wire protocol, section 9.6.1).

    Args:
        among: ids to choose from; programs that look at the same time need different ones.

    Raises:
        ConfigError: none of them is free.
    """
    candidates = list(among)
    random.SystemRandom().shuffle(candidates)
    for domain in candidates:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("", 7400 + 250 * domain))
            except OSError:
                continue
            return domain
    raise ConfigError(f"every ROS domain id from {min(candidates)} to {max(candidates)} is in use on this machine")


def open_context(domain_id: int | None = None, arguments: list[str] | None = None) -> Context:
    """Prepare the environment, and return an initialised rclpy context of this process's own.

    rclpy's signal handlers stay off: with them the context is already invalid when a node wants to send its last
    command. Whoever opens the context handles SIGINT and SIGTERM and calls ``try_shutdown``.

    Args:
        domain_id: DDS domain, or None for ``ROS_DOMAIN_ID`` and its default 0.
        arguments: command line, of which the part after ``--ros-args`` is used (remappings, parameters).

    Raises:
        MissingDependencyError: rclpy or a message package is not installed.
        RobotRLError: ROS 2 refused the arguments.
    """
    require_ros()
    prepare_environment(domain_id)
    import rclpy
    from rclpy.context import Context
    from rclpy.signals import SignalHandlerOptions

    context = Context()
    try:
        # No log files under the home directory: our processes log through Python, into the deployment's own files.
        given = [*(arguments or []), "--ros-args", "--disable-external-lib-logs"]
        rclpy.init(args=given, context=context, signal_handler_options=SignalHandlerOptions.NO)
    except Exception as error:  # rclpy raises bare RCLError subclasses of its C extension
        raise RobotRLError(f"ROS 2 did not start: {' '.join(str(error).split())}") from error
    return context


def check() -> list[str]:
    """Return one line per problem that would keep ROS 2 deployment from working; empty when all is well.

    Reads the environment and changes nothing; imports rclpy only to see whether its libraries load.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        return [f"ROS 2 packages are missing: {', '.join(missing)}; pip install 'robot-rl[ros]' or source your ROS 2."]
    problems = []
    try:
        import rclpy  # noqa: F401
    except ImportError as error:
        problems.append(f"rclpy does not load ({error}); start Python from the environment that it is installed in.")
    problems += _transport_problems()
    domain = os.environ.get("ROS_DOMAIN_ID", "0")
    if not domain.isdigit() or int(domain) > MAX_DOMAIN:
        problems.append(f"ROS_DOMAIN_ID={domain} is not in 0 … {MAX_DOMAIN}.")
    return problems


def _fast_dds() -> bool:
    return "fastrtps" in os.environ.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp")


def _transport_problems() -> list[str]:
    problems = []
    for variable in _PROFILE_VARIABLES:
        path = os.environ.get(variable)
        if path and not Path(path).is_file():
            problems.append(f"{variable} names '{path}', which does not exist.")
    discovery = os.environ.get(_RANGE, "SYSTEM_DEFAULT")
    if discovery == "OFF":
        problems.append(f"{_RANGE}=OFF: processes on this machine will not find each other.")
    elif _fast_dds() and discovery != "SYSTEM_DEFAULT":
        problems.append(
            f"{_RANGE}={discovery}: Fast DDS then uses shared memory, and a hanging policy process can block the "
            "executor for a second; unset it (the project's own profile keeps to this machine anyway)."
        )
    return problems


def exports(domain_id: int | None = None, images: bool = False) -> list[str]:
    """Return the shell commands that prepare a terminal for ``ros2`` tools and for nodes of ours.

    Args:
        domain_id: DDS domain, or None to leave ``ROS_DOMAIN_ID`` as it is.
        images: take the profile for cameras and recorders, instead of what is set.
    """
    if images:
        os.environ.update(dict.fromkeys(_PROFILE_VARIABLES, str(data_file("launch", IMAGES_PROFILE))))
        os.environ[_RANGE] = "SYSTEM_DEFAULT"
    prepare_environment(domain_id)
    names = [*_PROFILE_VARIABLES, _RANGE, "AMENT_PREFIX_PATH"]
    names += ["ROS_DOMAIN_ID"] if domain_id is not None else []
    return [f"export {name}={shlex.quote(os.environ[name])}" for name in names if name in os.environ]


def describe() -> list[tuple[str, str]]:
    """Return what holds in this environment: pairs of what it is and how it is set."""
    profile = os.environ.get(_PROFILE_VARIABLES[0], "")
    ours = {
        "": "set by our processes: this machine only, no shared memory",
        str(data_file("launch", "fastdds.xml")): "ours: this machine only, no shared memory",
        str(data_file("launch", IMAGES_PROFILE)): "ours for images: this machine only",
    }
    discovery = os.environ.get(_RANGE, "set by our processes: SYSTEM_DEFAULT with our profile, else LOCALHOST")
    return [
        ("domain", os.environ.get("ROS_DOMAIN_ID", "0, ROS_DOMAIN_ID is not set")),
        ("discovery range", discovery),
        ("Fast DDS profile", ours.get(profile, f"{profile}, your own: who can command the robot is up to it")),
    ]
