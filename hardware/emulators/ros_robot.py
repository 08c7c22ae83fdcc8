"""An emulated arm or base on ROS 2 topics, in a process of its own.

    python -m hardware.emulators.ros_robot arm --joints shoulder elbow --controller trajectory
    python -m hardware.emulators.ros_robot base --stamped

The arm moves to its commands at a bounded speed, the base follows its velocities until they are older than half a
second. An image topic with a moving pattern, /camera/image_raw, comes with both.
"""

from __future__ import annotations

import argparse
import math
import signal
import threading
import time
from typing import Any

import numpy as np

from hardware.ros.convert import to_image, to_time
from hardware.ros.endpoint import Endpoint, quality
from robot_rl.core.clock import Rate

RATE_HZ = 100.0
JOINT_SPEED = 2.0
"""Speed of the arm's joints in rad/s."""
ACCELERATION = 2.0
"""How fast the base changes its speed, in m/s^2 and rad/s^2."""
SCAN_EVERY = 4
"""Steps between two sweeps of the laser: 25 Hz."""
TIMEOUT = 0.5
"""Age in seconds at which the base drops a command."""


class EmulatedArm:
    """Joints that go where they are told; publishes them in two messages, as an arm with a separate gripper does."""

    def __init__(self, endpoint: Endpoint, joints: list[str], controller: str) -> None:
        from sensor_msgs.msg import JointState
        from std_msgs.msg import Float64MultiArray
        from trajectory_msgs.msg import JointTrajectory

        self.joints, self.place, self.goal = joints, np.zeros(len(joints)), np.zeros(len(joints))
        self._publish = endpoint.publisher(JointState, "/joint_states", quality(10))
        if controller == "forward":
            topic = "/forward_position_controller/commands"
            endpoint.subscribe(Float64MultiArray, topic, self._forward, quality(10))
        else:
            topic = "/joint_trajectory_controller/joint_trajectory"
            endpoint.subscribe(JointTrajectory, topic, self._trajectory, quality(10))

    def _forward(self, message: Any) -> None:
        if len(message.data) == len(self.joints):  # the real controller drops others with an error as well
            self.goal = np.array(message.data)

    def _trajectory(self, message: Any) -> None:
        if sorted(message.joint_names) == sorted(self.joints) and message.points:
            goal = dict(zip(message.joint_names, message.points[-1].positions, strict=True))
            self.goal = np.array([goal[name] for name in self.joints])

    def step(self, dt: float) -> None:
        """Move for ``dt`` s and publish."""
        from sensor_msgs.msg import JointState

        before = self.place
        self.place = before + np.clip(self.goal - before, -JOINT_SPEED * dt, JOINT_SPEED * dt)
        velocity = (self.place - before) / dt
        for part in (slice(0, 1), slice(1, None)):
            message = JointState(
                name=self.joints[part], position=self.place[part].tolist(), velocity=velocity[part].tolist()
            )
            message.header.stamp = to_time(time.time())
            self._publish(message)


class EmulatedBase:
    """A unicycle with odometry and a laser in the middle of a round room of 2 m radius."""

    def __init__(self, endpoint: Endpoint, stamped: bool) -> None:
        from geometry_msgs.msg import Twist, TwistStamped
        from nav_msgs.msg import Odometry
        from sensor_msgs.msg import LaserScan

        self.pose, self.speed, self.wanted = np.zeros(3), np.zeros(2), np.zeros(2)
        self._commanded, self._count = -math.inf, 0
        self._odometry = endpoint.publisher(Odometry, "/odom", quality(10))
        self._scan = endpoint.publisher(LaserScan, "/scan", quality(5, reliable=False))
        endpoint.subscribe(TwistStamped if stamped else Twist, "/cmd_vel", self._receive, quality(10))

    def _receive(self, message: Any) -> None:
        twist = getattr(message, "twist", message)
        self.wanted = np.array([twist.linear.x, twist.angular.z])
        self._commanded = time.monotonic()

    def step(self, dt: float) -> None:
        """Drive for ``dt`` s and publish."""
        from nav_msgs.msg import Odometry
        from sensor_msgs.msg import LaserScan

        wanted = self.wanted if time.monotonic() - self._commanded < TIMEOUT else np.zeros(2)
        self.speed = self.speed + np.clip(wanted - self.speed, -ACCELERATION * dt, ACCELERATION * dt)
        x, y, yaw = self.pose
        self.pose = np.array(
            [
                x + self.speed[0] * math.cos(yaw) * dt,
                y + self.speed[0] * math.sin(yaw) * dt,
                yaw + self.speed[1] * dt,
            ]
        )
        odometry = Odometry()
        odometry.header.stamp = to_time(time.time())
        odometry.pose.pose.position.x, odometry.pose.pose.position.y = self.pose[0], self.pose[1]
        odometry.pose.pose.orientation.z = math.sin(self.pose[2] / 2)
        odometry.pose.pose.orientation.w = math.cos(self.pose[2] / 2)
        odometry.twist.twist.linear.x, odometry.twist.twist.angular.z = self.speed[0], self.speed[1]
        self._odometry(odometry)
        self._count += 1
        if self._count % SCAN_EVERY == 0:
            ranges = np.full(360, 2.0)
            ranges[90] = math.inf
            self._scan(LaserScan(range_min=0.1, range_max=10.0, ranges=ranges.tolist()))


class EmulatedCamera:
    """A pattern that moves with every image."""

    def __init__(self, endpoint: Endpoint) -> None:
        from sensor_msgs.msg import Image

        self._publish = endpoint.publisher(Image, "/camera/image_raw", quality(1, reliable=False))
        self._count = 0

    def step(self, dt: float) -> None:
        """Publish every third time."""
        self._count += 1
        if self._count % 3 == 0:
            image = np.zeros((48, 64, 3), np.uint8)
            image[..., 0] = 200
            image[:, self._count // 3 % 64] = 255
            self._publish(to_image(image, time.time(), self._count))


def main() -> None:
    """Emulate until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="An emulated robot on ROS 2 topics.")
    parser.add_argument("robot", choices=["arm", "base"])
    parser.add_argument("--joints", nargs="+", default=["joint_1", "joint_2", "joint_3"])
    parser.add_argument("--controller", choices=["forward", "trajectory"], default="forward")
    parser.add_argument("--stamped", action="store_true")
    arguments = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    endpoint = Endpoint(f"emulated_{arguments.robot}", namespace="")
    robot: Any
    if arguments.robot == "arm":
        robot = EmulatedArm(endpoint, arguments.joints, arguments.controller)
    else:
        robot = EmulatedBase(endpoint, arguments.stamped)
    parts = [robot, EmulatedCamera(endpoint)]
    endpoint.start()
    rate = Rate(RATE_HZ)
    while not ended.is_set():
        rate.wait()
        for part in parts:
            part.step(rate.period)
    endpoint.close()


if __name__ == "__main__":
    main()
