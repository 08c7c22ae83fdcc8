"""Any arm under ros2_control: joint states in, positions out to a forward or a trajectory controller."""

from __future__ import annotations

import array
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hardware.ros.driver import RosDriver, RosDriverConfig
from hardware.ros.endpoint import Endpoint, quality
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.robot import Limits, StopKind
from robot_rl.core.spec import ArraySpec, Spec

if TYPE_CHECKING:
    from sensor_msgs.msg import JointState

_TOPICS = {
    "forward": "/forward_position_controller/commands",
    "trajectory": "/joint_trajectory_controller/joint_trajectory",
}
_RAMP_SECONDS = 0.01
"""Time between the commands of a controlled stop."""


@dataclass(frozen=True)
class RosArmConfig(RosDriverConfig):
    """Settings of an arm under ros2_control. Positions are in rad, in m for joints that slide."""

    joints: tuple[str, ...] = ()
    """Names of the joints, in the order of the action; of the controller, too."""
    low: tuple[float, ...] = ()
    """Lowest position of each joint."""
    high: tuple[float, ...] = ()
    """Highest position of each joint."""
    max_velocity: tuple[float, ...] = ()
    """Largest speed of each joint, per second."""
    max_acceleration: tuple[float, ...] = ()
    """Largest change of that speed of each joint, per second."""
    unit: str = "rad"
    """Unit of all joints, or one for each, separated by commas."""
    controller: Literal["forward", "trajectory"] = "forward"
    """forward sends std_msgs/Float64MultiArray to a forward_command_controller; trajectory sends a
    trajectory_msgs/JointTrajectory of one point to a joint_trajectory_controller."""
    command_topic: str = ""
    """Topic of the commands; by default that of a controller of ros2_control's usual name."""
    state_topic: str = "/joint_states"
    """Topic of sensor_msgs/JointState."""
    velocities: bool = False
    """Whether joint velocities are observed, too (``velocity``)."""
    trajectory_seconds: float = 0.05
    """Time in which a trajectory controller is to reach each command; not below its period."""
    still: float = 0.005
    """How much a position may change within 0.1 s in a robot that stands."""


class RosArm(RosDriver):
    """Any arm under ros2_control; observes ``state``: joint positions (A,), and ``velocity`` (A,) if asked for.

    The stamp of a measurement is when its oldest joint arrived: several nodes may publish a part of the joints each.
    """

    Config = RosArmConfig
    requires = (("rclpy", "ros"), ("sensor_msgs", "ros"), ("trajectory_msgs", "ros"), ("std_msgs", "ros"))
    kind = "arm"

    def __init__(self, config: RosArmConfig) -> None:
        """Check the settings; `ConfigError` names what is missing."""
        size = len(config.joints)
        if not size:
            raise ConfigError("an arm needs the names of its 'joints', in the order of its controller")
        rows = {}
        for name in ("low", "high", "max_velocity", "max_acceleration"):
            rows[name] = np.array(getattr(config, name), float)
            if rows[name].shape != (size,):
                raise ConfigError(f"an arm of {size} joints needs {size} numbers in '{name}', not {rows[name].size}")
        if not (rows["low"] < rows["high"]).all():
            raise ConfigError(f"'low' {config.low} is not below 'high' {config.high}")
        state = ArraySpec((size,), names=config.joints, unit=config.unit)
        observation = {"state": state}
        if config.velocities:
            unit = ",".join(f"{one.strip()}/s" for one in config.unit.split(","))
            observation["velocity"] = ArraySpec((size,), names=config.joints, unit=unit)
        action = ArraySpec((size,), names=config.joints, unit=config.unit, low=config.low, high=config.high)
        super().__init__(Spec(observation, action, config.rate_hz), Limits(*rows.values()), config)
        self.config: RosArmConfig = config
        self._command_topic = config.command_topic or _TOPICS[config.controller]
        self._joints: dict[str, tuple[float, float, float]] = {}
        self._others: set[str] = set()

    def _join(self, endpoint: Endpoint) -> None:
        from sensor_msgs.msg import JointState
        from std_msgs.msg import Float64MultiArray
        from trajectory_msgs.msg import JointTrajectory

        self._joints.clear()
        self._others.clear()
        message: type[Any] = Float64MultiArray if self.config.controller == "forward" else JointTrajectory
        self._publish = endpoint.publisher(message, self._command_topic, quality(1))
        endpoint.subscribe(JointState, self.config.state_topic, self._receive, quality(10, reliable=False))

    def _ready(self) -> None:
        message = "std_msgs/msg/Float64MultiArray"
        if self.config.controller == "trajectory":
            message = "trajectory_msgs/msg/JointTrajectory"
        self._require_reader(self._command_topic, message, "is the controller active? (ros2 control list_controllers)")

    def _receive(self, message: JointState) -> None:
        now = self._now()
        velocities = message.velocity or [0.0] * len(message.name)
        for name, position, velocity in zip(message.name, message.position, velocities, strict=False):
            if name in self.config.joints:
                self._joints[name] = (position, velocity, now)
            else:
                self._others.add(name)
        if len(self._joints) < len(self.config.joints):
            return
        rows = np.array([self._joints[name] for name in self.config.joints])
        values = {"state": rows[:, 0].astype(np.float32)}
        if self.config.velocities:
            values["velocity"] = rows[:, 1].astype(np.float32)
        self._measured(values, rows[:, 0], float(rows[:, 2].min()))

    def _silent(self) -> str:
        missing = [name for name in self.config.joints if name not in self._joints]
        if not self._joints and not self._others:
            return self._silent_topic(self.config.state_topic)
        if missing:
            there = ", ".join(sorted([*self._joints, *self._others]))
            return f"'{self.config.state_topic}' lacks {', '.join(missing)}; there are: {there}"
        return f"'{self.config.state_topic}' fell silent"

    def _send(self, action: np.ndarray) -> None:
        data = array.array("d", np.asarray(action, np.float64).tobytes())
        if self.config.controller == "forward":
            from std_msgs.msg import Float64MultiArray

            self._publish(Float64MultiArray(data=data))
            return
        from builtin_interfaces.msg import Duration
        from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

        seconds, nanoseconds = divmod(round(self.config.trajectory_seconds * 1e9), 1_000_000_000)
        point = JointTrajectoryPoint(positions=data, time_from_start=Duration(sec=seconds, nanosec=nanoseconds))
        self._publish(JointTrajectory(joint_names=list(self.config.joints), points=[point]))

    def _halt(self, kind: StopKind) -> bool:
        """Stop by commands, and look whether the joints stand; no topic of ros2_control switches drives off."""
        for index, command in enumerate(self._to_standstill(kind, _RAMP_SECONDS)):
            if index:
                time.sleep(_RAMP_SECONDS)
            self._send(command)
        self._sent.clear()
        stands = self._stands(self.config.still, self.config.stop_timeout)
        if kind is StopKind.DRIVES_OFF:
            raise HardwareError("it holds, but its drives cannot be switched off over topics: use its own controls")
        return stands
