"""The learner's side of human-in-the-loop learning: channel, HG-DAgger, relative actions, resumption."""

import threading

import numpy as np
import pytest
import torch

from robot_rl.core.errors import CapabilityError, ConfigError, DataError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames
from robot_rl.data.normalizer import Normalizer
from robot_rl.data.store import EpisodeWriter
from robot_rl.policies.gaussian import GaussianConfig, GaussianPolicy
from robot_rl.rl import channel as channels
from robot_rl.rl.channel import Channel, ChannelError
from robot_rl.rl.learner_process import LearnerSettings, main, method_settings
from robot_rl.rl.methods.hg_dagger import DaggerConfig, DaggerLearner, corrections
from robot_rl.rl.methods.rlpd import GaussianBehaviour, RLPDConfig, action_bounds
from robot_rl.rl.off_policy.stream import HUMAN, EpisodeStream

SPEC = Spec({"state": ArraySpec((2,))}, ArraySpec((2,), low=(-1, -1), high=(1, 1)), 20.0)


@pytest.fixture
def ends():
    near, far = Channel.pair()
    far = Channel(far)
    yield near, far
    near.close()
    far.close()


def test_messages_arrive_whole_in_order_and_with_their_types(ends):
    near, far = ends
    large = np.arange(300_000, dtype=np.float32).reshape(3, -1)
    sending = threading.Thread(target=lambda: (near.send("a", {"n": 1}, {"x": large}), near.send("b")))
    sending.start()
    first, second = far.receive(5), far.receive(5)
    sending.join()
    assert (first.kind, first.facts, second.kind) == ("a", {"n": 1}, "b")
    np.testing.assert_array_equal(first.arrays["x"], large)
    assert first.arrays["x"].dtype == np.float32
    assert far.receive(0.01) is None


def test_garbage_large_messages_and_the_others_end_are_errors_of_one_kind(ends, monkeypatch):
    near, far = ends
    near._socket.sendall(channels._HEAD.pack(4, 2) + b"nonsen")
    with pytest.raises(ChannelError, match="no message"):
        far.receive(5)
    near._socket.sendall(channels._HEAD.pack(1 << 31, 0))
    with pytest.raises(ChannelError, match="at most"):
        far.receive(5)
    near.close()
    with pytest.raises(ChannelError, match="gone"):
        far.receive(5)
    with pytest.raises(ChannelError, match="gone"):
        far.send("x", {}, {"x": np.zeros(1000)})


def frames_of(actors, success=True, action=0.5):
    count = len(actors)
    extras = {"actor": np.array(actors, np.int8), "success": np.zeros(count, bool), "keep": np.ones(count, bool)}
    extras["success"][-1] = success
    state = np.random.default_rng(count).uniform(-1, 1, (count, 2)).astype(np.float32)
    actions = np.full((count, 2), action, np.float32)
    return Frames({"state": state}, actions, np.array([count]), SPEC, extras)


def test_corrections_are_the_stretches_that_the_operator_drove():
    frames = frames_of([0, 0, HUMAN, HUMAN, -1, HUMAN, 0, HUMAN, HUMAN])
    found = corrections(frames)
    assert found.episode_lengths.tolist() == [2, 1, 2]
    np.testing.assert_array_equal(found.observation["state"], frames.observation["state"][[2, 3, 5, 7, 8]])
    assert corrections(frames_of([0, 0, -1])) is None
    split = Frames(frames.observation, frames.action, np.array([3, 9]), SPEC, frames.extras)
    assert corrections(split).episode_lengths.tolist() == [1, 1, 1, 2]  # two parts that are not consecutive


def dagger(stream, seed=0):
    torch.manual_seed(0)
    policy = GaussianPolicy(SPEC, GaussianConfig((32,), low=(-1, -1), high=(1, 1)))
    demos = frames_of([0] * 50, action=-0.5)
    config = DaggerConfig(batch_size=32, correction_share=0.9, learning_rate=1e-2, ema_decay=0.9, updates_per_step=4)
    return DaggerLearner(policy, stream, config, demos, seed)


def send_episode(end, number, actors, action=0.5):
    frames = frames_of(actors, action=action)
    arrays = {"observation.state": frames.observation["state"], "action": frames.action, **frames.extras}
    end.send("episode", {"number": number}, arrays | {"ends": frames.episode_ends})


def test_hg_dagger_learns_what_the_operator_did_and_nothing_from_its_own_steps(ends):
    near, far = ends
    learner = dagger(EpisodeStream(far, SPEC))
    learner.begin()
    assert near.receive(5).kind == "hello"
    assert near.receive(5).kind == "weights"
    send_episode(near, 0, [0] * 20, action=0.9)
    learner.iterate(0.0)
    assert learner.updates == 0
    send_episode(near, 1, [0] * 10 + [HUMAN] * 30, action=0.5)
    metrics = learner.iterate(0.0)
    assert learner.updates == 4 * 40
    assert metrics["human_steps"] == 30
    history = {"state": frames_of([0] * 10 + [HUMAN] * 30).observation["state"][10:, None]}
    learned = learner.policy.plan(history)[:, 0]
    assert np.abs(learned - 0.5).mean() < 0.25  # a tenth of each batch still says -0.5


