"""Attempts with a verifier: what ends one, the way back, and that retries give what they should."""

from dataclasses import replace

import numpy as np
import pytest
from deployment_rig import VirtualClock, WanderingPolicy

from hardware.attempts import AttemptConfig, Attempts, Reporter
from hardware.control.executor import Executor, ExecutorConfig
from hardware.policy_process import PolicyServer
from hardware.robots.fake import FakeRobot
from hardware.transport import InProcessTransport
from robot_rl.core.errors import CapabilityError, ConfigError, SpecMismatchError
from robot_rl.core.realtime import RealTimeConfig
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.core.teleop import OperatorEvent, OperatorInput

SPEC = Spec({"state": ArraySpec((1,))}, ArraySpec((1,), unit="m", low=(-9,), high=(9,)), 10.0)


class Climber:
    """Commands one more than before at every step."""

    spec, obs_steps, horizon, execute_steps, closed_loop = SPEC, 1, 4, 4, False

    def __init__(self):
        self.seeded = None

    def seed(self, seed):
        self.seeded = seed

    def plan(self, history):
        return history["state"][:, -1:] + np.arange(1, 5, dtype=np.float32)[None, :, None]


class Verifier:
    """Says yes with a probability that the observation itself is."""

    spec, obs_steps, threshold = SPEC, 2, 0.5

    def probability(self, history):
        assert history["state"].shape[1] == self.obs_steps
        return history["state"][:, -1, 0]


def drive(attempts, states):
    """Play ``states`` as a robot that goes its own way; return the actions."""
    history, actions = np.zeros((1, attempts.obs_steps, 1), np.float32), []
    for number, state in enumerate(states):
        history = np.concatenate([history[:, 1:], np.full((1, 1, 1), state, np.float32)], axis=1)
        planned = np.full((1, 1), float(number), np.float32)
        actions.append(float(attempts.refine({"state": history}, planned)[0, 0]))
    return actions


def test_success_takes_as_many_confirmations_as_asked_for_and_ends_it():
    told = []
    attempts = Attempts(
        Climber(), AttemptConfig(2, 10.0, confirmations=3), Verifier(), listen=lambda what, _: told.append(what)
    )
    drive(attempts, [0.9, 0.9, 0.1, 0.9, 0.9])
    assert attempts.attempts == []
    actions = drive(attempts, [0.9, 0.0, 0.0])
    assert told == ["attempt", "finished"]
    assert attempts.attempts[0].success
    assert attempts.attempts[0].steps == 6
    assert attempts.attempts[0].probability == pytest.approx(0.9)
    assert actions[1] == actions[2] == actions[0]  # it stays where it succeeded


def test_a_failed_attempt_is_taken_back_step_by_step_and_made_again():
    told = []
    attempts = Attempts(Climber(), AttemptConfig(1, 0.5), Verifier(), listen=lambda what, _: told.append(what))
    actions = drive(attempts, [0.0] * 16)
    assert actions[:5] == [0, 1, 2, 3, 4]
    assert actions[5:10] == [4, 3, 2, 1, 0]
    assert actions[10] == 10  # acting again
    assert told == ["attempt", "returned", "attempt", "finished"]
    assert [one.success for one in attempts.attempts] == [False, False]
    assert attempts.phase == "finished"


def test_the_way_back_is_where_the_robot_has_been_whoever_drove_and_waiting_takes_no_time():
    places = iter(np.arange(100.0, 200.0))
    driven = [True, True, False, False, True, True, True]
    calls = iter(driven)
    state = {"driven": True}

    def under_way():
        return state["driven"]

    attempts = Attempts(
        Climber(), AttemptConfig(1, 0.5), Verifier(), driven=under_way, place=lambda: np.array([next(places)])
    )
    for _ in range(7):
        state["driven"] = next(calls)
        drive(attempts, [0.0])
    assert attempts.phase == "returning"
    assert attempts.attempts[0].steps == 5
    back = drive(attempts, [0.0] * 7)
    assert back == [106.0, 105.0, 104.0, 103.0, 102.0, 101.0, 100.0]
    assert attempts.phase == "acting"


