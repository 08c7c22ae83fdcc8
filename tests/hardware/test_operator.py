"""Several operator devices: the one that drives keeps its place, and only its own heartbeat counts."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from deployment_rig import Rig, WanderingPolicy

from hardware.control.executor import Executor, ExecutorConfig
from hardware.control.operator import OperatorInbox
from hardware.policy_process import PolicyServer
from hardware.robots.fake import FakeRobot
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
    assert (steps[:, 0] >= -1e-8).all(), "rounding of the limits is a part in a million"
    before = rig.executor.operator.dropped
    leader.poll = lambda: dataclasses.replace(poll(), enabled=True, target=np.array([np.nan, 0, 0]))
    rig.tick()
    assert rig.executor.operator.dropped == before + 1


# ---- devices in threads of their own -----------------------------------------------------------------------------


def wait_until(condition, what, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.002)


class Stick:
    """A device whose library hangs when it is told to, in the middle of a poll."""

    def __init__(self):
        self.events, self.motion, self.polled_by = [OperatorEvent.ENABLE], np.zeros(3), set()
        self.free, self.hanging, self.error = threading.Event(), threading.Event(), None
        self.free.set()

    def poll(self):
        self.polled_by.add(threading.current_thread())
        if self.error is not None:
            raise self.error
        if not self.free.is_set():
            self.hanging.set()
            self.free.wait(30.0)
            self.hanging.clear()
        events, self.events = tuple(self.events), []
        return OperatorInput(time.monotonic(), 0, bool(self.motion.any()), self.motion, events, "stick")


@pytest.fixture
def live():
    """An executor in real time with a policy that answers at once, driven by its operator's stick."""
    stick, transport = Stick(), InProcessTransport(quiet=True)
    robot = FakeRobot(3)
    server = PolicyServer(WanderingPolicy(robot.spec), transport.policy)
    transport.on_observation = lambda: server.serve_once()
    config = ExecutorConfig(
        execute_steps=4, blend_seconds=0.0, max_state_age=5.0, operator_timeout=0.5, realtime_priority=0
    )
    executor = Executor(robot, transport.executor, config, teleop=stick)
    executor.connect()
    stop = threading.Event()
    loop = threading.Thread(target=executor.run, args=(stop,))
    loop.start()
    yield SimpleNamespace(
        executor=executor, arbiter=executor.arbiter, stick=stick, transport=transport, loop=loop, stop=stop
    )
    stick.free.set()
    stop.set()
    loop.join(10.0)
    executor.shut_down()
    wait_until(lambda: not any(one.is_alive() for one in stick.polled_by), "the end of the device's thread")


def in_mode(live, mode):
    return lambda: live.arbiter.mode.value == mode


def test_a_device_that_hangs_while_it_drives_holds_the_robot_and_stops_no_watchdog(live, caplog):
    executor, stick = live.executor, live.stick
    wait_until(in_mode(live, "auto"), "driving by the policy")
    stick.motion = np.array([1.0, 0.0, 0.0])
    wait_until(in_mode(live, "human"), "the takeover")
    ticks = executor.lateness.count + executor.missed_ticks
    stick.free.clear()
    wait_until(stick.hanging.is_set, "the hang")
    last = executor.operator.reading.stamp
    wait_until(lambda: live.arbiter.reason == "operator_lost", "the hold")
    when = next(at for at, _, reason in live.arbiter.changes if reason == "operator_lost")
    ticked = executor.lateness.count + executor.missed_ticks - ticks
    assert live.arbiter.mode.value == "hold"
    assert when - last > executor.config.operator_timeout
    assert ticked >= 40, "the loop goes on meanwhile: 0.5 s are 50 ticks"
    wait_until(lambda: not executor.safety.moving, "standing still")
    place = executor.safety.command.copy()
    ticks = executor.lateness.count
    wait_until(lambda: executor.lateness.count > ticks + 10, "further ticks")
    np.testing.assert_array_equal(executor.safety.command, place)
    live.transport.set_estop(True)
    wait_until(in_mode(live, "stopped"), "an emergency stop from elsewhere")
    live.transport.set_estop(False)
    stick.motion, stick.events = np.zeros(3), [OperatorEvent.RESET]
    stick.free.set()
    wait_until(in_mode(live, "idle"), "the reset by the device that is back")
    assert not executor.operator.failed
    assert "exception" not in caplog.text


def test_a_device_is_polled_beside_the_loop_and_within_it_where_ticks_are_called(live):
    wait_until(in_mode(live, "auto"), "driving by the policy")
    assert live.loop not in live.stick.polled_by
    assert len(live.stick.polled_by) == 1
    rig, stick = Rig(), Stick()
    rig.executor.operator._devices = [stick]
    rig.operator_alive = False
    rig.tick()
    assert stick.polled_by == {threading.current_thread()}


def test_a_device_that_hangs_does_not_hold_up_the_end(live):
    wait_until(in_mode(live, "auto"), "driving by the policy")
    live.stick.free.clear()
    wait_until(live.stick.hanging.is_set, "the hang")
    live.stop.set()
    live.loop.join(10.0)
    assert not live.loop.is_alive()
    assert live.stick.hanging.is_set()
    assert not live.executor.safety.moving


def test_every_event_of_a_device_beside_the_loop_arrives_once(live):
    wait_until(in_mode(live, "auto"), "driving by the policy")
    for _ in range(5):
        live.stick.events = [OperatorEvent.TAKE_OVER, OperatorEvent.HOLD]
        wait_until(lambda: not live.stick.events, "the next poll")
        ticks = live.executor.lateness.count
        wait_until(lambda before=ticks: live.executor.lateness.count > before + 2, "further ticks")
    asked = [event for _, event in live.executor.times.events]
    assert asked == [OperatorEvent.ENABLE] + 5 * [OperatorEvent.TAKE_OVER, OperatorEvent.HOLD]


def test_a_device_beside_the_loop_that_raises_counts_as_lost(live, caplog):
    wait_until(in_mode(live, "auto"), "driving by the policy")
    live.stick.motion = np.ones(3)
    wait_until(in_mode(live, "human"), "the takeover")
    live.stick.error = OSError("unplugged")
    wait_until(lambda: live.arbiter.reason == "operator_lost", "the hold")
    assert live.executor.operator.failed == [live.stick]
    assert "operator device failed" in caplog.text
    assert "unplugged" in caplog.text
