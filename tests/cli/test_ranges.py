"""Numbers that cannot work are refused in one line that names them, before anything is loaded."""

import pytest

from robot_rl.cli import main as cli

COMPARE = "compare --policy x --task y --methods residual"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train d --policy.width -3", "width must be at least 1, got -3"),
        ("train d --policy.sample-steps 0", "sample_steps must be at least 1, got 0"),
        ("train d --train.learning-rate -1", "learning_rate must be at least 0, got -1.0"),
        ("train d --train.learning-rate nan", "learning_rate must be at least 0, got nan"),
        ("train d --train.log-every 0", "log_every must be at least 1, got 0"),
        ("train d --train.checkpoint-every 0", "checkpoint_every must be at least 1, got 0"),
        ("train d --threads -2", "threads must be at least 0, got -2"),
        ("train d --seed -1", "seed must be at least 0, got -1"),
        ("collect --task t --out o --seed -1", "seed must be at least 0, got -1"),
        ("collect --task t --out o --noise -1", "noise must be at least 0, got -1.0"),
        ("finetune --options lanes=-4", "option 'lanes' must not be negative, got -4"),
        ("finetune --options lanes=0", "lanes must be at least 1, got 0"),
        ("finetune --eval-episodes 0", "eval_episodes must be at least 1, got 0"),
        (f"{COMPARE} --jobs -1", "jobs must be at least 0, got -1"),
        (f"{COMPARE} --test-episodes 0", "test_episodes must be at least 1, got 0"),
        (f"{COMPARE} --seeds 0 -1", "seeds must be at least 0, got -1"),
        ("eval --policy p --task t --episodes 0", "episodes must be at least 1, got 0"),
        ("guide --policy p --critic c --temperature -2", "temperature must be at least 0, got -2.0"),
        ("deploy --policy p --policy-threads -1", "policy_threads must be at least 1, got -1"),
        ("deploy --policy p --duration -4", "duration must be at least 0, got -4.0"),
        ("serve --port 99999", "port must be in 0..65535, got 99999"),
    ],
)
def test_a_number_out_of_range_is_one_line(line, message, capsys):
    assert cli.main(line.split()) == 2
    assert capsys.readouterr().err == message + "\n"
