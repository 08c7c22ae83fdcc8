"""Any mobile base: velocities out, odometry and laser scans in."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware.ros.convert import to_time
from hardware.ros.driver import RosDriver, RosDriverConfig
from hardware.ros.endpoint import Endpoint, quality
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.robot import Limits, StampedObservation, StopKind
from robot_rl.core.spec import ArraySpec, Spec

if TYPE_CHECKING:
    from nav_msgs.msg import Odometry
    from sensor_msgs.msg import LaserScan

_RAMP_SECONDS = 0.01
"""Time between the commands of a controlled stop."""


@dataclass(frozen=True)
class RosBaseConfig(RosDriverConfig):
    """Settings of a mobile base. Speeds are in m/s and rad/s."""

    max_speed: float = 0.5
    """Largest speed, forwards."""
    max_reverse: float = 0.2
    """Largest speed, backwards."""
    max_turn_rate: float = 1.0
    """Largest rate of turning, both ways."""
    max_acceleration: float = 0.5
    """Largest change of the speed, in m/s^2."""
    max_turn_acceleration: float = 2.0
    """Largest change of the rate of turning, in rad/s^2."""
    max_jerk: float = 5.0
    """Largest change of the accelerations, in m/s^3 and rad/s^3."""
    command_topic: str = "/cmd_vel"
    """Topic of the velocities."""
    stamped: bool = False
    """Whether the base takes geometry_msgs/TwistStamped instead of Twist."""
    odometry_topic: str = "/odom"
    """Topic of nav_msgs/Odometry."""
    scan_topic: str = ""
    """Topic of sensor_msgs/LaserScan; empty for none."""
    beams: int = 36
    """Number of distances observed; each is the nearest in its share of the scan."""
    scan_range: float = 5.0
    """Largest distance observed, in m; where nothing is hit as well."""
    base_frame: str = "base_link"
    """Frame of velocities and distances."""
    still: float = 0.02
    """Speed in m/s and rad/s below which the base stands."""


class RosBase(RosDriver):
    """Any mobile base on cmd_vel; observes ``odometry``: x, y, yaw, speed and turn rate (5,), and ``scan`` (beams,) m.

    The scan has a stamp of its own, so that the safety chain judges its age as it does a camera's. That the base stops
    when its commands end is the business of its own controller (``cmd_vel_timeout``).
    """

    Config = RosBaseConfig
    requires = (("rclpy", "ros"), ("geometry_msgs", "ros"), ("nav_msgs", "ros"), ("sensor_msgs", "ros"))
    kind = "base"

    def __init__(self, config: RosBaseConfig) -> None:
        """Derive spec and limits; `ConfigError` for limits that are not positive."""
        numbers = ("max_speed", "max_turn_rate", "max_acceleration", "max_turn_acceleration", "max_jerk", "scan_range")
        wrong = [name for name in numbers if not getattr(config, name) > 0]
        if wrong or config.max_reverse < 0 or config.beams < 1:
            raise ConfigError(f"a base needs positive {', '.join(wrong) or 'beams, and no negative max_reverse'}")
        names, unit = ("speed", "turn_rate"), "m/s,rad/s"
        low, high = (-config.max_reverse, -config.max_turn_rate), (config.max_speed, config.max_turn_rate)
        observation = {
            "odometry": ArraySpec((5,), names=("x", "y", "yaw", *names), unit="m,m,rad,m/s,rad/s", frame="odom")
        }
        if config.scan_topic:
            observation["scan"] = ArraySpec(
                (config.beams,),
                unit="m",
                frame=config.base_frame,
                low=(0.0,) * config.beams,
                high=(config.scan_range,) * config.beams,
            )
        action = ArraySpec((2,), names=names, unit=unit, frame=config.base_frame, low=low, high=high)
        limits = Limits(
            np.array(low),
            np.array(high),
            np.array([config.max_acceleration, config.max_turn_acceleration]),
            np.full(2, config.max_jerk),
        )
        super().__init__(Spec(observation, action, config.rate_hz), limits, config)
        self.config: RosBaseConfig = config
        self._scan: tuple[np.ndarray, float] | None = None

    def _join(self, endpoint: Endpoint) -> None:
        from geometry_msgs.msg import Twist, TwistStamped
        from nav_msgs.msg import Odometry
        from sensor_msgs.msg import LaserScan

        config = self.config
        self._scan = None
        self._publish = endpoint.publisher(TwistStamped if config.stamped else Twist, config.command_topic, quality(1))
        endpoint.subscribe(Odometry, config.odometry_topic, self._receive, quality(1, reliable=False))
        if config.scan_topic:
            endpoint.subscribe(LaserScan, config.scan_topic, self._receive_scan, quality(1, reliable=False))

    def _ready(self) -> None:
        message = "geometry_msgs/msg/TwistStamped" if self.config.stamped else "geometry_msgs/msg/Twist"
        self._require_reader(self.config.command_topic, message, "is the base up, and does 'stamped' fit it?")

    def _receive_scan(self, message: LaserScan) -> None:
        self._scan = nearest(np.asarray(message.ranges, float), message, self.config), self._now()

    def _receive(self, message: Odometry) -> None:
        pose, twist = message.pose.pose, message.twist.twist
        q = pose.orientation
        yaw = math.atan2(2 * (q.w * q.z + q.x * q.y), 1 - 2 * (q.y * q.y + q.z * q.z))
        row = (pose.position.x, pose.position.y, yaw, twist.linear.x, twist.angular.z)
        values, stamps = {"odometry": np.array(row, np.float32)}, {}
        if self.config.scan_topic:
            if self._scan is None:
                return
            values["scan"], stamps["scan"] = self._scan
        self._measured(values, np.zeros(2), stamps=stamps)

    def _silent(self) -> str:
        if self.config.scan_topic and self._scan is None:
            return self._silent_topic(self.config.scan_topic)
        return self._silent_topic(self.config.odometry_topic)

    def _send(self, action: np.ndarray) -> None:
        from geometry_msgs.msg import Twist, TwistStamped

        twist = Twist()
        twist.linear.x, twist.angular.z = float(action[0]), float(action[1])
        if not self.config.stamped:
            self._publish(twist)
            return
        stamped = TwistStamped(twist=twist)
        stamped.header.frame_id = self.config.base_frame
        stamped.header.stamp = to_time(time.time())  # the base compares it with its own clock
        self._publish(stamped)

    def _halt(self, kind: StopKind) -> bool:
        """Slow to zero, at once for a hold, and look whether the base stands; no topic switches its drives off."""
        for index, command in enumerate(self._to_standstill(kind, _RAMP_SECONDS)):
            if index:
                time.sleep(_RAMP_SECONDS)
            self._send(command)
        self._sent.clear()
        stands = self._stands(0.0, self.config.stop_timeout, self._motion)
        if kind is StopKind.DRIVES_OFF:
            raise HardwareError("it stands, but its drives cannot be switched off over topics: use its own controls")
        return stands

    def _motion(self, seen: StampedObservation, place: np.ndarray) -> np.ndarray:
        """Return zeros if the base stands, else the number of the measurement, which is never twice the same."""
        stands = (np.abs(seen.values["odometry"][3:]) <= self.config.still).all()
        return np.zeros(1) if stands else np.array([1.0 + seen.seq])


def nearest(ranges: np.ndarray, message: Any, config: RosBaseConfig) -> np.ndarray:
    """Return the nearest distance (beams,) in m of each share of a scan (N,); the range where nothing valid was hit."""
    good = np.isfinite(ranges) & (ranges >= message.range_min) & (ranges <= message.range_max)
    cleaned = np.where(good, np.minimum(ranges, config.scan_range), config.scan_range)
    shares = np.array_split(cleaned, config.beams)
    return np.array([share.min() if share.size else config.scan_range for share in shares], np.float32)
