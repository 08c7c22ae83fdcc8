"""Decisions: rewards and discounts of chunks, next states at every kind of end, demonstrations."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from robot_rl.core.env import Step
from robot_rl.core.errors import ConfigError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.guard import Guard, NonFiniteError
from robot_rl.rl.off_policy.collector import Behaviour, Collector, add_demonstrations, make_replay
from robot_rl.rl.state import load_state
from robot_rl.rl.testing import CHAIN, SPEC, run_method


class Counter:
    """State = (lane, episode, time); reward = time; lane 0 terminates after 5 steps, lane 1 is cut after 7."""

    num_envs, max_episode_steps = 2, 7
    spec = Spec({"state": ArraySpec((3,))}, ArraySpec((1,)), 10.0)

    def reset(self, seed=None):
        self.time, self.episode = np.zeros(2, int), np.zeros(2, int)
        return self._observe()

    def _observe(self):
        return {"state": np.stack([np.arange(2), self.episode, self.time], 1).astype(np.float32)}

    def step(self, actions):
        self.time += 1
        reward, final = self.time.astype(np.float32), self._observe()
        terminated, truncated = np.array([self.time[0] == 5, False]), np.array([False, self.time[1] == 7])
        done = terminated | truncated
        self.episode[done] += 1
        self.time[done] = 0
        info = {"success": terminated, "episode_seed": self.episode.copy()}
        return Step(self._observe(), reward, terminated, truncated, final, info)

    def close(self):
        pass


class Chunks(Behaviour):
    spec, obs_steps, horizon, execute_steps = Counter.spec, 2, 4, 3

    def __init__(self):
        self.record, self.number = {}, 0

    def plan(self, history):
        count = len(history["state"])
        self.number += 1
        self.record = {"state": self.state(history), "action": torch.full((count, 1), float(self.number))}
        return np.zeros((count, 4, 1), np.float32)

    def state(self, history):
        return torch.from_numpy(history["state"][:, -1].copy())

    def action(self, chunks):
        return torch.from_numpy(chunks[:, 0])


def collect(steps, discount=None, **options):
    replay = make_replay(3, 1, {"online": 100, "demonstrations": 100}, 0)
    collector = Collector(Counter(), Chunks(), DecisionConfig(**options), seed=0, discount=discount)
    stored = collector.collect(replay, steps)
    assert stored == replay.size["online"]
    rows = replay.all("online")
    return [{name: values[i].tolist() for name, values in rows.items()} for i in range(stored)], collector, replay


def test_decisions_of_each_lane():
    rows, _, _ = collect(8)
    lane0 = [row for row in rows if row["state"][0] == 0]
    lane1 = [row for row in rows if row["state"][0] == 1]
    # lane 0: steps 0-2 (rewards 1+2+3), 3-4 (4+5, terminated), then 0-2 of the next episode, closed by its next plan
    assert [row["reward"] for row in lane0] == [6, 9, 6][: len(lane0)]
    assert [row["terminated"] for row in lane0[:2]] == [0, 1]
    assert lane0[0]["next_state"] == [0, 0, 3]
    # lane 1: 0-2, 3-5, then one step to the time limit, whose next state is the final observation
    assert [row["reward"] for row in lane1] == [6, 15, 7]
    assert [row["truncated"] for row in lane1] == [0, 0, 1]
    assert [row["terminated"] for row in lane1] == [0, 0, 0]
    assert lane1[2]["next_state"] == [1, 0, 7]
    assert [row["exponent"] for row in lane1] == [1, 1, 1]


def test_clock_and_discount_within_a_chunk():
    rows, _, _ = collect(8, reward="discounted", discount=0.5, clock="step", penalty=1.0)
    lane1 = [row for row in rows if row["state"][0] == 1]
    assert [row["exponent"] for row in lane1] == [3, 3, 1]
    assert lane1[0]["reward"] == pytest.approx(1 + 0.5 * 2 + 0.25 * 3 - 1)


def test_the_discount_within_a_chunk_is_the_cores():
    """Where the core's is per decision, three control steps of a chunk discount as much as one decision does."""
    rows, _, _ = collect(8, reward="discounted", discount=0.125)
    first = next(row for row in rows if row["state"][0] == 1)
    assert first["exponent"] == 1
    assert first["reward"] == pytest.approx(1 + 0.5 * 2 + 0.25 * 3)
    with pytest.raises(ConfigError, match="needs the core's discount"):
        collect(8, reward="discounted")


def test_runs_discount_the_rewards_of_a_chunk_as_their_core_does(tmp_path):
    """Two or four steps to either end of the chain, in one chunk: 1 on the right and 0.3 on the left."""
    options, base = ["horizon=4", "reward=discounted", "clock=step", "discount=0.5"], SimpleNamespace(spec=SPEC)
    run_method("rlpd", CHAIN, tmp_path / "run", steps=300, options=options, base=base, evaluations=0)
    tensors, _ = load_state(tmp_path / "run" / "learner.safetensors")
    reward = tensors["replay.online"][:, 2 + 4]
    assert sorted({round(value, 5) for value in reward.tolist()}) == [0, 0.0375, 0.125, 0.15, 0.5]


def test_steps_are_counted_over_all_lanes():
    _, collector, _ = collect(8)
    assert collector.steps == 16
    assert collector.episodes.recent()["episodes"] == 2


