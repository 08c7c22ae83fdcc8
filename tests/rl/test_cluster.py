"""On a Ray cluster, here of two local workers: the same lanes, the same runs, the same results."""

import logging
import os
import time
from dataclasses import replace

import numpy as np
import pytest

from robot_rl.core.errors import ConfigError
from robot_rl.core.registry import make_env

SECONDS = 30


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A cluster of two workers; skips where Ray is missing or takes more than half a minute to start."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'robot-rl[cluster]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    began = time.monotonic()
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # on a busy machine Ray gives up, each time by another kind of error
        pytest.skip(f"Ray does not start here: {str(error).splitlines()[0]}")
    try:
        taken = time.monotonic() - began
        if taken > SECONDS:
            pytest.skip(f"Ray took {taken:.0f} s to start, more than {SECONDS} s")
        yield
    finally:
        ray.shutdown()


def test_remote_lanes_play_the_same_episodes_as_local_ones():
    local = make_env("peg_insert", 3, threads=1, max_episode_steps=6)
    remote = make_env("ray:peg_insert", 3, workers=2, max_episode_steps=6)
    rng = np.random.default_rng(0)
    here, there = local.reset(7), remote.reset(7)
    seeds = set()
    for _ in range(8):
        for key in here:
            np.testing.assert_array_equal(here[key], there[key])
        actions = rng.uniform(-1, 1, (3, local.spec.action.size))
        ours, theirs = local.step(actions), remote.step(actions)
        for name in ("reward", "terminated", "truncated"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        seeds |= set(theirs.info["episode_seed"].tolist())
        here, there = ours.observation, theirs.observation
    assert seeds == set(range(7, 13)), "the second round follows the first without a gap"
    local.close()
    remote.close()


def test_a_mistake_is_one_line_also_from_afar():
    with pytest.raises(ConfigError, match=r"^peg_insert: unknown reward 'none'. Available: sparse, shaped$"):
        make_env("ray:peg_insert", 2, workers=1, reward="none")


def test_runs_on_a_cluster_are_those_of_a_comparison(clustered):
    from robot_rl.rl.compare.cluster import RayPlaces
    from robot_rl.rl.compare.run import Comparison

    config, launcher = clustered
    good, broken = Comparison(config, launcher).execute(RayPlaces())["methods"]
    assert (good["success"], good["seeds"]) == (0.9, [0])
    assert broken["error"] == "The method cannot do this. It can do that."
    again = Comparison(replace(config, seeds=(0,)), launcher).execute(RayPlaces())
    assert [row["seeds"] for row in again["methods"]] == [[0], [0]], "the failed one was tried again"
