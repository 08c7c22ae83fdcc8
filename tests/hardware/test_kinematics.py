"""The compiled kinematics against MuJoCo's, on random robots, and how they are compiled."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hardware.safety import arithmetic, kinematics
from hardware.safety.model import RobotModel

mujoco = pytest.importorskip("mujoco")


def random_robot(rng, depth=4):
    """Return the MJCF of a tree of bodies with up to two joints each, and the names of joints and sites."""
    joints, sites = [], []

    def bodies(level):
        text = ""
        for _ in range(rng.integers(1, 3) if level else 0):
            number, inner = len(sites), ""
            sites.append(f"s{number}")
            for kind in rng.choice(["hinge", "slide"], rng.integers(0, 3)):
                joints.append(f"j{len(joints)}")
                axis, place = (" ".join(map(str, rng.normal(size=3))) for _ in range(2))
                reference = rng.normal() * (1 if kind == "slide" else 20)
                inner += f'<joint name="{joints[-1]}" type="{kind}" axis="{axis}" pos="{place}" ref="{reference}"/>'
            place, turn, at = (" ".join(map(str, rng.normal(size=size))) for size in (3, 4, 3))
            inner += f'<geom size="0.1"/><site name="s{number}" pos="{at}"/>{bodies(level - 1)}'
            text += f'<body name="b{number}" pos="{place}" quat="{turn}">{inner}</body>'
        return text

    return f'<mujoco><worldbody><site name="fixed" pos="1 2 3"/>{bodies(depth)}</worldbody></mujoco>', joints, sites


@pytest.mark.parametrize("seed", range(12))
def test_places_and_jacobians_are_those_of_mujoco(seed):
    rng = np.random.default_rng(seed)
    text, joints, sites = random_robot(rng)
    model = mujoco.MjModel.from_xml_string(text)
    data = mujoco.MjData(model)
    joints = [str(one) for one in rng.permutation(joints)][: max(1, len(joints) - 2)]  # the others stay where they are
    if not joints:
        pytest.skip("this robot has no joint")
    robot = RobotModel(model, joints, str(rng.choice(sites)), [*sites[:4], "b0", "fixed"])
    commands = rng.normal(size=(5, len(joints)))
    found = robot.positions(commands)
    for command, places in zip(commands, found, strict=True):
        for name, value in zip(joints, command, strict=True):
            data.joint(name).qpos = value
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        expected = [data.body(name).xpos if name[0] == "b" else data.site(name).xpos for name in robot.names]
        np.testing.assert_allclose(places, expected, atol=1e-12)
        full = np.zeros((6, model.nv))
        mujoco.mj_jacSite(model, data, full[:3], full[3:], model.site(robot.names[0]).id)
        columns = [model.jnt_dofadr[model.joint(name).id] for name in joints]
        np.testing.assert_allclose(kinematics.jacobian(command, *robot.tree), full[:, columns], atol=1e-12)
    np.testing.assert_array_equal(robot.tool(commands), found[:, 0])


@pytest.mark.parametrize("shape", [(6, 7), (6, 6), (6, 2), (3, 1)])
def test_singular_values_are_those_of_lapack(shape):
    rng = np.random.default_rng(0)
    for scale in 10.0 ** rng.uniform(-6, 3, 50):
        matrix = scale * rng.normal(size=shape)
        values = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(kinematics.extreme_singular_values(matrix), values[[0, -1]], rtol=1e-9)


def test_a_singular_matrix_has_a_smallest_value_of_zero_and_nan_stays_nan():
    matrix = np.outer(np.arange(6.0), np.arange(7.0))
    assert kinematics.extreme_singular_values(matrix)[1] < 1e-9
    matrix[2, 3] = np.nan
    assert not np.isfinite(kinematics.extreme_singular_values(matrix)).any()


@pytest.mark.parametrize("shape", [(6, 7), (6, 6), (6, 2), (3, 1)])
def test_what_is_surely_even_has_singular_values_within_the_ratio(shape):
    rng, said, even = np.random.default_rng(0), 0, 0
    for _ in range(300):
        matrix = rng.normal(size=shape) * 10.0 ** rng.uniform(-1, 1, (shape[0], 1))
        values = np.linalg.svd(matrix, compute_uv=False)
        ratio = values[0] / values[-1] * rng.uniform(0.5, 3.0)
        surely = kinematics.surely_even(matrix, ratio)
        assert not surely or values[0] <= ratio * values[-1]
        assert surely or values[0] * np.sqrt(min(shape)) > 0.999 * ratio * values[-1]  # the trace is no larger
        said, even = said + surely, even + (values[0] <= ratio * values[-1])
    assert 0.2 * even < said <= even


def test_neither_a_singular_matrix_nor_nan_is_surely_even():
    matrix = np.outer(np.arange(1.0, 7.0), np.arange(1.0, 8.0))
    assert not kinematics.surely_even(matrix, 1e6)
    assert not kinematics.surely_even(np.zeros((6, 7)), 1e6)
    matrix = np.random.default_rng(0).normal(size=(6, 7))
    assert kinematics.surely_even(matrix, 1e6)
    matrix[2, 3] = np.nan
    assert not kinematics.surely_even(matrix, 1e6)


def test_read_only_and_strided_arrays_are_taken_as_they_are():
    rows = np.arange(24.0).reshape(4, 6)
    expected = arithmetic.braking_path(rows[1, ::2].copy(), np.zeros(3), np.ones((4, 3)), 50)
    rows.flags.writeable = False
    np.testing.assert_array_equal(arithmetic.braking_path(rows[1, ::2], np.zeros(3), np.ones((4, 3)), 50), expected)


def test_an_array_that_is_too_short_is_an_error():
    """Compiled code that read beyond its end would judge by whatever lies there."""
    with pytest.raises(IndexError):
        arithmetic.lags(np.zeros(7), np.zeros(6), np.ones(7))


def test_nothing_is_compiled_after_the_import():
    """The control loop must never wait for a compiler: all signatures are stated, and others are refused."""
    for module in (arithmetic, kinematics):
        public = [one for name, one in vars(module).items() if name[0] != "_" and hasattr(one, "py_func")]
        entries = [one for one in public if one.__module__ == module.__name__]
        assert len(entries) > 3
        assert all(one.signatures and not one._can_compile for one in entries)
    with pytest.raises(TypeError, match="No matching definition"):
        arithmetic.braking_change(np.zeros(3, np.float32), np.zeros(3), np.ones((8, 3)))


def test_where_nothing_can_be_written_it_compiles_for_this_process(tmp_path):
    """A robot's file system may be read-only; the start takes longer there."""
    code = (  # code that comes from no file has no place for a cache
        "from robot_rl.core.compiled import NUMBER, compiled\nprint(compiled(NUMBER(NUMBER))(lambda x: 2 * x)(3.0))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "6.0", done.stderr
