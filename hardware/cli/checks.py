"""What `robot-rl doctor` checks for deployment: whether ROS 2 is there and can carry a message."""

from __future__ import annotations

from collections.abc import Iterator

REMEDY = "pip install -c constraints.txt -e '.[ros]' (x86_64), or source the ROS 2 installation of the robot"


def ros() -> Iterator[tuple[str, str, str, str]]:
    """Yield ``(verdict, subject, detail, remedy)``: ROS 2 is optional, so that its absence is only a warning."""
    try:
        import rclpy
    except ImportError as error:
        detail = f"absent ({error}); deployment falls back to one process"
        yield ("warn", "ros 2", detail, REMEDY)
        return
    context = rclpy.Context()
    try:
        rclpy.init(context=context)
        node = rclpy.create_node("robot_rl_doctor", context=context)
        implementation = rclpy.utilities.get_rmw_implementation_identifier()
        node.destroy_node()
        yield ("ok", "ros 2", f"rclpy starts a node over {implementation}", "")
    except Exception as error:
        yield ("fail", "ros 2", f"rclpy is installed and does not start: {error}", REMEDY)
    finally:
        if context.ok():
            rclpy.shutdown(context=context)