def test_the_way_back_waits_while_the_robot_is_held_and_leads_on_from_where_it_was_left():
    told, driven, place = [], [True], [None]
    attempts = Attempts(
        Climber(),
        AttemptConfig(1, 0.5),
        Verifier(),
        listen=lambda what, _: told.append(what),
        driven=lambda: driven[0],
        place=lambda: place[0],
    )
    assert drive(attempts, [0.0] * 7) == [0, 1, 2, 3, 4, 4, 3]
    driven[0] = False
    drive(attempts, [0.0] * 20)
    assert told == ["attempt"]
    assert attempts.phase == "returning"
    driven[0], place[0] = True, np.array([1.2])
    assert drive(attempts, [0.0] * 2) == [1, 0]
    assert told == ["attempt", "returned"]


def test_somebody_else_may_judge_and_it_goes_on_for_ever():
    told = []
    attempts = Attempts(Climber(), AttemptConfig(-1, 10.0), None, listen=lambda what, _: told.append(what), again=True)
    for success in (True, False, True):
        drive(attempts, [0.0] * 3)
        attempts.judge(success)
        drive(attempts, [0.0] * 5)
    assert [one.success for one in attempts.attempts] == [True, False, True]
    assert told.count("judged") == 3
    assert "finished" not in told


def test_retries_give_what_independent_attempts_and_a_judge_with_false_alarms_give():
    rng = np.random.default_rng(0)
    chance, false_alarm, rounds = 0.74, 0.1, 3000
    true, reported = 0, 0
    for _ in range(rounds):
        attempts = Attempts(Climber(), AttemptConfig(1, 0.2, confirmations=1), Verifier())
        done = False
        while attempts.phase != "finished":
            really = rng.random() < chance
            yes = really or rng.random() < false_alarm
            before = len(attempts.attempts)
            while len(attempts.attempts) == before:
                drive(attempts, [0.9 if yes else 0.1])
            done = really
            while attempts.phase == "returning":
                drive(attempts, [0.0])
        true += done
        reported += attempts.attempts[-1].success
    missed = (1 - chance) * (1 - false_alarm)
    assert true / rounds == pytest.approx(chance + missed * chance, abs=0.02)
    assert reported / rounds == pytest.approx(1 - missed**2, abs=0.02)


def test_rates_cannot_be_taken_back_and_settings_are_checked():
    class Base(Climber):
        spec = Spec({"state": ArraySpec((1,))}, ArraySpec((2,), unit="m/s,rad/s"), 10.0)

    with pytest.raises(CapabilityError, match="rates"):
        Attempts(Base())
    with pytest.raises(ConfigError, match="seconds"):
        Attempts(Climber(), AttemptConfig(seconds=0.0))


def test_attempts_run_through_the_executor_and_each_is_an_episode_of_the_record():
    ended, modes = [], []
    clock = VirtualClock()
    robot = FakeRobot(3, clock=clock)
    transport = InProcessTransport(quiet=True)
    reporter = Reporter(transport.send_operator, 3, clock)
    base = WanderingPolicy(robot.spec)

    class Yes:
        spec, obs_steps, threshold = base.spec, 1, 0.5
        count = 0

        def probability(self, history):
            self.count += 1
            return np.array([float(self.count > 70)])

    attempts = Attempts(base, AttemptConfig(3, 2.0, confirmations=1), Yes(), listen=reporter)
    server = PolicyServer(attempts, transport.policy)
    transport.on_observation = server.serve_once

    class Record:
        add = staticmethod(lambda step: modes.append(step.mode.value))
        end_episode = staticmethod(ended.append)
        status = staticmethod(dict)

    config = ExecutorConfig(execute_steps=1, autostart=True, blend_seconds=0.0)
    executor = Executor(robot, transport.executor, config, recorder=Record(), clock=clock)
    executor.connect()
    for _ in range(900):
        transport.send_operator(OperatorInput(clock.now, 0, False, np.zeros(3), source="hand"))
        executor.tick()
        clock.now += executor.dt
    verdicts = [one.success for one in attempts.attempts]
    assert verdicts[-1]
    assert len(verdicts) >= 2
    # Each failure ends an episode, and so does each way back; then the success.
    assert ended == [False] * (2 * (len(verdicts) - 1)) + [True]
    assert executor.arbiter.mode.value == "hold"
    assert executor.arbiter.reason == "operator_hold"
    assert OperatorEvent.EMERGENCY_STOP not in [event for _, event in executor.times.events]


