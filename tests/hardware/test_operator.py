"""Several operator devices: the one that drives keeps its place, and only its own heartbeat counts."""

import dataclasses

import numpy as np
from deployment_rig import Rig

from hardware.control.operator import OperatorInbox
from hardware.transport import InProcessTransport
from robot_rl.core.teleop import OperatorEvent, OperatorInput


class Device:
    """Says what it is told to say; ``stamp`` None is a sign of life at every poll."""

    def __init__(self, source, clock):
        self.source, self.clock = source, clock
        self.motion, self.stamp, self.events = np.zeros(3), None, ()

    def poll(self):
        events, self.events = self.events, ()
        stamp = self.clock() if self.stamp is None else self.stamp
        return OperatorInput(stamp, 0, bool(self.motion.any()), self.motion, events, self.source)


def rig_with(*sources):
    rig = Rig()
    rig.operator_alive = False
    devices = [Device(source, rig.clock) for source in sources]
    rig.executor.operator._devices = devices
    devices[0].events = (OperatorEvent.ENABLE,)
    rig.tick()
    assert rig.mode == "auto"
    return rig, *devices


def test_the_loss_of_the_device_that_drives_counts_though_another_one_is_alive():
    rig, keyboard, console = rig_with("", "console")
    console.motion = np.array([1.0, 0, 0])
    rig.tick()
    assert (rig.mode, rig.reason) == ("human", "operator_motion")
    console.stamp = rig.clock()
    rig.tick(count=24)
    assert rig.mode == "human"
    rig.tick(count=3)
    assert (rig.mode, rig.reason) == ("hold", "operator_lost")
    keyboard.events = (OperatorEvent.TAKE_OVER,)
    rig.tick()
    assert rig.mode == "human"
    rig.tick(count=100)
    assert rig.mode == "human", "now the keyboard drives, and it is alive"


def test_nobody_drives_beside_the_one_who_holds():
    rig, keyboard, console = rig_with("", "console")
    console.motion = np.array([1.0, 0, 0])
    rig.tick()
    keyboard.motion = np.array([-1.0, 0, 0])
    keyboard.events = (OperatorEvent.TAKE_OVER,)
    rig.tick()
    assert rig.executor.operator.reading.source == "console"
    np.testing.assert_array_equal(rig.executor.operator.motion(1.0), [1, 0, 0])
    console.motion = np.zeros(3)
    rig.tick(count=2)
    assert rig.executor.operator.reading.source == ""


def test_a_take_over_counts_though_a_quiet_reading_followed_it():
    transport = InProcessTransport(quiet=True)
    inbox = OperatorInbox(transport.executor, None, 3, lambda: 1.0)
    quiet = np.zeros(3)
    transport.send_operator(OperatorInput(1.0, 0, False, quiet))
    inbox.poll()
    transport.send_operator(OperatorInput(1.0, 1, False, quiet, (OperatorEvent.TAKE_OVER,), "console"))
    transport.send_operator(OperatorInput(1.0, 2, False, quiet, (), "console"))
    assert inbox.poll()[0] == (OperatorEvent.TAKE_OVER,)
    assert inbox.reading.source == "console"


def test_letting_go_counts_though_a_held_reading_came_in_the_same_tick():
    transport = InProcessTransport(quiet=True)
    inbox = OperatorInbox(transport.executor, None, 3, lambda: 1.0)
    for number, held in enumerate((True, False)):
        transport.send_operator(OperatorInput(1.0, number, held, np.full(3, float(held))))
    inbox.poll()
    assert not inbox.reading.enabled
    assert not inbox.motion(1.0).any()


def test_a_shown_command_is_approached_at_the_operators_speed_and_not_overshot():
    rig, leader = rig_with("leader")
    posed = np.array([0.6, -0.4, 0.0])
    poll = leader.poll
    leader.poll = lambda: dataclasses.replace(poll(), enabled=True, target=posed)
    leader.events = (OperatorEvent.TAKE_OVER,)
    rig.tick()
    assert rig.mode == "human"
    commands = []
    for _ in range(300):
        rig.tick()
        commands.append(rig.executor.safety.command.copy())
    steps = np.diff(commands, axis=0)
    assert np.abs(steps).max() <= 0.5 * 1.0 / 100 + 1e-9, "half of the velocity limit of 1 per second"
    np.testing.assert_allclose(commands[-1], posed, atol=1e-6)
    assert (np.abs(commands - posed).max(0) <= np.abs(commands[0] - posed) + 1e-9).all(), "never beyond"
    assert (steps[:, 0] >= -1e-9).all()
    before = rig.executor.operator.dropped
    leader.poll = lambda: dataclasses.replace(poll(), enabled=True, target=np.array([np.nan, 0, 0]))
    rig.tick()
    assert rig.executor.operator.dropped == before + 1
