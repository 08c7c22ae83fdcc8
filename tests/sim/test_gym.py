"""Gymnasium environments behind our contract, in this process and in workers."""

import os
import signal

import numpy as np
import pytest

from robot_rl.core.errors import CapabilityError, ConfigError, MissingDependencyError, RobotRLError, UnknownNameError
from robot_rl.core.registry import make_env
from sim.gym import make

gymnasium = pytest.importorskip("gymnasium")
PUSHT = "gym:gym_pusht/PushT-v0"


@pytest.fixture
def workers():
    """Return Push-T lanes in two worker processes."""
    pytest.importorskip("gym_pusht")
    env = make_env(PUSHT, 3, workers=2)
    yield env
    env.close()


def test_push_t_speaks_our_vocabulary():
    pytest.importorskip("gym_pusht")
    env = make_env(PUSHT, 2)
    assert set(env.spec.observation) == {"environment_state", "agent_pos"}
    assert env.spec.rate_hz == 10
    assert env.max_episode_steps == 300
    assert env.spec.action.high == (512.0, 512.0)
    env.reset(0)
    step = env.step(np.full((2, 2), 256.0))
    assert np.allclose(step.reward, np.minimum(step.info["coverage"] / 0.95, 1.0))
    assert env.render(1).shape[2] == 3
    assert set(make_env(PUSHT, 1, obs_type="state").spec.observation) == {"state"}


def test_workers_give_what_one_process_gives(workers):
    single = make_env(PUSHT, 3)
    first, other = single.reset(7), workers.reset(7)
    rng = np.random.default_rng(0)
    for _ in range(5):
        assert all(np.array_equal(first[key], other[key]) for key in first)
        actions = rng.uniform(0, 512, (3, 2))
        step, twin = single.step(actions), workers.step(actions)
        assert np.array_equal(step.reward, twin.reward)
        assert np.array_equal(step.info["coverage"], twin.info["coverage"])
        first, other = step.observation, twin.observation
    assert np.array_equal(single.render(2), workers.render(2))
    processes = [worker._process for worker in workers._workers]
    workers.close()
    assert [process.poll() for process in processes] == [0, 0]


def test_a_worker_that_dies_is_one_line(workers):
    workers.reset(0)
    os.kill(workers._workers[1]._process.pid, signal.SIGKILL)
    with pytest.raises(RobotRLError, match=r"worker process of 'gym:.*' ended unexpectedly, by signal 9"):
        workers.step(np.zeros((3, 2)))
    assert workers._workers[0]._process.poll() is not None, "the other worker outlived the environment"


def test_errors_come_back_from_workers_as_they_are():
    with pytest.raises(UnknownNameError, match="Did you mean 'Pendulum-v1'"):
        make_env("gym:Pendulun-v1", 1, workers=1)


def test_adroit_door_success_is_an_open_door():
    pytest.importorskip("gymnasium_robotics")
    env = make_env("gym:AdroitHandDoor-v1", 1, reward="sparse")
    assert env.spec.rate_hz == 100
    assert env.max_episode_steps == 200
    env.reset(0)
    inner = env._groups[0]._envs[0].unwrapped
    step = env.step(np.zeros((1, 28)))
    assert step.info["door_angle"][0] == pytest.approx(step.observation["state"][0, 28], abs=1e-6)
    assert step.reward[0] == 0.0
    assert not step.info["success"][0]
    inner.data.joint("door_hinge").qpos[0] = 1.45
    step = env.step(np.zeros((1, 28)))
    assert step.info["door_angle"][0] >= 1.35
    assert step.info["success"][0]
    assert step.reward[0] == 1.0
    assert step.terminated[0]


