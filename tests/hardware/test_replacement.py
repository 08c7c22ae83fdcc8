"""A chunk that arrives between ticks may replace the tick's command: same actions, same limits, and only when safe."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from deployment_rig import Rig, WanderingPolicy
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.control.executor import Executor, ExecutorConfig
from hardware.control.loop import ControlLoop
from hardware.policy_process import PolicyServer
from hardware.robots.fake import FakeRobot
from hardware.safety.chain import SafetyChain, SafetyConfig, Situation
from hardware.safety.flags import SafetyFlag, flag_names
from hardware.safety.surroundings import Guards
from hardware.safety.workspace import Workspace
from hardware.transport import InProcessTransport
from robot_rl.core.policy import ActionChunk
from robot_rl.core.robot import Limits, StampedObservation
from robot_rl.core.teleop import OperatorEvent

DT = 0.01
PATIENCE = 60.0


def wait_until(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(1e-4)


def situation(**changes):
    return Situation(0.0, **{"observation": StampedObservation({}, 0, 0.0), "writer": "policy", **changes})


def random_limits(rng, size):
    return Limits(
        *(-rng.uniform(0, 3, size), rng.uniform(0.01, 3, size)),
        *(10 ** rng.uniform(-2, 1, size), 10 ** rng.uniform(-1, 2, size)),
    )


# ---- the chain ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), walking=st.booleans())
def test_limits_hold_between_effective_commands_and_the_pair_stays_within_reach(seed, walking):
    rng, size = np.random.default_rng(seed), 16
    bounds = random_limits(rng, size)
    chain, twin = SafetyChain(bounds, DT), SafetyChain(bounds, DT)
    previous, step, target = chain.command.copy(), np.zeros(size), np.zeros(size)
    reach = bounds.acceleration * DT**2
    for _ in range(60):
        target = target + rng.normal(0, 0.02, size) if walking else rng.uniform(-6, 6, size)
        wished = None if rng.random() < 0.05 else target
        first = sent = chain.filter(wished, situation()).command
        if rng.random() < 0.5:
            other = target + rng.normal(0, 0.02 if walking else 3.0, size)
            verdict = chain.replace(other, situation())
            assert (verdict is None) == (first is None)
            sent, wished = verdict.command, other
            assert chain.replace(target, situation()) is None  # at most once
        # The same two commands as if the first had never been given: the tick leaves no trace of it.
        np.testing.assert_array_equal(twin.filter(wished, situation()).command, sent)
        np.testing.assert_array_equal(chain.command, sent)
        for command in (first, sent):  # either is a permitted successor of what was in force before
            new = command - previous
            assert np.isfinite(command).all()
            assert ((command >= bounds.low) & (command <= bounds.high)).all()
            assert (np.abs(new) <= bounds.velocity * DT).all()
            assert (np.abs(new - step) <= reach).all()
        assert (np.abs(sent - first) <= 2 * reach + 1e-15).all()
        previous, step = sent, sent - previous
    assert chain.counts["post_check_failed"] == chain.counts["exception"] == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_workspace_holds_for_both_commands(seed):
    rng = np.random.default_rng(seed)
    planes = np.concatenate([np.eye(3), np.full((3, 1), -0.2)], axis=1)
    workspace = Workspace(np.full(3, -0.3), np.full(3, 0.3), planes)
    one = np.ones(4)
    chain = SafetyChain(Limits(-one, one, one, 5 * one), DT, guards=Guards(workspace=workspace))
    for k in range(120):
        if k % 20 == 0:
            target = rng.uniform(-1, 1, 4)
        chain.filter(target, situation())
        assert workspace.excess(chain.command[None]) <= 1e-12
        if chain.replace(rng.uniform(-1, 1, 4), situation()) is not None:
            assert workspace.excess(chain.command[None]) <= 1e-12


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        (np.array([0.0, np.nan, 0.0]), {}),
        (np.zeros(2), {}),
        (np.zeros(3), {"estop": True}),
        (np.zeros(3), {"writer": "none"}),
        (np.zeros(3), {"command_stamp": -5.0}),
        (np.zeros(3), {"observation": StampedObservation({}, 0, -5.0)}),
    ],
)
def test_what_would_brake_replaces_nothing_and_leaves_no_trace(target, changes):
    bounds = random_limits(np.random.default_rng(0), 3)
    chain, twin = SafetyChain(bounds, DT), SafetyChain(bounds, DT)
    for k in range(40):
        wished = np.full(3, 0.001 * k)
        np.testing.assert_array_equal(
            chain.filter(wished, situation()).command, twin.filter(wished, situation()).command
        )
        assert chain.replace(target, situation(**changes)) is None
    assert chain.counts == twin.counts


def test_an_answer_to_a_fault_is_not_replaced():
    chain = SafetyChain(random_limits(np.random.default_rng(0), 3), DT)
    assert chain.replace(np.zeros(3), situation()) is None  # there is nothing to replace
    chain.filter(np.full(3, np.nan), situation())
    assert chain.replace(np.full(3, 0.1), situation()) is None
    chain.filter(np.zeros(3), situation())
    chain.anchor(np.full(3, 0.2))
    assert chain.replace(np.zeros(3), situation()) is None
    np.testing.assert_array_equal(chain.command, np.full(3, 0.2))


def test_a_replaced_tick_counts_once():
    one = np.ones(1)
    chain = SafetyChain(Limits(-one, one, one, 5 * one), DT, SafetyConfig(tracking_seconds=0.1, tracking_ticks=3))
    stuck, flags = np.array([0.5]), []
    for _ in range(3):
        flags.append(chain.filter(one, situation(measured=stuck)).flags & SafetyFlag.TRACKING_ERROR)
        chain.replace(-one, situation(measured=stuck))
    assert [bool(flag) for flag in flags] == [False, False, True]
    assert chain.counts["acceleration_limited"] == 2


# ---- the executor ---------------------------------------------------------------------------------------------------


def late_rig(policy=None, **config):
    """Return a rig that the policy drives, whose policy answers between the ticks from now on."""
    rig = Rig(policy, **config).start()
    rig.transport.on_observation = None
    return rig


def answer_between_ticks(rig, ticks):
    """Return the effective command of each of the next ``ticks`` ticks, and on which of them it was replaced."""
    commands, replaced = [], []
    for _ in range(ticks):
        rig.executor.tick()
        rig.server.serve_once()
        replaced.append(rig.executor.replace_command())
        commands.append(rig.executor.safety.command.copy())
        np.testing.assert_array_equal(rig.plain.commands[-1], commands[-1])
        rig.clock.now += rig.executor.dt
        rig.seq += 1
    return np.array(commands), np.array(replaced)


@pytest.mark.parametrize("interpolation", ["hold", "linear"])
@pytest.mark.parametrize("closed_loop", [False, True])
@pytest.mark.parametrize(("wild", "blend"), [(False, 0.0), (True, 0.0), (True, 0.5)])
def test_a_chunk_within_its_tick_gives_the_actions_of_one_that_is_never_late(interpolation, closed_loop, wild, blend):
    def policy():
        return WanderingPolicy(FakeRobot().spec, closed_loop=closed_loop, speed=0.3 if wild else 0.002)

    options = {"interpolation": interpolation, "takeover_by_motion": False, "operator_timeout": 1e9}
    options["blend_seconds"] = blend
    prompt, late = Rig(policy(), **options).start(), late_rig(policy(), **options)
    expected = []
    for _ in range(200):
        prompt.executor.tick()
        expected.append(prompt.executor.safety.command.copy())
        prompt.clock.now += prompt.executor.dt
    commands, replaced = answer_between_ticks(late, 200)
    np.testing.assert_array_equal(commands, np.array(expected))
    assert replaced.sum() == late.executor.counters["chunks_acted_within_tick"] >= 200 // 5 // 4 - 1
    assert np.ptp(commands, axis=0).min() > 0.001
    assert late.policy.planned == prompt.policy.planned
    assert late.executor.safety.counts["post_check_failed"] == 0
    assert prompt.executor.safety.counts["acceleration_limited"] or not wild


def test_without_the_option_or_the_robots_consent_a_chunk_waits_for_the_next_tick():
    for change in ("option", "robot"):
        rig = late_rig(replace_within_tick=change != "option")
        rig.executor._may_replace &= change != "robot"
        sent = len(rig.plain.commands)
        _, replaced = answer_between_ticks(rig, 60)
        assert not replaced.any()
        assert len(rig.plain.commands) == sent + 60
    robot = FakeRobot()
    robot.accepts_replacement = False
    assert not Executor(robot, InProcessTransport(quiet=True).executor)._may_replace


def chunk_for(rig, value):
    playback = rig.executor.playback
    return ActionChunk(np.full((8, 3), value, np.float32), playback.step, rig.executor.port.observation.stamp)


def next_step(rig):
    """Run to the first tick of a policy step, whose observation nobody has answered yet."""
    while rig.executor._tick % rig.executor.ticks_per_step:
        rig.tick()
    rig.tick()


def test_only_one_replacement_per_tick_and_only_while_the_policy_drives():
    rig = late_rig()
    next_step(rig)
    rig.transport.policy.send_chunk(chunk_for(rig, 0.002))
    assert rig.executor.replace_command()
    rig.transport.policy.send_chunk(chunk_for(rig, 0.003))
    assert not rig.executor.replace_command()
    rig.tick(OperatorEvent.TAKE_OVER)
    next_step(rig)
    sent = len(rig.plain.commands)
    rig.transport.policy.send_chunk(chunk_for(rig, 0.004))
    assert not rig.executor.replace_command()
    assert len(rig.plain.commands) == sent


def test_a_pressed_emergency_stop_comes_before_a_chunk():
    rig = late_rig()
    next_step(rig)
    rig.transport.policy.send_chunk(chunk_for(rig, 0.002))
    rig.transport.set_estop(True)
    assert not rig.executor.replace_command()
    assert rig.mode == "stopped"
    assert rig.executor.counters["chunks_acted_within_tick"] == 0
    sizes = rig.moved(40)
    assert (np.diff(sizes) <= 1e-12).all()
    assert sizes[-1] == 0.0


def test_an_emergency_stop_between_ticks_brakes_instead_of_the_ticks_command():
    for replaced in (False, True):
        rig = late_rig(WanderingPolicy(FakeRobot().spec, speed=0.02))
        answer_between_ticks(rig, 20)
        assert rig.executor.safety.moving
        before, limits = rig.executor.safety.command.copy(), rig.plain.limits
        step = rig.executor.safety.step.copy()
        rig.executor.tick()
        if replaced:
            rig.server.serve_once()
            rig.executor.replace_command()
        rig.transport.set_estop(True)
        assert rig.executor.stop_between_ticks()
        assert (rig.mode, rig.reason) == ("stopped", "emergency_stop")
        braked = rig.plain.commands[-1] - before
        assert (np.abs(braked) <= np.abs(step) + 1e-15).all()
        assert (np.abs(braked - step) <= limits.acceleration * rig.executor.dt**2 + 1e-15).all()
        assert not rig.executor.stop_between_ticks(), "once"
        assert not rig.executor.replace_command()
        rig.clock.now += rig.executor.dt
        sizes = rig.moved(60)
        assert sizes[0] <= np.abs(braked).max()
        assert (np.diff(sizes) <= 1e-12).all()
        assert sizes[-1] == 0.0
        assert rig.executor.safety.counts["post_check_failed"] == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), jerky=st.booleans())
def test_a_stop_in_any_tick_keeps_every_limit(seed, jerky):
    rng, size = np.random.default_rng(seed), 8
    bounds = random_limits(rng, size)
    if jerky:
        bounds = replace(bounds, jerk=bounds.acceleration * 10 ** rng.uniform(0, 3, size))
    chain = SafetyChain(bounds, DT)
    previous, step, change = chain.command.copy(), np.zeros(size), np.zeros(size)
    for _ in range(80):
        sent = chain.filter(rng.uniform(-6, 6, size), situation()).command
        if rng.random() < 0.3:
            chain.replace(rng.uniform(-6, 6, size), situation())
        if rng.random() < 0.3:
            sent = chain.stop(0.0).command
        sent = chain.command
        new = sent - previous
        assert ((sent >= bounds.low) & (sent <= bounds.high)).all()
        assert (np.abs(new) <= bounds.velocity * DT).all()
        assert (np.abs(new - step) <= bounds.acceleration * DT**2).all()
        assert not jerky or (np.abs(new - step - change) <= bounds.jerk * DT**3).all()
        previous, step, change = sent, new, new - step
    assert chain.counts["post_check_failed"] == chain.counts["exception"] == 0


def test_waiting_between_ticks_ends_for_an_emergency_stop_and_does_not_spin(monkeypatch):
    """It stops before the next tick begins; where others keep the processors busy, in one of several tries."""
    assert any(stops_before_the_next_tick(monkeypatch) for _ in range(20)), "it waited for the next tick"


def stops_before_the_next_tick(monkeypatch):
    """Press the emergency stop between two ticks; return whether the executor stopped before the second one."""
    transport, stop = InProcessTransport(quiet=True), threading.Event()
    executor = Executor(FakeRobot(), transport.executor, ExecutorConfig(tick_rate_hz=20.0, max_state_age=60.0))
    executor.connect()
    begun, ended, polls = [], [], []
    tick, poll = executor.tick, transport.executor.poll_estop

    def watched(**options):
        begun.append(time.monotonic())
        verdict = tick(**options)
        ended.append(time.monotonic())
        return verdict

    monkeypatch.setattr(executor, "tick", watched)
    monkeypatch.setattr(transport.executor, "poll_estop", lambda: polls.append(None) or poll())
    thread = threading.Thread(target=executor.run, args=(stop,))
    thread.start()
    try:
        wait_until(lambda: len(ended) > 3, "the first ticks")
        seen = len(ended)
        wait_until(lambda: len(ended) > seen, "the next tick")
        following = len(ended)
        transport.set_estop(True)
        wait_until(lambda: executor.arbiter.mode.value == "stopped" and len(begun) > following, "the stop")
        polls.clear()
        first = len(begun)
        wait_until(lambda: len(begun) >= first + 6, "further ticks")
        assert len(polls) < 7 * (len(begun) - first + 1)
        return executor.arbiter.changes[-1][0] < begun[following]
    finally:
        stop.set()
        thread.join(PATIENCE)


def test_a_broken_chunk_between_ticks_is_answered_on_the_next_tick():
    rig = late_rig()
    next_step(rig)
    rig.transport.policy.send_chunk(chunk_for(rig, np.nan))
    sent = len(rig.plain.commands)
    assert not rig.executor.replace_command()
    assert len(rig.plain.commands) == sent
    assert rig.mode == "auto"
    assert flag_names(rig.tick().flags) == ["action_not_finite"]
    assert (rig.mode, rig.reason) == ("hold", "action_not_finite")


def test_an_exception_between_ticks_is_a_latched_stop(caplog):
    rig = late_rig()
    next_step(rig)
    rig.transport.policy.send_chunk(chunk_for(rig, 0.002))
    rig.executor.safety.replace = None
    assert not rig.executor.replace_command()
    assert (rig.mode, rig.reason) == ("stopped", "exception")
    assert "exception between ticks" in caplog.text
    sizes = rig.moved(40)
    assert (np.diff(sizes) <= 1e-12).all()
    assert sizes[-1] == 0.0


def test_a_robot_that_refuses_the_second_command_is_stopped():
    rig = late_rig(faulty=True)
    next_step(rig)
    rig.transport.policy.send_chunk(chunk_for(rig, 0.002))
    command = rig.robot.command

    def refuse(action):
        raise RuntimeError("one command per cycle")

    rig.robot.command = refuse
    rig.executor.replace_command()
    rig.robot.command = command
    assert (rig.mode, rig.reason) == ("stopped", "robot_fault")


def test_the_record_keeps_what_was_executed_last_and_says_that_it_was_replaced():
    class Kept:
        def __init__(self):
            self.steps = []

        def add(self, step):
            self.steps.append(step)

    rig = late_rig()
    recorder = rig.executor.journal._recorder = Kept()
    next_step(rig)
    rig.transport.policy.send_chunk(chunk_for(rig, 0.0004))
    rig.tick(count=rig.executor.ticks_per_step - 2)
    recorder.steps.clear()
    for value in (0.0005, 0.0006):
        next_step(rig)
        while rig.executor._tick % rig.executor.ticks_per_step:
            rig.tick()
        rig.transport.policy.send_chunk(chunk_for(rig, value))  # behind the last tick of the step
        assert rig.executor.replace_command()
    next_step(rig)
    last = recorder.steps[-2:]
    np.testing.assert_array_equal(
        np.array([step.action for step in last])[:, 0].astype(np.float32), np.float32([5e-4, 6e-4])
    )
    np.testing.assert_array_equal(last[-1].policy_action, last[-1].action.astype(np.float32))
    assert all(step.safety_flags & SafetyFlag.REPLACED_WITHIN_TICK for step in last)
    assert not recorder.steps[0].safety_flags & SafetyFlag.REPLACED_WITHIN_TICK
    assert not rig.executor.safety.counts["replaced_within_tick"]


def test_a_chunk_just_before_the_next_tick_is_left_to_it(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    rig = late_rig()
    next_step(rig)
    rig.transport.policy.send_chunk(chunk_for(rig, 0.002))
    sent = len(rig.plain.commands)
    ControlLoop(rig.executor).idle(4e-4)
    assert len(rig.plain.commands) == sent
    ControlLoop(rig.executor).idle(6e-4)
    assert len(rig.plain.commands) == sent + 1


def test_in_real_time_chunks_are_acted_upon_between_ticks():
    robot = FakeRobot()
    transport, stop = InProcessTransport(quiet=True), threading.Event()
    policy = WanderingPolicy(robot.spec, closed_loop=True)
    server = PolicyServer(policy, transport.policy)

    def serve():
        while not stop.is_set():
            observation = transport.policy.receive_observation(0.02)
            if observation is not None:
                time.sleep(0.003)
                transport._observations.appendleft(observation)
                server.serve_once()

    config = ExecutorConfig(execute_steps=1, late_steps=100, autostart=True, max_state_age=5.0)
    executor = Executor(robot, transport.executor, config)
    executor.connect()
    threads = [threading.Thread(target=serve), threading.Thread(target=executor.run, args=(stop,))]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: executor.counters["chunks_acted_within_tick"] >= 3, "an answer within a tick")
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
    report = executor.report()
    assert report["chunks"]["chunks_acted_within_tick"] >= 3
    assert report["observation_to_planned_command"]["count"] >= 3
