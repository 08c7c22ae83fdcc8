"""Robots on the bench: every driver with the emulator of its robot, and hands on the cable. Imported by the tests."""

from hardware.emulators.servo_bus import ServoBusEmulator
from hardware.robots.fake import FakeRobot, FaultyRobot
from hardware.robots.servo_arm import SIX_JOINTS, SO101, Koch, ServoArmConfig
from hardware.servo.calibration import Calibration, Joint
from hardware.servo.family import DYNAMIXEL, FEETECH


class FakeBench:
    """A robot without a cable: it is silenced by the wrapper of faults."""

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


BENCHES = {
    "fake": FakeBench,
    "so101": lambda folder: ServoBench(folder, FEETECH, SO101),
    "koch": lambda folder: ServoBench(folder, DYNAMIXEL, Koch),
}
