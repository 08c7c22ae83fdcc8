"""The executor: faults end in a named, controlled stop within one tick; nobody moves the robot unasked."""

import logging

import numpy as np
import pytest
from deployment_rig import Rig, WanderingPolicy

from hardware.control.arbiter import REASONS
from hardware.control.executor import Executor, ExecutorConfig, ticks_per_step
from hardware.robots.fake import FakeRobot
from hardware.safety.flags import HOLDING_FAULTS, STOPPING_FAULTS, SafetyFlag, flag_names
from hardware.transport import InProcessTransport
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.policy import ActionChunk
from robot_rl.core.robot import Limits, StopKind
from robot_rl.core.teleop import OperatorEvent

FAST = Limits(-np.ones(3), np.ones(3), 2 * np.ones(3), 20 * np.ones(3))


def brakes_to_a_stop(rig):
    """Whether the command slows in every tick from now on until it stands still."""
    sizes = rig.moved(40)
    return (np.diff(sizes) <= 1e-12).all() and sizes[-1] == 0.0


def test_the_policy_drives_once_enabled_and_not_before():
    rig = Rig()
    assert not rig.moved(20).any()
    assert rig.mode == "idle"
    rig.start()
    assert rig.moved(40).max() > 0
    assert rig.executor.safety.counts["post_check_failed"] == 0


def test_a_nan_action_brakes_in_its_own_tick_and_is_named(caplog):
    class Broken(WanderingPolicy):
        def plan(self, history):
            chunk = super().plan(history)
            if self.planned > 2:
                chunk[:, 0, 1] = np.nan
            return chunk

    rig = Rig(Broken(FakeRobot().spec))
    rig.start()
    while rig.policy.planned < 3:
        verdict = rig.tick()
    assert "action_not_finite" in flag_names(verdict.flags)
    assert np.isfinite(verdict.command).all()
    assert (rig.mode, rig.reason) == ("hold", "action_not_finite")
    assert brakes_to_a_stop(rig)
    assert "action_not_finite" in caplog.text
    assert np.isfinite(rig.plain.commands).all()


def test_a_dead_policy_starves_into_a_hold_after_its_last_permitted_action(caplog):
    caplog.set_level(logging.INFO)
    rig = Rig(late_steps=1).start()
    rig.alive = False
    allowed = (rig.policy.execute_steps + 1) * rig.executor.ticks_per_step
    rig.tick(count=allowed - 1)
    assert rig.mode == "auto"
    verdict = rig.tick()
    assert flag_names(verdict.flags) == ["policy_starved"]
    assert (rig.mode, rig.reason) == ("hold", "policy_starved")
    assert "safety: policy_starved (1 so far)" in caplog.messages
    assert "arbiter: auto -> hold (policy_starved)" in caplog.messages
    assert brakes_to_a_stop(rig)
    rig.tick(count=100)
    rig.alive = True
    rig.tick(count=20)
    assert rig.mode == "hold"  # too late to go on by itself
    rig.tick(OperatorEvent.HAND_BACK)
    rig.tick(count=5)
    assert rig.mode == "auto"


def test_a_short_stall_of_the_policy_resumes_with_a_fresh_plan():
    rig = Rig(late_steps=0).start()
    rig.alive = False
    rig.tick(count=25)
    assert rig.mode == "hold"
    rig.alive = True
    rig.tick(count=6)
    assert (rig.mode, rig.reason) == ("auto", "policy_resumed")


def test_a_stale_policy_is_discarded_by_its_step_and_starves():
    rig = Rig().start()
    kept = []
    send = rig.transport.policy.send_chunk
    rig.server.link.send_chunk = kept.append  # the network holds everything back ...
    rig.tick(count=150)
    assert rig.mode == "hold"
    before = rig.executor.safety.command.copy()
    for chunk in kept:  # ... and delivers it at once
        send(ActionChunk(chunk.actions + 5.0, chunk.observation_seq, chunk.observation_stamp))
    rig.tick(count=20)
    assert (rig.mode, rig.reason) == ("hold", "policy_starved")
    assert (rig.executor.safety.command == before).all()
    counters = rig.executor.counters
    assert counters["chunks_late"] >= 4


