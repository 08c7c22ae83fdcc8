"""Peg insertion: geometry, contact, episodes that their seeds decide, observations, expert and hold."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

from robot_rl.core.errors import ConfigError, DataError
from robot_rl.core.registry import make_env
from sim.tasks.peg_insert import FINE_RANGE, SUCCESS_DEPTH, PegInsert, make
from sim.tasks.peg_scene import PegGeometry, build_model


def _run_expert(env: PegInsert, noise: float, steps: int) -> np.ndarray:
    """Return (N,) whether each lane's first episode succeeded."""
    expert = env.make_expert(noise=noise, seed=0)
    succeeded, ended = np.zeros(env.num_envs, bool), np.zeros(env.num_envs, bool)
    for _ in range(steps):
        step = env.step(expert.act())
        succeeded |= step.info["success"] & ~ended
        ended |= step.done
        if ended.all():
            break
    return succeeded


def test_clearance_measured_on_the_geoms_is_half_a_millimetre() -> None:
    model = build_model(PegGeometry())
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    inner = {}
    for wall, axis, side in (("right", 0, -1), ("left", 0, 1), ("back", 1, -1), ("front", 1, 1)):
        geom = model.geom(f"wall_{wall}")
        inner[wall] = geom.pos[axis] + side * geom.size[axis]
    edges = [model.geom(f"peg_edge_{i}") for i in range(4)]
    for axis, (high, low) in enumerate((("right", "left"), ("back", "front"))):
        outermost = max(edge.pos[axis] + edge.size[0] for edge in edges)
        innermost = min(edge.pos[axis] - edge.size[0] for edge in edges)
        assert inner[high] - inner[low] - (outermost - innermost) == pytest.approx(0.0005, abs=1e-9)
        assert inner[high] - outermost == pytest.approx(0.00025, abs=1e-9)
    top = max(model.geom("floor").pos[2] + model.geom("floor").size[2], -1.0)
    assert -top == pytest.approx(0.030)
    assert SUCCESS_DEPTH < 0.030


def test_only_peg_and_block_can_touch() -> None:
    model = build_model(PegGeometry())
    touching = {model.geom(i).name for i in range(model.ngeom) if model.geom_contype[i] or model.geom_conaffinity[i]}
    assert len(touching) == 13
    assert all(name.startswith(("peg_edge", "peg_tip", "wall", "floor")) for name in touching)
    assert model.nv == 13


def test_expert_without_noise_succeeds() -> None:
    env = make(10, threads=1)
    env.reset(500)
    assert _run_expert(env, 0.0, 120).sum() >= 9


def test_peg_does_not_pass_through_the_block() -> None:
    env = make(8, threads=1, max_episode_steps=400)
    env.reset(20)
    low, _ = env.spec.action.bounds()
    for step in range(80):
        action = env.hold_action()
        action[:, :2] = env.hole_position[:, :2] + [0.0, 0.035]
        action[:, 2] = low[2] if step > 25 else env.tool_pose()[:, 2]
        env.step(action)
    offset, _ = env.alignment()
    assert offset[:, 2].min() > -0.001, "the tip sank into the block's top"
    force = env.wrench()[:, 2]
    assert (force < -5).all()
    assert (force > -150).all(), "the leash bounds the force"


