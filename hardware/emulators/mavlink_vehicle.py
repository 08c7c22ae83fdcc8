"""An emulated multirotor that speaks MAVLink over UDP: modes, arming, setpoints, streams and failsafes of PX4."""

from __future__ import annotations

import socket
import threading
import time
from types import TracebackType
from typing import Any

import numpy as np

from hardware.robots.mavlink import MODES, Modes

PX4 = 12
ACCELERATION = 4.0
"""How fast velocities are reached, in m/s^2 and rad/s^2."""
SETPOINT_TIMEOUT = 0.5
"""Age of a setpoint in seconds at which the vehicle leaves the mode for commands."""


class MavlinkVehicle:
    """A point with a heading, in a thread of its own; ``silent``, `pilot` and `kill` are what can happen to it."""

    def __init__(self, port: int, autopilot: int = PX4, *, armed: bool = True, altitude: float = 2.0) -> None:
        """Place the vehicle.

        Args:
            port: UDP port of this computer to which it sends.
            autopilot: MAV_AUTOPILOT that it says it is.
            armed: whether its motors run.
            altitude: height above the ground in m.
        """
        from pymavlink.dialects.v20 import common

        self.dialect: Any = common
        self.link = common.MAVLink(None, srcSystem=1, srcComponent=1)
        self.link.robust_parsing = True
        self.modes = MODES.get(autopilot, Modes(4, 5, 9))
        self.autopilot, self.armed, self.mode = autopilot, armed, self.modes.hold
        self.place = np.array([0.0, 0.0, -altitude])
        """(3,) north, east, down in m."""
        self.velocity, self.yaw, self.yaw_rate = np.zeros(3), 0.0, 0.0
        self.silent = False
        """Whether nothing is sent."""
        self.refuses: set[int] = set()
        """Commands that are denied."""
        self.setpoints = 0
        """Setpoints received."""
        self._wanted, self._wanted_at = np.zeros(4), -np.inf
        self._intervals: dict[int, float] = {}
        self._target = ("127.0.0.1", port)
        self._socket: socket.socket | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> MavlinkVehicle:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(0.005)
        self._thread = threading.Thread(target=self._run, name="mavlink-emulator", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None and self._socket is not None:
            self._thread.join(2.0)
            self._socket.close()
            self._thread = None

    def pilot(self) -> None:
        """Let the pilot take the vehicle by the remote control: it holds."""
        self.mode = self.modes.hold

    def kill(self) -> None:
        """Stop the motors."""
        self.armed = False

    def _run(self) -> None:
        before = time.monotonic()
        due = {"heartbeat": before}
        while not self._ended.is_set():
            self._receive()
            now = time.monotonic()
            self._move(now - before)
            before = now
            if now >= due["heartbeat"]:
                due["heartbeat"] = now + 0.1
                flags = 1 | (128 if self.armed else 0)
                d = self.dialect
                self._send(self.link.heartbeat_encode(d.MAV_TYPE_QUADROTOR, self.autopilot, flags, self.mode, 4))
            for message, interval in self._intervals.items():
                if now >= due.get(str(message), now):
                    due[str(message)] = now + interval
                    self._stream(message)

    def _stream(self, message: int) -> None:
        if message == self.dialect.MAVLINK_MSG_ID_ATTITUDE:
            self._send(self.link.attitude_encode(0, 0.0, 0.0, self.yaw, 0.0, 0.0, self.yaw_rate))
        elif message == self.dialect.MAVLINK_MSG_ID_LOCAL_POSITION_NED:
            self._send(self.link.local_position_ned_encode(0, *map(float, self.place), *map(float, self.velocity)))

    def _move(self, dt: float) -> None:
        wanted = np.zeros(4)
        if self.mode == self.modes.command:
            if time.monotonic() - self._wanted_at > SETPOINT_TIMEOUT:
                self.mode = self.modes.hold
            else:
                wanted = self._wanted
        elif self.mode == self.modes.land:
            wanted = np.array([0.0, 0.0, 1.0, 0.0])
        if not self.armed:
            self.velocity, self.yaw_rate = np.zeros(3), 0.0
            return
        reach = ACCELERATION * dt
        self.velocity = self.velocity + np.clip(wanted[:3] - self.velocity, -reach, reach)
        self.yaw_rate += float(np.clip(wanted[3] - self.yaw_rate, -reach, reach))
        self.place = self.place + self.velocity * dt
        self.yaw += self.yaw_rate * dt
        if self.place[2] >= 0.0:
            self.place[2], self.velocity = 0.0, np.zeros(3)
            self.armed = self.armed and self.mode != self.modes.land

    def _receive(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(4096)
        except TimeoutError:
            return
        except OSError:  # nobody listens at the other end yet
            time.sleep(0.005)
            return
        for message in self.link.parse_buffer(data) or ():
            if message.get_type() == "COMMAND_LONG":
                self._command(message)
            elif message.get_type() == "SET_POSITION_TARGET_LOCAL_NED":
                self.setpoints += 1
                self._wanted = np.array([message.vx, message.vy, message.vz, message.yaw_rate])
                self._wanted_at = time.monotonic()

    def _command(self, message: Any) -> None:
        d = self.dialect
        result = d.MAV_RESULT_ACCEPTED
        if message.command in self.refuses:
            result = d.MAV_RESULT_DENIED
        elif message.command == d.MAV_CMD_SET_MESSAGE_INTERVAL:
            self._intervals[int(message.param1)] = message.param2 / 1e6
        elif message.command == d.MAV_CMD_COMPONENT_ARM_DISARM:
            self.armed = message.param1 == 1.0
        elif message.command == d.MAV_CMD_DO_SET_MODE:
            px4 = self.autopilot == PX4
            mode = int(message.param2) << 16 | int(message.param3) << 24 if px4 else int(message.param2)
            if mode == self.modes.command and time.monotonic() - self._wanted_at > SETPOINT_TIMEOUT:
                result = d.MAV_RESULT_TEMPORARILY_REJECTED
            else:
                self.mode = mode
        else:
            result = d.MAV_RESULT_UNSUPPORTED
        self._send(self.link.command_ack_encode(message.command, result))

    def _send(self, message: Any) -> None:
        if self._socket is not None and not self.silent:
            self._socket.sendto(message.pack(self.link), self._target)
