"""Gamepad and 3-D mouse on fake backends: dead-man, deadband, buttons once, neutral on loss and on silence."""

from types import SimpleNamespace

import numpy as np
import pytest
from deployment_rig import VirtualClock

from hardware.teleop.axes import AxesConfig, AxesReading, AxesTeleop
from hardware.teleop.build import build_teleop
from hardware.teleop.gamepad import Gamepad, GamepadConfig
from hardware.teleop.spacemouse import SpaceMouse, SpaceMouseBackend, SpaceMouseConfig
from robot_rl.core.errors import ConfigError, HardwareError, MissingDependencyError
from robot_rl.core.teleop import OperatorEvent, Teleop


class FakePad:
    def __init__(self, axes=6, buttons=11):
        self.axes, self.buttons, self.gone, self.opened = [0.0] * axes, [False] * buttons, False, 0

    def open(self):
        self.opened += 1

    def read(self):
        if self.gone:
            raise OSError("pulled out")
        return AxesReading(list(self.axes), list(self.buttons))

    def close(self):
        self.opened -= 1


@pytest.fixture
def pad():
    return FakePad()


@pytest.fixture
def gamepad(pad):
    device = Gamepad(6, backend=pad, clock=VirtualClock())
    device.connect()
    return device


def test_a_gamepad_moves_only_while_the_dead_man_button_is_held(pad, gamepad):
    assert isinstance(gamepad, Teleop)
    pad.axes[0], pad.axes[4] = 1.0, -1.0
    reading = gamepad.poll()
    assert not reading.enabled
    assert not reading.motion.any()
    pad.buttons[4] = True
    reading = gamepad.poll()
    assert reading.enabled
    np.testing.assert_allclose(reading.motion, [1, 0, 0, 0, -1, 0])
    pad.buttons[4] = False
    assert not gamepad.poll().motion.any()


def test_triggers_that_rest_at_minus_one_move_nothing(pad, gamepad):
    pad.axes[2] = pad.axes[5] = -1.0
    pad.buttons[4] = True
    assert not gamepad.poll().enabled


def test_sticks_that_do_not_come_back_to_zero_are_at_rest_and_motion_begins_at_zero(pad, gamepad):
    pad.buttons[4] = True
    pad.axes[0] = 0.09
    assert not gamepad.poll().enabled
    pad.axes[0] = 0.1 + 0.45
    assert gamepad.poll().motion[0] == pytest.approx(0.5)
    pad.axes[0] = float("nan")
    assert not gamepad.poll().motion.any()


def test_a_button_asks_once_and_not_for_what_was_pressed_before_the_start(pad):
    pad.buttons[7] = True
    device = Gamepad(6, backend=pad, clock=VirtualClock())
    device.connect()
    assert device.poll().events == ()
    pad.buttons[7], pad.buttons[1], pad.buttons[3] = False, True, True
    assert device.poll().events == (OperatorEvent.EMERGENCY_STOP, OperatorEvent.TAKE_OVER)
    assert device.poll().events == ()
    pad.buttons[1] = False
    device.poll()
    pad.buttons[1] = True
    assert device.poll().events == (OperatorEvent.EMERGENCY_STOP,)


def test_a_gamepad_that_is_pulled_out_is_neutral_and_its_heartbeat_stops(pad):
    clock = VirtualClock()
    device = Gamepad(6, backend=pad, clock=clock)
    device.connect()
    pad.axes[0], pad.buttons[4] = 1.0, True
    assert device.poll().enabled
    last = device.poll().stamp
    pad.gone = True
    clock.now += 1.0
    reading = device.poll()
    assert reading.stamp == last
    assert not reading.enabled
    assert not reading.motion.any()
    pad.gone = False
    assert device.poll().stamp == last  # it stays lost: somebody has to look
    device.disconnect()
    assert pad.opened == 0


def test_axes_and_buttons_can_be_assigned_and_mistakes_are_named(pad):
    layout = AxesConfig(axes=(1, 0), signs=(-1.0, 2.0), deadband=0.0, buttons={5: "success"})
    device = Gamepad(2, GamepadConfig(layout=layout), backend=pad)
    device.connect()
    pad.axes[:2] = [0.25, 0.5]
    pad.buttons[5] = True
    reading = device.poll()
    np.testing.assert_allclose(reading.motion, [-0.5, 0.5])
    assert reading.events == (OperatorEvent.SUCCESS,)
    with pytest.raises(ConfigError, match="2 entries"):
        AxesTeleop(2, pad, AxesConfig(axes=(0,)), {}, name="pad")
    with pytest.raises(ConfigError, match="emergency_stop"):
        AxesTeleop(2, pad, AxesConfig(buttons={0: "dance"}), {}, name="pad")


class FakeMouse:
    """A device of pyspacemouse: each read takes one report in, and unplugged it repeats the last state."""

    def __init__(self):
        self.reports, self.connected, self.count = [], True, 0
        self.state = SimpleNamespace(t=-1.0, x=0.0, y=0.0, z=0.0, roll=0.0, pitch=0.0, yaw=0.0, buttons=[0, 0])

    def read(self):
        if self.reports:
            self.count += 1
            self.state = SimpleNamespace(**{**vars(self.state), **self.reports.pop(0), "t": float(self.count)})
        return self.state


def mouse_on(fake, clock, **config):
    config = SpaceMouseConfig(**config)
    backend = SpaceMouseBackend(config, clock)
    backend._device = fake
    backend._heard = clock.now
    backend.open = lambda: None
    device = SpaceMouse(6, config, backend, clock=clock)
    device.connect()
    return device


def test_a_3d_mouse_takes_in_all_reports_and_a_silent_deflection_is_none():
    clock, fake = VirtualClock(), FakeMouse()
    device = mouse_on(fake, clock)
    fake.reports = [{"x": 0.2}, {"x": 1.0}, {"yaw": -1.0, "buttons": [1, 0]}]
    reading = device.poll()
    np.testing.assert_allclose(reading.motion, [1, 0, 0, 0, 0, -1])
    assert reading.enabled
    assert reading.events == (OperatorEvent.HAND_BACK,)
    clock.now += 0.15
    assert device.poll().enabled
    clock.now += 0.1  # the receiver hangs: the last state would go on for ever
    reading = device.poll()
    assert not reading.enabled
    assert not reading.motion.any()
    assert reading.stamp == clock.now  # at rest it is silent as well, so that silence alone is no loss
    fake.connected = False
    clock.now += 1.0
    assert device.poll().stamp < clock.now


@pytest.mark.parametrize("name", ["gamepad", "spacemouse"])
def test_without_device_or_library_connecting_says_what_is_missing(name):
    device = build_teleop(name, 6)
    with pytest.raises((HardwareError, MissingDependencyError), match=r"teleop|gamepad|3-D mouse"):
        device.connect()