def test_an_old_command_is_stale_by_its_stamp(caplog):
    rig = Rig(max_command_age=0.055).start()
    verdicts = [rig.tick() for _ in range(7)]
    assert "command_stale" not in flag_names(verdicts[4].flags)
    assert any(flag_names(v.flags) == ["command_stale"] for v in verdicts[5:])
    assert (rig.mode, rig.reason) == ("hold", "command_stale")
    assert "safety: command_stale (1 so far)" in caplog.messages


def test_a_frozen_camera_clock_stops_within_one_tick_of_its_limit(caplog):
    rig = Rig(camera=True, faulty=True, max_camera_age=0.2).start()
    rig.tick(count=10)
    rig.robot.faults.freeze_cameras = True
    flags = [flag_names(rig.tick().flags) for _ in range(30)]
    first = next(i for i, names in enumerate(flags) if "camera_stale" in names)
    assert first in (19, 20, 21)
    assert rig.reason == "camera_stale"
    assert "camera_stale" in caplog.text
    assert not rig.moved(30)[-1]


def test_a_late_state_is_to_blame_and_not_the_command_planned_from_it():
    rig = Rig().start()
    rig.tick(count=7)
    rig.executor._judge(SafetyFlag.COMMAND_STALE | SafetyFlag.STATE_STALE, rig.clock.now)
    assert (rig.mode, rig.reason) == ("hold", "state_stale")


@pytest.mark.parametrize(
    ("fault", "mode", "name"),
    [
        ("freeze", "hold", "state_stale"),
        ("not_a_number", "hold", "observation_not_finite"),
        ("disconnected", "stopped", "robot_fault"),
        ("stuck", "stopped", "tracking_error"),
        ("drop_commands", "stopped", "tracking_error"),
    ],
)
def test_faults_of_the_robot_are_named_and_stop_it(fault, mode, name, caplog):
    policy = WanderingPolicy(FakeRobot().spec, speed=0.03)
    rig = Rig(policy, faulty=True, limits=FAST, tracking_seconds=0.02).start()
    rig.tick(count=7)
    setattr(rig.robot.faults, fault, True)
    seen = set()
    for _ in range(40):
        seen |= set(flag_names(rig.tick().flags))
        if rig.mode != "auto":
            break
    assert name in seen
    assert (rig.mode, rig.reason) == (mode, name)
    assert name in caplog.text
    assert brakes_to_a_stop(rig)


def test_a_delay_within_the_tolerance_changes_nothing():
    rig = Rig(faulty=True).start()
    rig.robot.faults.delay = 5
    rig.tick(count=50)
    assert rig.mode == "auto"


def test_commands_outside_every_limit_are_clamped_and_named(caplog):
    caplog.set_level(logging.INFO)

    class Wild(WanderingPolicy):
        def plan(self, history):
            self.planned += 1
            return np.full((1, self.horizon, 3), 1e6 * (-1) ** self.planned, np.float32)

    rig = Rig(Wild(FakeRobot().spec)).start()
    names = set()
    for _ in range(300):
        names |= set(flag_names(rig.tick().flags))
    commands = np.array(rig.plain.commands)
    limits, dt = rig.plain.limits, rig.executor.dt
    assert {"position_limited", "velocity_limited", "acceleration_limited"} <= names
    for name in names:
        assert f"safety: {name} (1 so far)" in caplog.messages
    assert (np.abs(commands) <= 1.0).all()
    assert (np.abs(np.diff(commands, axis=0)) <= limits.velocity * dt + 1e-12).all()
    assert (np.abs(np.diff(commands, n=2, axis=0)) <= limits.acceleration * dt**2 + 1e-12).all()
    assert rig.mode == "auto"


