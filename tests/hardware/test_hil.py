"""Human-in-the-loop learning: what is stored, what a takeover is, a learner that dies, runs that go on."""

import json
import os
import signal
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from deployment_rig import VirtualClock, WanderingPolicy
from driver_benches import ros_arm
from test_parity import PointEnv

from hardware.control.arbiter import Mode
from hardware.control.executor import Executor, ExecutorConfig
from hardware.hil import session
from hardware.hil.acting import ActingPolicy
from hardware.hil.config import HILConfig
from hardware.hil.experience import Experience, Sinks
from hardware.hil.learner import LearnerClient
from hardware.hil.lockstep import LockStep
from hardware.hil.operator import OperatorHabits, ScriptedOperator
from hardware.policy_process import PolicyServer
from hardware.recording.recorder import ACTOR_CODES, ExecutedStep, Recorder
from hardware.robots.fake import FakeRobot
from hardware.transport import InProcessTransport
from robot_rl.core.bridge import EnvRobot
from robot_rl.core.errors import CapabilityError, ConfigError, HardwareError
from robot_rl.core.spec import Spec
from robot_rl.core.teleop import OperatorEvent, OperatorInput
from robot_rl.data.dataset import open_dataset
from robot_rl.data.store import EpisodeWriter
from robot_rl.policies.checkpoint import load_policy, save_policy
from robot_rl.policies.gaussian import GaussianConfig, GaussianPolicy
from robot_rl.policies.success import ClassifierConfig, StateEncoder, SuccessClassifier, save_classifier
from robot_rl.rl.learner_process import LearnerSettings

torch.set_num_threads(1)
RATE = 20.0


def step(index, writer="policy", mode=Mode.AUTO, own=0.5, executed=0.1, spec=None):
    size = 3 if spec is None else spec.action.size
    return ExecutedStep(
        observation={"state": np.full(2 * size, index, np.float32)},
        action=np.full(size, executed),
        policy_action=np.full(size, own, np.float32),
        human_action=np.full(size, executed),
        writer=writer,
        mode=mode,
        reason="enabled",
        safety_flags=0,
        stamp=10.0 + index / RATE,
    )


class Delivered(list):
    @property
    def one(self):
        assert len(self) == 1
        return self[0]


@pytest.fixture
def delivered():
    return Delivered()


@pytest.fixture
def experience(delivered):
    return Experience(FakeRobot(3).spec, delivered.append)


# ---- what is stored ------------------------------------------------------------------------------------------------


def test_images_are_not_kept_until_the_episode_ends(delivered):
    robot = FakeRobot(3, camera=True)
    numbers = Spec({"state": robot.spec.observation["state"]}, robot.spec.action, robot.spec.rate_hz)
    experience, image = Experience(numbers, delivered.append), np.zeros((48, 64, 3), np.uint8)
    there = weakref.ref(image)
    one = step(0)
    experience.add(replace(one, observation={**one.observation, "images.front": image}))
    del image
    assert there() is None


def test_stored_are_the_policys_own_actions_where_it_drove_alone_and_what_was_executed_elsewhere(experience, delivered):
    for index in range(50):
        human = 10 <= index < 17
        mode = Mode.HUMAN if human else Mode.ALIGN if index in (18, 19) else Mode.AUTO
        experience.add(step(index, "human" if human else "policy", mode))
    experience.end_episode(True)
    episode = delivered.one
    assert (episode.steps, episode.human_steps, episode.takeovers, episode.success) == (50, 7, 1, True)
    own = episode.arrays["action"][:, 0] == 0.5
    np.testing.assert_array_equal(np.flatnonzero(~own), [*range(10, 17), 18, 19])
    np.testing.assert_array_equal(episode.arrays["observation.state"][:, 0], np.arange(50))
    assert episode.arrays["success"].nonzero()[0].tolist() == [49]
    assert episode.arrays["keep"].all()
    assert episode.arrays["ends"].tolist() == [50]


def test_steps_that_do_not_follow_each_other_are_never_joined(experience, delivered):
    for index in (*range(10), *range(15, 30)):
        experience.add(step(index))
    for index in range(30, 60):  # nobody writes for longer than a second: somebody is waited for
        experience.add(step(index, "none", Mode.HOLD))
    for index in range(60, 65):
        experience.add(step(index))
    experience.end_episode(False)
    arrays = delivered.one.arrays
    assert arrays["ends"].tolist() == [10, 25, 30]
    np.testing.assert_array_equal(np.flatnonzero(~arrays["keep"]), [9, 24, 29])
    assert not arrays["success"].any()