def test_hg_dagger_goes_on_where_it_was(ends):
    near, far = ends
    learner = dagger(EpisodeStream(far, SPEC))
    send_episode(near, 0, [HUMAN] * 20)
    learner.iterate(0.0)
    tensors, numbers = learner.state()
    again = dagger(EpisodeStream(far, SPEC))
    again.restore({name: tensor.clone() for name, tensor in tensors.items()}, numbers)
    assert again.stream.received == 1
    for one in (learner, again):
        one._update()
    for mine, theirs in zip(learner.policy.parameters(), again.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_an_episode_that_is_missing_is_noticed(ends):
    near, far = ends
    stream = EpisodeStream(far, SPEC)
    send_episode(near, 3, [0] * 5)
    with pytest.raises(DataError, match="episode 3, and 0"):
        stream.next(5)


# ---- actions relative to what is observed --------------------------------------------------------------------------


def relative(**changes):
    values = {"low": (-0.1, -0.2), "high": (0.1, 0.2), "relative_to": "state[0:2]", **changes}
    return GaussianPolicy(SPEC, GaussianConfig((8,), **values))


def test_relative_actions_are_offsets_from_the_newest_observation_and_squash_is_the_inverse():
    policy = relative()
    policy.normalizer.load_state_dict(Normalizer(SPEC).state_dict())
    history = {"state": np.random.default_rng(0).uniform(-0.8, 0.8, (50, 1, 2)).astype(np.float32)}
    chunks = policy.plan(history)
    offset = chunks[:, 0] - history["state"][:, 0]
    assert (np.abs(offset) <= [0.1 + 1e-6, 0.2 + 1e-6]).all()
    squashed = torch.rand(50, 2) * 1.8 - 0.9
    origin = policy.origin(history)
    torch.testing.assert_close(policy.squash(policy.unsquash(squashed, origin), origin), squashed, atol=1e-5, rtol=0)
    behaviour = GaussianBehaviour(policy, 0)
    record = behaviour.demonstrated(history, history["state"] + np.array([0.05, -0.1], np.float32))
    torch.testing.assert_close(record["action"], torch.tensor([[0.5, -0.5]]).repeat(50, 1), atol=1e-5, rtol=0)
    with pytest.raises(CapabilityError, match="demonstrated"):
        behaviour.action(chunks)


def test_what_actions_are_relative_to_must_fit_them():
    with pytest.raises(ConfigError, match="1 elements"):
        relative(relative_to="state[0]")
    config = RLPDConfig(relative_to="state", reach=(0.1, 0.3))
    low, high = action_bounds(SPEC, config, None)
    np.testing.assert_allclose([low, high], [[-0.1, -0.3], [0.1, 0.3]])
    with pytest.raises(ConfigError, match="reach"):
        action_bounds(SPEC, RLPDConfig(relative_to="state"), None)
    frames = frames_of([0] * 20)
    low, high = action_bounds(SPEC, RLPDConfig(relative_to="state"), frames)
    farthest = np.abs(frames.action - frames.observation["state"]).max(0)
    np.testing.assert_allclose(high, 1.1 * farthest, rtol=1e-6)


def test_settings_survive_the_way_to_the_process_and_unknown_options_are_named(tmp_path):
    settings = LearnerSettings("serl", SPEC.to_json(), "demos", options=("batch_size=8",), pretrain=3)
    settings.write(tmp_path)
    assert LearnerSettings.read(tmp_path) == settings
    assert method_settings("serl", settings.options).core.batch_size == 8
    with pytest.raises(ConfigError):
        LearnerSettings.read(tmp_path / "nowhere")


def test_demonstrations_of_another_robot_end_the_process_with_the_differences_in_its_log(tmp_path, ends, caplog):
    other = Spec({"position": ArraySpec((2,))}, ArraySpec((3,)), SPEC.rate_hz)
    with EpisodeWriter(tmp_path / "demos", other, task="other") as writer:
        writer.add({"position": np.zeros(2, np.float32)}, np.zeros(3, np.float32), reward=0.0, actor="human")
        writer.save_episode(success=True)
    LearnerSettings("serl", SPEC.to_json(), str(tmp_path / "demos")).write(tmp_path / "run")
    near, _ = ends
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "run"), str(near._socket.detach())])
    assert end.value.code == 2
    assert caplog.messages[-1].startswith("the robot does not fit the demonstrations: ")
    for difference in ("observation 'state' is missing (available: position)", "action: shape (2,) against (3,)"):
        assert difference in caplog.messages[-1]