def test_after_an_emergency_stop_nothing_moves_until_reset_and_enabled(caplog):
    rig = Rig().start()
    rig.tick(count=10)
    verdict = rig.tick(OperatorEvent.EMERGENCY_STOP)
    assert "emergency_stop" in flag_names(verdict.flags)
    assert "safety: emergency_stop (1 so far)" in caplog.messages
    assert rig.mode == "stopped"
    assert brakes_to_a_stop(rig)
    for event in (OperatorEvent.ENABLE, OperatorEvent.HAND_BACK, OperatorEvent.TAKE_OVER):
        rig.tick(event)
        assert not rig.moved(10).any()
    rig.steering = np.ones(3)
    assert not rig.moved(30).any()
    rig.steering = np.zeros(3)
    rig.tick(OperatorEvent.RESET)
    assert rig.mode == "idle"
    for event in (OperatorEvent.HAND_BACK, OperatorEvent.TAKE_OVER):
        rig.tick(event)
        assert not rig.moved(10).any()
    rig.tick(OperatorEvent.ENABLE)
    assert rig.moved(30).max() > 0
    assert rig.mode == "auto"


def test_a_remote_emergency_stop_stays_until_it_is_released_and_reset():
    rig = Rig().start()
    rig.transport.set_estop(True)
    rig.tick()
    assert rig.mode == "stopped"
    rig.tick(OperatorEvent.RESET)
    assert rig.mode == "stopped"
    rig.transport.set_estop(False)
    rig.tick(count=5)
    assert rig.mode == "stopped"
    rig.tick(OperatorEvent.RESET)
    assert rig.mode == "idle"


def test_a_remote_emergency_stop_that_is_released_at_once_is_not_missed():
    rig = Rig().start()
    rig.tick(count=7)
    rig.transport.set_estop(True)
    rig.transport.set_estop(False)
    assert rig.transport.executor.wait_estop(0.0)
    rig.tick()
    assert (rig.mode, rig.reason) == ("stopped", "emergency_stop")
    rig.tick(OperatorEvent.RESET)
    assert rig.mode == "idle", "it is seen once"


def test_a_stop_between_ticks_is_latched_on_a_robot_that_takes_one_command_per_tick():
    rig = Rig().start()
    rig.tick(count=7)
    rig.executor._may_stop = False
    sent = len(rig.plain.commands)
    assert not rig.executor.stop_between_ticks()
    assert len(rig.plain.commands) == sent
    assert (rig.mode, rig.reason) == ("stopped", "emergency_stop")


def test_a_reset_takes_up_a_robot_that_was_moved_while_it_was_stopped():
    rig = Rig().start()
    rig.tick(OperatorEvent.EMERGENCY_STOP)
    rig.tick(count=40)
    rig.plain._position = rig.plain._position - 0.3
    rig.plain.command = lambda command: None  # no power
    rig.tick(count=5)
    rig.tick(OperatorEvent.RESET)
    np.testing.assert_allclose(rig.executor.safety.command, rig.plain.hold_command())


def test_a_reset_that_comes_while_the_command_still_brakes_gives_the_robot_its_power_back():
    rig = Rig(WanderingPolicy(FakeRobot().spec, speed=0.03), limits=FAST, stop_kind="drives_off").start()
    rig.tick(count=9)
    rig.tick(OperatorEvent.EMERGENCY_STOP)
    assert rig.executor.port.powerless
    assert rig.executor.safety.moving
    rig.tick(OperatorEvent.RESET)
    assert not rig.executor.port.powerless
    np.testing.assert_allclose(rig.executor.safety.command, rig.plain.hold_command())


def test_what_fails_after_the_command_was_sent_moves_the_robot_no_further():
    rig = Rig(WanderingPolicy(FakeRobot().spec, speed=0.03)).start()
    rig.tick(count=9)
    before, step = rig.executor.safety.command.copy(), rig.executor.safety.step.copy()
    tick = rig.executor._tick

    def fail(*_):
        raise RuntimeError("the journal is full")

    rig.executor._judge = fail
    rig.executor.tick()
    rig.clock.now += rig.executor.dt
    assert (rig.mode, rig.reason) == ("stopped", "exception")
    assert rig.executor._tick == tick + 1
    moved = np.abs(rig.executor.safety.command - before)
    assert (moved <= np.abs(step) + 1e-12).all(), "a brake, instead of what was sent"
    rig.executor._judge = lambda *_: None
    assert brakes_to_a_stop(rig)


