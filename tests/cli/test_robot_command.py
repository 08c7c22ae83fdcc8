"""``robot-rl robot``: looks at a robot without moving it, and calibrates arms by a person's hands."""

import re
import threading
import time

import numpy as np
import pytest

from hardware.cli.robot import Calibrate, Check, run
from hardware.emulators.servo_bus import ServoBusEmulator
from hardware.robots.servo_arm import SO101, Koch, ServoArmConfig
from hardware.servo.calibration import Calibration
from hardware.servo.family import DYNAMIXEL, FEETECH
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.registry import register

PATIENCE = 60.0
SHAFTS = (100, 900, 2048, 2500, 3900, 4095)
"""Where the horns happened to be mounted: the ranges of some cross the encoder's zero."""


class Hands:
    """A person who moves the arm when asked to, and presses Enter."""

    def __init__(self, bus, reach=700, lazy=()):
        self.bus, self.reach, self.lazy, self.asked = bus, reach, lazy, []

    def __call__(self, text):
        self.asked.append(text)
        if "middle" in text:
            for servo, shaft in zip(self.bus.servos, SHAFTS, strict=True):
                self.bus.turn(servo, shaft)
            return ""
        for servo, shaft in zip(self.bus.servos, SHAFTS, strict=True):
            for share in (0, 0.4, 0.8, 1, 0, -0.4, -0.8, -1, 0) if servo not in self.lazy else (0,):
                self.bus.turn(servo, shaft + share * self.reach)
                self.let_it_be_seen()
        return ""

    def let_it_be_seen(self):
        """Wait until the bus was read twice more: one reading may have been under way."""
        enough, deadline = self.bus.requests + 2, time.monotonic() + PATIENCE
        while self.bus.requests < enough:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture(params=[(FEETECH, "so101", SO101), (DYNAMIXEL, "koch", Koch)], ids=["so101", "koch"])
def arm(request):
    with ServoBusEmulator(request.param[0]) as bus:
        yield bus, *request.param[1:]


def test_an_arm_is_calibrated_by_hand_and_then_is_a_robot(arm, tmp_path, monkeypatch, capsys):
    bus, name, driver = arm
    hands = Hands(bus)
    monkeypatch.setattr("builtins.input", hands)
    path = tmp_path / "arms" / "mine.yaml"
    assert run(Calibrate(name, port=bus.port, out=path, mirrored=("elbow_flex",))) == 0
    assert len(hands.asked) == 2
    assert "gripper          id 6, -1.05 to +1.05 rad" in capsys.readouterr().out
    found = Calibration.load(path)
    assert [joint.sign for joint in found.joints.values()] == [1, 1, -1, 1, 1, 1]
    for joint in found.joints.values():
        assert joint.high == pytest.approx(700 * 2 * np.pi / 4096 - 0.02, abs=0.003)
    robot = driver(ServoArmConfig(port=bus.port, calibration=path))
    robot.connect()
    assert robot.hold_command() == pytest.approx(np.zeros(6), abs=0.004), "the middle pose is 0 rad"
    robot.command(np.full(6, 0.2))
    deadline = time.monotonic() + PATIENCE
    while robot.hold_command() != pytest.approx(np.full(6, 0.2), abs=0.004):
        assert time.monotonic() < deadline, f"it is at {robot.hold_command()}"
        time.sleep(0.01)
    robot.disconnect()


def test_what_was_not_done_is_named(arm, tmp_path, monkeypatch):
    bus, name, _ = arm
    out = tmp_path / "c.yaml"
    monkeypatch.setattr("builtins.input", Hands(bus, lazy=(2, 5)))
    with pytest.raises(HardwareError, match="not moved through a range: shoulder_lift, wrist_roll"):
        run(Calibrate(name, port=bus.port, out=out))
    monkeypatch.setattr("builtins.input", Hands(bus, reach=2300))
    with pytest.raises(HardwareError, match="over the end of the servo's turn: shoulder_pan"):
        run(Calibrate(name, port=bus.port, out=out))
    with pytest.raises(ConfigError, match="no joint elbow"):
        run(Calibrate(name, port=bus.port, out=out, mirrored=("elbow",)))
    with pytest.raises(ConfigError, match="not one for each"):
        run(Calibrate(name, port=bus.port, out=out, ids=(1, 2)))
    bus.silent = {4}
    with pytest.raises(HardwareError, match=r"for wrist_flex \(id 4\).*there are: 1, 2, 3, 5, 6"):
        run(Calibrate(name, port=bus.port, out=out))
    with pytest.raises(ConfigError, match="no servo arm"):
        run(Calibrate("fake", port=bus.port, out=out))
    assert not out.exists()


def test_a_robot_is_looked_at_and_sent_no_command(monkeypatch, capsys):
    from hardware.robots.fake import FakeRobot

    made = []
    monkeypatch.setattr("robot_rl.core.registry._overrides", {})
    register("robots", "watched", lambda **options: made.append(FakeRobot(**options)) or made[-1])
    assert run(Check("watched", options=("camera=true",), seconds=0.2)) == 0
    output = capsys.readouterr().out
    assert "images.front     (48, 64, 3) uint8" in output
    assert "stop confirmed" in output
    assert not made[0].commands
    assert made[0].stops


def test_what_is_too_old_is_an_exit_status(monkeypatch, capsys):
    from hardware.robots.fake import FakeRobot

    class Late(FakeRobot):
        def observe(self):
            seen = super().observe()
            seen.stamps["images.front"] -= 0.5
            return seen

        def stop(self, *kind):
            return False

    monkeypatch.setattr("robot_rl.core.registry._overrides", {})
    register("robots", "late", lambda: Late(camera=True))
    assert run(Check("late", seconds=0.1)) == 1
    output = capsys.readouterr().out
    (age,) = re.findall(r"images\.front is up to ([0-9.]+) s old", output)
    assert 0.49 <= float(age) <= 0.5
    assert "NOT CONFIRMED" in output
    assert not [thread for thread in threading.enumerate() if "driver" in thread.name]
