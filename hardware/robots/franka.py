"""Franka arms (FER and FR3) by the library panda-py: joint angles out, joints, external torques and hand in.

The library's joint impedance controller runs in a thread of its own at 1 kHz and leads the arm to the newest command as
a spring and a damper would; Python only moves its goal. When this process ends the controller does, and the arm brakes.
The robot's own supervision stays in charge: a reflex or the user stop is a fault here, which names it.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hardware.robots.driver import DriverConfig, PolledDriver, library_call
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.robot import Limits, StopKind
from robot_rl.core.spec import ArraySpec, Spec

JOINTS = tuple(f"joint{k}" for k in range(1, 8))
WIDTH = 0.08
"""Opening of the hand in m."""
_STOPPED = {
    "kGuiding": "is guided by hand: let go of its grip",
    "kReflex": "is in reflex",
    "kUserStopped": "is held by its user stop: release it",
    "kAutomaticErrorRecovery": "recovers from an error",
    "kOther": "is not ready: unlock its brakes and activate the FCI in its Desk",
}
"""Modes in which nobody may command the arm."""
_ANY_WIDTH = 0.1
"""Tolerance of a grasp in m: whatever is between the fingers may be held."""
_HAND_LIMITS = 20 * WIDTH, 1e4 * WIDTH
"""Limits of speed and acceleration of the command of the hand, which paces its motions itself."""
_STEP = 0.02 * WIDTH
"""Change of the wish in m for which the hand moves."""
_SETTLING = 0.02
"""Seconds for which a wish must stand before the hand moves: it cannot be led anew while it does."""


@dataclass(frozen=True)
class FrankaConfig(DriverConfig):
    """Settings of a Franka arm. Angles are in rad."""

    host: str = "172.16.0.2"
    """Address of the controller; its FCI must be active."""
    low: tuple[float, ...] = (-2.7437, -1.7628, -2.8973, -3.0421, -2.8065, 0.5445, -2.8973)
    """Lowest angle of each joint: by default what FER and FR3 have in common."""
    high: tuple[float, ...] = (2.7437, 1.7628, 2.8973, -0.1518, 2.8065, 3.7525, 2.8973)
    """Highest angle of each joint."""
    max_velocity: float = 1.0
    """Largest speed of the command of a joint, in rad/s; the robot's own limits begin at 2."""
    max_acceleration: float = 5.0
    """Largest change of that speed, in rad/s^2; the robot's own limits begin at 7.5."""
    stiffness: tuple[float, ...] = (600.0, 600.0, 600.0, 600.0, 250.0, 150.0, 50.0)
    """Spring of each joint, in N m/rad."""
    damping: tuple[float, ...] = (50.0, 50.0, 50.0, 20.0, 20.0, 20.0, 10.0)
    """Damper of each joint, in N m s/rad. The arm follows a steady motion by damping / stiffness seconds late."""
    hand: bool = False
    """Whether the Franka hand is mounted and has been homed: an eighth number, its opening in m, is observed and
    commanded."""
    hand_speed: float = 0.1
    """Speed of the fingers in m/s."""
    hand_force: float = 40.0
    """Force in N with which closing fingers hold what they meet."""
    recover: bool = False
    """Whether connecting clears a reflex or an error of before. Look for its reason first."""
    real_time: bool = True
    """Whether a system without real-time permission is refused. Without it the 1 kHz exchange breaks off now and then,
    and the arm brakes."""
    poll_rate_hz: float = 200.0
    """Measurements per second that Python takes of the robot's 1000."""
    still: float = 0.002
    """How much a joint may move within 0.1 s in an arm that stands."""


