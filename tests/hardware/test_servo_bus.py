"""Servo buses: the bytes are those of the makers' packages, and arms that are not as they should be are named."""

import time

import numpy as np
import pytest
from driver_benches import ServoBench, six_joints

from hardware.emulators.servo_bus import ServoBusEmulator
from hardware.robots.servo_arm import SO101, Koch, ServoArm, ServoArmConfig
from hardware.servo.bus import ServoBus
from hardware.servo.calibration import Calibration, Joint
from hardware.servo.family import DYNAMIXEL, FEETECH, Register, family_of
from hardware.servo.protocol import DynamixelProtocol, FeetechProtocol, Packet, Reply
from robot_rl.core.errors import ConfigError, DataError, HardwareError, UnknownNameError
from robot_rl.core.robot import RobotState, StopKind
from robot_rl.core.robot_testing import fails_within

BOTH = pytest.mark.parametrize("family", [FEETECH, DYNAMIXEL], ids=lambda family: family.name)


class Wire:
    """Takes the place of a makers' package's port: keeps what is sent."""

    is_using = False

    def __init__(self):
        self.sent = b""

    def clearPort(self):
        pass

    def writePort(self, packet):
        self.sent = bytes(packet)
        return len(packet)

    def setPacketTimeout(self, length):
        pass


def makers(family):
    if family is FEETECH:
        sdk = pytest.importorskip("scservo_sdk", reason="pip install feetech-servo-sdk")
        return sdk, sdk.protocol_packet_handler()
    sdk = pytest.importorskip("dynamixel_sdk", reason="pip install dynamixel-sdk")
    return sdk, sdk.PacketHandler(2.0)


@BOTH
def test_packets_are_those_of_the_makers_package(family):
    sdk, handler = makers(family)
    wire, ours = Wire(), family.protocol
    handler.writeTxOnly(wire, 3, 42, 4, [255, 254, 253, 7])
    assert wire.sent == ours.write(3, 42, bytes([255, 254, 253, 7]))
    wire.is_using = False
    handler.readTx(wire, 5, 56, 2)
    assert wire.sent == ours.read(5, 56, 2)
    wire.is_using = False
    group = sdk.GroupSyncRead(wire, handler, 56, 2)
    for servo in (1, 2, 9):
        group.addParam(servo)
    group.txPacket()
    assert wire.sent == ours.sync_read([1, 2, 9], 56, 2)
    wire.is_using = False
    writes = sdk.GroupSyncWrite(wire, handler, 42, 2)
    for servo in (1, 2):
        writes.addParam(servo, [servo, 7])
    writes.txPacket()
    assert wire.sent == ours.sync_write(42, {1: b"\x01\x07", 2: b"\x02\x07"})


@BOTH
def test_the_emulator_talks_with_the_makers_package(family):
    sdk, handler = makers(family)
    with ServoBusEmulator(family, ids=(1, 2)) as bus:
        port = sdk.PortHandler(bus.port)
        assert port.openPort()
        assert handler.ping(port, 1) == (next(iter(family.models)), 0, 0)
        goal = family.registers["goal_position"]
        size = goal.size
        write = handler.write2ByteTxRx if size == 2 else handler.write4ByteTxRx
        assert handler.write1ByteTxRx(port, 1, family.registers["torque"].address, 1) == (0, 0)
        assert write(port, 1, goal.address, 2100) == (0, 0)
        time.sleep(0.1)
        group = sdk.GroupSyncRead(port, handler, family.registers["present_position"].address, size)
        group.addParam(1)
        group.addParam(2)
        assert group.txRxPacket() == 0
        found = [group.getData(servo, family.registers["present_position"].address, size) for servo in (1, 2)]
        assert found == [2100, 2048]
        bus.servos[2].memory[150:154] = b"\xff\xff\xfd\x07"  # looks like a header, and must be marked as none
        assert list(handler.readTxRx(port, 2, 150, 4)[0]) == [255, 255, 253, 7]
        port.closePort()


def some(rng, count):
    """Bytes that look like headers."""
    return rng.choice([255, 253, 0, 7], count).astype(np.uint8).tobytes()


