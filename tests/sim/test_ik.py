"""Batched inverse kinematics: accuracy, joint limits, independence of lanes, and the rotation maps under it."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

from robot_rl.core.errors import ConfigError
from robot_rl.core.paths import data_file
from sim.cartesian import TOOL_DOWN, CartesianController, ControllerLimits, tool_pose, tool_rotation
from sim.ik import BatchIK, matrix_to_rotation_vector, rotation_vector_to_matrix
from sim.tasks.peg_scene import HOME

ARMS = 32


@pytest.fixture(scope="module")
def arm() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_path(str(data_file("assets", "franka_panda", "panda.xml")))


@pytest.fixture(scope="module")
def kinematics(arm: mujoco.MjModel) -> BatchIK:
    return BatchIK(arm, "tool", HOME, ARMS, threads=1)


def _poses(rng: np.random.Generator) -> np.ndarray:
    """Return reachable tool poses (ARMS, 6) in front of the robot."""
    low = [0.35, -0.25, 0.08, -0.3, -0.3, -0.8]
    high = [0.65, 0.25, 0.45, 0.3, 0.3, 0.8]
    return rng.uniform(low, high, (ARMS, 6))


def test_rotation_maps_are_inverse_and_agree_with_mujoco() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.uniform(-1.5, 1.5, (50, 3))
    vectors[0] = 0.0
    vectors[1] = [1e-10, 0.0, 0.0]
    matrices = rotation_vector_to_matrix(vectors)
    np.testing.assert_allclose(matrix_to_rotation_vector(matrices), vectors, atol=1e-9)
    quaternion, expected = np.zeros(4), np.zeros(9)
    angle = np.linalg.norm(vectors[5])
    mujoco.mju_axisAngle2Quat(quaternion, vectors[5] / angle, angle)
    mujoco.mju_quat2Mat(expected, quaternion)
    np.testing.assert_allclose(matrices[5].ravel(), expected, atol=1e-12)


def test_tool_point_at_home_is_where_the_published_kinematics_put_it(kinematics: BatchIK) -> None:
    quarter = np.pi / 4
    home = np.array([[0.0, -quarter, 0.0, -3 * quarter, 0.0, 2 * quarter, quarter]])
    position, rotation = kinematics.forward(home)
    # Planar chain: shoulder at 0.333, upper arm 0.316 tilted by -45°, elbow offsets 0.0825, forearm 0.384, wrist 0.088.
    sine = np.sin(quarter)
    x = -0.316 * sine + 0.0825 * sine + 0.0825 * 0.0 + 0.384 + 0.088
    np.testing.assert_allclose(position[0, 1], 0.0, atol=1e-9)
    np.testing.assert_allclose(rotation[0], TOOL_DOWN, atol=1e-9)
    assert position[0, 0] == pytest.approx(x, abs=1e-6)


def test_reaches_targets_within_tolerance_and_joint_limits(kinematics: BatchIK) -> None:
    poses = _poses(np.random.default_rng(1))
    rotation = tool_rotation(poses)
    joints = kinematics.solve(np.tile(HOME, (ARMS, 1)), poses[:, :3], rotation, iterations=40)
    position, reached = kinematics.forward(joints)
    assert np.abs(position - poses[:, :3]).max() < 1e-4
    assert np.abs(matrix_to_rotation_vector(reached @ rotation.swapaxes(-1, -2))).max() < 1e-3
    assert (joints >= kinematics.low).all()
    assert (joints <= kinematics.high).all()


def test_unreachable_targets_stay_finite_and_inside_the_limits(kinematics: BatchIK) -> None:
    position = np.tile([2.0, 1.0, -1.0], (ARMS, 1))
    rotation = np.tile(TOOL_DOWN, (ARMS, 1, 1))
    joints = kinematics.solve(np.tile(HOME, (ARMS, 1)), position, rotation, iterations=60)
    assert np.isfinite(joints).all()
    assert (joints >= kinematics.low).all()
    assert (joints <= kinematics.high).all()


def test_an_arm_does_not_depend_on_its_neighbours(kinematics: BatchIK) -> None:
    poses = _poses(np.random.default_rng(2))
    start = np.tile(HOME, (ARMS, 1))
    together = kinematics.solve(start, poses[:, :3], tool_rotation(poses), iterations=10)
    alone = kinematics.solve(start[7:8], poses[7:8, :3], tool_rotation(poses[7:8]), iterations=10)
    np.testing.assert_array_equal(together[7:8], alone)


def test_refuses_a_model_whose_first_joints_are_not_hinges() -> None:
    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><body><joint type='slide'/><geom size='1'/><site name='tool'/></body></worldbody></mujoco>"
    )
    with pytest.raises(ConfigError, match="hinges"):
        BatchIK(model, "tool", np.zeros(1), 1)


def test_controller_bounds_speed_and_keeps_the_target_on_its_leash(kinematics: BatchIK) -> None:
    limits = ControllerLimits()
    controller = CartesianController(kinematics, ARMS, limits)
    pose = np.tile([0.5, 0.0, 0.2, 0.0, 0.0, 0.0], (ARMS, 1))
    controller.reset(np.arange(ARMS), pose)
    controller.command[:] = pose + np.array([0.1, -0.1, 0.05, 0.1, 0.0, 0.4])
    before = controller.target.copy()
    for _ in range(100):
        controller.tick(pose, 0.01)
        assert (np.abs(controller.target - before) <= limits.velocity() * 0.01 + 1e-12).all()
        before = controller.target.copy()
    # The measured pose never moved: the target waits at the end of its leash.
    np.testing.assert_allclose((controller.target - pose)[:, 0], limits.linear_leash)
    assert (np.abs(controller.target - pose) <= limits.leash() + 1e-12).all()


def test_controller_arrives_at_a_command_that_the_arm_follows(kinematics: BatchIK) -> None:
    controller = CartesianController(kinematics, ARMS, ControllerLimits())
    pose = _poses(np.random.default_rng(3))
    pose[:, 3:] *= 0.3
    joints = controller.reset(np.arange(ARMS), pose)
    controller.command[:] = goal = pose + np.array([0.02, -0.02, 0.01, 0.05, 0.0, 0.1])
    for _ in range(120):
        joints = controller.tick(tool_pose(*kinematics.forward(joints)), 0.01)
    np.testing.assert_allclose(tool_pose(*kinematics.forward(joints)), goal, atol=5e-4)
