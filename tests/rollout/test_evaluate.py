from dataclasses import replace

import numpy as np
import pytest

from robot_rl.core.env import Step
from robot_rl.core.errors import CapabilityError, DataError, SpecMismatchError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.rollout.collect import collect
from robot_rl.rollout.evaluate import evaluate, wilson


class SeededEnv:
    """An episode of seed s lasts ``1 + s % 7`` steps, succeeds if s is even, and returns its length."""

    spec = Spec({"state": ArraySpec((1,))}, ArraySpec((1,)), 10.0)
    max_episode_steps = 7

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def reset(self, seed=0):
        self.seeds = seed + np.arange(self.num_envs)
        self.count = np.zeros(self.num_envs, int)
        return self._observe()

    def _observe(self):
        return {"state": self.seeds[:, None].astype(np.float32)}

    def step(self, actions):
        assert np.array_equal(actions[:, 0], self.seeds)
        self.count += 1
        done = self.count >= 1 + self.seeds % 7
        success = done & (self.seeds % 2 == 0)
        info = {"success": success, "episode_seed": self.seeds.copy(), "count": self.count.copy()}
        final = self._observe()
        self.seeds[done] += self.num_envs
        self.count[done] = 0
        reward = np.ones(self.num_envs, np.float32)
        return Step(self._observe(), reward, success, done & ~success, final, info)


class Echo:
    """Acts with the seed that it sees."""

    spec, obs_steps, horizon, execute_steps, closed_loop = SeededEnv.spec, 1, 8, 8, False

    def seed(self, seed):
        pass

    def plan(self, history):
        return np.repeat(history["state"], 8, axis=1)

    def refine(self, history, actions):
        return actions


@pytest.mark.parametrize("lanes", [1, 3, 10])
def test_every_seed_counts_exactly_once_whatever_the_lanes(lanes):
    result = evaluate(Echo(), SeededEnv(lanes), episodes=20, seed=100)
    seeds = 100 + np.arange(20)
    assert result.seeds.tolist() == seeds.tolist()
    assert result.lengths.tolist() == (1 + seeds % 7).tolist()
    assert result.returns.tolist() == result.lengths.tolist()
    assert result.success.tolist() == (seeds % 2 == 0).tolist()
    assert result.extras["count"].tolist() == result.lengths.tolist()
    assert result.to_json()["success_rate"] == 0.5


def test_an_environment_that_lacks_an_observation_is_refused():
    env = SeededEnv(1)
    env.spec = Spec({"other": ArraySpec((1,))}, ArraySpec((2,)), 10.0)
    with pytest.raises(SpecMismatchError, match=r"'state' is missing.*action: shape \(1,\) against \(2,\)"):
        evaluate(Echo(), env, 1)


@pytest.mark.parametrize("key", ["success", "episode_seed"])
def test_steps_that_do_not_say_which_episode_they_belong_to_are_refused(monkeypatch, key):
    plain = SeededEnv.step

    def step(self, actions):
        made = plain(self, actions)
        return replace(made, info={name: value for name, value in made.info.items() if name != key})

    monkeypatch.setattr(SeededEnv, "step", step)
    with pytest.raises(DataError, match=f"lacks '{key}'"):
        evaluate(Echo(), SeededEnv(2), 3)


def test_wilson_interval_against_published_values():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-3)
    assert wilson(200, 200) == pytest.approx((0.9812, 1.0), abs=1e-4)


class Memory:
    """A writer that keeps episodes in memory."""

    def __init__(self):
        self.rows, self.episodes = [], []

    def add(self, observation, action, **extras):
        self.rows.append((float(observation["state"][0]), float(action[0]), extras))

    def save_episode(self, success=None):
        self.episodes.append((success, self.rows))
        self.rows = []


def test_collect_keeps_successes_whole_and_in_order():
    env, writer = SeededEnv(3), Memory()
    result = collect(env, lambda observation: observation["state"], writer, 5, seed=0, keep="success")
    assert result.kept == 5
    assert result.frames == sum(len(rows) for _, rows in writer.episodes)
    assert result.succeeded / result.tried == pytest.approx(0.5, abs=0.25)
    for success, rows in writer.episodes:
        seed = rows[0][0]
        assert success
        assert seed % 2 == 0
        assert len(rows) == 1 + seed % 7
        assert all(row[0] == seed for row in rows)
        assert rows[-1][2] == {"reward": 1.0, "success": True, "actor": "expert"}


def test_collecting_successes_ends_where_there_are_none():
    env = SeededEnv(4)
    env.reset = lambda seed: SeededEnv.reset(env, 1)
    env.step = lambda actions: replace(SeededEnv.step(env, actions), info={"success": np.zeros(4, bool)})
    with pytest.raises(CapabilityError, match=r"no success in 20. episodes of 'expert'"):
        collect(env, lambda observation: observation["state"], None, 1)


def test_collect_records_labels_instead_of_executed_actions():
    env, writer = SeededEnv(2), Memory()
    collect(env, lambda o: o["state"], writer, 2, keep="all", label=lambda: np.full((2, 1), 7.0))
    assert all(row[1] == 7.0 for _, rows in writer.episodes for row in rows)
