import numpy as np
import pytest

from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.rollout.player import ChunkPlayer, History, PolicyRunner


class Counter:
    """Plans ``observation + 0, 1, 2, …`` and counts its calls."""

    spec = Spec({"state": ArraySpec((1,))}, ArraySpec((1,)), 10.0)
    obs_steps, horizon, execute_steps, closed_loop = 2, 6, 3, False

    def __init__(self):
        self.calls = 0

    def seed(self, seed):
        pass

    def plan(self, history):
        self.calls += 1
        newest = history["state"][:, -1]
        return (newest[:, None] + np.arange(self.horizon)[None, :, None]).astype(np.float32)

    def refine(self, history, actions):
        return actions + 0.5


def test_history_repeats_the_first_frame_of_an_episode():
    history = History(3, ("state",))
    first = history.add({"state": np.array([[1.0], [10.0]])}, np.array([True, True]))["state"].copy()
    assert first[..., 0].tolist() == [[1, 1, 1], [10, 10, 10]]
    second = history.add({"state": np.array([[2.0], [20.0]])}, np.array([False, True]))["state"]
    assert second[..., 0].tolist() == [[1, 1, 2], [20, 20, 20]]


def test_a_plan_every_execute_steps_and_per_lane_resets():
    policy, actions = Counter(), []
    runner = PolicyRunner(policy, 2)
    for tick in range(6):
        if tick == 4:
            runner.reset(np.array([False, True]))
        actions.append(runner.step({"state": np.array([[100.0 * tick], [100.0 * tick]])})[:, 0].copy())
    assert np.array(actions)[:, 0].tolist() == [0, 1, 2, 300, 301, 302]
    assert np.array(actions)[:, 1].tolist() == [0, 1, 2, 300, 400, 401]
    assert policy.calls == 3


def test_closed_loop_policies_correct_every_action():
    policy = Counter()
    policy.closed_loop = True
    runner = PolicyRunner(policy, 1)
    executed = [runner.step({"state": np.zeros((1, 1))})[0, 0] for _ in range(3)]
    assert executed == [0.5, 1.5, 2.5]
    assert runner.base_action[0, 0] == 2.0


def test_a_late_chunk_is_entered_at_the_consumed_count():
    player = ChunkPlayer(1, horizon=6, execute_steps=3, action_size=1)
    chunk = np.arange(6, dtype=np.float32)[None, :, None]
    player.push(np.array([True]), chunk)
    assert [player.pop()[0, 0] for _ in range(2)] == [0, 1]
    player.push(np.array([True]), chunk + 10, consumed=2)
    assert player.pop()[0, 0] == 12
    assert player.due.all()
    assert [player.pop()[0, 0] for _ in range(3)] == [13, 14, 15]
    assert player.starved.all()
    assert player.pop()[0, 0] == 15  # starved: the last action, never beyond the chunk


def test_chunk_for_a_robot_starts_with_the_executed_action():
    runner = PolicyRunner(Counter(), 1)
    action = runner.step({"state": np.zeros((1, 1))})
    chunk = runner.chunk(action[0], seq=7, stamp=1.5)
    assert chunk.actions[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert (chunk.observation_seq, chunk.observation_stamp) == (7, 1.5)
    action = runner.step({"state": np.zeros((1, 1))})
    assert runner.chunk(action[0], 8, 1.6).actions[:, 0].tolist() == pytest.approx([1, 2, 3, 4, 5, 5])
