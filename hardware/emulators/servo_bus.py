"""A bus of emulated servos behind a pseudo terminal, for drivers that open a serial port.

    with ServoBusEmulator(FEETECH, ids=range(1, 7)) as bus:
        arm = SO101(SO101Config(port=bus.port, calibration=...))

The servos have the registers of `hardware.servo.family` and move to their goals at a bounded speed. ``silent``,
`lose`, `corrupt` and `alarm` are hands on the cable, and `turn` moves a joint by hand.
"""

from __future__ import annotations

import os
import select
import threading
import time
import tty
from collections.abc import Iterable
from types import TracebackType

from hardware.servo.family import TURN, Family
from hardware.servo.protocol import BROADCAST, PING, READ, SYNC_READ, SYNC_WRITE, WRITE, Packet, Reply

SPEED = 2500.0
"""Positions per second at which a servo moves, about 3.8 rad/s."""


class EmulatedServo:
    """Memory and motion of one servo."""

    def __init__(self, family: Family, model: int, position: float = 2048.0) -> None:
        self.family, self.memory = family, bytearray(160)
        self.shaft = position
        """Where the shaft is, in positions of its encoder."""
        self.error = 0
        self._moved_at = self._heard_at = time.monotonic()
        self.put("model", model)

    def get(self, register: str) -> int:
        """Return the number in a register."""
        where = self.family.registers[register]
        return where.unpack(bytes(self.memory[where.address : where.address + where.size]))

    def put(self, register: str, value: int) -> None:
        """Set the number in a register."""
        where = self.family.registers[register]
        self.memory[where.address : where.address + where.size] = where.pack(value)

    @property
    def reading(self) -> int:
        """What the servo measures: its shaft with the offset, in one turn unless it counts turns."""
        reading = round(self.shaft) + self.family.offset_sign * self.get("offset")
        return reading if self.family.position_mode == 4 else reading % TURN

    def move(self) -> None:
        """Let the time since the last call pass."""
        now = time.monotonic()
        elapsed, self._moved_at = now - self._moved_at, now
        if "watchdog" in self.family.registers:
            limit = self.get("watchdog")
            if limit > 0 and now - self._heard_at > 0.02 * limit:
                self.put("watchdog", -1)
            if limit < 0:
                return
        if self.get("torque"):
            way = self.get("goal_position") - self.reading
            self.shaft += max(-SPEED * elapsed, min(SPEED * elapsed, way))
        self.put("present_position", self.reading)

    def read(self, address: int, size: int) -> bytes:
        """Return bytes of the memory as of now."""
        self.move()
        self._heard_at = time.monotonic()
        return bytes(self.memory[address : address + size])

    def write(self, address: int, data: bytes) -> int:
        """Write bytes and return the error number: 0, or 7 where a tripped watchdog refuses a goal."""
        self.move()
        self._heard_at = time.monotonic()
        tripped = "watchdog" in self.family.registers and self.get("watchdog") < 0
        if tripped and address == self.family.registers["goal_position"].address:
            return 7
        torque = self.family.registers["torque"].address
        if address == torque and data[0] and not self.memory[torque]:
            self.put("goal_position", self.reading)  # a servo that is switched on holds where it is
        self.memory[address : address + len(data)] = data
        self.put("present_position", self.reading)
        return 0


class ServoBusEmulator:
    """Servos on one pseudo terminal, whose other end is `port`."""

    def __init__(self, family: Family, ids: Iterable[int] = range(1, 7), model: int = 0) -> None:
        self.family = family
        self.servos = {servo: EmulatedServo(family, model or next(iter(family.models))) for servo in ids}
        self.port = ""
        """Path of the serial device, once `open`."""
        self.silent: set[int] = set()
        """Addresses that do not answer."""
        self.requests = 0
        """Packets that were understood."""
        self._lost = self._broken = 0
        self._master = self._slave = -1
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> ServoBusEmulator:
        """Make the pseudo terminal and answer on it."""
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.port = os.ttyname(self._slave)
        self._thread = threading.Thread(target=self._run, name="servo-emulator", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Pull the plug: the device is gone; safe to call twice."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join(2.0)
        self._thread = None
        os.close(self._master)
        os.close(self._slave)

    def __enter__(self) -> ServoBusEmulator:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def lose(self, replies: int) -> None:
        """Lose the next ``replies``."""
        self._lost = replies

    def corrupt(self, replies: int) -> None:
        """Flip a bit in each of the next ``replies``."""
        self._broken = replies

    def alarm(self, servo: int, bits: int) -> None:
        """Let a servo report that it protects itself; 0 ends it."""
        one = self.servos[servo]
        if "alarm" in self.family.registers:
            one.put("alarm", bits)
            one.error = 0x80 if bits else 0
        else:
            one.error = bits

    def turn(self, servo: int, shaft: float) -> None:
        """Put a servo's shaft somewhere by hand, in positions of its encoder."""
        self.servos[servo].shaft = shaft
        self.servos[servo].move()

    def _run(self) -> None:
        buffer = bytearray()
        while not self._ended.is_set():
            for servo in self.servos.values():
                servo.move()
            if not select.select([self._master], [], [], 0.01)[0]:
                continue
            try:
                buffer += os.read(self._master, 4096)
            except OSError:  # nobody has the other end open
                self._ended.wait(0.01)
                continue
            while (packet := self.family.protocol.decode(buffer)) is not None:
                self.requests += 1
                answer = b"".join(self._sent(reply) for reply in self._answers(packet))
                if answer:
                    os.write(self._master, answer)

    def _answers(self, packet: Packet) -> list[Reply]:
        width = self.family.protocol.address_size
        numbers = [int.from_bytes(packet.parameters[i : i + width], "little") for i in (0, width)]
        rest = packet.parameters[2 * width :]
        if packet.instruction == SYNC_READ:
            return [Reply(s, self.servos[s].error, self.servos[s].read(*numbers)) for s in rest if s in self.servos]
        if packet.instruction == SYNC_WRITE:
            for start in range(0, len(rest), numbers[1] + 1):
                row = rest[start : start + numbers[1] + 1]
                if row[0] in self.servos:
                    self.servos[row[0]].write(numbers[0], row[1:])
            return []
        if packet.servo == BROADCAST or packet.servo not in self.servos:
            return []
        servo = self.servos[packet.servo]
        if packet.instruction == READ:
            return [Reply(packet.servo, servo.error, servo.read(*numbers))]
        if packet.instruction == WRITE:
            failed = servo.write(numbers[0], packet.parameters[width:])
            return [Reply(packet.servo, failed | servo.error, b"")]
        if packet.instruction == PING:
            # A Dynamixel says its model and its firmware; a Feetech servo says only that it is there.
            extra = servo.read(0, 2) + b"\x2e" if width == 2 else b""
            return [Reply(packet.servo, servo.error, extra)]
        return []

    def _sent(self, reply: Reply) -> bytes:
        if reply.servo in self.silent:
            return b""
        if self._lost > 0:
            self._lost -= 1
            return b""
        data = self.family.protocol.encode_reply(reply)
        if self._broken > 0:
            self._broken -= 1
            return data[:-1] + bytes([data[-1] ^ 0x10])
        return data
