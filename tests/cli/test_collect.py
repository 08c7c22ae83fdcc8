"""Collecting demonstrations by command: appended episodes are new, and Ctrl-C says a command that goes on."""

import shlex

import numpy as np
import pytest

from robot_rl.cli import collect as command
from robot_rl.cli import main as cli
from robot_rl.core import registry
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.core.testing import random_actions
from robot_rl.data.check import check_dataset
from robot_rl.data.dataset import open_dataset


class Toy:
    """Episodes of two steps whose actions follow from their seed; one whose seed is odd fails."""

    spec = Spec({"state": ArraySpec((1,))}, ArraySpec((2,), low=(-1, -1), high=(1, 1)), 10.0)
    interrupt_at = -1

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def make_expert(self, noise, seed):
        return self

    def close(self):
        pass

    def reset(self, seed):
        self.seeds, self.late = seed + np.arange(self.num_envs), False
        return self._observe()

    def act(self):
        return np.concatenate([random_actions(self.spec.action, 1, np.random.default_rng(s)) for s in self.seeds])

    def step(self, actions):
        from robot_rl.core.env import Step

        if self.interrupt_at in self.seeds:
            raise KeyboardInterrupt
        done = np.full(self.num_envs, self.late)
        success = done & (self.seeds % 2 == 0)
        info, final = {"success": success, "episode_seed": self.seeds.copy()}, self._observe()
        self.seeds, self.late = self.seeds + self.num_envs * done, not self.late
        return Step(self._observe(), np.ones(self.num_envs, np.float32), success, done & ~success, final, info)

    def _observe(self):
        return {"state": self.seeds[:, None].astype(np.float32)}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(registry._overrides, ("tasks", "toy"), Toy)


def seeds(root):
    return open_dataset(root).load().observation["state"][::2, 0].astype(int).tolist()


def test_appended_episodes_are_new_also_where_failures_were_dropped(tmp_path):
    out = tmp_path / "demos"
    for append in (False, True, True):
        command.run(command.Config("toy", out, episodes=3, lanes=2, append=append))
    assert len(set(seeds(out))) == 9
    assert not [finding for finding in check_dataset(open_dataset(out)) if finding.check == "repeated"]
    command.run(command.Config("toy", out, episodes=1, lanes=2, append=True, seed=2))
    assert seeds(out)[-1] == 2, "as asked for"


def test_ctrl_c_says_a_command_that_collects_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Toy, "interrupt_at", 6)
    out = tmp_path / "demos"
    assert cli.main(["collect", "--task", "toy", "--out", str(out), "--episodes", "5", "--lanes", "2"]) == 130
    words = shlex.split(capsys.readouterr().err.partition("Continue with: robot-rl ")[2])
    assert words[-3:] == ["--lanes", "2", "--append"]
    assert words[words.index("--episodes") + 1] == "2"
    monkeypatch.setattr(Toy, "interrupt_at", -1)
    assert cli.main(words) == 0
    assert len(seeds(out)) == len(set(seeds(out))) == 5


def test_an_interrupt_before_the_first_episode_says_the_command_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Toy, "interrupt_at", 0)
    assert cli.main(["collect", "--task", "toy", "--out", str(tmp_path / "demos")]) == 130
    assert "Start again with: robot-rl collect --task toy --out" in capsys.readouterr().err
