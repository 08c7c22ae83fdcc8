"""Stage 9: no command, nor the stop that must remain possible after it, comes nearer than the margin to anything."""

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.safety.chain import SafetyChain, Situation
from hardware.safety.clearance import Clearance
from hardware.safety.surroundings import Guards
from hardware.safety.workspace import Workspace
from robot_rl.core.errors import ConfigError, UnknownNameError
from robot_rl.core.robot import Limits, StampedObservation

DT = 0.01
ARM = """
<mujoco>
  <worldbody>
    <geom name="post" type="capsule" size="0.04" fromto="0.45 0.1 0 0.45 0.1 0.8"/>
    <body name="a"><joint name="j1" axis="0 0 1"/><geom name="a" type="capsule" size="0.04" fromto="0 0 0.1 0 0 0.3"/>
      <body name="b" pos="0 0 0.3"><joint name="j2" axis="0 1 0"/>
        <geom name="b" type="capsule" size="0.03" fromto="0 0 0.05 0.3 0 0"/>
        <body name="c" pos="0.3 0 0"><joint name="j3" axis="0 0 1"/>
          <geom name="c" type="capsule" size="0.03" fromto="0.05 0 0 0.3 0 0"/>
          <body name="d" pos="0.3 0 0"><joint name="j4" type="slide" axis="1 0 0" range="0 0.1" limited="true"/>
            <geom name="d" type="sphere" size="0.03" pos="0.05 0 0"/>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
</mujoco>"""
JOINTS = ("j1", "j2", "j3", "j4")
START = np.array([1.8, 0.0, 0.0, 0.0])
LIMITS = Limits(
    *(np.array([s * 2.8, s * 1.2, s * 2.8, max(0, s) * 0.1]) for s in (-1, 1)), np.full(4, 2.0), np.full(4, 15.0)
)


def situation():
    return Situation(0.0, StampedObservation({}, 0, 0.0), "policy")


def chain(solver=True, **options):
    clearance = Clearance(mujoco.MjModel.from_xml_string(ARM), JOINTS, **options)
    clearance.solver &= solver
    found = SafetyChain(LIMITS, DT, guards=Guards(clearance=clearance))
    found.anchor(START)
    return found


def distances(clearance, command):
    """Distances of all pairs, by MuJoCo from Python."""
    data = mujoco.MjData(clearance.model)
    data.qpos[:] = command
    mujoco.mj_kinematics(clearance.model, data)
    return np.array([mujoco.mj_geomDistance(clearance.model, data, *pair, 10.0, None) for pair in clearance.pairs])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), solver=st.booleans(), replaced=st.booleans())
def test_whatever_is_asked_the_margin_and_every_limit_hold(seed, solver, replaced):
    rng, arm = np.random.default_rng(seed), chain(solver)
    clearance, previous, step = arm.guards.clearance, START, np.zeros(4)
    for k in range(120):
        if k % 30 == 0:
            target = rng.uniform(LIMITS.low, LIMITS.high)
        arm.filter(target, situation())
        if replaced and k % 3 == 0:
            arm.replace(rng.uniform(LIMITS.low, LIMITS.high), situation())
        assert clearance.distance(arm.command) >= clearance.margin - 1e-9
        new = arm.command - previous
        assert (np.abs(new) <= LIMITS.velocity * DT + 1e-12).all()
        assert (np.abs(new - step) <= LIMITS.acceleration * DT**2 + 1e-12).all()
        previous, step = arm.command, new
    assert arm.counts["post_check_failed"] == arm.counts["exception"] == 0
    for _ in range(30):
        arm.filter(None, situation())
        assert clearance.distance(arm.command) >= clearance.margin - 1e-9
    assert not arm.moving


def test_a_motion_in_the_open_passes_bit_for_bit():
    arm = chain()
    for k in range(100):
        target = START + np.array([0.0005, 0.0004, -0.0005, 0.0001]) * min(k, 20)
        verdict = arm.filter(target, situation())
        np.testing.assert_array_equal(verdict.command, target)
        assert verdict.flags == 0


