"""The success classifier: labels, threshold, report, files, and the reward it gives."""

import numpy as np
import pytest
import torch

from benchmarks.pusht_human import CoverageGain
from robot_rl.cli import finetune as finetune_command
from robot_rl.cli import reward as command
from robot_rl.core import registry
from robot_rl.core.env import Step
from robot_rl.core.errors import CapabilityError, ConfigError, DataError, SpecMismatchError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames
from robot_rl.data.store import EpisodeWriter
from robot_rl.policies.success import (
    ClassifierConfig,
    StateEncoder,
    SuccessClassifier,
    load_classifier,
    save_classifier,
)
from robot_rl.rl.reward_training import (
    RewardTrainConfig,
    assess,
    conformal_threshold,
    label,
    make_report,
    split,
    train_classifier,
)
from robot_rl.rl.rewards import ClassifierReward

SPEC = Spec({"state": ArraySpec((2,))}, ArraySpec((1,)), 10.0)
QUICK = RewardTrainConfig(
    last_frames=2, margin=2, steps=400, learning_rate=3e-3, classifier=ClassifierConfig(hidden=(32,))
)


def episodes(count=60, length=20, seed=0):
    """The first number rises to 1 in successes, to at most 0.6 in failures; the second is noise."""
    rng = np.random.default_rng(seed)
    states, success = [], []
    for i in range(count):
        top = 1.0 if i % 2 else rng.uniform(0.2, 0.6)
        path = np.stack([np.linspace(0, top, length), rng.normal(size=length)], axis=1)
        states.append(path + [[0.01, 0]] * rng.normal(size=(length, 1)))
        marks = np.zeros(length, bool)
        marks[-1] = bool(i % 2)
        success.append(marks)
    ends = np.arange(1, count + 1) * length
    state = np.concatenate(states).astype(np.float32)
    return Frames(
        {"state": state}, np.zeros((len(state), 1), np.float32), ends, SPEC, {"success": np.concatenate(success)}
    )


@pytest.fixture(scope="module")
def trained():
    return train_classifier(episodes(), QUICK, seed=1)


def test_labels_of_frames():
    frames = episodes(2, 8)
    labels = label(frames, last_frames=2, margin=3)
    assert labels.success.tolist() == [False, True]
    assert labels.positive[:8].sum() == 0
    assert labels.positive[8:].tolist() == [False] * 6 + [True] * 2
    assert labels.negative[:8].all()
    assert labels.negative[8:].tolist() == [True] * 3 + [False] * 5
    # Frames that are marked themselves are success, however early, and the margin precedes them.
    frames.extras["success"][8 + 4 :] = True
    labels = label(frames, last_frames=2, margin=3)
    assert labels.positive[8:].tolist() == [False] * 4 + [True] * 4
    assert labels.negative[8:].tolist() == [True] + [False] * 7


def test_split_keeps_kinds_apart_and_every_episode_once():
    success = np.arange(40) % 4 == 0
    parts = split(success, 0.3, 0, "it")
    assert sorted(np.concatenate(parts)) == list(range(40))
    assert [int(success[part].sum()) for part in parts] == [6, 2, 2]
    with pytest.raises(DataError, match="at least 3"):
        split(np.array([True, False, False]), 0.3, 0, "it")


def test_conformal_threshold_keeps_its_promise():
    """Over many calibration sets the share of new episodes above the threshold is at most the one asked for."""
    rng = np.random.default_rng(0)
    exceeded = [(rng.uniform(size=200) > conformal_threshold(rng.uniform(size=39), 0.1)).mean() for _ in range(400)]
    assert np.mean(exceeded) == pytest.approx(0.1, abs=0.01)
    assert conformal_threshold(np.array([0.2, 0.9, 0.4]), 0.05) == 0.9
    assert conformal_threshold(np.array([0.2]), 0.05, least=0.5) == 0.5


def test_report_counts_by_hand():
    frames = episodes(4, 5)
    labels = label(frames, last_frames=1, margin=1)
    probability = np.zeros(20)
    probability[[9, 8, 19 - 3]] = 0.9, 0.8, 0.7  # episode 1: its last two frames; episode 3: too early, never again
    probability[2] = 0.95  # episode 0 failed
    report = make_report(probability, labels, frames, np.arange(4), 0.6)
    assert (report.episodes, report.successes, report.detected) == (4, 2, 1)
    assert (report.failures, report.false_alarms) == (2, 1)
    assert report.lead == np.median([1, 3])
    # Positives 0.9 and 0; negatives: ten of the failures (one 0.95), two times three before the margin (one 0.7).
    assert report.area == pytest.approx((15 + 14 / 2) / (2 * 16))


