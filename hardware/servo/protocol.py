"""Packets of the two serial protocols: Feetech's (Dynamixel's 1.0) and Dynamixel's 2.0; bytes in, bytes out.

They are ours, on top of pyserial, because both makers' packages wait for a reply by spinning, which takes the
interpreter from the control loop beside them, and one of them takes a late reply for the next one. Tests hold the bytes
against both packages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PING, READ, WRITE, SYNC_READ, SYNC_WRITE, STATUS = 0x01, 0x02, 0x03, 0x82, 0x83, 0x55
BROADCAST = 0xFE
"""Address of all servos."""


@dataclass(frozen=True)
class Packet:
    """One packet."""

    servo: int
    """Address that it is for, or comes from."""
    instruction: int
    """What is asked for; in a reply of Feetech's protocol, the error byte."""
    parameters: bytes
    """What follows."""


@dataclass(frozen=True)
class Reply:
    """What a servo answered."""

    servo: int
    """Its address."""
    error: int
    """Error byte; 0 for none."""
    data: bytes
    """What was read; empty for a write."""


class ServoProtocol(ABC):
    """How instructions and replies are written as bytes."""

    address_size: int
    """Bytes of a register's address, and of a length."""

    @abstractmethod
    def encode(self, servo: int, instruction: int, parameters: bytes = b"") -> bytes:
        """Return the bytes of a packet."""

    @abstractmethod
    def decode(self, buffer: bytearray) -> Packet | None:
        """Take the first whole packet out of ``buffer``, and whatever is before it; None if there is none."""

    @abstractmethod
    def encode_reply(self, reply: Reply) -> bytes:
        """Return the bytes of what a servo answers."""

    @abstractmethod
    def reply(self, packet: Packet) -> Reply | None:
        """Return a received packet as a reply; None if it is none."""

    def number(self, value: int) -> bytes:
        """Return an address or a length as it stands in a packet."""
        return value.to_bytes(self.address_size, "little")

    def read(self, servo: int, address: int, size: int) -> bytes:
        """Ask one servo for ``size`` bytes."""
        return self.encode(servo, READ, self.number(address) + self.number(size))

    def write(self, servo: int, address: int, data: bytes) -> bytes:
        """Write ``data`` to one servo, which answers."""
        return self.encode(servo, WRITE, self.number(address) + data)

    def sync_read(self, servos: Sequence[int], address: int, size: int) -> bytes:
        """Ask several servos, which answer in this order, for ``size`` bytes each."""
        return self.encode(BROADCAST, SYNC_READ, self.number(address) + self.number(size) + bytes(servos))

    def sync_write(self, address: int, data: Mapping[int, bytes]) -> bytes:
        """Write to several servos at once; none of them answers."""
        size = len(next(iter(data.values())))
        rows = b"".join(bytes([servo]) + row for servo, row in data.items())
        return self.encode(BROADCAST, SYNC_WRITE, self.number(address) + self.number(size) + rows)


class FeetechProtocol(ServoProtocol):
    """``FF FF id length instruction parameters checksum``; the checksum is the inverted sum from the id on."""

    address_size = 1

    def encode(self, servo: int, instruction: int, parameters: bytes = b"") -> bytes:
        """Return the bytes of a packet."""
        body = bytes([servo, len(parameters) + 2, instruction]) + parameters
        return b"\xff\xff" + body + bytes([~sum(body) & 0xFF])

    def decode(self, buffer: bytearray) -> Packet | None:
        """Take the first whole packet out of ``buffer``; one with a wrong checksum is skipped."""
        while True:
            start = buffer.find(b"\xff\xff")
            del buffer[: max(0, len(buffer) - 1) if start < 0 else start]
            if start < 0 or len(buffer) < 4:
                return None
            if buffer[2] == 0xFF or buffer[3] < 2:
                del buffer[0]
                continue
            end = 4 + buffer[3]
            if len(buffer) < end:
                return None
            if ~sum(buffer[2 : end - 1]) & 0xFF != buffer[end - 1]:
                del buffer[:2]
                continue
            packet = Packet(buffer[2], buffer[4], bytes(buffer[5 : end - 1]))
            del buffer[:end]
            return packet

    def encode_reply(self, reply: Reply) -> bytes:
        """Return the bytes of what a servo answers."""
        return self.encode(reply.servo, reply.error, reply.data)

    def reply(self, packet: Packet) -> Reply | None:
        """Return a received packet as a reply."""
        return Reply(packet.servo, packet.instruction, packet.parameters)


class DynamixelProtocol(ServoProtocol):
    """``FF FF FD 00 id length instruction parameters crc``, with ``FD`` after every ``FF FF FD`` inside.

    See the e-manual of Robotis, protocol 2.0; the CRC is CRC-16 with the polynomial 0x8005 over all before it.
    """

    address_size = 2

    def encode(self, servo: int, instruction: int, parameters: bytes = b"") -> bytes:
        """Return the bytes of a packet."""
        body = (bytes([instruction]) + parameters).replace(b"\xff\xff\xfd", b"\xff\xff\xfd\xfd")
        packet = b"\xff\xff\xfd\x00" + bytes([servo]) + (len(body) + 2).to_bytes(2, "little") + body
        return packet + crc16(packet).to_bytes(2, "little")

    def decode(self, buffer: bytearray) -> Packet | None:
        """Take the first whole packet out of ``buffer``; one with a wrong CRC is skipped."""
        while True:
            start = buffer.find(b"\xff\xff\xfd\x00")
            del buffer[: max(0, len(buffer) - 3) if start < 0 else start]
            if start < 0 or len(buffer) < 7:
                return None
            end = 7 + int.from_bytes(buffer[5:7], "little")
            if end < 10 or end > 1024:
                del buffer[:4]
                continue
            if len(buffer) < end:
                return None
            if crc16(buffer[: end - 2]) != int.from_bytes(buffer[end - 2 : end], "little"):
                del buffer[:4]
                continue
            body = bytes(buffer[8 : end - 2]).replace(b"\xff\xff\xfd\xfd", b"\xff\xff\xfd")
            packet = Packet(buffer[4], buffer[7], body)
            del buffer[:end]
            return packet

    def encode_reply(self, reply: Reply) -> bytes:
        """Return the bytes of what a servo answers."""
        return self.encode(reply.servo, STATUS, bytes([reply.error]) + reply.data)

    def reply(self, packet: Packet) -> Reply | None:
        """Return a received packet as a reply; None for the echo of an instruction."""
        if packet.instruction != STATUS or not packet.parameters:
            return None
        return Reply(packet.servo, packet.parameters[0], packet.parameters[1:])


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte << 8
        for _ in range(8):
            value = (value << 1) ^ (0x8005 if value & 0x8000 else 0)
        table.append(value & 0xFFFF)
    return tuple(table)


_CRC_TABLE = _crc_table()


def crc16(data: bytes | bytearray) -> int:
    """Return the CRC-16 of ``data`` (polynomial 0x8005, start 0, not reflected)."""
    value = 0
    for byte in data:
        value = (value << 8 & 0xFFFF) ^ _CRC_TABLE[(value >> 8) ^ byte]
    return value