def test_peg_in_the_hole_is_held_by_the_walls(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(4, threads=1)
    monkeypatch.setattr(env, "success", lambda: np.zeros(4, bool))
    env.reset(40)
    expert = env.make_expert(0.0)
    for _ in range(35):
        env.step(expert.act())
    assert (env.alignment()[0][:, 2] < -SUCCESS_DEPTH).all()
    inside = env.hold_action()
    for push in ([0.02, 0.02], [-0.02, 0.02], [-0.02, -0.02]):
        for _ in range(8):
            env.step(inside + np.array([*push, 0, 0, 0, 0], np.float32))
        offset, _ = env.alignment()
        assert np.linalg.norm(env.wrench()[:, :2], axis=-1).min() > 5
        assert np.abs(offset[:, :2]).max() < 0.0005


def _trajectory(num_envs: int, seed: int, steps: int) -> dict[int, np.ndarray]:
    """Return states (steps, 31) by episode seed under the noisy expert."""
    env = make(num_envs, threads=1)
    expert = env.make_expert(noise=1.0, seed=3)
    observation = env.reset(seed)
    rows = [[] for _ in range(num_envs)]
    for _ in range(steps):
        for lane in range(num_envs):
            rows[lane].append(observation["state"][lane])
        observation = env.step(expert.act()).observation
    return {seed + lane: np.stack(rows[lane]) for lane in range(num_envs)}


def test_episodes_are_decided_by_their_seeds_alone() -> None:
    wide, narrow = _trajectory(5, 70, 15), _trajectory(2, 73, 15)
    for seed in (73, 74):
        np.testing.assert_allclose(wide[seed], narrow[seed], atol=1e-6)
    assert np.abs(wide[70] - wide[71]).max() > 0.01
    np.testing.assert_array_equal(_trajectory(2, 73, 15)[74], narrow[74])


def test_state_has_the_names_and_ranges_of_its_spec() -> None:
    env = make_env("peg_insert", num_envs=6, threads=1)
    state = env.reset(0)["state"]
    spec = env.spec.observation["state"]
    spec.validate(state, "state", batch_dims=1)
    assert state.dtype == np.float32
    assert len(spec.names) == len(spec.unit.split(",")) == spec.size <= 35
    column = {name: state[:, i] for i, name in enumerate(spec.names)}
    assert np.abs(column["fine_x"]).max() <= FINE_RANGE + 1e-9
    hole = np.stack([column[f"hole_{x}"] for x in "xyz"], -1) + np.stack([column[f"tool_{x}"] for x in "xyz"], -1)
    assert np.abs(hole - env.hole_position).max() <= 0.002 + 1e-6
    np.testing.assert_allclose(np.stack([column[n] for n in ("tool_x", "tool_rz")]), env.tool_pose()[:, [0, 5]].T, 1e-5)


def test_hold_action_keeps_the_tool_in_place() -> None:
    env = make(3, threads=1)
    env.reset(9)
    before = env.tool_pose()
    for _ in range(10):
        env.step(env.hold_action())
    after = env.tool_pose()
    assert np.abs(after - before)[:, :3].max() < 5e-4
    assert np.abs(after - before)[:, 3:].max() < 5e-3


def test_tool_velocity_is_bounded_and_its_limits_are_stated() -> None:
    env = make(4, threads=1)
    env.reset(11)
    assert env.command_velocity.shape == env.command_acceleration.shape == (6,)
    low, high = env.spec.action.bounds()
    fastest = 0.0
    rng = np.random.default_rng(0)
    for _ in range(40):
        state = env.step(rng.choice([low, high], 4)).observation["state"]
        fastest = max(fastest, float(np.abs(state[:, 6:9]).max()))
    assert 0.05 < fastest < 0.6


def test_random_actions_do_not_succeed_and_stay_stable() -> None:
    env = make(8, threads=1, on_unstable="raise")
    env.reset(0)
    low, high = env.spec.action.bounds()
    rng = np.random.default_rng(1)
    for _ in range(60):
        assert not env.step(rng.uniform(low, high, (8, 6))).info["success"].any()


def test_real_time_steps_equal_whole_steps() -> None:
    whole, parts = make(1, threads=1), make(1, threads=1)
    whole.reset(4), parts.reset(4)
    for _ in range(5):
        action = whole.hold_action() + np.array([0.01, 0, -0.005, 0, 0, 0.02], np.float32)
        whole.step(action)
        parts.set_action(action)
        for _ in range(5):
            parts.advance(5)
        parts.finish()
    np.testing.assert_allclose(whole.tool_pose(), parts.tool_pose(), atol=1e-6)


def test_rewards() -> None:
    for kind in ("sparse", "shaped"):
        env = make(6, threads=1, reward=kind)
        env.reset(800)
        expert, returns, ended = env.make_expert(0.0), np.zeros(6), np.zeros(6, bool)
        for _ in range(60):
            step = env.step(expert.act())
            returns += step.reward * ~ended
            assert not (step.terminated & ~step.info["success"]).any()
            ended |= step.done
        assert ended.all()
        if kind == "sparse":
            np.testing.assert_allclose(returns, 1.0)
        else:
            assert ((returns > 1.3) & (returns <= 2.0)).all()


def test_user_errors_are_one_line() -> None:
    with pytest.raises(ConfigError, match="sparse, shaped"):
        make(1, reward="dense")
    env = make(1, threads=1)
    env.reset(0)
    with pytest.raises(DataError, match="not finite"):
        env.step(np.full((1, 6), np.nan))
