"""A serial bus of servos: read and write registers by name, of one servo or of all at once."""

from __future__ import annotations

import logging
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hardware.servo.family import Family
from hardware.servo.protocol import PING, Reply
from robot_rl.core.errors import HardwareError

logger = logging.getLogger(__name__)

_PORT_ERRORS = (OSError, termios.error)
_SLICE = 0.004
"""Seconds that one read waits at most; the reply's deadline is looked at between reads."""
_ATTEMPTS = 3
"""How often one servo is asked before it counts as absent; where many are read at once, the next reading does."""
_LINK_SECONDS = 0.02
"""What adapters and servos may add to the time on the wire: USB adapters hold bytes back for up to 16 ms."""


class ServoAlarmError(HardwareError):
    """A servo protects itself (heat, load, voltage): asking again does not help."""


class ServoBus:
    """One serial port with servos of one family on it; used by one thread at a time."""

    def __init__(self, port: str, family: Family, baud: int = 0) -> None:
        """Remember the port.

        Args:
            port: path of the serial device, for example ``/dev/ttyACM0``.
            family: kind of the servos.
            baud: bits per second; 0 takes the family's.
        """
        self.port, self.family, self.baud = port, family, baud or family.baud
        self._serial: Any = None
        self._buffer = bytearray()

    def open(self) -> None:
        """Open the port for this process alone; `HardwareError` if it is absent or taken."""
        import serial

        try:
            self._serial = serial.Serial(self.port, self.baud, timeout=_SLICE, write_timeout=0.2, exclusive=True)
        except (*_PORT_ERRORS, ValueError) as error:  # pyserial's own are OSErrors
            raise HardwareError(f"serial port '{self.port}' cannot be opened: {_reason(error)}") from error

    def close(self) -> None:
        """Close the port; safe to call twice."""
        if self._serial is not None:
            self._serial.close()
            self._serial = None

    def ping(self, servo: int) -> bool:
        """Return whether a servo answers at address ``servo``."""
        packet = self.family.protocol.encode(servo, PING)
        return any(list(self._exchange(packet, [servo], 4, missing=True)) for _ in range(_ATTEMPTS))

    def scan(self, servos: Sequence[int] = range(1, 21)) -> list[int]:
        """Return the addresses among ``servos`` at which a servo answers."""
        return [servo for servo in servos if self.ping(servo)]

    def read(self, servo: int, register: str) -> int:
        """Return the number in a register of one servo."""
        where = self.family.registers[register]
        packet = self.family.protocol.read(servo, where.address, where.size)
        return self._patiently(lambda: next(self._numbers(packet, [servo], register))[1])

    def write(self, servo: int, register: str, value: int) -> None:
        """Write a register of one servo, which acknowledges it."""
        where = self.family.registers[register]
        packet = self.family.protocol.write(servo, where.address, where.pack(value))
        for reply in self._patiently(lambda: list(self._exchange(packet, [servo], 0))):
            self._check(reply, f"writing {register}")

    def set(self, servo: int, register: str, value: int) -> None:
        """Write a register and read it back; `HardwareError` if the servo did not take the value."""
        self.write(servo, register, value)
        found = self.read(servo, register)
        if found != value:
            raise HardwareError(f"servo {servo} kept {register} at {found} when told {value}")

    def sync_read(self, servos: Sequence[int], register: str) -> dict[int, int]:
        """Return the numbers in a register of several servos, read in one exchange."""
        where = self.family.registers[register]
        return dict(self._numbers(self.family.protocol.sync_read(servos, where.address, where.size), servos, register))

    def sync_write(self, register: str, values: Mapping[int, int]) -> None:
        """Write a register of several servos in one packet, which none of them acknowledges."""
        where = self.family.registers[register]
        self._send(self.family.protocol.sync_write(where.address, {s: where.pack(v) for s, v in values.items()}))

    def _patiently(self, call: Callable[[], Any]) -> Any:
        for _ in range(_ATTEMPTS - 1):
            try:
                return call()
            except ServoAlarmError:  # noqa: PERF203 - three times at most
                raise
            except HardwareError as error:
                logger.debug("asked again: %s", error)
        return call()

    def _numbers(self, packet: bytes, servos: Sequence[int], register: str) -> Iterator[tuple[int, int]]:
        where = self.family.registers[register]
        for reply in self._exchange(packet, servos, where.size):
            self._check(reply, f"reading {register}")
            if len(reply.data) != where.size:
                raise HardwareError(f"servo {reply.servo} gave {len(reply.data)} bytes for {register}")
            yield reply.servo, where.unpack(reply.data)

    def _exchange(self, packet: bytes, servos: Sequence[int], size: int, *, missing: bool = False) -> Iterator[Reply]:
        """Send ``packet`` and yield the replies of ``servos``; a missing one is an error unless ``missing``."""
        self._send(packet)
        wire = 10.0 * (len(packet) + len(servos) * (size + 11)) / self.baud
        deadline = time.monotonic() + wire + _LINK_SECONDS
        awaited = list(servos)
        while awaited:
            found = self.family.protocol.decode(self._buffer)
            reply = None if found is None else self.family.protocol.reply(found)
            if reply is not None and reply.servo in awaited:
                awaited.remove(reply.servo)
                yield reply
            elif found is None:
                if time.monotonic() > deadline:
                    if not missing:
                        names = ", ".join(map(str, awaited))
                        raise HardwareError(f"no reply of servo {names} on '{self.port}'")
                    return
                self._receive()

    def _send(self, packet: bytes) -> None:
        if self._serial is None:
            raise HardwareError(f"serial port '{self.port}' is closed")
        try:
            self._buffer.clear()
            self._serial.reset_input_buffer()  # a late reply must not be taken for the next one
            self._serial.write(packet)
        except _PORT_ERRORS as error:
            raise HardwareError(f"serial port '{self.port}' failed: {_reason(error)}") from error

    def _receive(self) -> None:
        try:
            self._buffer += self._serial.read(max(1, self._serial.in_waiting))
        except _PORT_ERRORS as error:
            raise HardwareError(f"serial port '{self.port}' failed: {_reason(error)}") from error

    def _check(self, reply: Reply, doing: str) -> None:
        """Raise if a reply carries an error: `ServoAlarmError` where the servo protects itself."""
        if not reply.error:
            return
        alarms = reply.error
        if "alarm" in self.family.registers:  # Dynamixel: bit 7 says that there is an alarm, the others what failed
            if not reply.error & 0x80:
                raise HardwareError(f"servo {reply.servo} refused {doing} (error {reply.error})")
            where = self.family.registers["alarm"]
            packet = self.family.protocol.read(reply.servo, where.address, where.size)
            alarms = next((int(one.data[0]) for one in self._exchange(packet, [reply.servo], 1) if one.data), 0)
        named = [text for bit, text in self.family.alarms.items() if alarms & bit]
        raise ServoAlarmError(f"servo {reply.servo} protects itself: {', '.join(named) or f'alarm {alarms}'}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