def test_training_separates_success_and_is_repeatable(trained):
    classifier, report = trained
    assert report.detected == report.successes == 5
    assert report.failures == 5
    assert report.area > 0.99
    fresh = assess(classifier, episodes(seed=9), QUICK, "fresh")
    assert fresh.detected >= 0.9 * fresh.successes
    assert fresh.false_alarms <= 0.15 * fresh.failures
    again, _ = train_classifier(episodes(), QUICK, seed=1)
    history = {"state": np.random.default_rng(0).normal(size=(9, 1, 2)).astype(np.float32)}
    np.testing.assert_array_equal(again.probability(history), classifier.probability(history))


def test_label_smoothing_bounds_the_confidence(trained):
    """At the optimum of smoothed labels, probabilities of clear cases are s/2 and 1 - s/2."""
    classifier, _ = trained
    clear = classifier.probability({"state": np.array([[[1.0, 0.0]], [[0.1, 0.0]]], np.float32)})
    np.testing.assert_allclose(clear, [0.975, 0.025], atol=0.03)


def test_marks_that_are_missing_or_say_nothing_are_one_line():
    frames = episodes(6)
    silent = Frames(frames.observation, frames.action, frames.episode_ends, SPEC, {"reward": np.zeros(120)})
    with pytest.raises(DataError, match=r"rec has no success marks: .* \(its extras: reward\)$"):
        train_classifier(silent, where="rec")
    none = Frames(frames.observation, frames.action, frames.episode_ends, SPEC, {"success": np.zeros(120, bool)})
    with pytest.raises(DataError, match="none of its 6 episodes"):
        train_classifier(none)
    with pytest.raises(DataError, match="nothing but success"):
        label(episodes(2).take([1]), last_frames=20, margin=0)
    with pytest.raises(ConfigError, match="last_frames"):
        label(frames, last_frames=0, margin=0)