def test_demonstrations_become_decisions():
    replay = make_replay(3, 1, {"demonstrations": 20}, 0)
    state = np.arange(15, dtype=np.float32).reshape(5, 3)
    action = np.arange(5, dtype=np.float32)[:, None]
    frames = Frames({"state": state}, action, np.array([5]), Counter.spec)
    behaviour = Chunks()
    assert add_demonstrations(replay, frames, behaviour, DecisionConfig(clock="step")) == 5
    rows = replay.all("demonstrations")
    assert rows["reward"].tolist() == [0, 0, 1, 1, 1]
    assert rows["terminated"].tolist() == [0, 0, 1, 1, 1]
    assert rows["exponent"].tolist() == [3, 3, 3, 2, 1]
    assert rows["next_state"][0].tolist() == state[3].tolist()
    discounted = DecisionConfig(reward="discounted", clock="step")
    add_demonstrations(replay, frames, behaviour, discounted, discount=0.5)
    assert replay.all("demonstrations")["reward"][5:].tolist() == [0, 0, 0.25, 0.5, 1]
    failed = Frames({"state": state}, action, np.array([5]), Counter.spec, {"success": np.zeros(5, bool)})
    add_demonstrations(replay, failed, behaviour, DecisionConfig())
    assert replay.all("demonstrations")["truncated"][10:].tolist() == [0, 0, 1, 1, 1]
    assert replay.all("demonstrations")["reward"][10:].sum() == 0


def test_guard_names_the_step_and_keeps_the_arrays(tmp_path):
    guard = Guard(tmp_path)
    guard.check(3, {"reward": np.zeros(2), "loss": 1.0})
    with pytest.raises(NonFiniteError, match=r"reward is not finite at environment step 12 .*index \[1\]"):
        guard.check(12, {"reward": np.array([0.0, np.nan])}, action=np.ones(2))
    with np.load(tmp_path / "not_finite_12.npz") as dump:
        assert set(dump.files) == {"reward", "action"}


def test_final_observations_are_guarded():
    replay, env = make_replay(3, 1, {"online": 100}, 0), Counter()
    observe = env._observe
    env._observe = lambda: {"state": np.where(env.time[:, None] == 5, np.nan, observe()["state"]).astype(np.float32)}
    step = env.step

    def ended(actions):
        taken = step(actions)
        return replace(taken, observation=observe())  # lane 1 goes on; only what lane 0 ended with is lost

    env.step = ended
    with pytest.raises(NonFiniteError, match="final observation 'state' is not finite"):
        Collector(env, Chunks(), DecisionConfig(), seed=0).collect(replay, 8)


class Numbered(Chunks):
    """Stores who decided (per row) and what the next decision had to choose from (per successor)."""

    def __init__(self):
        super().__init__()
        self.extra_fields = {"base": (1,), "next_candidates": (2, 1)}

    def plan(self, history):
        chunks = super().plan(history)
        self.record |= self.successor(history)
        return chunks

    def successor(self, history, upcoming=None):
        state = self.state(history)
        return {"state": state, "base": state[:, 2:], "candidates": 10 * state[:, 2:, None].expand(-1, 2, -1)}


def test_extra_fields_come_from_the_decision_and_from_its_successor():
    behaviour = Numbered()
    replay = make_replay(3, 1, {"online": 100, "demonstrations": 20}, 0, behaviour.extra_fields)
    Collector(Counter(), behaviour, DecisionConfig(), seed=0).collect(replay, 8)
    rows = replay.all("online")
    assert rows["next_candidates"].shape[1:] == (2, 1)
    assert rows["base"][:, 0].tolist() == rows["state"][:, 2].tolist()
    assert rows["next_candidates"][:, 1, 0].tolist() == (10 * rows["next_state"][:, 2]).tolist()
    assert {5.0, 7.0} <= set(rows["next_state"][:, 2].tolist())  # ends by termination and by the time limit

    state = np.arange(15, dtype=np.float32).reshape(5, 3)
    frames = Frames({"state": state}, np.zeros((5, 1), np.float32), np.array([5]), Counter.spec)
    add_demonstrations(replay, frames, behaviour, DecisionConfig())
    rows = replay.all("demonstrations")
    assert rows["base"][:, 0].tolist() == state[:, 2].tolist()
    assert rows["next_candidates"][:, 0, 0].tolist() == (10 * state[[3, 4, 4, 4, 4], 2]).tolist()


class Remembering(Chunks):
    """Takes the whole history for the state, so that a history across an episode's boundary shows."""

    def state(self, history):
        return torch.from_numpy(history["state"].reshape(len(history["state"]), -1).copy())


def test_demonstrations_of_several_episodes_do_not_mix():
    """Chunks, histories, rewards and next states stop at the end of an episode: each is stored as if it were alone."""
    rng = np.random.default_rng(0)
    ends = np.array([5, 9, 16])
    success, reward = np.isin(np.arange(16), [4, 15]), rng.normal(size=16).astype(np.float32)
    state, action = rng.normal(size=(16, 3)).astype(np.float32), rng.normal(size=(16, 1)).astype(np.float32)
    frames = Frames({"state": state}, action, ends, Counter.spec, {"success": success, "reward": reward})
    config = DecisionConfig(clock="step", reward="discounted")

    def stored(frames):
        replay = make_replay(6, 1, {"demonstrations": 20}, 0)
        assert add_demonstrations(replay, frames, Remembering(), config, discount=0.5) == frames.num_frames
        return replay.all("demonstrations")

    together, alone = stored(frames), [stored(frames.take([i])) for i in range(3)]
    for name, values in together.items():
        assert torch.equal(values, torch.cat([rows[name] for rows in alone])), name
    assert together["exponent"].tolist() == [3, 3, 3, 2, 1, 3, 3, 2, 1, 3, 3, 3, 3, 3, 2, 1]
    assert together["next_state"][8].tolist() == state[[7, 8]].flatten().tolist() != together["state"][9].tolist()
    assert together["terminated"].sum() == 6
    assert together["truncated"].sum() == 3