@pytest.mark.parametrize("transport", ["inprocess", pytest.param("ros", marks=pytest.mark.ros)])
def test_a_deployment_with_a_verifier_makes_its_attempts_records_each_and_ends(tmp_path, new_domain, transport):
    torch = pytest.importorskip("torch")
    if transport == "ros":
        pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")
    from hardware.deployment.config import DeploymentConfig
    from hardware.deployment.run import deploy
    from robot_rl.core.registry import make_env
    from robot_rl.data.dataset import open_dataset
    from robot_rl.data.normalizer import Normalizer
    from robot_rl.policies.checkpoint import save_policy
    from robot_rl.policies.gaussian import GaussianConfig, GaussianPolicy
    from robot_rl.policies.success import StateEncoder, SuccessClassifier, save_classifier

    torch.manual_seed(0)
    env = make_env("peg_insert", 1, threads=1)
    spec = env.spec
    env.close()
    reach = (0.002,) * 6
    shape = GaussianConfig(
        (8,), low=tuple(-x for x in reach), high=reach, relative_to="state[0:6]", deterministic=False
    )
    save_policy(GaussianPolicy(spec, shape), tmp_path / "policy")
    never = SuccessClassifier(StateEncoder(spec, 1, Normalizer(spec)), threshold=2.0)
    save_classifier(never.eval(), tmp_path / "verifier")
    config = DeploymentConfig(
        policy=tmp_path / "policy",
        task="peg_insert",
        transport=transport,
        domain_id=new_domain() if transport == "ros" else None,
        robot_options=("restart=false",),
        operator="none",
        record=tmp_path / "record",
        out=tmp_path / "out",
        verifier=tmp_path / "verifier",
        retries=1,
        attempt_seconds=0.6,
        executor=ExecutorConfig(realtime_priority=0, max_state_age=2.0, late_steps=8, operator_timeout=2.0),
    )
    report = deploy(config)
    assert report.transport == transport
    assert report.final_stop_confirmed
    assert [one["success"] for one in report.attempts] == [False, False]
    assert [one["steps"] for one in report.attempts] == [12, 12]
    frames = open_dataset(tmp_path / "record").load()
    # Two attempts and the way back between them; a few steps of holding may follow.
    assert 3 <= frames.num_episodes <= 4
    assert not frames.extras["success"].any()
    first, back = frames.episode(0), frames.episode(1)
    went = np.abs(frames.action[first.stop - 1] - frames.action[first.start]).max()
    left = np.abs(frames.action[back.stop - 1] - frames.action[first.start]).max()
    assert went > 0.002
    assert left < 0.5 * went
    with pytest.raises(ConfigError, match="continue no chunk"):
        deploy(replace(config, real_time=RealTimeConfig("guided")))
    blind = SuccessClassifier(StateEncoder(SPEC, 1, Normalizer(SPEC)))
    save_classifier(blind.eval(), tmp_path / "blind")
    with pytest.raises(SpecMismatchError, match="classifier"):
        deploy(replace(config, verifier=tmp_path / "blind"))