@pytest.mark.parametrize("protocol", [FeetechProtocol(), DynamixelProtocol()], ids=["feetech", "dynamixel"])
def test_whatever_is_in_between_whole_packets_are_found(protocol):
    rng = np.random.default_rng(0)
    for _ in range(200):
        packets = [Packet(int(rng.integers(1, 250)), int(rng.integers(1, 5)), some(rng, 12)) for _ in range(3)]
        noise = some(rng, int(rng.integers(0, 6)))
        stream = noise + b"".join(protocol.encode(p.servo, p.instruction, p.parameters) for p in packets)
        buffer, found = bytearray(), []
        for byte in stream:  # as it comes in
            buffer.append(byte)
            while (packet := protocol.decode(buffer)) is not None:
                found.append(packet)
        assert found[-1:] == packets[-1:] or noise, "without noise every packet is found"
        if not noise:
            assert found == packets
        damaged = bytearray(protocol.encode(7, 3, b"\x01\x02\x03"))
        damaged[-1] ^= 1
        assert protocol.decode(damaged) is None
    reply = Reply(4, 0, b"\xff\xff\xfd\x01")
    assert protocol.reply(protocol.decode(bytearray(protocol.encode_reply(reply)))) == reply


def test_signed_registers():
    assert FEETECH.registers["offset"].pack(-1204) == (1204 | 1 << 11).to_bytes(2, "little")
    for register in (*FEETECH.registers.values(), *DYNAMIXEL.registers.values()):
        numbers = [0, 1, 100] + ([-1, -100] if register.sign_bit or register.signed else [])
        assert [register.unpack(register.pack(number)) for number in numbers] == numbers
    with pytest.raises(ValueError, match="does not fit"):
        Register(0, 1).pack(300)
    with pytest.raises(UnknownNameError, match="Did you mean 'feetech'"):
        family_of("feetec")


def test_angles_and_positions_across_mounting_and_turns():
    straight, turned = Joint(1, 777, 0, 1, -1, 1), Joint(1, 777, 0, -1, -1, 1)
    for position in (2048, 1500, 2900, 2048 + 4096 + 100, 2048 - 4096):
        for joint in (straight, turned):
            assert joint.position(joint.angle(position), near=position) == position
    assert straight.angle(3072) == pytest.approx(np.pi / 2)
    assert turned.angle(3072) == pytest.approx(-np.pi / 2)


@BOTH
def test_a_corrupt_reply_is_no_measurement(family):
    with ServoBusEmulator(family) as emulator:
        bus = ServoBus(emulator.port, family)
        bus.open()
        emulator.corrupt(1)
        with pytest.raises(HardwareError, match="no reply of servo 1 "):
            bus.sync_read([1, 2], "present_position")
        assert bus.sync_read([1, 2], "present_position") == {1: 2048, 2: 2048}, (
            "late replies are not taken for new ones"
        )
        bus.close()


@pytest.fixture(params=[(FEETECH, SO101), (DYNAMIXEL, Koch)], ids=["so101", "koch"])
def bench(request, tmp_path):
    made = ServoBench(tmp_path, *request.param)
    yield made
    made.close()


def test_connecting_powers_on_without_moving(bench):
    for servo in bench.bus.servos.values():
        servo.put("goal_position", 1000)  # left over from an earlier session
    bench.bus.turn(1, 2048 + 300)
    begun = {number: servo.shaft for number, servo in bench.bus.servos.items()}
    bench.robot.connect()
    time.sleep(0.15)
    assert {number: servo.shaft for number, servo in bench.bus.servos.items()} == begun
    assert all(servo.get("torque") for servo in bench.bus.servos.values())
    assert bench.robot.hold_command() == pytest.approx([300 * 2 * np.pi / 4096, 0, 0, 0, 0, 0], abs=1e-6)


def test_a_mirrored_joint_turns_the_other_way(bench):
    bench.robot.connect()
    bench.robot.command(np.full(6, 0.3))
    time.sleep(0.4)
    assert bench.robot.hold_command() == pytest.approx(np.full(6, 0.3), abs=2e-3)
    moved = {n: servo.reading - 2048 for n, servo in bench.bus.servos.items()}
    assert moved == {n: (-196 if n == 2 else 196) for n in range(1, 7)}


def test_a_missing_servo_and_another_arm_are_named(bench):
    bench.bus.silent = {2, 5}
    missing = r"no servo answers for shoulder_lift \(id 2\), wrist_roll \(id 5\).*there are: 1, 3, 4, 6"
    with pytest.raises(HardwareError, match=missing):
        bench.robot.connect()
    assert bench.robot.state() is RobotState.DISCONNECTED
    bench.bus.silent = set()
    bench.bus.servos[4].put("offset", 12)
    with pytest.raises(HardwareError, match=r"offset of wrist_flex \(id 4\) is 12, the calibration says 0"):
        bench.robot.connect()
    bench.bus.servos[4].put("offset", 0)
    bench.robot.connect()


def test_a_servo_that_protects_itself_is_a_fault_at_once(bench):
    bench.robot.connect()
    bench.bus.alarm(3, 32)
    error = fails_within(bench.robot, 1.0)
    assert "servo 3 protects itself: overload" in str(error)
    assert bench.robot.failures <= 1, "asking again would not help"
    assert bench.robot.stop() is False
    bench.bus.alarm(3, 0)
    bench.robot.disconnect()
    bench.robot.connect()
    assert bench.robot.state() is RobotState.READY


