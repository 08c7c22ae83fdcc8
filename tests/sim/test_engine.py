"""The vector environment: parts of a step, inner control, randomised models, blow-ups, wrong settings."""

import logging

import mujoco
import numpy as np
import pytest

from robot_rl.core.errors import CapabilityError, ConfigError, DataError, RobotRLError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.core.testing import check_vec_env
from sim.engine import ALL, BatchEnv

XML = """
<mujoco>
  <option timestep="0.01"/>
  <worldbody>
    <body><joint name="x" type="slide" axis="1 0 0" damping="1"/><geom name="ball" size="0.1" mass="1"/></body>
  </worldbody>
  <actuator><motor joint="x" ctrlrange="-1 1"/></actuator>
</mujoco>
"""
SPEC = Spec(
    {"state": ArraySpec((2,), names=("x", "v"), unit="m,m/s")},
    ArraySpec((1,), names=("force",), unit="N", low=(-1.0,), high=(1.0,)),
    20.0,
)


class Slide(BatchEnv):
    """A mass on a rail that must come near the origin; its mass differs from episode to episode."""

    name = "slide"

    def __init__(self, num_envs, model=XML, spec=SPEC, **options):
        super().__init__(model, num_envs, spec=spec, substeps=5, max_episode_steps=40, **options)
        self.qpos, self.qvel, self.ctrl = (self.batch.bind(key) for key in ("qpos", "qvel", "ctrl"))
        self.mass = self.batch.expand("body_mass")
        self.controlled = 0

    def reset_lanes(self, lanes, rngs):
        for lane, rng in zip(lanes, rngs, strict=True):
            self.qpos[lane, 0] = rng.uniform(-1, 1)
            self.mass[lane, 1] = rng.uniform(0.5, 2.0)

    def apply(self, actions):
        self.ctrl[:] = actions

    def control(self):
        self.controlled += 1

    def observe(self, lanes=ALL):
        return {"state": np.concatenate([self.qpos[lanes], self.qvel[lanes]], axis=1).astype(np.float32)}

    def success(self):
        return np.abs(self.qpos[:, 0]) < 0.05


def test_a_task_of_thirty_lines_keeps_the_contract():
    check_vec_env(lambda num_envs: Slide(num_envs, threads=1))


def test_threads_do_not_change_results():
    one, two = Slide(4, threads=1), Slide(4, threads=2)
    one.reset(3), two.reset(3)
    for _ in range(20):
        a, b = one.step(np.ones((4, 1))), two.step(np.ones((4, 1)))
        assert np.array_equal(a.observation["state"], b.observation["state"])


def test_sparse_reward_is_one_on_the_first_success_only():
    env = Slide(1)
    env.reset([4])
    while True:
        step = env.step(-np.sign(env.qpos))
        assert step.reward[0] == float(step.terminated[0])
        if step.done[0]:
            break
    assert step.info["success"][0]
    assert step.info["episode_seed"][0] == 4
    assert abs(step.final_observation["state"][0, 0]) < 0.05 < abs(step.observation["state"][0, 0])


def test_step_equals_its_parts():
    """A robot that runs in real time advances part by part; whole steps give the same."""
    whole, parts = Slide(2), Slide(2)
    whole.reset(0), parts.reset(0)
    for _ in range(3):
        expected = whole.step(np.full((2, 1), 0.5))
        parts.set_action(np.full((2, 1), 0.5))
        positions = []
        for substeps in (2, 2, 1):
            parts.advance(substeps)
            positions.append(float(parts.observe()["state"][0, 1]))
        assert positions == sorted(positions)
        assert np.array_equal(parts.finish().observation["state"], expected.observation["state"])


def test_lanes_out_of_step_end_evenly_spread_over_an_episode_and_stay_so():
    env = Slide(4, threads=1)
    env.reset(100)
    env.stagger(seed=1)
    ended = np.array([env.step(np.sign(env.qpos[:, :1])).done for _ in range(80)])  # away from the origin
    assert (ended.sum(axis=0) == 2).all()
    first, second = (np.array([np.flatnonzero(lane)[k] for lane in ended.T]) for k in (0, 1))
    assert sorted(first + 1) == [10, 20, 30, 40]
    assert (second - first == 40).all()


def test_inner_control_runs_at_its_own_rate():
    env = Slide(1, control_every=2)
    env.reset(0)
    env.step(np.zeros((1, 1)))
    assert env.controlled == 3
    env.set_action(np.zeros((1, 1)))
    for _ in range(5):
        env.advance(1)
    assert env.controlled == 6


def test_model_fields_follow_the_episode_seed():
    env, alone = Slide(3), Slide(1)
    env.reset(10)
    alone.reset(12)
    assert env.mass[2, 1] == alone.mass[0, 1]
    assert len(np.unique(env.mass[:, 1])) == 3
    first = env.step(np.ones((3, 1)))
    assert np.array_equal(first.observation["state"][2], alone.step(np.ones((1, 1))).observation["state"][0])


def test_blow_up_ends_the_episode_of_its_lane_alone(caplog):
    env = Slide(2)
    before = env.reset(5)["state"].copy()
    env.qpos[1] = np.nan
    with caplog.at_level(logging.WARNING):
        step = env.step(np.zeros((2, 1)))
    assert "slide: the simulation of lane 1 became unstable at step 1 of the episode with seed 6" in caplog.text
    assert step.truncated.tolist() == [False, True]
    assert not step.terminated.any()
    assert np.array_equal(step.final_observation["state"][1], before[1])
    assert np.isfinite(step.observation["state"]).all()
    assert env.step(np.zeros((2, 1))).info["episode_seed"].tolist() == [5, 8]
    strict = Slide(2, on_unstable="raise")
    strict.reset(5)
    strict.qpos[0] = np.inf
    with pytest.raises(RobotRLError, match="lane 0 became unstable at step 1 of the episode with seed 5"):
        strict.step(np.zeros((2, 1)))


def test_wrong_use_is_named():
    env = Slide(2)
    with pytest.raises(RobotRLError, match=r"slide: call reset\(\)"):
        env.step(np.zeros((2, 1)))
    env.reset()
    with pytest.raises(DataError, match=r"slide: actions have shape \(2,\), expected \(2, 1\)"):
        env.step(np.zeros(2))
    with pytest.raises(DataError, match="action of lane 1 holds a value that is not finite"):
        env.step(np.array([[0.0], [np.inf]]))
    with pytest.raises(ConfigError, match="reset needs 2 seeds"):
        env.reset([1, 2, 3])
    with pytest.raises(CapabilityError, match="'slide' has no scripted expert"):
        env.make_expert()
    with pytest.raises(ConfigError, match=r"unknown reward 'dense'\. Available: sparse, shaped"):
        Slide(1, reward="dense")
    with pytest.raises(ConfigError, match=r"5 substeps of 0\.01 s are 20 Hz, not 25"):
        Slide(1, spec=Spec(SPEC.observation, SPEC.action, 25.0))


def test_large_models_need_dense_jacobians():
    bodies = "".join('<body><freejoint/><geom size="0.1"/></body>' for _ in range(10))
    xml = '<mujoco><option timestep="0.01"{}/><worldbody>' + bodies + "</worldbody></mujoco>"
    with pytest.raises(ConfigError, match="60 degrees of freedom"):
        Slide(1, model=xml.format(""))
    Slide(1, model=xml.format(' jacobian="dense"'))


def test_no_log_file_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = Slide(1)
    env.reset(0)
    env.qpos[0] = np.nan
    env.step(np.zeros((1, 1)))
    assert not list(tmp_path.iterdir())
    assert not mujoco.MjLogConfig.get().logto_file
