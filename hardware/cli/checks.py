"""What `robot-rl doctor` checks for deployment: ROS 2, and the packages that robots, devices and cameras need."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec

from hardware.ros.context import available, check, describe, open_context
from hardware.ros.shared_memory import stale_files

REMEDY = "pip install -c constraints.txt -e '.[ros]' (x86_64), or source the ROS 2 installation of the robot"


def ros() -> Iterator[tuple[str, str, str, str]]:
    """Yield ``(verdict, subject, detail, remedy)``: ROS 2 is optional, so that its absence is only a warning."""
    if not available():
        yield ("warn", "ros 2", "absent; deployment falls back to one process", REMEDY)
        return
    for subject, detail in describe():
        yield ("ok", "ros 2", f"{subject}: {detail}", "")
    for problem in check():
        yield ("warn", "ros 2", problem, "see docs/ros.md")
    stale = stale_files()
    if stale:
        size = sum(path.stat().st_size for path in stale if path.exists()) / 1e6
        detail = f"{len(stale)} shared-memory files ({size:.0f} MB) were left behind by processes that were killed"
        yield ("warn", "ros 2", detail, "robot-rl ros clean")
    context = open_context()
    try:
        import rclpy
        from rclpy.utilities import get_rmw_implementation_identifier

        rclpy.create_node("robot_rl_doctor", context=context).destroy_node()
        yield ("ok", "ros 2", f"rclpy starts a node over {get_rmw_implementation_identifier()}", "")
    finally:
        context.try_shutdown()


def drivers() -> Iterator[tuple[str, str, str, str]]:
    """Yield for robots, operator devices and cameras which are ready, and what each of the others lacks."""
    for group in ("robots", "teleop", "cameras"):
        ready, lacking = [], []
        for entry in sorted(entry_points(group=f"robot_rl.{group}"), key=lambda entry: entry.name):
            try:
                needs = getattr(entry.load(), "requires", ())
            except Exception as error:  # of a plug-in, whose trouble must not hide the others
                lacking.append((entry.name, f"does not load: {error}", "reinstall the package that it comes from"))
                continue
            missing = [(package, extra) for package, extra in needs if find_spec(package) is None]
            if missing:
                extras = ",".join(sorted({extra for _, extra in missing}))
                packages = ", ".join(package for package, _ in missing)
                lacking.append((entry.name, f"needs {packages}", f"pip install 'robot-rl[{extras}]'"))
            else:
                ready.append(entry.name)
        yield ("ok", group, ", ".join(ready) or "none", "")
        for name, what, remedy in lacking:
            yield ("warn", f"{group} {name}", what, remedy)