def test_held_commands_run_on_a_line_and_stop_with_the_episode():
    class Recorder(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Box(-9, 9, (1,)), gymnasium.spaces.Box(-1, 1, (1,))
        metadata = {"render_fps": 20}  # noqa: RUF012 (gymnasium's own form)

        def reset(self, *, seed=None, options=None):
            self.actions = []
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.actions.append(float(action[0]))
            done = len(self.actions) == 6
            return np.full(1, len(self.actions), np.float32), 1.0, False, False, {"success": done}

    gymnasium.register("RobotRLRecorder-v0", Recorder, max_episode_steps=10)
    env = make("RobotRLRecorder-v0", 1, hold=4)
    recorder = env._groups[0]._envs[0].unwrapped
    assert env.spec.rate_hz == 5
    assert env.max_episode_steps == 3
    env.reset(0)
    assert env.step(np.full((1, 1), 0.4)).reward[0] == 4
    assert recorder.actions == pytest.approx([0.4] * 4), "there was no command to come from"
    step = env.step(np.full((1, 1), -0.4))
    assert recorder.actions[4:] == pytest.approx([0.2, 0.0, -0.2, -0.4])
    assert step.info["success"][0]
    step = env.step(np.full((1, 1), -0.4))
    assert step.truncated[0]
    assert step.reward[0] == 2, "the environment's limit ends a control step early"
    assert step.final_observation["state"][0, 0] == 10
    env.step(np.full((1, 1), 0.8))
    assert recorder.actions == pytest.approx([0.8] * 4), "a new episode came from the old one's command"
    sparse = make("RobotRLRecorder-v0", 1, hold=4, reward="sparse")
    sparse.reset(0)
    sparse.step(np.zeros((1, 1)))
    step = sparse.step(np.zeros((1, 1)))
    assert step.terminated[0]
    assert step.reward[0] == 1
    assert step.final_observation["state"][0, 0] == 6, "the episode ends with its success"
    with pytest.raises(ConfigError, match="hold"):
        make("RobotRLRecorder-v0", 1, hold=0)


def test_nested_observations_are_flattened_by_name():
    class Nested(gymnasium.Env):
        observation_space = gymnasium.spaces.Dict(
            {
                "observation": gymnasium.spaces.Box(-1, 1, (2,)),
                "arm": gymnasium.spaces.Dict({"tip": gymnasium.spaces.Box(-1, 1, (3,))}),
                "front": gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8),
            }
        )
        action_space = gymnasium.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 0.0, True, True, {"success": True, "phase": "text"}

    gymnasium.register("RobotRLNested-v0", Nested)
    env = make("RobotRLNested-v0", 2)
    assert set(env.spec.observation) == {"state", "arm.tip", "images.front"}
    assert env.spec.observation["images.front"].is_image
    env.reset(0)
    step = env.step(np.zeros((2, 1)))
    assert step.terminated.all()
    assert not step.truncated.any()
    assert step.info["success"].all()
    assert "phase" not in step.info


def test_a_module_before_the_name_is_imported_first(tmp_path, monkeypatch):
    """As ``gymnasium.make("module:Name-v0")`` does."""
    (tmp_path / "registers_one.py").write_text(
        "import gymnasium, numpy as np\n"
        "class Still(gymnasium.Env):\n"
        "    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)\n"
        "    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)\n"
        "    def reset(self, *, seed=None, options=None): return np.zeros(3, np.float32), {}\n"
        "    def step(self, action): return np.zeros(3, np.float32), 0.0, False, False, {}\n"
        "gymnasium.register('Still-v0', Still, max_episode_steps=5)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    env = make_env("gym:registers_one:Still-v0", num_envs=2)
    assert env.reset(0)["state"].shape == (2, 3)
    env.close()
    with pytest.raises(UnknownNameError, match="registers_one:Stil-v0"):
        make_env("gym:registers_one:Stil-v0")
    with pytest.raises(ConfigError, match="there is no module 'registers_two'"):
        make_env("gym:registers_two:Moving-v0")


def test_wrong_names_and_options_are_named(monkeypatch):
    with pytest.raises(UnknownNameError, match="Did you mean 'Pendulum-v1'"):
        make("Pendulun-v1")
    with pytest.raises(CapabilityError, match="Discrete actions are not supported"):
        make("CartPole-v1")
    with pytest.raises(ConfigError, match="unexpected keyword argument 'bogus'"):
        make("Pendulum-v1", bogus=1)
    with pytest.raises(ConfigError, match="Available: native, sparse"):
        make("Pendulum-v1", reward="dense")
    with pytest.raises(ConfigError, match="gym:<id>"):
        make_env("gym")
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'robot-rl\[gym\]'"):
        make("Pendulum-v1")
