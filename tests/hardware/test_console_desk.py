"""The console without a browser: who may, how long a heartbeat lasts, where a target leads, what the page says."""

import numpy as np
import pytest
from deployment_rig import Rig, VirtualClock

from hardware.console import view
from hardware.console.desk import SOURCE, Desk, pull
from hardware.transport import ExecutorStatus
from robot_rl.core.spec import ArraySpec
from robot_rl.core.teleop import OperatorEvent

X = np.array([1.0, 0.0, 0.0])


@pytest.fixture
def desk():
    clock = VirtualClock()
    desk = Desk(3, clock=clock)
    desk.clock = clock
    desk.command = lambda: np.zeros(3)
    desk.speed = np.full(3, 0.5)
    return desk


class ConsoleRig(Rig):
    """A deployment whose operator is a desk."""

    def __init__(self, **config):
        super().__init__(**config)
        self.desk = Desk(3, clock=self.clock)
        self.desk.command = lambda: self.executor.safety.command
        self.desk.speed = self.executor.targets.speed
        self.operator_alive = False
        self.executor.operator._devices = [self.desk]

    def until_auto(self):
        assert self.desk.ask(OperatorEvent.ENABLE, 1) == ""
        self.tick()
        assert self.mode == "auto"
        return self

    def held(self, ticks, tab=1):
        """Tick with the button held: a heartbeat every 50 ms."""
        for k in range(ticks):
            if k % 5 == 0:
                assert self.desk.hold(tab) == ""
            self.tick()


def test_a_held_button_takes_over_within_a_tick_and_keeps_control():
    rig = ConsoleRig().until_auto()
    rig.desk.hold(1)
    rig.tick()
    assert (rig.mode, rig.reason) == ("human", "operator_takeover")
    rig.held(200)
    assert rig.mode == "human"
    events = [event for _, event in rig.executor.times.events]
    assert events == [OperatorEvent.ENABLE, OperatorEvent.TAKE_OVER]


def test_without_heartbeats_the_wish_is_neutral_after_200_ms_and_the_robot_holds_after_250():
    rig = ConsoleRig().until_auto()
    rig.held(20)
    rig.desk.place(1, [0.9, 0, 0])
    rig.held(5)
    assert rig.executor.targets.human is not None
    last = rig.desk._beat
    moving = []
    while rig.mode == "human":
        rig.tick()
        moving.append((rig.clock.now - last, abs(rig.executor.operator.motion(9.0)).max()))
        assert len(moving) < 100
    assert all(size > 0.5 for age, size in moving if age < 0.2)
    assert all(size == 0 for age, size in moving if age > 0.22)
    assert moving[-1][0] == pytest.approx(0.27, abs=0.02)
    assert rig.reason == "operator_lost"
    rig.tick(count=60)
    assert rig.mode == "hold", "never back to the policy by itself"
    assert not rig.moved(10).any()


def test_a_key_that_is_kept_down_drives_only_once_it_repeats():
    rig = ConsoleRig().until_auto()
    rig.desk.hold(1, key=True)
    rig.tick(count=25)
    rig.desk.place(1, [0.9, 0, 0])
    rig.tick(count=24)
    assert rig.mode == "human", "the pause before a key's repetition is no loss"
    assert not rig.executor.operator.motion(9.0).any(), "but no wish either"
    for _ in range(5):
        rig.desk.hold(1, key=True)
        rig.tick(count=3)
        assert rig.executor.operator.motion(9.0)[0] > 0
    rig.tick(count=28)
    assert (rig.mode, rig.reason) == ("hold", "operator_lost")
    events = [event for _, event in rig.executor.times.events]
    assert events.count(OperatorEvent.TAKE_OVER) == 1


def test_a_target_is_reached_and_not_passed():
    rig = ConsoleRig().until_auto()
    rig.held(40)
    target = rig.executor.safety.command + np.array([0.3, -0.1, 0.0])
    rig.desk.place(1, target)
    path = []
    for _ in range(60):
        rig.held(5)
        path.append(rig.executor.safety.command.copy())
    path = np.array(path)
    np.testing.assert_allclose(path[-1], target, atol=5e-3)
    assert path[:, 0].max() < target[0] + 5e-3
    along = path[5:30] - path[0]
    assert np.abs(along[:, 1] + along[:, 0] / 3).max() < 0.02, "straight"


def test_the_first_tab_that_takes_over_holds_control_and_stop_is_everybodys(desk):
    assert desk.hold(1) == ""
    assert desk.hold(2) == "Tab 1 has control."
    assert desk.jog(2, 0, 1.0) == desk.place(2, X) == desk.ask(OperatorEvent.ENABLE, 2) == "Tab 1 has control."
    assert desk.ask(OperatorEvent.EMERGENCY_STOP, 2) == desk.ask(OperatorEvent.HOLD, 3) == ""
    assert desk.poll().events == (OperatorEvent.TAKE_OVER, OperatorEvent.EMERGENCY_STOP, OperatorEvent.HOLD)
    assert desk.holder == 1
    desk.clock.now += 1.9
    assert desk.hold(2) == "Tab 1 has control."
    desk.clock.now += 0.2
    assert desk.holder is None
    assert desk.hold(2) == ""
    assert desk.holder == 2


def test_closing_the_tab_that_drives_is_neutral_at_once(desk):
    desk.jog(1, 1, -0.5)
    np.testing.assert_array_equal(desk.poll().motion, [0, -0.5, 0])
    desk.leave(2)
    assert desk.poll().enabled
    desk.leave(1)
    reading = desk.poll()
    assert not reading.enabled
    assert not reading.motion.any()
    assert desk.holder is None


