"""The environment contract, over every registered task."""

import pytest

from robot_rl.core.registry import make_env, names
from robot_rl.core.testing import check_vec_env

TASKS = [name for name in names("tasks") if name not in ("gym", "ray")]


@pytest.mark.parametrize("name", TASKS)
def test_task_keeps_the_contract(name):
    check_vec_env(lambda num_envs: make_env(name, num_envs, threads=1))


@pytest.mark.parametrize("env_id", ["gym:gym_pusht/PushT-v0", "gym:AdroitHandDoor-v1", "gym:Pendulum-v1"])
def test_adapted_environment_keeps_the_contract(env_id):
    pytest.importorskip("gymnasium")
    check_vec_env(lambda num_envs: make_env(env_id, num_envs), max_steps=320)