def test_holding_for_a_moment_belongs_to_the_episode(experience, delivered):
    for index in range(20):
        holds = 8 <= index < 11
        experience.add(step(index, "none" if holds else "policy", Mode.HOLD if holds else Mode.AUTO))
    experience.end_episode(True)
    arrays = delivered.one.arrays
    assert arrays["ends"].tolist() == [20]
    assert (arrays["actor"] == ACTOR_CODES["none"]).sum() == 3


def test_every_step_reaches_the_replay_and_the_operators_steps_reach_the_demonstrations_too(experience, delivered):
    from robot_rl.rl.channel import Channel, Message
    from robot_rl.rl.decision import DecisionConfig
    from robot_rl.rl.methods.rlpd import GaussianBehaviour
    from robot_rl.rl.off_policy.collector import make_replay
    from robot_rl.rl.off_policy.stream import EpisodeStream, StreamCollector

    robot = FakeRobot(3)
    width = robot.spec.observation["state"].size
    for index in range(50):
        human = 10 <= index < 17
        one = step(index, "human" if human else "policy", Mode.HUMAN if human else Mode.AUTO)
        experience.add(replace(one, observation={"state": np.full(width, index, np.float32)}))
    experience.end_episode(True)
    near, far = Channel.pair()
    stream = EpisodeStream(Channel(far), robot.spec)
    policy = GaussianPolicy(robot.spec, GaussianConfig(low=(-1,) * 3, high=(1,) * 3))
    policy.features = lambda history: history["state"][:, -1]  # raw numbers: a step's state is its index
    behaviour = GaussianBehaviour(policy, 0)
    replay = make_replay(width, 3, {"online": 100, "demonstrations": 100}, 0)
    collector = StreamCollector(stream, behaviour, DecisionConfig())
    near.send("episode", {"number": 0}, delivered.one.arrays)
    assert collector.collect(replay, 1) == 50
    assert replay.size == {"online": 50, "demonstrations": 7}
    online, corrected = replay.all("online"), replay.all("demonstrations")
    going = online["terminated"] == 0
    assert torch.equal(online["next_state"][going, 0], online["state"][going, 0] + 1)
    assert torch.equal(corrected["next_state"][:, 0], torch.arange(11.0, 18.0))
    torch.testing.assert_close(corrected["action"], torch.full((7, 3), 0.1))
    assert online["reward"].nonzero().ravel().tolist() == [49]
    near.send("episode", {"number": 0}, delivered.one.arrays)  # sent twice after a restart: counted once
    assert collector.collect(replay, 1) == 0
    damaged = dict(delivered.one.arrays)
    del damaged["keep"]
    from robot_rl.core.errors import DataError
    from robot_rl.rl.off_policy.stream import unpack

    with pytest.raises(DataError, match="keep"):
        unpack(Message("episode", {}, damaged), robot.spec)
    near.close()
    assert collector.collect(replay, 1) == 0
    assert stream.ended


