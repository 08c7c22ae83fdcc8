"""What the kinds of stop do: where the loop brakes they are alike, where the robot is asked itself they are not."""

import numpy as np
import pytest
from deployment_rig import Rig, VirtualClock, WanderingPolicy

from hardware.robots.driver import Driver, DriverConfig
from hardware.robots.fake import FakeRobot
from robot_rl.core.errors import HardwareError
from robot_rl.core.robot import Limits, StopKind
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.core.teleop import OperatorEvent

FAST = Limits(-np.ones(3), np.ones(3), 2 * np.ones(3), 20 * np.ones(3))
PERIOD = 0.01


class Silent(Driver):
    """A robot on a clock of the test that notes what it is sent, and lags behind it by 0.05."""

    def __init__(self, clock, unit="m"):
        spec = Spec({"state": ArraySpec((2,))}, ArraySpec((2,), unit=unit), 20.0)
        one = np.ones(2)
        super().__init__(spec, Limits(-one, one, one, 10 * one), DriverConfig(), clock=clock)
        self.sent = []

    def _open(self):
        self._measure(np.zeros(2))

    def _measure(self, place):
        rates = self.spec.action.unit.endswith("/s")
        self._measured({"state": place.astype(np.float32)}, np.zeros(2) if rates else place)

    def _send(self, action):
        self.sent.append(action)
        self._measure(action - 0.05)

    def _halt(self, kind):
        self.sent += self._to_standstill(kind, PERIOD)
        return True

    def _close(self):
        pass


def driven(unit="m"):
    """A driver whose command has just moved along its first element at 0.5 per second (or is that rate)."""
    clock = VirtualClock()
    robot = Silent(clock, unit)
    robot.connect()
    for k in range(10):
        clock.now += PERIOD
        robot.command(np.array([0.5, 0.0]) * (1.0 if unit == "m/s" else k * PERIOD))
    return robot


def test_a_hold_stays_where_the_robot_was_measured_and_a_controlled_stop_brakes_from_its_command():
    robot = driven()
    last = robot.sent[-1]
    (held,) = robot._to_standstill(StopKind.HOLD, PERIOD)
    np.testing.assert_array_equal(held, last - 0.05)
    path = np.array([last, *robot._to_standstill(StopKind.CONTROLLED, PERIOD)])
    steps = np.diff(path, axis=0)
    assert len(steps) == 5, "from 0.5 per second at 10 per second squared"
    assert (np.diff(steps[:, 0], prepend=0.5 * PERIOD) >= -10 * PERIOD**2 - 1e-12).all()
    assert steps[-1, 0] == pytest.approx(0.0, abs=1e-12)
    assert (steps[:-1, 0] > 0).all(), "it goes on a little, and never back"
    assert not steps[:, 1].any()


def test_rates_are_zero_at_once_in_a_hold_and_fall_to_zero_in_a_controlled_stop():
    robot = driven("m/s")
    (held,) = robot._to_standstill(StopKind.HOLD, PERIOD)
    assert not held.any()
    path = np.array(robot._to_standstill(StopKind.CONTROLLED, PERIOD))
    assert len(path) == 50, "from 0.5 at 1 per second"
    assert (np.diff(path[:, 0]) < 0).all()
    assert not path[-1].any()


def test_a_controlled_stop_of_a_robot_that_was_sent_nothing_lately_stays_where_its_command_was():
    robot = driven()
    robot._now.now += 1.0
    (only,) = robot._to_standstill(StopKind.CONTROLLED, PERIOD)
    np.testing.assert_array_equal(only, robot.sent[-1])
    fresh = Silent(VirtualClock())
    fresh.connect()
    (only,) = fresh._to_standstill(StopKind.CONTROLLED, PERIOD)
    np.testing.assert_array_equal(only, fresh.hold_command())


def test_both_kinds_leave_a_robot_that_takes_commands_and_power_off_one_that_does_not():
    robot = driven()
    for kind in (StopKind.HOLD, StopKind.CONTROLLED):
        assert robot.stop(kind)
        robot.command(np.zeros(2))
    assert robot.stop(StopKind.DRIVES_OFF)
    with pytest.raises(HardwareError, match="drives of the robot 'Silent' are off"):
        robot.command(np.zeros(2))


def commands_after(kind, upset):
    rig = Rig(WanderingPolicy(FakeRobot().spec, speed=0.03), faulty=True, limits=FAST, stop_kind=kind).start()
    while np.abs(rig.executor.safety.step).max() < 0.01:
        rig.tick()
    sent = len(rig.plain.commands)
    upset(rig)
    rig.tick(count=40)
    assert rig.mode == "stopped"
    return rig, np.array(rig.plain.commands[sent:])


@pytest.mark.parametrize(
    "upset",
    [
        lambda rig: rig.tick(OperatorEvent.EMERGENCY_STOP),
        lambda rig: setattr(rig.executor.targets, "wanted", None),  # an exception in the loop
    ],
)
def test_at_emergency_stops_and_faults_the_loop_brakes_alike_for_hold_and_controlled(upset):
    rig, braked = commands_after("controlled", upset)
    assert rig.plain.stops == [], "the robot itself is not asked"
    other, held = commands_after("hold", upset)
    assert other.plain.stops == []
    np.testing.assert_array_equal(held, braked)
    sizes = np.abs(np.diff(braked, axis=0)).max(1)
    assert sizes[0] > 0
    assert (np.diff(sizes) <= 1e-12).all()
    assert sizes[-1] == 0.0
    assert commands_after("drives_off", upset)[0].plain.stops == [StopKind.DRIVES_OFF]


@pytest.mark.parametrize("kind", list(StopKind))
def test_a_robot_that_does_not_take_a_command_is_asked_for_the_kind_that_was_chosen(kind):
    def fail(rig):
        rig.robot.faults.disconnected = True
        rig.robot.stop = rig.plain.stop

    rig, sent = commands_after(kind.value, fail)
    assert len(sent) == 0
    assert rig.plain.stops == [kind]