def test_jogging_moves_one_element_while_it_is_held(desk):
    desk.jog(1, 2, 1.0)
    desk.clock.now += 0.19
    np.testing.assert_array_equal(desk.poll().motion, [0, 0, 1])
    desk.jog(1, 0, -1.0)
    np.testing.assert_array_equal(desk.poll().motion, [-1, 0, 1])
    desk.clock.now += 0.21
    assert not desk.poll().motion.any()
    desk.jog(1, 0, 1.0)
    np.testing.assert_array_equal(desk.poll().motion, [1, 0, 0])


def test_the_stamp_is_the_last_heartbeat_and_nothing_else(desk):
    assert desk.poll().stamp == 0.0
    desk.hold(1)
    beat = desk.clock.now
    desk.clock.now += 5.0
    desk.ask(OperatorEvent.EMERGENCY_STOP, 1)
    reading = desk.poll()
    assert (reading.stamp, reading.source) == (beat, SOURCE)


def test_no_target_leads_anywhere_where_the_command_is_unknown_or_the_element_is_a_rate(desk):
    desk.hold(1)
    desk.place(1, X)
    assert desk.poll().motion[0] == 1.0
    desk.speed = np.zeros(3)
    assert not desk.poll().motion.any()
    desk.speed, desk.command = np.ones(3), lambda: None
    assert not desk.poll().motion.any()
    assert "no place" in desk.place(1, [np.nan, 0, 0])
    assert "no place" in desk.place(1, [0.0])


@pytest.mark.parametrize("event", [OperatorEvent.EMERGENCY_STOP, OperatorEvent.HOLD, OperatorEvent.HAND_BACK])
def test_a_stop_forgets_the_target(desk, event):
    desk.place(1, X)
    desk.ask(event, 1)
    assert desk.target is None


def test_the_pull_keeps_its_direction_and_slows_down_near_the_target():
    near = np.array([0.2, 0.2, 0.0])
    np.testing.assert_allclose(pull(np.array([2.0, -1.0, 3.0]), near), [1.0, -0.5, 0.0])
    np.testing.assert_allclose(pull(np.array([0.1, 0.0, 0.0]), near), [0.5, 0.0, 0.0])
    assert not pull(np.array([1e-5, 0, 0]), near).any()


# ---- what the page says ----------------------------------------------------------------------------------------------

ACTION = ArraySpec((2,), names=("x", "<b>"), unit="m,rad/s", low=(-1.0, -2.0), high=(1.0, 2.0))


def test_the_banner_says_who_drives_why_and_what_can_follow():
    stopped = ExecutorStatus("stopped", "none", "tracking_error", 3, estop_latched=True)
    text = view.banner(stopped, 0.1)
    assert "STOPPED (latched) · tracking error" in text
    assert "nobody writes" in text
    assert "Reset moves nothing" in text
    assert "tab 2 has control" in view.banner(ExecutorStatus("human", "human", "operator_takeover", 3), 0.0, 2)
    assert "operator writes" in view.banner(ExecutorStatus("human", "human", "operator_takeover", 3), 0.0)


def test_a_silent_executor_is_not_shown_as_if_it_were_well():
    status = ExecutorStatus("auto", "policy", "enabled", 3)
    assert "AUTO" not in view.banner(status, 1.2)
    assert "SILENT FOR 1 s" in view.banner(status, 1.2)
    assert "NO EXECUTOR" in view.banner(None, np.inf)


def test_elements_are_shown_within_their_range_and_names_cannot_inject():
    status = ExecutorStatus("auto", "policy", "", 0, command=[0.5, 0.0], measured=[0.99, np.nan])
    text = view.elements(ACTION, status)
    assert "+0.990 m" in text
    assert "+0.000 rad/s" in text, "the command, where nothing was measured"
    assert "width:99.5%;height:100%;background:#c23b31" in text, "red near the end of the range"
    assert "<b>" not in text
    assert "&lt;b&gt;" in text
    assert view.elements(ACTION, None).count("unknown") == 2
    assert "unbounded" in view.elements(ArraySpec((1,)), status)


def test_only_interventions_are_counted_as_such():
    status = ExecutorStatus("auto", "policy", "", 0, counters={"chunks_received": 9, "clearance_limited": 2})
    status.counters |= {"velocity_limited": 30, "command_failures": 1}
    text = view.counters(status)
    assert text.index("velocity limited") < text.index("clearance limited") < text.index("command failures")
    assert "chunks" not in text
    assert "No intervention" in view.counters(ExecutorStatus("idle", "none", "", 0))


def test_the_record_says_what_is_left_of_the_disk_and_what_failed():
    status = ExecutorStatus("auto", "policy", "", 0)
    assert "Nothing is recorded" in view.recording(status)
    status.recording = {"active": True, "steps": 12, "dropped": 1, "episodes": 2, "free_bytes": 3.2e9, "failure": None}
    text = view.recording(status)
    for part in ("recording", "12 (1 dropped)", "3.2 GB"):
        assert part in text
    status.recording["failure"] = "disk full"
    assert "ENDED: disk full" in view.recording(status)
    assert view.size_text(999) == "999 B"
    assert view.size_text(1.5e15) == "1.5e+03 TB"


def test_a_camera_tells_its_age_and_a_frozen_one_stands_out():
    assert view.camera_label("images.front", 0.031) == "front · 31 ms"
    assert "STALE" in view.camera_label("images.front", 0.5)


def test_the_loop_is_told_in_figures():
    status = ExecutorStatus("auto", "policy", "", 0, loop={"rate_hz": 99.97, "lateness_p99_ms": 0.123})
    assert "100.0 Hz" in view.loop(status)
    assert "0.12 ms" in view.loop(status)
    assert view.loop(None) == ""