def test_a_blocked_motion_is_named_and_slides_along_where_there_is_a_solver():
    pytest.importorskip("daqp")
    target = np.array([-0.4, 0.9, 1.0, 0.1])  # behind the post, which bars the first joint alone
    sliding, stopping = chain(), chain(solver=False)
    for arm in (sliding, stopping):
        arm.anchor(np.array([0.6, 0.0, 0.0, 0.0]))
    for _ in range(400):
        sliding.filter(target, situation())
        stopping.filter(target, situation())
    assert sliding.counts["clearance_limited"] > 0
    assert stopping.counts["clearance_limited"] > 0
    assert "clearance_limited" in sliding._logged
    left = [np.linalg.norm(arm.command - target) for arm in (sliding, stopping)]
    assert left[0] < left[1] - 0.05


def test_the_shortcut_over_a_path_sees_what_every_single_command_shows():
    rng, clearance = np.random.default_rng(0), Clearance(mujoco.MjModel.from_xml_string(ARM), JOINTS)
    judged = []
    for _ in range(60):
        ends = rng.uniform(LIMITS.low, LIMITS.high, (2, 4))
        path = ends[0] + np.linspace(0, 0.3, 40)[:, None] * (ends[1] - ends[0])
        every = clearance.margin - min(clearance.distance(one) for one in path)
        assert (clearance.excess(path) > 0) == (every > 0)
        if every > 0:
            assert clearance.excess(path, np.inf) == pytest.approx(every, abs=0.02)
        walked = [clearance.excess(one[None]) for one in path]  # near what was measured before
        assert (max(walked) > 0) == (every > 0)
        judged.append(every > 0)
    assert 5 < sum(judged) < 55


def test_the_reach_bounds_how_far_any_point_travels():
    model = mujoco.MjModel.from_xml_string(ARM)
    clearance, rng = Clearance(model, JOINTS), np.random.default_rng(1)
    reach = clearance._scene.reach
    for _ in range(300):
        here = rng.uniform(LIMITS.low, LIMITS.high)
        there = here + rng.normal(0, 0.1, 4) * (rng.random(4) < 0.5)
        there[3] = np.clip(there[3], 0, 0.1)
        before, after = distances(clearance, here), distances(clearance, there)
        assert (np.abs(after - before) <= reach @ np.abs(there - here) + 1e-9).all()
    assert (reach > 0).any(axis=1).all()
    assert (reach == 0).any()  # no joint above both geoms of a pair moves them against each other


def test_workspace_and_clearance_hold_together():
    model, rng = mujoco.MjModel.from_xml_string(ARM), np.random.default_rng(3)
    data = mujoco.MjData(model)

    def tool(commands):
        places = []
        for one in commands:
            data.qpos[:] = one
            mujoco.mj_kinematics(model, data)
            places.append(data.geom("d").xpos.copy())
        return np.array(places)

    workspace = Workspace(np.array([-1, -1, 0.1]), np.array([1, 1, 0.6]), kinematics=tool)
    arm = SafetyChain(LIMITS, DT, guards=Guards(workspace=workspace, clearance=Clearance(model, JOINTS)))
    arm.anchor(START)
    for k in range(300):
        if k % 30 == 0:
            target = rng.uniform(LIMITS.low, LIMITS.high)
        arm.filter(target, situation())
        assert workspace.excess(arm.command[None]) <= 1e-9
        assert arm.guards.clearance.distance(arm.command) >= arm.guards.clearance.margin - 1e-9
    assert arm.counts["workspace_limited"] > 0


