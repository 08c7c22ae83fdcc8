"""Lanes divided among actors: the contract of environments holds across the parts. Ray itself: `test_cluster.py`."""

from types import SimpleNamespace

import numpy as np
import pytest

from robot_rl.core import registry
from robot_rl.core.errors import CapabilityError, ConfigError, DataError, RobotRLError, UnknownNameError
from robot_rl.core.registry import make_env
from robot_rl.core.testing import check_vec_env
from robot_rl.rollout.evaluate import evaluate


class TaskError(Exception):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class LostActor(Exception):
    pass


class Ray:
    """As much of Ray as the environment uses, in this process."""

    exceptions = SimpleNamespace(RayTaskError=TaskError, RayActorError=LostActor)

    def __init__(self):
        self.actors = []

    def cluster_resources(self):
        return {"CPU": 3.0}

    def remote(self, num_cpus):
        return lambda kind: SimpleNamespace(remote=lambda: self.actor(kind()))

    def actor(self, instance):
        def call(method):
            return SimpleNamespace(remote=lambda *arguments: (instance, method, arguments))

        names = [name for name in dir(type(instance)) if not name.startswith("_")]
        actor = SimpleNamespace(**{name: call(name) for name in names}, instance=instance, lost=False)
        self.actors.append(actor)
        return actor

    def get(self, references):
        if any(actor.lost for actor in self.actors):
            raise LostActor("the actor died\nand more")
        try:
            return [getattr(instance, method)(*arguments) for instance, method, arguments in references]
        except Exception as error:
            raise TaskError(error) from error

    def kill(self, actor):
        self.actors.remove(actor)


@pytest.fixture
def ray(monkeypatch):
    fake = Ray()
    monkeypatch.setattr("robot_rl.rl.remote.connect_ray", lambda purpose: fake)
    return fake


def test_the_contract_holds_over_parts_of_unequal_size(ray):
    options = {"max_episode_steps": 8, "threads": 1}
    check_vec_env(lambda num_envs: make_env("ray:peg_insert", num_envs, workers=2, **options))
    assert not ray.actors, "closed environments leave no actor"


def test_the_contract_holds_for_gymnasium(ray):
    pytest.importorskip("gymnasium")
    check_vec_env(lambda num_envs: make_env("ray:gym:Pendulum-v1", num_envs, workers=2), max_steps=210)


def test_lanes_are_divided_evenly_over_the_cluster(ray):
    env = make_env("ray:peg_insert", 8)
    assert sorted(actor.instance.env.num_envs for actor in ray.actors) == [2, 3, 3]
    env.close()
    with pytest.raises(RobotRLError, match="ray:peg_insert is closed"):
        env.reset(0)


def test_a_mistake_is_one_line_also_from_afar(ray):
    with pytest.raises(UnknownNameError, match="Unknown task 'peg_insrt'"):
        make_env("ray:peg_insrt", 2)
    with pytest.raises(ConfigError, match="unknown reward 'none'"):
        make_env("ray:peg_insert", 2, reward="none")
    with pytest.raises(ConfigError, match="which task"):
        make_env("ray", 2)
    assert not ray.actors, "nothing is left of an environment that could not be built"
    env = make_env("ray:peg_insert", 2, workers=2)
    with pytest.raises(CapabilityError, match="has no expert"):
        env.make_expert()
    env.reset(0)
    with pytest.raises(DataError, match="lane 1 holds a value that is not finite"):
        env.step(np.stack([np.zeros(env.spec.action.size), np.full(env.spec.action.size, np.nan)]))
    ray.actors[0].lost = True
    with pytest.raises(RobotRLError, match=r"ray:peg_insert: the cluster lost some lanes: the actor died$"):
        env.step(np.zeros((2, env.spec.action.size)))


def test_a_task_whose_seeds_cannot_be_kept_in_a_block_is_not_split(ray, reach_env, monkeypatch):
    monkeypatch.setitem(registry._overrides, ("tasks", "reach"), lambda num_envs, threads: reach_env(num_envs))
    with pytest.raises(CapabilityError, match=r"no seed_stride.*workers=1 works"):
        make_env("ray:reach", 4, workers=2)
    env = make_env("ray:reach", 4, workers=1)
    assert env.reset(3)["state"].shape == (4, 4)


def test_evaluation_takes_it_as_any_environment(ray):
    local, remote = make_env("peg_insert", 3, max_episode_steps=5), make_env("ray:peg_insert", 3, max_episode_steps=5)
    here, there = (evaluate(Still(env.spec), env, 5, seed=40) for env in (local, remote))
    assert there.seeds.tolist() == list(range(40, 45))
    np.testing.assert_array_equal(here.returns, there.returns)
    np.testing.assert_array_equal(here.lengths, there.lengths)


class Still:
    """Does nothing."""

    obs_steps, horizon, execute_steps, closed_loop = 1, 1, 1, False

    def __init__(self, spec):
        self.spec = spec

    def seed(self, seed):
        pass

    def plan(self, history):
        lanes = len(next(iter(history.values())))
        return np.zeros((lanes, 1, self.spec.action.size), np.float32)