def test_files(trained, tmp_path):
    classifier, report = trained
    save_classifier(classifier, tmp_path / "c", report.to_json())
    loaded = load_classifier(tmp_path / "c")
    history = {"state": np.random.default_rng(0).normal(size=(9, 1, 2)).astype(np.float32)}
    np.testing.assert_array_equal(loaded.probability(history), classifier.probability(history))
    assert loaded.threshold == classifier.threshold
    with pytest.raises(DataError, match="robot-rl reward train"):
        load_classifier(tmp_path)
    weights = tmp_path / "c" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot read the classifier"):
        load_classifier(tmp_path / "c")
    (tmp_path / "c" / "classifier.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        load_classifier(tmp_path / "c")


def test_a_policy_serves_as_encoder(tmp_path, fake_base):
    """Its features are used as they are, with as many observations as it takes, and travel with the classifier."""
    frames = episodes()
    wide = {"state": np.concatenate([frames.observation["state"], np.zeros((1200, 2), np.float32)], axis=1)}
    spec = Spec({"state": ArraySpec((4,))}, ArraySpec((2,), low=(-1.0,) * 2, high=(1.0,) * 2), 10.0)
    frames = Frames(wide, np.zeros((1200, 2), np.float32), frames.episode_ends, spec, frames.extras)
    policy = fake_base(spec)
    classifier, report = train_classifier(frames, QUICK, encoder=policy)
    assert classifier.obs_steps == policy.obs_steps == 2
    assert classifier.feature_size == 4
    assert report.detected == report.successes
    save_classifier(classifier, tmp_path / "c")
    history = {"state": np.random.default_rng(0).normal(size=(9, 2, 4)).astype(np.float32)}
    np.testing.assert_array_equal(load_classifier(tmp_path / "c").probability(history), classifier.probability(history))


class Tiles(torch.nn.Module):
    """A policy that sees a camera: features are the mean brightness of four tiles of its image, times a weight."""

    kind, closed_loop, base = "tiles", False, None

    def __init__(self, spec):
        super().__init__()
        self.spec, self.obs_steps, self.horizon, self.execute_steps = spec, 1, 1, 1
        self.gain = torch.nn.Parameter(torch.full((4,), 2.0))

    @classmethod
    def from_parts(cls, config, spec, base=None):
        return cls(spec)

    def config_dict(self):
        return {}

    def encode(self, history):
        image = history["images.front"][:, -1].float().permute(0, 3, 1, 2) / 255
        return torch.nn.functional.adaptive_avg_pool2d(image, 2).mean(1).flatten(1) * self.gain


class Lamp:
    """Two lanes of ten steps; in the image a lamp, at the left of lane 0 and of no other, glows more with each step."""

    num_envs, max_episode_steps = 2, 10
    spec = Spec({"images.front": ArraySpec((8, 8, 3), "uint8"), "state": ArraySpec((1,))}, ArraySpec((1,)), 10.0)

    def reset(self, seed=None):
        self.time = 0
        return self._observe()

    def _observe(self):
        image = np.full((2, 8, 8, 3), 20, np.uint8)
        image[0, 4:, :4] = 20 + 23 * self.time
        return {"images.front": image, "state": np.zeros((2, 1), np.float32)}

    def step(self, actions):
        self.time += 1
        final, ended = self._observe(), np.full(2, self.time == 10)
        self.time %= 10
        info = {"success": np.zeros(2, bool), "episode_seed": np.arange(2)}
        return Step(self._observe(), np.zeros(2, np.float32), np.zeros(2, bool), ended, final, info)


def test_images_are_judged_by_an_encoder_that_sees_them(tmp_path, monkeypatch, reach_env):
    """From recorded images to a reward: trained, saved, loaded, and asked about a camera's images in an environment."""
    monkeypatch.setitem(registry._overrides, ("policies", "tiles"), Tiles)
    monkeypatch.setitem(registry._overrides, ("policies", "tiles"), Tiles)
    rng, env = np.random.default_rng(0), Lamp()
    images, success = [], []
    for i in range(40):
        observation = env.reset()
        for _ in range(10):
            images.append(observation["images.front"][i % 2] + rng.integers(0, 8, (8, 8, 3), np.uint8))
            observation = env.step(np.zeros((2, 1))).final_observation
        success += [False] * 9 + [i % 2 == 0]
    spec = Spec({"images.front": env.spec.observation["images.front"]}, env.spec.action, 10.0)
    frames = Frames(
        {"images.front": np.stack(images)}, np.zeros((400, 1), np.float32), np.arange(10, 401, 10), spec,
        {"success": np.array(success)},
    )  # fmt: skip
    encoder = Tiles(spec)
    classifier, report = train_classifier(frames, QUICK, encoder=encoder)
    assert (report.detected, report.false_alarms) == (report.successes, 0)
    assert torch.equal(encoder.gain, torch.full((4,), 2.0)), "features are used as they are"
    save_classifier(classifier, tmp_path / "c")
    loaded = load_classifier(tmp_path / "c")
    assert isinstance(loaded.encoder, Tiles)
    history = {"images.front": np.stack(images)[:, None]}
    np.testing.assert_array_equal(loaded.probability(history), classifier.probability(history))
    view = ClassifierReward(env, loaded)
    view.reset(0)
    rewards = np.array([view.step(np.zeros((2, 1))).reward for _ in range(20)])
    assert rewards.sum(0).tolist() == [2, 0]
    assert (np.flatnonzero(rewards[:, 0]) % 10 >= 6).all()
    blind = StateEncoder(env.spec)
    assert list(blind.spec.observation) == ["state"], "what has no image encoder sees no images"
    with pytest.raises(SpecMismatchError, match=r"images\.front"):
        ClassifierReward(reach_env(2), loaded)


class Above(torch.nn.Module):
    """A classifier by hand: success is where the state's first number exceeds 0.35."""

    def __init__(self, spec, obs_steps=1):
        super().__init__()
        self.spec, self.obs_steps, self.seen = spec, obs_steps, []

    def fires(self, history):
        self.seen.append(history["state"].copy())
        return history["state"][:, -1, 0] > 0.35


def test_reward_comes_once_at_the_first_yes_and_success_stays_the_environments(reach_env):
    env = reach_env(2, limit=6, radius=0.0)
    view = ClassifierReward(env, Above(env.spec, obs_steps=3))
    first = view.reset(5)
    rewards, last = [], None
    for _ in range(12):
        last = view.step(np.array([[1.0, 0.0], [0.2, 0.0]]))
        rewards.append(last.reward)
        assert not last.info["success"].any()
    # Lane 0 passes 0.35 with its fourth step of every episode of six, and says yes until it ends; lane 1 never does.
    np.testing.assert_array_equal(np.array(rewards)[:, 0], [0, 0, 0, 1, 0, 0] * 2)
    np.testing.assert_array_equal(np.array(rewards)[:, 1], 0)
    assert last.info["classifier"].tolist() == [True, False]
    seen = view.classifier.seen
    np.testing.assert_allclose(seen[0][0, :, 0], [first["state"][0, 0], first["state"][0, 0], 0.1], atol=1e-6)
    # What is judged is the step's own last observation, and no history reaches across an episode's end.
    np.testing.assert_allclose(seen[5][0, :, 0], [0.4, 0.5, 0.6], atol=1e-6)
    np.testing.assert_allclose(seen[6][0, :, 0], [0, 0, 0.1], atol=1e-6)


def test_terminating_ends_the_episode_where_it_can(reach_env):
    one = reach_env(1, limit=10, radius=0.0)
    view = ClassifierReward(one, Above(one.spec), terminate=True)
    view.reset(0)
    steps = [view.step(np.array([[1.0, 0.0]])) for _ in range(8)]
    assert [bool(step.terminated[0]) for step in steps] == [False] * 3 + [True] + [False] * 3 + [True]
    assert steps[3].final_observation["state"][0, 0] == pytest.approx(0.4)
    assert steps[3].observation["state"][0, 0] == 0
    assert [float(step.reward[0]) for step in steps] == [0, 0, 0, 1] * 2
    many = reach_env(2)
    with pytest.raises(CapabilityError, match="one lane"):
        ClassifierReward(many, Above(many.spec), terminate=True)
    other = Spec({"state": ArraySpec((9,))}, ArraySpec((2,)), 10.0)
    with pytest.raises(SpecMismatchError, match="the success classifier"):
        ClassifierReward(many, SuccessClassifier(StateEncoder(other)))


def test_commands(tmp_path, capsys, reach_env):
    frames = episodes(30)
    writer = EpisodeWriter(tmp_path / "data", SPEC)
    for i in range(30):
        part = frames.episode(i)
        for row in range(part.start, part.stop):
            writer.add({"state": frames.observation["state"][row]}, frames.action[row])
        writer.save_episode(success=bool(i % 2))
    writer.close()
    command.run(command.Train(tmp_path / "data", tmp_path / "reward", train=QUICK))
    assert "classifier:" in capsys.readouterr().out
    command.run(command.Check(tmp_path / "reward", tmp_path / "data", train=QUICK))
    assert "detects" in capsys.readouterr().out

    def task(num_envs=1):
        env = reach_env(num_envs, size=1)
        env.spec = SPEC
        return env

    registry.register("tasks", "rising", task)
    config = finetune_command.Config(task="rising", reward=f"classifier:{tmp_path / 'reward'}")
    env = finetune_command._factory(config)(num_envs=3)
    assert isinstance(env, ClassifierReward)
    assert env.num_envs == 3
    with pytest.raises(ConfigError, match="classifier:PATH"):
        finetune_command._factory(finetune_command.Config(task="rising", reward="classifier:"))
    with pytest.raises(DataError, match="no success classifier"):
        finetune_command._factory(finetune_command.Config(task="rising", reward=f"classifier:{tmp_path}"))


def test_coverage_of_an_earlier_episode_costs_the_next_nothing(reach_env):
    env = reach_env(2, radius=0.0)
    step = env.step

    def covered(actions):
        taken = step(actions)
        taken.info["coverage"] = taken.final_observation["state"][:, 0]
        return taken

    env.step = covered
    view, ahead = CoverageGain(env), np.array([[1.0, 0.0], [0.5, 0.0]])
    for _ in range(2):
        view.reset(3)
        for _ in range(3):
            np.testing.assert_allclose(view.step(ahead).reward, [2.0, 1.0], rtol=1e-4)
