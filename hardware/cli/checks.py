"""What `robot-rl doctor` checks for deployment: whether ROS 2 is there and can carry a message."""

from __future__ import annotations

from collections.abc import Iterator

from hardware.ros.context import available, check, open_context

REMEDY = "pip install -c constraints.txt -e '.[ros]' (x86_64), or source the ROS 2 installation of the robot"


def ros() -> Iterator[tuple[str, str, str, str]]:
    """Yield ``(verdict, subject, detail, remedy)``: ROS 2 is optional, so that its absence is only a warning."""
    if not available():
        yield ("warn", "ros 2", "absent; deployment falls back to one process", REMEDY)
        return
    for problem in check():
        yield ("warn", "ros 2", problem, "see docs/deployment.md")
    context = open_context()
    try:
        import rclpy
        from rclpy.utilities import get_rmw_implementation_identifier

        rclpy.create_node("robot_rl_doctor", context=context).destroy_node()
        yield ("ok", "ros 2", f"rclpy starts a node over {get_rmw_implementation_identifier()}", "")
    finally:
        context.try_shutdown()
