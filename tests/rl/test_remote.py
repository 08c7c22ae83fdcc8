"""What runs on Ray, on a stand-in for it: lanes divided among actors, and a comparison's jobs.

The contract of environments holds across the parts, and both cores learn from them what they learn from local lanes.
Ray itself: `test_cluster.py`.
"""

import ctypes
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from robot_rl.core import registry
from robot_rl.core.errors import CapabilityError, ConfigError, DataError, RobotRLError, UnknownNameError
from robot_rl.core.registry import make_env
from robot_rl.core.testing import check_vec_env
from robot_rl.rl.compare.cluster import RayPlaces
from robot_rl.rl.compare.jobs import Job, run_jobs
from robot_rl.rl.compare.run import Comparison
from robot_rl.rl.methods import ppo, rlpd
from robot_rl.rl.session import SessionConfig
from robot_rl.rl.state import load_state
from robot_rl.rl.testing import OffsetEnv, small_settings
from robot_rl.rollout.evaluate import evaluate
from robot_rl.train.run import Run, read_metrics


class RayError(Exception):
    pass


class TaskError(RayError):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class LostActor(RayError):
    pass


class Task(threading.Thread):
    """A function under way; cancelling it raises `KeyboardInterrupt` in it, as Ray does."""

    def __init__(self, function, arguments):
        super().__init__(daemon=True)
        self.function, self.arguments, self.error, self.result = function, arguments, None, None
        self.start()

    def run(self):
        try:
            self.result = self.function(*self.arguments)
        except BaseException as error:
            self.error = error

    def cancel(self):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(KeyboardInterrupt))


class Ray:
    """As much of Ray as environments and jobs use, in this process."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=TaskError, RayActorError=LostActor)

    def __init__(self):
        self.actors, self.tasks, self.asked = [], [], []

    def cluster_resources(self):
        return {"CPU": 3.0}

    def remote(self, **options):
        self.asked.append(options)
        return lambda what: SimpleNamespace(
            remote=lambda *arguments: self.actor(what()) if isinstance(what, type) else self.task(what, arguments)
        )

    def task(self, function, arguments):
        self.tasks.append(Task(function, arguments))
        return self.tasks[-1]

    def wait(self, tasks, num_returns=1, timeout=None):
        deadline = time.monotonic() + timeout
        while sum(not task.is_alive() for task in tasks) < num_returns and time.monotonic() < deadline:
            time.sleep(0.01)
        return [task for task in tasks if not task.is_alive()], [task for task in tasks if task.is_alive()]

    def cancel(self, task):
        task.cancel()

    def actor(self, instance):
        def call(method):
            return SimpleNamespace(remote=lambda *arguments: (instance, method, arguments))

        names = [name for name in dir(type(instance)) if not name.startswith("_")]
        actor = SimpleNamespace(**{name: call(name) for name in names}, instance=instance, lost=False)
        self.actors.append(actor)
        return actor

    def get(self, references):
        if isinstance(references, Task):
            if references.error is not None:
                raise TaskError(references.error)
            return references.result
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
    monkeypatch.setattr("robot_rl.rl.compare.cluster.connect_ray", lambda purpose, address: fake)
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


class Split(OffsetEnv):
    """Counts the seeds of its episodes over the lanes of all parts."""

    seed_stride = 0

    def _begin(self, lanes):
        super()._begin(lanes)
        self._following[lanes] += max(self.seed_stride - self.num_envs, 0)


@pytest.mark.parametrize(
    ("method", "settings", "steps"),
    [(rlpd, ("lanes=5", "start_steps=20", "batch_size=16"), [20, 40, 60, 80]), (ppo, ("lanes=5",), [40, 80])],
    ids=["off-policy", "on-policy"],
)
def test_a_learner_learns_from_remote_lanes_what_it_learns_from_local_ones(
    method, settings, steps, ray, tmp_path, monkeypatch
):
    monkeypatch.setitem(registry._overrides, ("tasks", "split"), lambda num_envs, threads=1: Split(num_envs))
    config, learned = small_settings(method.finetune, settings), []
    for task, options in (("split", {}), ("ray:split", {"workers": 2})):

        def lanes(num_envs, task=task, options=options):
            return make_env(task, num_envs, **options)

        session = SessionConfig(steps=80, evaluations=0, eval_episodes=4, eval_lanes=4)
        with Run.create(tmp_path / task, {}, spec=Split.spec) as run:
            method.finetune(Still(Split.spec), lanes, config, run, session=session)
        assert [row["step"] for row in read_metrics(tmp_path / task, "finetune")] == steps
        learned.append(load_state(tmp_path / task / "learner.safetensors")[0])
    local, remote = learned
    assert local.keys() == remote.keys()
    assert any("exp_avg" in name and value.any() for name, value in local.items()), "it has made updates"
    for name, value in local.items():
        assert torch.equal(value, remote[name]), name
    assert len(ray.asked) == 2, "one environment to learn in, one to be evaluated in"
    assert not ray.actors


@pytest.mark.parametrize(("asked", "jobs", "threads"), [(0, 3, 1), (1, 1, 3), (2, 2, 1), (8, 3, 1)])
def test_jobs_share_the_processors_of_the_cluster(asked, jobs, threads, ray, tmp_path):
    places = RayPlaces(asked)
    assert (places.count, places.threads) == (jobs, threads)
    task = places.start(Job("one", ("-c", "import os; print(os.environ['OMP_NUM_THREADS'])"), tmp_path / "log"))
    task.join(60)
    assert places.poll(task) == 0
    assert (tmp_path / "log").read_text() == f"{threads}\n"
    assert ray.asked == [{"num_cpus": threads, "max_retries": 0}], "a failed run is not begun again unasked"


def test_runs_on_a_cluster_are_those_of_a_comparison(ray, clustered):
    config, launcher = clustered
    good, broken = Comparison(config, launcher).execute()["methods"]
    assert (good["success"], good["seeds"]) == (0.9, [0])
    assert broken["error"] == "The method cannot do this. It can do that."
    jobs = len(ray.tasks)
    assert jobs >= 4, "the base and what was learned are tested there as well"
    again = Comparison(replace(config, seeds=(0,)), launcher).execute()
    assert [row["seeds"] for row in again["methods"]] == [[0], [0]], "the failed one was tried again"
    assert len(ray.tasks) == jobs + 2


def test_a_lost_machine_is_a_failed_job(ray, tmp_path, monkeypatch):
    def lost(arguments, log, threads, directory):
        raise SystemExit("the machine is gone")

    monkeypatch.setattr("robot_rl.rl.compare.cluster._run_remotely", lost)
    ended = []
    run_jobs([Job("one", (), tmp_path / "log")], RayPlaces(), lambda job, end: ended.append(end) or [])
    assert ended[0].code == -signal.SIGKILL
    assert ended[0].error == "ended by SIGKILL, perhaps for want of memory"


def test_cancelled_jobs_end_in_order(ray, tmp_path):
    wait = "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\n"
    logs, places = [tmp_path / name for name in ("one", "two")], RayPlaces()
    code = wait + "except KeyboardInterrupt:\n    print('saved')"
    tasks = [places.start(Job(log.name, ("-c", code), log)) for log in logs]
    deadline = time.monotonic() + 60
    while not all(log.exists() and "ready" in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert [places.poll(task) for task in tasks] == [None, None]
    places.stop(tasks)
    assert not any(task.is_alive() for task in tasks)
    assert [log.read_text().split() for log in logs] == [["ready", "saved"]] * 2
    assert [places.poll(task) for task in tasks] == [-signal.SIGKILL] * 2