class Franka(PolledDriver):
    """Franka arm; observes ``state``, ``velocity`` and ``torque``.

    ``state`` is joint angles (7,) in rad, with a hand (8,) and the opening in m; ``velocity`` (7,) is in rad/s;
    ``torque`` (7,) what acts on the joints from outside, in N m, as the robot estimates it.
    """

    Config = FrankaConfig
    requires = (("panda_py", "franka"),)

    def __init__(self, config: FrankaConfig) -> None:
        """Derive spec and limits; `ConfigError` for settings that are not one number per joint."""
        for name in ("low", "high", "stiffness", "damping"):
            if len(getattr(config, name)) != len(JOINTS):
                raise ConfigError(f"an arm of seven joints needs seven numbers in '{name}': {getattr(config, name)}")
        low, high = np.array(config.low), np.array(config.high)
        velocity, acceleration = np.full(7, config.max_velocity), np.full(7, config.max_acceleration)
        names, unit = JOINTS, "rad"
        if config.hand:
            low, high = np.append(low, 0.0), np.append(high, WIDTH)
            velocity, acceleration = np.append(velocity, _HAND_LIMITS[0]), np.append(acceleration, _HAND_LIMITS[1])
            names, unit = (*JOINTS, "hand"), ", ".join(["rad"] * 7 + ["m"])
        observation = {
            "state": ArraySpec((len(names),), names=names, unit=unit),
            "velocity": ArraySpec((7,), names=JOINTS, unit="rad/s"),
            "torque": ArraySpec((7,), names=JOINTS, unit="N m"),
        }
        action = ArraySpec((len(names),), names=names, unit=unit, low=tuple(low.tolist()), high=tuple(high.tolist()))
        spec = Spec(observation, action, config.rate_hz)
        super().__init__(spec, Limits(low, high, velocity, acceleration), config, config.poll_rate_hz)
        self.config: FrankaConfig = config
        self._panda: Any = None
        self._controller: Any = None
        self._hand: _Hand | None = None
        self._time = -1.0

    def _open(self) -> None:
        config, library = self.config, importlib.import_module("panda_py")
        franka = importlib.import_module("panda_py.libfranka")
        if config.real_time:
            permitted, why = library.realtime_priority_available()
            if not permitted:
                raise HardwareError(
                    f"no real-time permission for {self.name}: {' '.join(why.split())} (real_time=no tries without)"
                )
        mode = franka.RealtimeConfig.kEnforce if config.real_time else franka.RealtimeConfig.kIgnore
        self._time = -1.0
        self._panda = self._library(lambda: library.Panda(config.host, realtime_config=mode))
        self._library(self._check)
        self._library(self._panda.set_default_behavior)
        if config.hand:
            self._hand = self._library(lambda: _Hand(franka.Gripper(config.host), config))
        self._start()

    def _check(self) -> None:
        """Refuse a robot that is stopped, or narrower than the settings say."""
        state, config = self._panda.get_state(), self.config
        why = _stopped(state)
        if why and not (config.recover and state.robot_mode.name == "kReflex"):
            raise HardwareError(f"{self.name} {why}")
        lowest, highest = self._panda.get_joint_limits_lower(), self._panda.get_joint_limits_upper()
        beyond = (np.array(config.low) < lowest.ravel()) | (np.array(config.high) > highest.ravel())
        if beyond.any():
            raise HardwareError(
                f"'low' and 'high' of {', '.join(np.array(JOINTS)[beyond])} lie beyond the robot's own limits, "
                f"{lowest.ravel().round(4).tolist()} and {highest.ravel().round(4).tolist()}"
            )

    def _ready(self) -> None:
        def begin() -> None:
            controllers = importlib.import_module("panda_py.controllers")
            self._controller = controllers.JointPosition(
                stiffness=np.array(self.config.stiffness), damping=np.array(self.config.damping)
            )
            # It begins with the joints where they are.
            self._library(lambda: self._panda.start_controller(self._controller))

        self._in_thread(begin, self.config.connect_timeout)

    def _read(self) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
        deadline = time.monotonic() + 5 * self._period
        while (state := self._library(self._panda.get_state)).time.to_sec() == self._time:
            if time.monotonic() > deadline:
                raise HardwareError("the robot's clock stands still")
            time.sleep(0.2 * self._period)
        self._time = state.time.to_sec()
        why = _stopped(state)
        if why:
            self._give_up(why)
        elif self._controller is not None:
            try:
                self._panda.raise_error()
            except RuntimeError as error:
                self._give_up(f"its controller broke off: {' '.join(str(error).split())}")
        place = np.array(state.q, float)
        seen = place
        if self._hand is not None:
            if self._hand.failure:
                self._give_up(f"its hand failed: {self._hand.failure}")
            # Fingers that hold something are not late: their command is where it is.
            seen, place = np.append(place, self._hand.width), np.append(place, self._hand.command)
        values = {"state": seen, "velocity": np.array(state.dq), "torque": np.array(state.tau_ext_hat_filtered)}
        return {name: value.astype(np.float32) for name, value in values.items()}, place

    def _write(self, action: np.ndarray) -> None:
        self._library(lambda: self._controller.set_control(action[:7]))
        if self._hand is not None:
            self._hand.follow(float(action[7]))

    def _halt(self, kind: StopKind) -> bool:
        path = self._to_standstill(kind, self._period)

        def brake() -> None:
            if self._controller is None:
                raise HardwareError("it has no controller that could brake it")
            for command in path:
                self._write(command)
                time.sleep(self._period)
            self._sent.clear()

        self._in_thread(brake, self.config.stop_timeout)
        stands = self._stands(self.config.still, self.config.stop_timeout)
        if kind is StopKind.DRIVES_OFF:
            raise HardwareError("it holds; its brakes are closed in its Desk, or by its user stop")
        return stands

    def _close(self) -> None:
        self._finish()
        if self._hand is not None:
            self._hand.close()
            self._hand = None
        if self._panda is not None:
            if self._controller is not None:
                self._panda.stop_controller()
            self._panda = self._controller = None

    def _library(self, call: Callable[[], Any]) -> Any:
        return library_call(self.config.host, call)


