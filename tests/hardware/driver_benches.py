"""Robots on the bench: every driver with the emulator of its robot, and hands on the cable. Imported by the tests."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from hardware.emulators.servo_bus import ServoBusEmulator
from hardware.robots.fake import FakeRobot, FaultyRobot
from hardware.robots.servo_arm import SIX_JOINTS, SO101, Koch, ServoArmConfig
from hardware.servo.calibration import Calibration, Joint
from hardware.servo.family import DYNAMIXEL, FEETECH

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = itertools.count()
PATIENCE = 60.0
"""Seconds to wait for processes, which take long to start where others compute."""


class FakeBench:
    """A robot without a cable: it is silenced by the wrapper of faults."""

    counts = False

    def __init__(self, folder):
        self.robot = FaultyRobot(FakeRobot(camera=True))

    def hiccup(self, times):
        pass

    def silence(self):
        self.robot.faults.disconnected = True

    def close(self):
        pass


def six_joints(family, model):
    """A calibration in which one joint is mounted the other way round and one nearly a turn off."""
    joints = {}
    for name, number in SIX_JOINTS.items():
        offset = 0 if number != 3 else -700
        joints[name] = Joint(number, model, offset, -1 if number == 2 else 1, -1.5, 1.2)
    return Calibration(family, joints)


class ServoBench:
    """A servo arm on a pseudo terminal."""

    counts = True
    """Whether the driver asks for measurements, and counts those that do not come."""

    def __init__(self, folder, family, driver):
        self.bus = ServoBusEmulator(family).open()
        calibration = six_joints(family, next(iter(family.models)))
        for joint in calibration.joints.values():
            self.bus.servos[joint.id].put("offset", joint.offset)
            self.bus.turn(joint.id, 2048 - family.offset_sign * joint.offset)
        self.path = folder / "arm.yaml"
        calibration.save(self.path)
        self.config = ServoArmConfig(port=self.bus.port, calibration=self.path)
        self.robot = driver(self.config)

    def hiccup(self, times):
        self.bus.lose(times)

    def silence(self):
        self.bus.silent = set(self.bus.servos)

    def close(self):
        self.robot.disconnect()
        self.bus.close()


class RosBench:
    """A robot on ROS 2 topics, in a process of its own."""

    counts = False

    def __init__(self, folder, kind, options, driver, config):
        pytest.importorskip("nav_msgs", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")
        command = [sys.executable, "-m", "hardware.emulators.ros_robot", kind, *options]
        self.process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        self.config = config
        self.robot = driver(config)

    def hiccup(self, times):
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        self.process.send_signal(signal.SIGCONT)

    def silence(self):
        self.process.send_signal(signal.SIGSTOP)

    def close(self):
        self.process.send_signal(signal.SIGCONT)
        self.robot.disconnect()
        self.process.kill()
        self.process.wait()


JOINTS = ("shoulder", "elbow", "gripper")
ARM = {
    "joints": JOINTS,
    "low": (-2.0,) * 3,
    "high": (2.0,) * 3,
    "max_velocity": (2.0,) * 3,
    "max_acceleration": (10.0,) * 3,
}


def ros_arm(folder, controller="forward", **settings):
    from hardware.ros.arm import RosArm, RosArmConfig

    config = RosArmConfig(controller=controller, connect_timeout=PATIENCE, **{**ARM, **settings})
    return RosBench(folder, "arm", ["--joints", *JOINTS, "--controller", controller], RosArm, config)


def ros_base(folder, stamped=False, **settings):
    from hardware.ros.base import RosBase, RosBaseConfig

    config = RosBaseConfig(stamped=stamped, scan_topic="/scan", connect_timeout=PATIENCE, **settings)
    return RosBench(folder, "base", ["--stamped"] if stamped else [], RosBase, config)


class MultirotorBench:
    """A multirotor that sends over UDP."""

    counts = False

    def __init__(self, folder, **vehicle):
        pytest.importorskip("pymavlink", reason="pip install 'robot-rl[mavlink]'")
        from hardware.emulators.mavlink_vehicle import MavlinkVehicle
        from hardware.robots.mavlink import Multirotor, MultirotorConfig

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.vehicle = MavlinkVehicle(port, **vehicle).__enter__()
        self.config = MultirotorConfig(address=f"127.0.0.1:{port}")
        self.robot = Multirotor(self.config)

    def hiccup(self, times):
        self.vehicle.silent = True
        time.sleep(0.1)
        self.vehicle.silent = False

    def silence(self):
        self.vehicle.silent = True

    def close(self):
        self.vehicle.silent = False
        self.robot.disconnect()
        self.vehicle.__exit__(None, None, None)


class Program:
    """Stands where the library's control interface stands: its servoing moves the emulated controller's joints."""

    def __init__(self, bench):
        self.bench, self.running, self.kicked, self.deaf = bench, True, 0, False

    def __call__(self, host, frequency):
        assert host == self.bench.config.host
        self.running = True
        return self

    def servoJ(self, goal, speed, acceleration, seconds, lookahead, gain):
        assert speed == acceleration == 0.0
        assert 0.03 <= lookahead <= 0.2
        self.bench.tell("goal", *goal)
        return not self.deaf

    def servoStop(self, deceleration=10.0):
        self.bench.tell("hold")
        return not self.deaf

    def setWatchdog(self, frequency):
        return True

    def kickWatchdog(self):
        self.kicked += 1
        return True

    def isProgramRunning(self):
        return self.running

    def stopScript(self):
        self.running = False

    def disconnect(self):
        pass


class URBench:
    """The library's own client of measurements on an emulated controller; its control interface is stood in for."""

    counts = True

    def __init__(self, folder):
        pytest.importorskip("rtde_receive", reason="pip install 'robot-rl[ur]'")
        from hardware.robots.ur import UR, URConfig

        host = f"127.{os.getpid() % 250 + 1}.{next(NUMBERS) % 250 + 1}.77"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hardware.emulators.rtde", "--host", host],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self.process.stdout.readline() == "ready\n"
        self.config = URConfig(host=host, low=(-2.0,) * 6, high=(2.0,) * 6, max_failures=20)
        self.program = Program(self)
        self.kept = sys.modules.get("rtde_control")
        sys.modules["rtde_control"] = types.SimpleNamespace(RTDEControlInterface=self.program, __spec__=object())
        self.robot = UR(self.config)

    def tell(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")

    def hiccup(self, times):
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(0.015 * times + 0.06)
        self.process.send_signal(signal.SIGCONT)

    def silence(self):
        self.process.send_signal(signal.SIGSTOP)

    def close(self):
        self.process.send_signal(signal.SIGCONT)
        self.robot.disconnect()
        self.process.kill()
        self.process.communicate()
        del sys.modules["rtde_control"]
        if self.kept is not None:
            sys.modules["rtde_control"] = self.kept


class EmulatedPanda:
    """Stands where the library's `Panda` stands: joints that follow the goal of a controller as a spring would."""

    def __init__(self, host="", *, realtime_config=None):
        self.host, self.enforced = host, realtime_config
        self.mode, self.errors, self.broken = "kIdle", "", ""
        self.place, self.goal = np.array([0.0, -0.5, 0.0, -2.0, 0.0, 1.5, 0.0]), None
        self.lowest, self.highest = np.full((7, 1), -2.9), np.full((7, 1), 3.8)
        self.lowest[3], self.frozen, self.started = -3.1, False, 0
        self.begun = self.moved = time.monotonic()

    def get_state(self):
        if not self.frozen:
            now = time.monotonic()
            elapsed, self.moved = now - self.moved, now
            if self.goal is not None:
                self.place = self.place + (self.goal - self.place) * (1.0 - np.exp(-elapsed / 0.05))
        clock = self.moved - self.begun
        return types.SimpleNamespace(
            time=types.SimpleNamespace(to_sec=lambda: clock),
            robot_mode=types.SimpleNamespace(name=self.mode),
            current_errors=self.errors,
            q=self.place.tolist(),
            dq=[0.0] * 7,
            tau_ext_hat_filtered=[0.5] * 7,
        )

    def get_joint_limits_lower(self):
        return self.lowest

    def get_joint_limits_upper(self):
        return self.highest

    def set_default_behavior(self):
        self.errors, self.mode = "", "kIdle"

    def start_controller(self, controller):
        self.started, self.mode, self.goal = self.started + 1, "kMove", self.place.copy()
        controller.panda = self

    def stop_controller(self):
        self.mode, self.goal = "kIdle" if self.mode == "kMove" else self.mode, None

    def raise_error(self):
        if self.broken:
            raise RuntimeError(self.broken)


class EmulatedHand:
    """Stands where the library's `Gripper` stands: fingers that take their time, and what may be between them."""

    def __init__(self, host=""):
        self.width, self.between, self.asked, self.broken = 0.04, 0.0, [], ""

    def read_once(self):
        if self.broken:
            raise RuntimeError(self.broken)
        return types.SimpleNamespace(width=self.width)

    def move(self, width, speed):
        return self._go("move", width)

    def grasp(self, width, speed, force, epsilon_inner=0.005, epsilon_outer=0.005):
        return self._go("grasp", width)

    def _go(self, kind, width):
        time.sleep(0.05)
        self.asked.append((kind, round(width, 4)))
        self.width = max(width, self.between)
        return True


class FrankaBench:
    """Objects in the place of the library, which speaks to nothing but a controller of the maker."""

    counts = True

    def __init__(self, folder, **settings):
        from hardware.robots.franka import Franka, FrankaConfig

        self.panda, self.hand, self.permission = EmulatedPanda(), EmulatedHand(), (True, "")

        def position(stiffness, damping):
            controller = types.SimpleNamespace(stiffness=stiffness, damping=damping, panda=None)
            controller.set_control = lambda goal: setattr(controller.panda, "goal", np.array(goal))
            return controller

        def panda(host, *, realtime_config):
            self.panda.host, self.panda.enforced = host, realtime_config
            return self.panda

        spec = {"__spec__": object()}
        modules = {
            "panda_py": {"Panda": panda, "realtime_priority_available": lambda: self.permission},
            "panda_py.controllers": {"JointPosition": position},
            "panda_py.libfranka": {
                "Gripper": lambda host: self.hand,
                "RealtimeConfig": types.SimpleNamespace(kEnforce="enforced", kIgnore="ignored"),
            },
        }
        self.kept = {name: sys.modules.get(name) for name in modules}
        sys.modules.update({name: types.SimpleNamespace(**spec, **parts) for name, parts in modules.items()})
        self.config = FrankaConfig(max_failures=20, **settings)
        self.robot = Franka(self.config)

    def hiccup(self, times):
        self.panda.frozen = True
        time.sleep(0.03 * times)
        self.panda.frozen = False

    def silence(self):
        self.panda.frozen = True

    def close(self):
        self.panda.frozen = False
        self.robot.disconnect()
        for name, module in self.kept.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


BENCHES = {
    "fake": FakeBench,
    "so101": lambda folder: ServoBench(folder, FEETECH, SO101),
    "koch": lambda folder: ServoBench(folder, DYNAMIXEL, Koch),
    "multirotor": MultirotorBench,
    "ur": URBench,
    "franka": FrankaBench,
    "ros_arm": lambda folder: ros_arm(folder, "trajectory", velocities=True),
    "ros_base": lambda folder: ros_base(folder, stamped=True),
}