def test_a_status_that_cannot_be_published_stops_nothing_and_is_counted(caplog):
    rig = Rig().start()

    def fail(status):
        raise OSError("no network")

    rig.transport.executor.publish_status = fail
    rig.tick(count=30)
    assert rig.mode == "auto"
    assert rig.executor.counters["status_failures"] > 1
    assert caplog.text.count("the status cannot be published") == 1
    rig.executor.shut_down()
    assert rig.executor.robot_confirmed_stop


def test_every_failure_of_the_bus_asks_the_robot_to_stop():
    rig = Rig(faulty=True).start()
    command = rig.robot.command

    def refuse(target):
        raise OSError("bus error")

    for incident in (1, 2):
        rig.tick(count=7)
        rig.robot.command = refuse
        rig.tick(count=3)
        assert rig.mode == "stopped"
        assert len(rig.plain.stops) == incident
        rig.robot.command = command
        rig.tick(count=40)
        rig.tick(OperatorEvent.RESET)
        rig.tick(OperatorEvent.ENABLE)
        rig.tick(count=20)
        assert rig.mode == "auto"


@pytest.mark.parametrize("place", [np.nan, np.inf])
def test_a_robot_that_does_not_say_where_it_is_is_not_connected(place):
    robot = FakeRobot(3)
    robot.hold_command = lambda: np.full(3, place)
    executor = Executor(robot, InProcessTransport(quiet=True).executor)
    for _ in range(2):
        with pytest.raises(HardwareError, match="does not say where it is"):
            executor.connect()