def _stopped(state: Any) -> str:
    """Return why the arm takes no commands; nothing if it does."""
    errors = f" ({state.current_errors})" if state.current_errors else ""
    why = _STOPPED.get(state.robot_mode.name, "")
    if state.robot_mode.name == "kReflex":
        return f"{why}{errors}: look why, and connect with recover=yes"
    return why and why + errors


class _Hand:
    """The Franka hand, whose commands take until the fingers stand: a thread leads it to the newest one."""

    def __init__(self, gripper: Any, config: FrankaConfig) -> None:
        self._gripper, self._config = gripper, config
        self.width = float(gripper.read_once().width)
        """Opening in m as measured between motions."""
        self.command = self.width
        """Opening in m that was asked for last."""
        self.failure = ""
        """Why the hand no longer moves."""
        self._ended = threading.Event()
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="franka-hand", daemon=True)
        self._thread.start()

    def follow(self, width: float) -> None:
        """Ask for an opening in m; does not wait."""
        self.command = width
        self._asked.set()

    def close(self) -> None:
        """End the thread; what the fingers hold they keep."""
        self._ended.set()
        self._asked.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        done = self.width
        while not self._ended.is_set():
            self._asked.wait(0.1)
            self._asked.clear()
            wish = self._settled()
            try:
                if abs(wish - done) >= _STEP:
                    self._move(wish, closing=wish < done)
                    done = wish
                self.width = float(self._gripper.read_once().width)
            except RuntimeError as error:
                self.failure = " ".join(str(error).split())
                return

    def _settled(self) -> float:
        """Return the newest wish once it stands."""
        wish = self.command
        while not self._ended.wait(_SETTLING) and self.command != wish:
            wish = self.command
        return wish

    def _move(self, width: float, closing: bool) -> None:
        config = self._config
        if closing:
            self._gripper.grasp(width, config.hand_speed, config.hand_force, _ANY_WIDTH, _ANY_WIDTH)
        else:
            self._gripper.move(width, config.hand_speed)