def test_recorded_as_the_human_action_is_what_the_operator_asked_for_at_the_end_of_each_step(tmp_path, delivered):
    clock, motion = VirtualClock(), np.array([1.0, 0.0, -0.5])
    robot = FakeRobot(3, clock=clock)  # at 1/s at most, between -1 and 1
    transport = InProcessTransport(quiet=True)
    server = PolicyServer(WanderingPolicy(robot.spec), transport.policy)
    transport.on_observation = server.serve_once
    recorder = Recorder(tmp_path / "record", robot.spec)
    sinks = Sinks(Experience(robot.spec, delivered.append), recorder)
    config = ExecutorConfig(execute_steps=4, blend_seconds=0.0, human_speed=0.5, autostart=True)
    executor = Executor(robot, transport.executor, config, recorder=sinks, clock=clock)
    executor.connect()

    def run(ticks, driving, *events):
        for _ in range(ticks):
            wish = motion if driving else np.zeros(3)
            transport.send_operator(OperatorInput(clock.now, 0, driving, wish, events))
            executor.tick()
            clock.now += executor.dt
            events = ()

    run(100, False)
    run(300, True, OperatorEvent.TAKE_OVER)  # against the end of the first element's range
    run(100, False, OperatorEvent.HAND_BACK)
    sinks.end_episode(True)
    recorder.close()
    frames = open_dataset(tmp_path / "record").load()
    asked, executed = frames.extras["human_action"], frames.action
    human = frames.extras["actor"].ravel() == ACTOR_CODES["human"]
    assert 55 <= human.sum() <= 62
    np.testing.assert_array_equal(asked[~human], executed[~human])
    asked, executed = asked[human][2:-2], executed[human][2:-2]  # those between which the speed is the same
    free = executed[:, 0] < 0.8
    assert 20 < free.sum() < len(free) - 5
    np.testing.assert_allclose(
        np.diff(asked[free], axis=0), np.tile(0.5 * motion / RATE, (free.sum() - 1, 1)), atol=1e-6
    )
    np.testing.assert_array_equal(asked[free], executed[free])
    # At the end of the range it is what was wanted, and not what the safety chain made of it.
    pressed = executed[:, 0] > 0.999
    assert pressed.sum() > 5
    assert (asked[pressed, 0] > executed[pressed, 0] + 5e-4).all()
    assert executed.max() <= 1.0
    np.testing.assert_array_equal(asked[:, 1:], executed[:, 1:])
    learned = delivered.one.arrays
    np.testing.assert_array_equal(learned["action"][learned["actor"] == ACTOR_CODES["human"]][2:-2], executed)


# ---- operator and executor -----------------------------------------------------------------------------------------


class GuidedEnv(PointEnv):
    """Success is to bring the point near 0.5 in every axis; an expert goes there."""

    goal, radius = 0.5, 0.05

    def make_expert(self, noise=1.0, seed=0):
        class Expert:
            def act(_):
                return np.full((self.num_envs, self.size), self.goal)

        return Expert()

    def progress(self):
        return 1.0 - np.clip(np.abs(self.position - self.goal).max(-1), 0, 1)

    def finish(self):
        done = super().finish()
        success = np.abs(done.final_observation["state"] - self.goal).max(-1) < self.radius
        if success.any():
            done = replace(done, terminated=success, observation=self.reset(1), truncated=done.truncated & ~success)
        return replace(done, info={**done.info, "success": success})


def make_path(delivered, habits, env=None):
    env = env or GuidedEnv()
    env.command_velocity, env.command_acceleration = np.full(3, 2.0), np.full(3, 50.0)
    clock = VirtualClock()
    type(clock).time = property(lambda self: self.now, lambda self, value: setattr(self, "now", value))
    robot = EnvRobot(env, lock_step=True, seed=5, clock=clock)
    transport = InProcessTransport(quiet=True)
    policy = WanderingPolicy(robot.spec, obs_steps=1, horizon=1, execute_steps=1, speed=0.0)
    operator = ScriptedOperator(robot, lambda: transport.status, habits, clock=clock)
    sinks = Sinks(Experience(robot.spec, delivered.append), None)
    config = ExecutorConfig(
        tick_rate_hz=robot.tick_rate_hz, execute_steps=1, autostart=True, status_rate_hz=20.0, human_speed=0.5
    )
    return LockStep(robot, policy, config, clock, transport, teleop=operator, recorder=sinks), operator


def test_the_scripted_operator_takes_over_where_the_policy_is_stuck_and_hands_back(delivered):
    path, operator = make_path(delivered, OperatorHabits(grace=0.3, patience=0.3, enough=0.2, longest=1.0, one_in=1))
    for _ in range(1200):
        path.tick()
    modes = [mode for _, mode, _ in path.executor.arbiter.changes]
    reasons = [reason for _, _, reason in path.executor.arbiter.changes]
    assert operator.takeovers >= 2
    assert Mode.HUMAN in modes
    assert reasons.count("operator_takeover") == operator.takeovers
    assert "hand_back" in reasons
    assert sum(episode.success for episode in delivered) >= 1
    episode = next(episode for episode in delivered if episode.success)
    human = episode.arrays["actor"] == ACTOR_CODES["human"]
    assert 0 < human.sum() < episode.steps
    # What is stored of the operator is the executed command: it moves on without a jump.
    jumps = np.abs(np.diff(episode.arrays["action"], axis=0)).max(-1)
    assert jumps[human[1:] & human[:-1]].max() <= 2.0 * 0.5 / RATE + 1e-6