def test_a_start_too_near_may_only_move_away():
    clearance = Clearance(mujoco.MjModel.from_xml_string(ARM), JOINTS, pairs=[("post", "c"), ("post", "d")])
    arm = SafetyChain(LIMITS, DT, guards=Guards(clearance=clearance))
    near = np.array([0.13, 0.0, 0.0, 0.0])
    assert clearance.distance(near) < clearance.margin
    arm.anchor(near)
    nearest = clearance.distance(near)
    for _ in range(200):
        arm.filter(np.array([1.5, 0.0, 0.0, 0.0]), situation())
        assert clearance.distance(arm.command) >= nearest - 1e-9


def test_what_cannot_work_is_refused():
    model = mujoco.MjModel.from_xml_string(ARM)
    with pytest.raises(UnknownNameError, match="j9"):
        Clearance(model, ("j9",))
    with pytest.raises(UnknownNameError, match="Available: a, b, c, d, post"):
        Clearance(model, JOINTS, pairs=[("post", "nose")])
    with pytest.raises(ConfigError, match="no pair"):
        Clearance(model, JOINTS, pairs=[])
    free = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><body><freejoint name='f'/><geom size='0.1'/></body></worldbody></mujoco>"
    )
    with pytest.raises(ConfigError, match="neither hinge nor slide"):
        Clearance(free, ("f",))


CUBE = " ".join(f"{x} {y} {z}" for x in (-0.1, 0.1) for y in (-0.1, 0.1) for z in (-0.1, 0.1))
SHAPES = """
<mujoco>
  <size memory="{memory}"/>
  <asset><mesh name="cube" vertex="{cube}"/></asset>
  <worldbody>
    <geom name="floor" type="plane" size="2 2 0.1"/>
    <geom name="box" type="box" size="0.1 0.2 0.3" pos="1 0 0.5"/>
    <geom name="cylinder" type="cylinder" size="0.1 0.2" pos="-1 0 0.5"/>
    <body pos="0 0 1"><joint name="x" type="slide" axis="1 0 0"/><joint name="turn" axis="0 1 0"/>
      <geom name="mesh" type="mesh" mesh="cube"/><geom name="ball" type="ellipsoid" size="0.1 0.2 0.1" pos="0.2 0 0"/>
    </body>
  </worldbody>
</mujoco>"""


def test_distances_of_all_shapes_are_those_that_python_measures():
    clearance = Clearance(mujoco.MjModel.from_xml_string(SHAPES.format(memory="1M", cube=CUBE)), ("x", "turn"))
    assert len(clearance.pairs) == 6
    rng = np.random.default_rng(0)
    for _ in range(50):
        command = rng.uniform((-1.0, -3.0), (1.0, 3.0))
        found = distances(clearance, command)
        assert clearance.distance(command) == found.min()
        clearance.forget()
        assert clearance.excess(command[None], np.inf) == max(clearance.margin - found.min(), 0.0)
        np.testing.assert_array_equal(clearance._scene.apart, found)


def test_a_model_without_the_memory_that_distances_take_is_refused():
    with pytest.raises(ConfigError, match=r"the distance of .* and .* cannot be measured: .*out of memory"):
        Clearance(mujoco.MjModel.from_xml_string(SHAPES.format(memory="10K", cube=CUBE)), ("x", "turn"))


def test_what_moved_by_itself_is_measured_anew_once_it_is_said():
    clearance = Clearance(mujoco.MjModel.from_xml_string(ARM), JOINTS)
    assert clearance.excess(START[None]) <= 0.0
    clearance.model.geom_pos[clearance.model.geom("post").id] = (-0.1, 0.3, 0.35)  # where the arm is
    assert clearance.excess(START[None]) <= 0.0
    clearance.forget()
    assert clearance.excess(START[None]) > 0.0


def test_a_command_that_is_no_number_is_an_error():
    clearance = Clearance(mujoco.MjModel.from_xml_string(ARM), JOINTS)
    for place in (0, 1):
        path = np.stack([START, START])
        path[place, 2] = np.nan
        with pytest.raises(ValueError, match="not finite"):
            clearance.excess(path)