@pytest.mark.parametrize(
    "setting", [{"status_rate_hz": 0.0}, {"max_state_age": 0.0}, {"execute_steps": 0}, {"operator_timeout": np.nan}]
)
def test_settings_that_cannot_work_are_refused_by_name(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        ExecutorConfig(**setting)


def test_reset_and_enable_in_one_reading_do_not_start_the_robot():
    rig = Rig().start()
    rig.tick(OperatorEvent.EMERGENCY_STOP)
    rig.tick(count=30)
    rig.tick(OperatorEvent.RESET, OperatorEvent.ENABLE)
    assert rig.mode == "idle"
    assert not rig.moved(10).any()


def test_one_press_takes_over_within_one_tick():
    rig = Rig().start()
    rig.tick(count=7)
    rig.tick(OperatorEvent.TAKE_OVER)
    assert (rig.mode, rig.reason) == ("human", "operator_takeover")


def test_one_motion_key_takes_over_within_one_tick_and_moves_from_the_last_command():
    rig = Rig().start()
    rig.tick(count=7)
    before = rig.executor.safety.command.copy()
    rig.steering = np.array([1.0, 0.0, 0.0])
    rig.tick()
    assert (rig.mode, rig.reason) == ("human", "operator_motion")
    assert np.abs(rig.executor.safety.command - before).max() <= 1.0 * rig.executor.dt
    rig.tick(count=50)
    assert rig.executor.safety.command[0] - before[0] > 0.1
    assert rig.mode == "human"


def test_losing_the_operator_who_drives_is_a_hold_and_never_auto():
    rig = Rig().start()
    rig.tick(OperatorEvent.TAKE_OVER)
    rig.steering = np.array([1.0, 0.0, 0.0])
    rig.tick(count=20)
    rig.operator_alive = False
    rig.tick(count=24)
    assert rig.mode == "human"
    rig.tick(count=3)
    assert (rig.mode, rig.reason) == ("hold", "operator_lost")
    assert brakes_to_a_stop(rig)
    rig.tick(count=200)
    assert rig.mode == "hold"


def test_hand_back_flushes_the_queue_and_blends_from_the_last_command():
    rig = Rig(blend_seconds=0.3).start()
    rig.tick(count=50)
    rig.tick(OperatorEvent.TAKE_OVER)
    rig.steering = np.array([1.0, 0.0, 0.0])
    rig.tick(count=60)
    rig.steering = np.zeros(3)
    rig.tick(count=40)
    planned, step = rig.policy.planned, rig.executor.playback.step
    before = rig.executor.safety.command.copy()
    rig.tick(OperatorEvent.HAND_BACK)
    rig.tick(count=rig.executor.ticks_per_step)
    assert (rig.mode, rig.reason) == ("align", "hand_back")
    assert rig.policy.planned == planned + 1
    assert rig.executor.playback.step > step + 100
    assert np.abs(rig.executor.safety.command - before).max() < 2e-3
    assert rig.moved(60).max() <= 1.0 * rig.executor.dt
    assert (rig.mode, rig.reason) == ("auto", "hand_back")


def test_control_goes_over_smoothly_in_align_and_fully_in_auto():
    rig = Rig(blend_seconds=0.3)
    rig.tick(OperatorEvent.ENABLE)
    assert (rig.mode, rig.executor.arbiter.writer) == ("align", "policy")
    anchor, modes, shares = rig.executor.targets.anchor.copy(), [], []
    for _ in range(40):
        rig.tick()
        modes.append(rig.mode)
        action = rig.executor.playback.action()
        shares.append(((rig.executor.safety.command - anchor) / (action - anchor))[0])
    assert modes == ["align"] * 29 + ["auto"] * 11  # and the one of the tick above: 0.3 s
    assert shares[0] < 0.02
    assert np.abs(np.diff(rig.plain.commands[-40:-11], n=2, axis=0)).max() <= 10 * rig.executor.dt**2 + 1e-12
    assert rig.executor.arbiter.blend(rig.clock.now) == 1.0


@pytest.mark.parametrize(
    ("event", "mode"),
    [
        (OperatorEvent.TAKE_OVER, "human"),
        (OperatorEvent.HOLD, "hold"),
        (OperatorEvent.EMERGENCY_STOP, "stopped"),
    ],
)
def test_aligning_ends_within_one_tick_of_what_the_operator_asks(event, mode):
    rig = Rig(blend_seconds=0.3)
    rig.tick(OperatorEvent.ENABLE)
    rig.tick(count=10)
    assert rig.mode == "align"
    rig.tick(event)
    assert rig.mode == mode


def test_a_motion_takes_over_and_a_dead_policy_holds_while_aligning():
    rig = Rig(blend_seconds=0.3)
    rig.tick(count=20)
    rig.tick(OperatorEvent.ENABLE)
    rig.steering = np.array([1.0, 0.0, 0.0])
    rig.tick()
    assert (rig.mode, rig.reason) == ("human", "operator_motion")
    rig = Rig(blend_seconds=5.0, late_steps=0)
    rig.tick(OperatorEvent.ENABLE)
    rig.alive = False
    rig.tick(count=25)
    assert (rig.mode, rig.reason) == ("hold", "policy_starved")
    rig.alive = True
    rig.tick(count=8)
    assert (rig.mode, rig.reason) == ("align", "policy_resumed")


def test_a_hand_back_right_after_the_takeover_is_flicker():
    rig = Rig().start()
    rig.tick(OperatorEvent.TAKE_OVER)
    rig.tick(count=5)
    rig.tick(OperatorEvent.HAND_BACK)
    assert rig.mode == "human"
    rig.tick(count=20)
    rig.tick(OperatorEvent.HAND_BACK)
    rig.tick(count=5)
    assert rig.mode == "auto"


def test_a_device_that_never_rests_does_not_take_over_again():
    rig = Rig().start()
    rig.steering = np.array([0.5, 0.0, 0.0])
    rig.tick(count=30)
    assert rig.mode == "human"
    rig.tick(OperatorEvent.HAND_BACK)
    rig.tick(count=30)
    assert rig.mode == "auto"
    rig.steering = np.zeros(3)
    rig.tick(count=20)
    rig.steering = np.array([0.5, 0.0, 0.0])
    rig.tick()
    assert rig.mode == "human"


def test_late_and_disordered_chunks_are_entered_at_the_consumed_count():
    rig = Rig(late_steps=4)
    rig.transport.on_observation = None
    playback = rig.executor.playback
    rig.tick(OperatorEvent.ENABLE)
    actions = np.tile(0.001 * np.arange(8, dtype=np.float32)[:, None], (1, 3))
    rig.tick(count=5)
    stamp = rig.executor.port.observation.stamp
    seq = playback.step - 1
    rig.transport.policy.send_chunk(ActionChunk(actions, seq, stamp))
    rig.tick()
    assert rig.mode == "auto"
    np.testing.assert_array_equal(playback.action(), actions[1])
    rig.transport.policy.send_chunk(ActionChunk(actions + 1, seq - 1, stamp))
    rig.tick()
    np.testing.assert_array_equal(playback.action(), actions[1])
    rig.transport.policy.send_chunk(ActionChunk(actions + 1, seq + 50, stamp))
    rig.tick(count=5)
    np.testing.assert_array_equal(playback.action(), actions[2])
    rig.transport.policy.send_chunk(ActionChunk(actions[:, :2], seq + 1, stamp))
    rig.tick()
    counters = rig.executor.counters
    assert counters["chunks_out_of_order"] == counters["chunks_flushed"] == counters["chunks_malformed"] == 1


def test_linear_interpolation_reaches_each_action_at_the_end_of_its_step():
    quick = Limits(FAST.low, FAST.high, FAST.velocity, 100 * FAST.acceleration)
    rig = Rig(interpolation="linear", limits=quick).start()
    for _ in range(20):
        rig.tick(count=rig.executor.ticks_per_step - 1)
        command, action = rig.executor.safety.command, rig.executor.playback.action()
        np.testing.assert_array_equal(command.astype(np.float32), action)
        rig.tick()
    assert not rig.executor.safety.counts


def test_an_exception_in_the_loop_itself_is_a_latched_stop(caplog):
    rig = Rig().start()
    rig.tick(count=7)
    rig.executor.playback.target = None
    rig.tick()
    assert (rig.mode, rig.reason) == ("stopped", "exception")
    assert "the robot is stopped" in caplog.text
    assert brakes_to_a_stop(rig)


def test_a_stop_that_is_not_confirmed_is_said(caplog):
    rig = Rig(faulty=True).start()
    rig.robot.faults.deaf = True
    rig.executor.shut_down()
    assert rig.executor.robot_confirmed_stop is False
    assert rig.executor.report()["final_stop_confirmed"] is False
    assert "NOT CONFIRMED" in caplog.text
    assert StopKind.CONTROLLED in rig.plain.stops


def test_status_names_mode_writer_and_counts():
    rig = Rig().start()
    rig.tick(count=30)
    status = rig.transport.status
    assert (status.mode, status.writer, status.estop_latched) == ("auto", "policy", False)
    assert status.counters["chunks_accepted"] >= 1
    assert status.loop["latency_p99_ms"] >= 0


def test_a_reset_after_a_tracking_error_takes_the_robot_up_where_it_is():
    rig = Rig(WanderingPolicy(FakeRobot().spec, speed=0.03), faulty=True, limits=FAST, tracking_seconds=0.02).start()
    rig.tick(count=7)
    rig.robot.faults.drop_commands = True
    rig.tick(count=40)
    assert (rig.mode, rig.reason) == ("stopped", "tracking_error")
    rig.robot.faults.drop_commands = False
    place = rig.plain.hold_command()
    rig.tick(OperatorEvent.RESET)
    assert rig.mode == "idle"
    np.testing.assert_array_equal(rig.executor.safety.command, place)
    assert not rig.moved(20).any()


def test_a_policy_that_never_answers_ends_the_wait():
    rig = Rig()
    rig.alive = False
    rig.tick(OperatorEvent.ENABLE)
    assert (rig.mode, rig.reason) == ("hold", "enabled")
    rig.tick(count=210)
    assert (rig.mode, rig.reason) == ("hold", "no_plan")
    rig.alive = True
    rig.tick(count=20)
    assert rig.mode == "hold"


def test_the_operator_can_hold_and_hand_back():
    rig = Rig().start()
    rig.tick(OperatorEvent.HOLD)
    assert (rig.mode, rig.reason) == ("hold", "operator_hold")
    assert brakes_to_a_stop(rig)
    rig.tick(OperatorEvent.HAND_BACK)
    rig.tick(count=5)
    assert rig.mode == "auto"


def test_without_an_operator_it_starts_by_itself_once_the_policy_answers():
    rig = Rig(autostart=True)
    rig.alive = False
    rig.tick(count=50)
    assert rig.mode == "idle"
    rig.alive = True
    rig.tick(count=12)
    assert rig.mode == "auto"
    rig.tick(OperatorEvent.EMERGENCY_STOP)
    rig.tick(OperatorEvent.RESET)
    rig.tick(count=50)
    assert rig.mode == "idle"


def test_a_lost_heartbeat_of_a_key_that_was_held_does_not_keep_driving():
    rig = Rig(operator_timeout=0.05).start()
    rig.steering = np.array([1.0, 0.0, 0.0])
    rig.tick(count=20)
    rig.operator_alive = False
    rig.tick(count=7)
    assert rig.mode == "hold"
    assert brakes_to_a_stop(rig)


def test_every_fault_is_a_reason_that_recordings_know():
    assert set(flag_names(HOLDING_FAULTS | STOPPING_FAULTS)) <= set(REASONS)
    assert len(set(REASONS)) == len(REASONS)


def test_rates_must_fit():
    assert ticks_per_step(100, 20) == 5
    with pytest.raises(ConfigError, match="whole multiple"):
        ticks_per_step(100, 30)
    with pytest.raises(ConfigError, match="interpolation"):
        Rig(interpolation="cubic")
    assert ExecutorConfig().realtime_priority > 0


# ---- thresholds with dwell -------------------------------------------------------------------------------------------


def steer(rig, size, count=1):
    rig.steering = np.array([size, 0.0, 0.0])
    rig.tick(count=count)


def handed_back_with(size):
    """A rig that was driven by hand and handed back while the device was still deflected by ``size``."""
    rig = Rig().start()
    steer(rig, 0.5, count=20)
    assert rig.mode == "human"
    steer(rig, size)
    rig.tick(OperatorEvent.HAND_BACK)
    rig.tick(count=10)
    assert (rig.mode, rig.reason) == ("auto", "hand_back")
    return rig


@pytest.mark.parametrize("size", [0.05, 0.1, 0.199])
def test_a_deflection_below_the_engaging_one_never_takes_over(size):
    rig = Rig().start()
    steer(rig, size, count=100)
    assert rig.mode == "auto"
    steer(rig, 0.2)
    assert (rig.mode, rig.reason) == ("human", "operator_motion"), "it had been at rest before"


@pytest.mark.parametrize("size", [0.05, 0.1, 0.3])
def test_a_device_that_was_not_let_go_after_a_hand_back_does_not_engage(size):
    rig = handed_back_with(size)
    steer(rig, size, count=100)
    steer(rig, 1.0, count=30)
    assert rig.mode == "auto"


def test_a_device_that_trembles_below_the_releasing_deflection_is_at_rest():
    rig = handed_back_with(0.3)
    for k in range(20):
        steer(rig, 0.04 if k % 2 else 0.0)
    steer(rig, 0.5)
    assert (rig.mode, rig.reason) == ("human", "operator_motion")


@pytest.mark.parametrize(("rest", "mode"), [(1, "auto"), (10, "auto"), (14, "auto"), (17, "human")])
def test_a_rest_must_last_for_the_dwell_before_the_device_engages_again(rest, mode):
    rig = handed_back_with(0.5)
    steer(rig, 0.0, count=rest)
    steer(rig, 0.5, count=2)
    assert rig.mode == mode, "the dwell is 15 ticks"


def test_short_rests_do_not_add_up_to_the_dwell():
    rig = handed_back_with(0.5)
    for _ in range(20):
        steer(rig, 0.0)
        steer(rig, 0.06)
    steer(rig, 0.5, count=2)
    assert rig.mode == "auto"


# ---- a robot that lags its command -----------------------------------------------------------------------------------


class LaggingRobot(FakeRobot):
    """Is where its command was ten ticks ago."""

    lag = 10

    def command(self, action):
        sent = super().command(action)
        self._position = self.commands[-self.lag] if len(self.commands) >= self.lag else np.zeros(self.spec.action.size)
        return sent


class Ahead(WanderingPolicy):
    """Goes on along the first element from wherever its last plan ended."""

    def plan(self, history):
        self.planned += 1
        steps = 0.02 * (4 * self.planned + np.arange(1, self.horizon + 1))
        return np.repeat(steps[None, :, None] * [1.0, 0.0, 0.0], len(history["state"]), 0).astype(np.float32)


def lagging_rig(**config):
    rig = Rig(Ahead(FakeRobot().spec))
    rig.robot = rig.plain = LaggingRobot(clock=rig.clock)
    settings = ExecutorConfig(execute_steps=4, interpolation="linear", **{"blend_seconds": 0.0, **config})
    rig.executor = Executor(rig.robot, rig.transport.executor, settings, clock=rig.clock)
    rig.executor.connect()
    rig.start()
    rig.tick(count=30)
    behind = rig.executor.safety.command[0] - rig.plain.hold_command()[0]
    assert behind > 0.02, "it lags"
    return rig, behind


@pytest.mark.parametrize("steering", [0.0, 0.2])
def test_a_takeover_goes_on_from_the_last_command_of_a_robot_that_lags_and_not_from_where_it_is(steering):
    rig, _ = lagging_rig()
    before, step = rig.executor.safety.command[0], rig.executor.safety.step[0]
    rig.steering = np.array([steering, 0.0, 0.0])
    rig.tick(OperatorEvent.TAKE_OVER)
    assert rig.mode == "human"
    places = [before, rig.executor.safety.command[0]]
    for _ in range(20):
        rig.tick()
        places.append(rig.executor.safety.command[0])
    steps = np.diff(places)
    assert (steps >= -1e-9).all(), "never back to where it is measured"
    assert np.abs(np.diff(steps, prepend=step)).max() <= 10 * rig.executor.dt**2 + 1e-12
    assert steps[-1] == pytest.approx(steering * 0.5 * rig.executor.dt, abs=1e-9)


def test_a_hand_back_blends_from_the_last_command_of_a_robot_that_lags():
    rig, _ = lagging_rig(blend_seconds=0.3)
    rig.steering = np.array([0.5, 0.0, 0.0])
    rig.tick(OperatorEvent.TAKE_OVER)
    rig.tick(count=40)
    command, step = rig.executor.safety.command.copy(), rig.executor.safety.step.copy()
    assert command[0] - rig.plain.hold_command()[0] > 0.02, "it still lags"
    rig.tick(OperatorEvent.HAND_BACK)
    rig.tick(count=rig.executor.ticks_per_step)
    assert rig.mode == "align"
    assert rig.executor.targets.anchor[0] >= command[0], "the last command, and braking from there"
    assert rig.executor.targets.anchor[0] <= command[0] + step[0] * rig.executor.ticks_per_step


def test_after_a_reset_a_robot_that_lags_is_taken_up_where_its_command_led():
    rig, behind = lagging_rig()
    rig.tick(OperatorEvent.EMERGENCY_STOP)
    before = rig.executor.safety.command[0]
    rig.tick(count=40)
    rig.tick(OperatorEvent.RESET)
    place = rig.executor.safety.command[0]
    assert rig.mode == "idle"
    assert place == rig.plain.hold_command()[0], "it has caught up by now"
    assert place >= before > before - behind
    assert not rig.moved(20).any()