def test_an_operator_who_only_attends_never_takes_over_and_resets_what_has_stopped(delivered):
    path, operator = make_path(delivered, OperatorHabits(corrects=False), env=GuidedEnv())
    for _ in range(200):
        path.tick()
    path.executor.arbiter.stop(path.clock.now, "exception")
    for _ in range(300):
        path.tick()
    assert operator.takeovers == 0
    assert path.executor.arbiter.mode in (Mode.AUTO, Mode.ALIGN)
    path.close()


def test_a_task_without_an_expert_has_no_scripted_operator():
    robot = EnvRobot(PointEnv(), lock_step=True)
    with pytest.raises(CapabilityError, match="make_expert"):
        ScriptedOperator(robot, lambda: None)


# ---- learner process -----------------------------------------------------------------------------------------------


@pytest.fixture
def demos(tmp_path):
    """Ten demonstrations of going to 0.5."""
    env = GuidedEnv()
    with EpisodeWriter(tmp_path / "demos", env.spec, task="point") as writer:
        for seed in range(10):
            observation = env.reset(seed)
            for _ in range(30):
                state = observation["state"][0]
                action = np.clip(state + 0.15 * np.sign(env.goal - state), -1, 1).astype(np.float32)
                action = np.where(np.abs(env.goal - state) < 0.15, env.goal, action).astype(np.float32)
                result = env.step(action[None])
                writer.add({"state": state}, action, success=bool(result.info["success"][0]))
                if result.terminated[0]:
                    break
                observation = result.observation
            writer.save_episode(success=True)
    return tmp_path / "demos"


SMALL = (
    "hidden=16,16",
    "core.hidden=16,16",
    "batch_size=32",
    "start_steps=20",
    "relative_to=state",
    "reach=0.2,0.2,0.2",
    "precision=fp32",
)


def start_learner(directory, demos, method="hil_serl", **changes):
    changes = {"options": SMALL, "pretrain": 5, **changes}
    settings = LearnerSettings(method, GuidedEnv().spec.to_json(), str(demos), **changes)
    settings.write(directory)
    client = LearnerClient(directory)
    client.start()
    return client


def episode_of(spec, length, success=True):
    delivered = Delivered()
    experience = Experience(spec, delivered.append)
    for index in range(length):
        one = step(index, "human" if index < 5 else "policy")
        experience.add(replace(one, observation={"state": np.full(3, 0.01 * index, np.float32)}))
    experience.end_episode(success)
    return delivered.one


def test_a_killed_learner_comes_back_with_all_episodes_while_the_actor_goes_on(tmp_path, demos):
    spec = GuidedEnv().spec
    client = start_learner(tmp_path / "learner", demos)
    try:
        acting = ActingPolicy.load(tmp_path / "learner" / "checkpoints" / "initial", client)
        history = {"state": np.zeros((1, 1, 3), np.float32)}
        acting.plan(history)
        before = acting.version
        for _ in range(3):
            client.submit(episode_of(spec, 30))
        assert client.wait(0, 60)
        os.kill(client.pid, signal.SIGKILL)
        client.submit(episode_of(spec, 30))  # nothing waits for the dead
        acting.plan(history)
        assert client.wait(0, 120)
        assert client.restarts == 1
        deadline = time.monotonic() + 60
        while client.newest[2]["received"] < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.newest[2]["received"] == 4
        assert client.newest[2]["steps"] == 120
        acting.plan(history)
        assert acting.version != before
    finally:
        client.close()
    assert not list((tmp_path / "learner").rglob("*.pkl"))
    # What was saved at the end is there when the run goes on.
    again = start_learner(tmp_path / "learner", demos)
    assert again.resumed == 4
    again.close()


def test_a_learner_that_cannot_start_says_why_in_one_line(tmp_path, demos):
    with pytest.raises(HardwareError, match="hg_dagger corrects a policy"):
        start_learner(tmp_path / "learner", demos, method="hg_dagger", options=())


# ---- the whole -----------------------------------------------------------------------------------------------------


@pytest.fixture
def guided(monkeypatch):
    """Let the simulated robot be in the guided task."""
    from hardware.robots import sim

    def make_env(task, num_envs=1, **options):
        env = GuidedEnv(num_envs)
        env.command_velocity, env.command_acceleration = np.full(3, 4.0), np.full(3, 200.0)
        env.close = lambda: None
        return env

    monkeypatch.setattr(sim, "make_env", make_env)