def test_a_controlled_stop_brakes_within_the_acceleration_limit(bench):
    robot = bench.robot
    robot.connect()
    goals = []
    write = robot._write
    robot._write = lambda action: (goals.append(action.copy()), write(action))
    for k in range(30):
        robot.command(np.full(6, 0.02 * k))  # about 2 rad/s
        time.sleep(0.01)
    begun = len(goals)
    assert robot.stop(StopKind.CONTROLLED)
    path = np.array([goal[0] for goal in goals[begun - 1 :]])
    steps = np.diff(path)
    assert len(steps) >= 3, "such a speed takes a while to brake at 20 rad/s^2"
    assert (steps >= -1e-9).all()
    assert (np.diff(steps) <= 1e-9).all(), "it slows in every step"
    assert steps[0] <= 3.0 * 0.01 + 1e-9
    assert robot.hold_command() == pytest.approx(np.full(6, path[-1]), abs=0.01)


def test_drives_off_lets_go_and_takes_no_command_before_connecting_anew(bench):
    robot = bench.robot
    robot.connect()
    assert robot.stop(StopKind.DRIVES_OFF)
    assert not any(servo.get("torque") for servo in bench.bus.servos.values())
    assert robot.state() is RobotState.STOPPED
    with pytest.raises(HardwareError, match="connect it anew"):
        robot.command(np.zeros(6))
    robot.observe()
    robot.disconnect()
    assert not any(servo.get("torque") for servo in bench.bus.servos.values()), "nothing is switched on at the end"
    robot.connect()
    assert robot.state() is RobotState.READY


def test_a_koch_arm_stops_by_itself_when_its_driver_is_gone(tmp_path):
    bench = ServoBench(tmp_path, DYNAMIXEL, Koch)
    bench.robot = Koch(ServoArmConfig(port=bench.bus.port, calibration=bench.path, watchdog_seconds=0.06))
    bench.robot.connect()
    bench.robot.command(np.full(6, 1.0))
    bench.robot._finish()  # the thread ends as with the process
    time.sleep(0.5)
    stopped = [servo.shaft for servo in bench.bus.servos.values()]
    assert all(abs(servo.reading - 2048) < 600 for servo in bench.bus.servos.values()), "far from 1 rad"
    assert all(servo.get("watchdog") == -1 for servo in bench.bus.servos.values())
    bench.robot.disconnect()
    bench.robot.connect()
    time.sleep(0.1)
    # It may move for the time between two packets, which on a busy machine is a switch between threads.
    assert [servo.shaft for servo in bench.bus.servos.values()] == pytest.approx(stopped, abs=50)
    bench.close()


def test_pulling_the_cable_is_a_fault(bench):
    bench.robot.connect()
    bench.bus.close()
    assert str(bench.robot.config.port) in str(fails_within(bench.robot, 3.0))
    assert bench.robot.stop() is False


def test_ports_that_are_absent_or_taken(bench, tmp_path):
    absent = SO101 if isinstance(bench.robot, SO101) else Koch
    with pytest.raises(HardwareError, match="'/dev/no-such-port' cannot be opened"):
        absent(ServoArmConfig(port="/dev/no-such-port", calibration=bench.path)).connect()
    bench.robot.connect()
    with pytest.raises(HardwareError, match="cannot be opened"):
        absent(bench.config).connect()


def test_calibrations_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="make one with robot-rl robot calibrate"):
        SO101(ServoArmConfig(calibration=tmp_path / "none.yaml"))
    path = tmp_path / "arm.yaml"
    six_joints(DYNAMIXEL, 1200).save(path)
    assert Calibration.load(path) == six_joints(DYNAMIXEL, 1200)
    with pytest.raises(ConfigError, match="of dynamixel servos, expected feetech"):
        SO101(ServoArmConfig(calibration=path))
    assert ServoArm(ServoArmConfig(calibration=path)).spec.action.names[0] == "shoulder_pan"
    good = path.read_text()
    for old, new, message in (
        ("sign: -1", "sign: 2", "sign 1 or -1"),
        ("low: -1.5", "low: 1.5", "low < high"),
        ("id: 2", "id: 1", "one id to several joints"),
        ("model: 1200", "modle: 1200", "needs exactly id, model"),
        ("joints:", "points:", "holds no 'joints'"),
        ("id: 3", "id: three", "id of joint 'elbow_flex' is 'three'"),
    ):
        path.write_text(good.replace(old, new, 1))
        with pytest.raises(DataError, match=message):
            Calibration.load(path)
