"""Keys through a pseudo terminal: the real path from the terminal driver to the operator's reading."""

import contextlib
import os
import termios
import time

import numpy as np
import pytest
from deployment_rig import Rig, VirtualClock

from hardware.teleop.keyboard import EVENT_KEYS, KeyboardTeleop, key_map, motion_keys
from hardware.teleop.script import DEMONSTRATION_SECONDS, KeyPress, ScriptedTeleop, load_script, parse_script
from robot_rl.core.errors import ConfigError, DataError, HardwareError
from robot_rl.core.teleop import OperatorEvent, Teleop


@pytest.fixture
def terminal():
    master, slave = os.openpty()
    yield master, slave
    for fd in (master, slave):
        with contextlib.suppress(OSError):
            os.close(fd)


@pytest.fixture
def keyboard(terminal):
    clock = VirtualClock()
    teleop = KeyboardTeleop(3, file_descriptor=terminal[1], clock=clock)
    teleop.connect()
    teleop.clock = clock
    yield teleop
    teleop.disconnect()


def press(terminal, text):
    os.write(terminal[0], text.encode())


def test_event_keys_are_delivered_once_and_in_order(terminal, keyboard):
    press(terminal, "tB r")
    assert keyboard.poll().events == (
        OperatorEvent.TAKE_OVER,
        OperatorEvent.HAND_BACK,
        OperatorEvent.EMERGENCY_STOP,
        OperatorEvent.RESET,
    )
    assert keyboard.poll().events == ()


def test_a_motion_key_counts_as_held_until_its_reports_stop(terminal, keyboard):
    press(terminal, "w")
    reading = keyboard.poll()
    assert reading.enabled
    np.testing.assert_array_equal(reading.motion, [1, 0, 0])
    keyboard.clock.now += 0.5  # the keyboard's own delay before it repeats
    assert keyboard.poll().enabled
    press(terminal, "w")
    keyboard.poll()
    keyboard.clock.now += 0.14
    assert keyboard.poll().enabled
    keyboard.clock.now += 0.02
    reading = keyboard.poll()
    assert not reading.enabled
    assert not reading.motion.any()


def test_keys_add_up_and_arrows_are_motion(terminal, keyboard):
    press(terminal, "\x1b[Ad")
    np.testing.assert_array_equal(keyboard.poll().motion, [1, -1, 0])
    press(terminal, "s\x1b")
    assert not keyboard.poll().motion[0]
    press(terminal, "[C")
    np.testing.assert_array_equal(keyboard.poll().motion, [0, -1, 0])
    press(terminal, "v")  # there are only three elements
    assert not keyboard.poll().events


# F1 in three dialects, End, Home, Delete, Ctrl-Right, Shift-Up, a focus report, Alt-n, Alt-w, and the cursor's place
@pytest.mark.parametrize(
    "sequence", ["[[A", "OP", "[11~", "[F", "[1~", "[3~", "[1;5C", "[1;2A", "[I", "n", "w", "[24;80R"]
)
@pytest.mark.parametrize("cut", [False, True])
def test_other_keys_of_several_characters_do_nothing(terminal, keyboard, sequence, cut):
    if cut:
        press(terminal, "\x1b" + sequence[:-1])
        assert keyboard.poll().events == ()
        press(terminal, sequence[-1])
    else:
        press(terminal, "\x1b" + sequence)
    reading = keyboard.poll()
    assert not reading.enabled
    assert reading.events == ()
    press(terminal, "w")
    assert keyboard.poll().motion[0] == 1, "the next key counts again"


@pytest.mark.parametrize("begun", ["\x1b", "\x1b[", "\x1bO", "\x1b[1;", "\x1b\x1b"])
def test_the_emergency_stop_works_in_the_middle_of_anything(terminal, keyboard, begun):
    press(terminal, begun)
    keyboard.poll()
    press(terminal, " ")
    assert keyboard.poll().events == (OperatorEvent.EMERGENCY_STOP,)


def test_a_terminal_that_is_gone_gives_no_more_signs_of_life(terminal, keyboard):
    press(terminal, "w")
    stamp = keyboard.poll().stamp
    os.close(terminal[0])
    keyboard.clock.now += 0.1
    reading = keyboard.poll()
    assert reading.stamp == stamp
    assert not reading.enabled
    keyboard.clock.now += 1.0
    assert keyboard.poll().stamp == stamp


def test_the_terminal_is_restored(terminal):
    before = termios.tcgetattr(terminal[1])
    with KeyboardTeleop(2, file_descriptor=terminal[1]) as teleop:
        assert termios.tcgetattr(terminal[1]) != before
        assert isinstance(teleop, Teleop)
    assert termios.tcgetattr(terminal[1]) == before
    teleop.disconnect()


def test_standard_input_that_is_no_terminal_is_refused():
    read, write = os.pipe()
    with pytest.raises(HardwareError, match="needs a terminal"):
        KeyboardTeleop(2, file_descriptor=read).connect()
    os.close(read)
    os.close(write)


def test_the_key_map_names_every_key_and_no_key_means_two_things():
    text = key_map(6, ("x", "y", "z", "rx", "ry", "rz"))
    assert all(f"  {name} + / -" in text for name in ("x", "rz"))
    assert "emergency stop" in text
    assert not set(EVENT_KEYS) & set(motion_keys(8))


def test_a_script_is_parsed_and_mistakes_name_their_line():
    assert parse_script("1.5 w 0.3  # go\n\n0.5 space") == [KeyPress(0.5, " "), KeyPress(1.5, "w", 0.3)]
    with pytest.raises(DataError, match="line 2: unknown key 'Z'"):
        parse_script("1 w\n2 Z")
    with pytest.raises(DataError, match="line 1: expected"):
        parse_script("soon w")
    with pytest.raises(ConfigError, match="demonstration"):
        load_script("nowhere.keys")
    whole, half = load_script("demonstration"), load_script("demonstration", seconds=DEMONSTRATION_SECONDS / 2)
    assert [p.key for p in whole] == [p.key for p in half]
    assert half[-1].time == whole[-1].time / 2


def test_a_scripted_operator_presses_keys_through_the_terminal():
    teleop = ScriptedTeleop(3, [KeyPress(0.0, "n"), KeyPress(0.05, "w", 0.2), KeyPress(0.3, "b")])
    teleop.connect()
    try:
        time.sleep(0.1)
        assert not teleop.poll().events  # the clock of the script has not been started
        teleop.start()
        events, moved = [], False
        end = time.monotonic() + 3.0
        while OperatorEvent.HAND_BACK not in events and time.monotonic() < end:
            reading = teleop.poll()
            events += reading.events
            moved |= bool(reading.motion[0] == 1.0)
            time.sleep(0.005)
        assert events == [OperatorEvent.ENABLE, OperatorEvent.HAND_BACK]
        assert moved
    finally:
        teleop.disconnect()


def test_a_broken_device_counts_as_a_lost_operator(caplog):
    class Broken:
        def poll(self):
            raise OSError("unplugged")

    rig = Rig()
    rig.executor.operator._devices = [Broken()]
    rig.start()
    rig.tick(count=10)
    assert rig.mode == "auto"
    assert rig.executor.operator.failed
    assert "operator device failed" in caplog.text
