"""A multirotor over MAVLink: velocities out in offboard (PX4) or guided (ArduPilot) mode, position and attitude in.

Frames are x forwards or north, y to the left or west, z up; MAVLink's own, which point down, stay inside this file.

**Who flies.** The driver takes over a vehicle that is armed, and flies where it is told; it arms one only if asked to,
and never by force. If the vehicle leaves the mode - its pilot switched, or a failsafe struck - the driver has failed
and lets go: it never fights for control. Setpoints are repeated while commands are fresh; without fresh ones the
vehicle is told to stand still, and if this process dies their stream ends, which is the autopilot's own failsafe.
"""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from hardware.control.realtime import MessengerThread
from hardware.robots.driver import Driver, DriverConfig
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.robot import Limits, RobotState, StampedObservation, StopKind
from robot_rl.core.spec import ArraySpec, Spec

logger = logging.getLogger(__name__)

STATE = ("x", "y", "z", "vx", "vy", "vz", "roll", "pitch", "yaw")
"""Elements of the observation ``state``."""
_ARMED = 128
_RAMP_SECONDS = 0.02


@dataclass(frozen=True)
class Modes:
    """Flight modes of an autopilot, as its heartbeat reports them and as they are asked for."""

    command: int
    """Takes velocities from this driver."""
    hold: int
    """Stays where it is by itself."""
    land: int
    """Lands by itself."""


def px4_mode(main: int, sub: int = 0) -> int:
    """Return PX4's custom mode of a main and a sub mode."""
    return main << 16 | sub << 24


MODES = {
    12: Modes(px4_mode(6), px4_mode(4, 3), px4_mode(4, 6)),  # PX4: offboard, hold, land
    3: Modes(4, 5, 9),  # ArduCopter: guided, loiter, land
}
"""Modes by MAV_AUTOPILOT."""


@dataclass(frozen=True)
class MultirotorConfig(DriverConfig):
    """Settings of a multirotor. Speeds are in m/s and rad/s."""

    address: str = "127.0.0.1:14540"
    """Address and UDP port of this computer to which the vehicle sends; it is answered where it sends from."""
    system: int = 1
    """MAVLink system id of the vehicle."""
    allow_arming: bool = False
    """Whether the driver may start the motors of a vehicle that is not armed. Otherwise it is refused."""
    max_speed: float = 1.0
    """Largest speed along x and y."""
    max_climb: float = 0.5
    """Largest speed along z, both ways."""
    max_turn_rate: float = 0.8
    """Largest rate of turning, both ways."""
    max_acceleration: float = 1.5
    """Largest change of the speeds, in m/s^2 and rad/s^2."""
    max_jerk: float = 15.0
    """Largest change of the accelerations, in m/s^3 and rad/s^3."""
    stream_rate_hz: float = 50.0
    """Measurements asked for, and setpoints sent, per second."""
    command_timeout: float = 0.25
    """Age in seconds of a command after which the vehicle is told to stand still."""
    heartbeat_timeout: float = 3.0
    """Seconds without the vehicle's heartbeat after which the driver gives up."""
    still: float = 0.1
    """Speed in m/s and rad/s below which the vehicle stands."""
    stop_timeout: float = 3.0
    """Seconds in which the vehicle must confirm a stop."""


