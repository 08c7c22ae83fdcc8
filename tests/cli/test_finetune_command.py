"""`robot-rl finetune` without a policy."""

import pytest

from robot_rl.cli.finetune import Config, run
from robot_rl.core.errors import DataError
from robot_rl.policies.checkpoint import load_policy

SMALL = {"task": "half_cheetah", "eval_episodes": 1, "evaluations": 1, "threads": 1}


@pytest.mark.parametrize(
    ("method", "options", "steps"),
    [
        ("ppo", ("lanes=4", "core.rollout_steps=8", "core.minibatches=1"), 64),
        ("rlpd", ("lanes=4", "core.start_steps=32", "core.batch_size=16", "core.updates_per_step=0.1"), 64),
        ("fpo", ("scratch=yes", "lanes=4", "core.minibatches=1"), 64),
    ],
)
def test_methods_that_can_learn_from_scratch(tmp_path, monkeypatch, method, options, steps):
    monkeypatch.chdir(tmp_path)
    run(Config(method=method, options=options, steps=steps, out=tmp_path / "run", **SMALL))
    assert load_policy(tmp_path / "run" / "checkpoints" / "best").spec.action.size == 6


@pytest.mark.parametrize(("method", "options"), [("residual", ()), ("fpo", ())])
def test_others_ask_for_the_policy_that_training_leaves(tmp_path, monkeypatch, method, options):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="runs/train/checkpoints/best"):
        run(Config(method=method, options=options, steps=64, out=tmp_path / "run", **SMALL))