def configured(tmp_path, demos, **changes):
    values = {
        "demos": demos,
        "task": "guided",
        "operator": "scripted",
        "clock": "fast",
        "out": tmp_path / "run",
        "options": SMALL,
        "pretrain": 50,
        "validate_every": 400,
        "validation_episodes": 5,
        "habits": OperatorHabits(grace=0.5, patience=0.3),
    }
    return HILConfig(**{**values, **changes})


@pytest.mark.usefixtures("guided")
def test_a_run_learns_ends_by_its_budget_and_goes_on_where_it_was(tmp_path, demos):
    config = configured(tmp_path, demos, steps=400, record=tmp_path / "recording")
    seen = []
    report = session.learn(config, lambda report, episode: seen.append(episode.success))
    assert report.steps >= 400
    assert len(seen) == report.episodes
    assert report.validations[0].episodes == 5
    assert (report.policy / "policy.json").exists() or list(report.policy.iterdir())
    saved = json.loads((tmp_path / "run" / session.PROGRESS).read_text())
    assert saved["steps"] == report.steps
    with pytest.raises(ConfigError, match="resume"):
        session.learn(config)
    more = session.learn(replace(config, steps=700, resume=True))
    assert more.steps >= 700
    assert more.episodes > report.episodes
    assert len(more.validations) >= len(report.validations)
    frames = open_dataset(tmp_path / "recording").load()
    assert frames.num_episodes >= more.episodes
    assert {"policy_action", "human_action", "pre_intervention", "reason"} <= set(frames.extras)
    driven = frames.extras["actor"].ravel() == ACTOR_CODES["human"]
    asked = frames.extras["human_action"]
    np.testing.assert_array_equal(asked[~driven], frames.action[~driven])
    assert (asked[driven] != frames.extras["policy_action"][driven]).any(axis=1).all()
    runs = [json.loads(line) for line in (tmp_path / "recording" / "meta" / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 2
    assert sum(run["acted"]["human"] for run in runs) == driven.sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"robot": "fake"}, "clock=fast"),
        ({"operator": "keyboard"}, "clock=fast"),
        ({"method": "hg_dagger"}, "--policy"),
        ({"method": "hg_dagger", "operator": "none"}, "corrections"),
        ({"reward": "classifier"}, "classifier:PATH"),
        ({"robot": "fake", "clock": "real"}, "does not know what success is"),
        ({"clock": "real", "stop_at": 0.9}, "clock=fast"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        session.learn(configured(tmp_path, tmp_path, **changes))


# ---- in real time --------------------------------------------------------------------------------------------------

REAL = ExecutorConfig(
    tick_rate_hz=40.0, realtime_priority=0, blend_seconds=0.1, late_steps=8, max_state_age=5.0, operator_timeout=5.0
)
"""A control loop that a busy machine does not stop."""


@pytest.fixture
def parts(monkeypatch):
    """The parts of the session that runs, and for all weights that are taken: version, thread, ticks made before."""
    kept = SimpleNamespace(taken=[], executor=None, learner=None, attempts=None)

    def keep(name, kind):
        def make(*args, **options):
            setattr(kept, name, kind(*args, **options))
            return getattr(kept, name)

        return make

    monkeypatch.setattr(session, "Executor", keep("executor", session.Executor))
    monkeypatch.setattr(session, "LearnerClient", keep("learner", session.LearnerClient))
    monkeypatch.setattr(session, "Attempts", keep("attempts", session.Attempts))
    refresh = ActingPolicy.refresh

    def noted(policy):
        before = policy.version
        refresh(policy)
        if policy.version != before and kept.executor is not None:
            kept.taken.append((policy.version, threading.current_thread().name, kept.executor.lateness.count))

    monkeypatch.setattr(ActingPolicy, "refresh", noted)
    return kept


def learn_until(condition, config, on_episode=None):
    """Learn, and press Ctrl-C as soon as the condition holds; where it never does, the session's minutes end it."""
    ended = threading.Event()

    def watch():
        while not ended.wait(0.02):
            if condition():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        return session.learn(config, on_episode)
    finally:
        ended.set()
        thread.join()


def check_control_went_on(parts):
    """New weights came to act between two ticks of a loop that kept its pace, in the thread that plans."""
    versions, threads, ticks = zip(*parts.taken, strict=True)
    assert versions[-1] >= 2
    assert list(versions) == sorted(set(versions))
    assert set(threads) == {"policy"}
    executor = parts.executor
    assert 0 < ticks[-1] <= executor.lateness.count
    assert executor.missed_ticks < executor.lateness.count, "at least every other tick came"
    assert executor.robot_confirmed_stop


def classifier_at(spec, total, directory):
    """Write a classifier that sees success where the elements of the state come to more than ``total``."""
    classifier = SuccessClassifier(StateEncoder(spec), ClassifierConfig(hidden=(), dropout=0.0))
    with torch.no_grad():
        classifier.net[-1].weight.fill_(20.0)
        classifier.net[-1].bias.fill_(-20.0 * total)
    return f"classifier:{save_classifier(classifier.eval(), directory)}"


@pytest.mark.usefixtures("guided")
def test_control_goes_on_while_the_learner_stands_still_and_takes_its_weights_when_they_come(
    tmp_path, demos, parts, monkeypatch
):
    make, goes_on = session.Executor, threading.Event()

    def halting(*args, **options):
        learner = parts.learner.pid
        os.kill(learner, signal.SIGSTOP)

        def resume():
            goes_on.wait(30.0)
            os.kill(learner, signal.SIGCONT)

        threading.Thread(target=resume, daemon=True).start()
        return make(*args, **options)

    monkeypatch.setattr(session, "Executor", halting)
    ended = []

    def on_episode(report, episode):
        if not ended:
            stat = Path(f"/proc/{parts.learner.pid}/stat").read_text()
            assert stat.rpartition(")")[2].split()[0] == "T", "the learner stands still"
            goes_on.set()
        ended.append((episode, parts.executor.lateness.count))

    config = configured(
        tmp_path,
        demos,
        clock="real",
        reward=classifier_at(GuidedEnv().spec, 1.0, tmp_path / "classifier"),
        attempt_seconds=20.0,
        habits=OperatorHabits(grace=0.2, patience=0.2),
        executor=REAL,
        pretrain=1,
        minutes=1.0,
    )
    report = learn_until(lambda: parts.taken and parts.taken[-1][0] >= 2, config, on_episode)
    # A tick, a step or an episode that waited for the learner would never have ended.
    episode, ticks = ended[0]
    assert ticks >= 2 * episode.steps
    assert parts.taken[-1][2] >= ticks
    assert episode.success, "the classifier saw it"
    assert parts.attempts.attempts[0].success
    assert parts.attempts.attempts[0].probability > 0.5
    assert report.takeovers >= 1
    assert report.human_steps >= 1
    assert report.learner_restarts == 0
    check_control_went_on(parts)


class Person:
    """Enables the robot, helps once in each attempt, marks it a success, hands back, and sets the scene."""

    def __init__(self, parts, size):
        self.parts, self.size = parts, size
        self.mode, self.ticks, self.seq = None, 0, 0
        self.helped, self.scenes = 0, []

    def connect(self):
        pass

    def disconnect(self):
        pass

    def poll(self):
        arbiter, acting = self.parts.executor.arbiter, self.parts.attempts.phase == "acting"
        mode = arbiter.mode
        self.ticks = self.ticks + 1 if mode is self.mode else 0
        self.mode, driving, events = mode, mode is Mode.HUMAN, ()
        if mode is Mode.IDLE and self.parts.executor.ready.is_set() and not arbiter.plan_requested:
            events = (OperatorEvent.ENABLE,)
        elif mode is Mode.AUTO and acting and self.ticks == 8 and self.helped == len(self.scenes):
            events = (OperatorEvent.TAKE_OVER,)
        elif driving and self.ticks == 16:
            self.helped += 1
            events = (OperatorEvent.SUCCESS,)
        elif driving and self.ticks >= 20:
            events = (OperatorEvent.HAND_BACK,)
        elif mode is Mode.HOLD and self.ticks >= 12 and not arbiter.plan_requested:
            if arbiter.reason == "operator_hold":
                self.scenes.append(self.parts.executor.safety.command.copy())
            events = (OperatorEvent.HAND_BACK,)
        self.seq += 1
        motion = np.full(self.size, float(driving and self.ticks < 16))
        return OperatorInput(time.monotonic(), self.seq, driving, motion, events, "person")


def test_an_operators_corrections_and_marks_teach_a_policy_and_the_robot_waits_for_the_scene(
    tmp_path, demos, parts, monkeypatch
):
    torch.manual_seed(0)
    shape = GaussianConfig((8,), low=(-0.1,) * 3, high=(0.1,) * 3, relative_to="state")
    save_policy(GaussianPolicy(FakeRobot(3).spec, shape), tmp_path / "policy")
    person = Person(parts, 3)
    monkeypatch.setattr(session, "build_teleop", lambda *_, **__: person)
    config = configured(
        tmp_path,
        demos,
        method="hg_dagger",
        policy=tmp_path / "policy",
        robot="fake",
        operator="person",
        reward="operator",
        clock="real",
        options=("batch_size=16",),
        executor=REAL,
        minutes=1.0,
    )
    episodes = []

    def in_the_next_attempt():
        return len(person.scenes) == 1 and parts.executor.arbiter.mode is Mode.AUTO and parts.taken[-1][0] >= 2

    report = learn_until(in_the_next_attempt, config, lambda _, episode: episodes.append(episode))
    episode = episodes[0]
    assert episode.success, "the operator's mark"
    assert episode.arrays["actor"][-1] == ACTOR_CODES["human"], "nothing is added to an attempt after its mark"
    assert 4 <= episode.human_steps < episode.steps
    assert report.takeovers == report.episodes == 1
    assert report.human_steps == episode.human_steps
    facts = parts.learner.newest[2]
    assert facts["metrics"]["human_steps"] == episode.human_steps
    assert facts["metrics"]["updates"] == episode.steps
    here = {"state": np.zeros((1, 1, 3), np.float32)}
    before, after = (
        load_policy(path).plan(here) for path in (tmp_path / "run/learner/checkpoints/initial", report.policy)
    )
    assert not np.array_equal(before, after)
    # The robot went back to where the attempt began, and stood there until the operator handed back.
    changes = [(mode, reason) for _, mode, reason in parts.executor.arbiter.changes]
    held = changes.index((Mode.HOLD, "operator_hold"))
    assert changes[held + 1] == (Mode.HOLD, "hand_back")
    np.testing.assert_allclose(person.scenes[0], np.zeros(3), atol=0.01)
    assert np.abs(episode.arrays["action"][-1]).max() > 0.05
    check_control_went_on(parts)


@pytest.mark.ros
@pytest.mark.usefixtures("ros_domain")
def test_a_robot_on_topics_learns_without_a_human_from_one_attempt_after_another(tmp_path, parts):
    bench = ros_arm(tmp_path, max_silence=10.0, stop_timeout=10.0)
    spec = bench.robot.spec
    with EpisodeWriter(tmp_path / "demos", spec, task="reach") as writer:
        for _ in range(3):
            for index in range(20):
                writer.add({"state": np.full(3, 0.02 * index, np.float32)}, np.full(3, 0.02 * index + 0.02, np.float32))
            writer.save_episode(success=True)
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(bench.config).items()}
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "keys.txt").write_text("".join(f"{0.5 * k} n\n{0.5 * k + 0.25} b\n" for k in range(1, 200)))
    (tmp_path / "keys.yaml").write_text(f"script: {tmp_path / 'keys.txt'}\nautostart: true\n")
    config = configured(
        tmp_path,
        tmp_path / "demos",
        method="serl",
        robot="ros_arm",
        robot_config=tmp_path / "arm.yaml",
        operator="script",
        operator_config=tmp_path / "keys.yaml",
        reward=classifier_at(spec, 50.0, tmp_path / "classifier"),
        attempt_seconds=0.5,
        wait_after_attempt=False,
        clock="real",
        executor=REAL,
        pretrain=1,
        minutes=2.0,
    )
    episodes = []
    try:
        report = learn_until(
            lambda: parts.taken and parts.taken[-1][0] >= 3, config, lambda _, episode: episodes.append(episode)
        )
    finally:
        bench.close()
    assert report.episodes >= 2
    assert report.human_steps == report.takeovers == 0
    assert [(one.success, one.steps) for one in parts.attempts.attempts[:2]] == [(False, 10)] * 2
    assert max(one.probability for one in parts.attempts.attempts) < 0.5, "the classifier looked, and saw none"
    assert not any(episode.success for episode in episodes)
    states = episodes[0].arrays["observation.state"]
    assert np.abs(states[-1] - states[0]).max() > 0.005, "the arm on the other side moved"
    reasons = [reason for _, _, reason in parts.executor.arbiter.changes]
    assert "operator_hold" not in reasons, "nobody was waited for"
    check_control_went_on(parts)