class Multirotor(Driver):
    """Multirotor over MAVLink (PX4, ArduPilot); observes ``state``: position, velocity and attitude (9,).

    Commands are velocities. A hold and a controlled stop end in hovering; drives-off **lands** instead, and is
    confirmed once the motors are off.
    """

    Config = MultirotorConfig
    requires = (("pymavlink", "mavlink"),)
    accepts_replacement = True

    def __init__(self, config: MultirotorConfig) -> None:
        """Derive spec and limits; `ConfigError` where the address cannot be read."""
        host, _, port = config.address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"address '{config.address}' is not of the form host:port")
        self._local = (host, int(port))
        high = np.array([config.max_speed, config.max_speed, config.max_climb, config.max_turn_rate])
        unit = "m/s,m/s,m/s,rad/s"
        names = ("forward", "left", "up", "turn_rate")
        state = ArraySpec((9,), names=STATE, unit="m,m,m,m/s,m/s,m/s,rad,rad,rad", frame="local")
        action = ArraySpec((4,), names=names, unit=unit, frame="heading", low=tuple(-high), high=tuple(high))
        limits = Limits(-high, high, np.full(4, config.max_acceleration), np.full(4, config.max_jerk))
        super().__init__(Spec({"state": state}, action, config.rate_hz), limits, config)
        self.config: MultirotorConfig = config
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._changed = threading.Condition()

    # ---- the vehicle ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        from pymavlink.dialects.v20 import common

        self._dialect: Any = common
        self._link = common.MAVLink(None, srcSystem=245, srcComponent=191)  # 191: onboard computer
        self._link.robust_parsing = True
        self._peer: tuple[str, int] | None = None
        self._heartbeat: Any = None
        self._heard = -np.inf
        self._attitude: Any = None
        self._acknowledged: dict[int, int] = {}
        self._setpoint, self._set_at = np.zeros(4), -np.inf
        self._flying = False
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind(self._local)
        except OSError as error:
            raise HardwareError(f"UDP port '{self.config.address}' cannot be opened: {error.strerror}") from error
        self._socket.settimeout(1.0 / self.config.stream_rate_hz)
        self._ended.clear()
        self._thread = MessengerThread(target=self._run, name="driver-mavlink", daemon=True)
        self._thread.start()

    def _ready(self) -> None:
        modes = self._modes()
        if not self._heartbeat.base_mode & _ARMED:
            if not self.config.allow_arming:
                raise HardwareError(
                    f"{self.name} is not armed: start its motors by its own remote control, or set 'allow_arming'"
                )
            self._ask(self._dialect.MAV_CMD_COMPONENT_ARM_DISARM, 1.0, what="arming")
        time.sleep(0.2)  # a setpoint stream must be there before the mode is accepted
        self._set_mode(modes.command, "the mode for commands")
        self._flying = True

    def _send(self, action: np.ndarray) -> None:
        self._set_at = self._now()
        self._setpoint = action
        self._transmit_setpoint()

    def _halt(self, kind: StopKind) -> bool:
        self._newest()  # a pilot or a failsafe that has the vehicle keeps it
        if kind is StopKind.DRIVES_OFF:
            self._flying = False
            self._set_mode(self._modes().land, "landing")
            deadline = self._now() + self.config.stop_timeout
            while self._heartbeat.base_mode & _ARMED and self._now() < deadline:
                time.sleep(0.02)
            return not self._heartbeat.base_mode & _ARMED
        for command in self._to_standstill(kind, _RAMP_SECONDS):
            self._send(command)
            time.sleep(_RAMP_SECONDS)
        self._sent.clear()
        return self._stands(0.0, self.config.stop_timeout, self._motion)

    def _close(self) -> None:
        if self._flying and self._state is RobotState.DISCONNECTED and self._heartbeat is not None:
            self._flying = False
            try:
                self._set_mode(self._modes().hold, "the hold mode")
            except HardwareError as error:
                logger.error("%s: %s; its failsafe takes it when the setpoints end", self.name, error)
        self._ended.set()
        if self._thread is not None:
            self._thread.join(2.0)
            self._thread = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _silent(self) -> str:
        if getattr(self, "_heartbeat", None) is None:
            return f"no heartbeat of system {self.config.system} at {self.config.address}"
        if self._attitude is None:
            return "no attitude comes"
        return "no local position comes: has it a position estimate?"

    def _motion(self, seen: StampedObservation, place: np.ndarray) -> np.ndarray:
        """Return zeros if the vehicle stands, else the number of the measurement, which is never twice the same."""
        stands = (np.abs(seen.values["state"][3:6]) <= self.config.still).all()
        return np.zeros(1) if stands else np.array([1.0 + seen.seq])

    # ---- messages ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Receive, and send setpoints and our heartbeat, until the end."""
        next_setpoint = next_heartbeat = self._now()
        while not self._ended.is_set():
            self._receive()
            now = self._now()
            if self._peer is None:
                continue
            if now >= next_heartbeat:
                next_heartbeat = now + 0.5
                d = self._dialect
                self._transmit(
                    self._link.heartbeat_encode(d.MAV_TYPE_ONBOARD_CONTROLLER, d.MAV_AUTOPILOT_INVALID, 0, 0, 0)
                )
                if self._latest is None or now - self._last_stamp() > 0.5:
                    self._ask_for_streams()
            if now >= next_setpoint and self._state is not RobotState.FAULT:  # whoever has failed lets go
                next_setpoint = max(next_setpoint + 1.0 / self.config.stream_rate_hz, now)
                self._transmit_setpoint()
            if self._heartbeat is not None and now - self._heard > self.config.heartbeat_timeout:
                self._give_up(f"no heartbeat of the vehicle for {now - self._heard:.1f} s")

    def _receive(self) -> None:
        assert self._socket is not None
        try:
            data, sender = self._socket.recvfrom(4096)
        except TimeoutError:
            return
        except OSError as error:
            self._failed(error)
            return
        if self._peer is not None and sender != self._peer:
            return  # whoever else sends here is not the vehicle
        for message in self._link.parse_buffer(data) or ():
            if message.get_srcSystem() == self.config.system:
                self._take(message, sender)

    def _take(self, message: Any, sender: tuple[str, int]) -> None:
        kind = message.get_type()
        if kind == "HEARTBEAT" and message.autopilot != self._dialect.MAV_AUTOPILOT_INVALID:
            self._peer = self._peer or sender
            self._heard = self._now()
            with self._changed:
                self._heartbeat = message
                self._changed.notify_all()
            if self._flying and message.custom_mode != self._modes().command:
                self._flying = False
                self._give_up("it left the mode for commands: its pilot or a failsafe has it")
            elif self._flying and not message.base_mode & _ARMED:
                self._flying = False
                self._give_up("its motors were stopped")
        elif kind == "COMMAND_ACK":
            with self._changed:
                self._acknowledged[message.command] = message.result
                self._changed.notify_all()
        elif kind == "ATTITUDE":
            self._attitude = message
        elif kind == "LOCAL_POSITION_NED" and self._attitude is not None and self._heartbeat is not None:
            m, a = message, self._attitude
            row = (m.x, -m.y, -m.z, m.vx, -m.vy, -m.vz, a.roll, -a.pitch, -a.yaw)
            self._measured({"state": np.array(row, np.float32)}, np.zeros(4))

    def _transmit(self, message: Any) -> None:
        if self._socket is None or self._peer is None:
            raise HardwareError("the link to the vehicle is closed")
        try:
            self._socket.sendto(message.pack(self._link), self._peer)
        except OSError as error:
            self._failed(error)

    def _transmit_setpoint(self) -> None:
        """Send the command, or a standstill where it is old; turned from the heading into MAVLink's frame."""
        command = self._setpoint if self._now() - self._set_at <= self.config.command_timeout else np.zeros(4)
        if self._latest is None:
            return
        yaw = float(self._latest[0].values["state"][8])
        north = command[0] * math.cos(yaw) - command[1] * math.sin(yaw)
        west = command[0] * math.sin(yaw) + command[1] * math.cos(yaw)
        velocity_and_yaw_rate = 0b0000_0101_1100_0111  # ignores position, acceleration and yaw
        self._transmit(
            self._link.set_position_target_local_ned_encode(
                *(self._milliseconds(), self.config.system, 1, self._dialect.MAV_FRAME_LOCAL_NED),
                *(velocity_and_yaw_rate, 0, 0, 0, north, -west, -command[2], 0, 0, 0, 0, -command[3]),
            )
        )

    def _ask_for_streams(self) -> None:
        interval = 1e6 / self.config.stream_rate_hz
        for message in (self._dialect.MAVLINK_MSG_ID_LOCAL_POSITION_NED, self._dialect.MAVLINK_MSG_ID_ATTITUDE):
            self._command(self._dialect.MAV_CMD_SET_MESSAGE_INTERVAL, message, interval)

    def _command(self, command: int, *parameters: float) -> None:
        filled = [*parameters, *[0.0] * (7 - len(parameters))]
        self._transmit(self._link.command_long_encode(self.config.system, 1, command, 0, *filled))

    def _ask(self, command: int, *parameters: float, what: str) -> None:
        """Send a command until it is acknowledged; raises `HardwareError` where it is refused or nobody answers."""
        with self._changed:
            self._acknowledged.pop(command, None)
        for _ in range(3):
            self._command(command, *parameters)
            with self._changed:
                self._changed.wait_for(lambda: command in self._acknowledged, 0.5)
                result = self._acknowledged.get(command)
            if result == self._dialect.MAV_RESULT_ACCEPTED:
                return
            if result is not None and result != self._dialect.MAV_RESULT_IN_PROGRESS:
                name = self._dialect.enums["MAV_RESULT"][result].name.removeprefix("MAV_RESULT_").lower()
                raise HardwareError(f"{self.name} refused {what}: {name}")
        raise HardwareError(f"{self.name} did not acknowledge {what}")

    def _set_mode(self, mode: int, what: str) -> None:
        """Switch the mode, and wait until the heartbeat says so."""
        if self._heartbeat.autopilot == self._dialect.MAV_AUTOPILOT_PX4:
            parameters = (1.0, float(mode >> 16 & 0xFF), float(mode >> 24 & 0xFF))
        else:
            parameters = (1.0, float(mode), 0.0)
        self._ask(self._dialect.MAV_CMD_DO_SET_MODE, *parameters, what=what)
        with self._changed:
            if not self._changed.wait_for(lambda: self._heartbeat.custom_mode == mode, 2.0):
                raise HardwareError(f"{self.name} acknowledged {what} and is in another mode")

    def _modes(self) -> Modes:
        modes = MODES.get(self._heartbeat.autopilot)
        if modes is None:
            raise HardwareError(f"autopilot {self._heartbeat.autopilot} is neither PX4 (12) nor ArduPilot (3)")
        return modes

    def _milliseconds(self) -> int:
        return int(1000 * (self._now() - self._connected_at)) & 0xFFFFFFFF
