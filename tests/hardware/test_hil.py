"""Human-in-the-loop learning: what is stored, what a takeover is, a learner that dies, runs that go on."""

import json
import os
import signal
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from deployment_rig import VirtualClock, WanderingPolicy
from test_parity import PointEnv

from hardware.control.arbiter import Mode
from hardware.control.executor import ExecutorConfig
from hardware.hil import session
from hardware.hil.acting import ActingPolicy
from hardware.hil.config import HILConfig
from hardware.hil.experience import Experience, Sinks
from hardware.hil.learner import LearnerClient
from hardware.hil.lockstep import LockStep
from hardware.hil.operator import OperatorHabits, ScriptedOperator
from hardware.recording.recorder import ACTOR_CODES, ExecutedStep
from hardware.robots.fake import FakeRobot
from hardware.transport import InProcessTransport
from robot_rl.core.bridge import EnvRobot
from robot_rl.core.errors import CapabilityError, ConfigError, HardwareError
from robot_rl.core.spec import Spec
from robot_rl.data.store import EpisodeWriter
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
    from robot_rl.policies.gaussian import GaussianConfig, GaussianPolicy
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
    from robot_rl.data.dataset import open_dataset

    frames = open_dataset(tmp_path / "recording").load()
    assert frames.num_episodes >= more.episodes
    assert {"policy_action", "human_action", "pre_intervention", "reason"} <= set(frames.extras)


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
