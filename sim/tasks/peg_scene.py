"""The model of the peg insertion task: a Panda that holds a square peg over a block with a square hole.

The hole is 0.5 mm wider than the peg (0.25 mm per side). The peg is a square prism with rounded edges. Its collision
geometry is one capsule along each of the eight edges that can touch the block: the four long ones and the four around
the tip. Contacts of such a prism with straight walls lie on these edges, so the capsules stand for the solid at a
fraction of its cost. Only the peg and the block can touch; the table, the hand and the arm cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from robot_rl.core.paths import data_file

HOME = np.array([0.0, 0.1868, 0.0, -2.3462, 0.0, 2.5330, 0.7854])
"""Joint angles (7,) in rad with the tool over the middle of the workspace; inverse kinematics leans towards them."""
RECESS = 2e-5
"""How far the capsules around the tip lie inside the solid, m: a flat face then rests on its corners alone."""


@dataclass(frozen=True)
class PegGeometry:
    """Sizes in metres and grasp stiffness; the defaults are the published task."""

    peg_width: float = 0.020
    """Side of the square peg."""
    clearance: float = 0.0005
    """Width of the hole minus width of the peg; half of it is free on each side."""
    fillet: float = 0.0005
    """Radius of the peg's rounded long edges and tip corners; the only lead-in there is."""
    peg_reach: float = 0.060
    """Distance from the tool point (between the fingertips) to the tip of the peg."""
    hole_depth: float = 0.030
    """Depth of the hole below the top of the block."""
    block_height: float = 0.060
    """Height of the block's top above the table."""
    block_width: float = 0.120
    """Side of the square block."""
    grasp_stiffness: float = 20000.0
    """Translational stiffness of the grasp in N/m, equal in all directions."""
    grasp_rotational_stiffness: float = 20.0
    """Rotational stiffness of the grasp in N m/rad, equal in all directions."""


def build_model(geometry: PegGeometry) -> mujoco.MjModel:
    """Compile the scene.

    Joints: 7 of the arm, then 3 slides and 3 hinges between hand and peg, whose springs are the grasp. The block is a
    mocap body, so that each simulation can place it. Gravity is zero: Panda's controller compensates the gravity of
    arm and payload, and nothing else in the scene can fall.
    """
    spec = mujoco.MjSpec.from_file(str(data_file("assets", "franka_panda", "panda.xml")))
    spec.modelname = "peg_insert"
    spec.option.timestep = 0.002
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_DISCRETE
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 5.0
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    spec.option.gravity = [0.0, 0.0, 0.0]
    for key in list(spec.keys):
        spec.delete(key)
    _add_surroundings(spec)
    _add_block(spec, geometry)
    _add_peg(spec, geometry)
    return spec.compile()


def _add_surroundings(spec: mujoco.MjSpec) -> None:
    world = spec.worldbody
    world.add_geom(
        name="table",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        pos=[0.4, 0.0, -0.02],
        size=[0.6, 0.5, 0.02],
        rgba=[0.72, 0.66, 0.58, 1.0],
        contype=0,
        conaffinity=0,
    )
    world.add_light(pos=[0.2, -0.6, 1.6], dir=[0.2, 0.4, -1.0], diffuse=[0.7, 0.7, 0.7])
    world.add_light(pos=[1.2, 0.8, 1.4], dir=[-0.5, -0.6, -1.0], diffuse=[0.4, 0.4, 0.4])
    world.add_camera(name="scene", **_look_at([0.86, -0.36, 0.34], [0.47, 0.0, 0.12]), fovy=42.0)


def _look_at(position: list[float], target: list[float]) -> dict[str, list[float]]:
    """Return the pose of a camera at ``position`` that looks at ``target`` with the world's z up."""
    backward = np.subtract(position, target)
    backward /= np.linalg.norm(backward)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, np.stack([right, np.cross(backward, right), backward], axis=1).ravel())
    return {"pos": list(position), "quat": quaternion.tolist()}


_CONTACT = {"solref": [0.004, 1.0], "solimp": [0.99, 0.995, 0.0001, 0.5, 2.0], "condim": 3}


def _add_block(spec: mujoco.MjSpec, geometry: PegGeometry) -> None:
    """Add the block as four walls and a floor around the hole; the body's origin is the centre of the hole's rim."""
    block = spec.worldbody.add_body(name="block", mocap=True, pos=[0.5, 0.0, geometry.block_height])
    hole = (geometry.peg_width + geometry.clearance) / 2
    outer = geometry.block_width / 2
    wall, middle = (outer - hole) / 2, (outer + hole) / 2
    half_height = geometry.block_height / 2
    floor = (geometry.block_height - geometry.hole_depth) / 2
    boxes = {
        "wall_right": ([middle, 0, -half_height], [wall, outer, half_height]),
        "wall_left": ([-middle, 0, -half_height], [wall, outer, half_height]),
        "wall_back": ([0, middle, -half_height], [hole, wall, half_height]),
        "wall_front": ([0, -middle, -half_height], [hole, wall, half_height]),
        "floor": ([0, 0, -geometry.block_height + floor], [hole, hole, floor]),
    }
    for name, (position, size) in boxes.items():
        block.add_geom(
            name=name,
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=position,
            size=size,
            rgba=[0.32, 0.45, 0.58, 1.0] if name != "floor" else [0.15, 0.2, 0.25, 1.0],
            contype=1,
            conaffinity=2,
            **_CONTACT,
        )


def _add_peg(spec: mujoco.MjSpec, geometry: PegGeometry) -> None:
    """Add the peg on its springs; the body's origin is the tool point and its z axis points from hand to tip."""
    tool = spec.site("tool")
    peg = spec.body("hand").add_body(name="peg", pos=tool.pos)
    mass = 0.080
    for kind, label, stiffness, armature in (
        (mujoco.mjtJoint.mjJNT_SLIDE, "slide", geometry.grasp_stiffness, 1.0),
        (mujoco.mjtJoint.mjJNT_HINGE, "hinge", geometry.grasp_rotational_stiffness, 0.004),
    ):
        for axis, letter in enumerate("xyz"):
            joint = peg.add_joint(name=f"grasp_{label}_{letter}", type=kind, axis=np.eye(3)[axis])
            joint.stiffness[0] = stiffness
            # A light peg on stiff springs leaps into the wall within the one time step in which a contact is lost.
            # The armature, inertia that acts along these joints only, keeps that leap below 0.1 mm.
            joint.armature = armature
            joint.damping[0] = 2 * 0.7 * np.sqrt(stiffness * armature)
    half = geometry.peg_width / 2
    back = 0.015
    middle = (geometry.peg_reach - back) / 2
    peg.add_geom(
        name="peg_body",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        pos=[0, 0, middle],
        size=[half, half, (geometry.peg_reach + back) / 2],
        mass=mass,
        rgba=[0.93, 0.58, 0.18, 1.0],
        contype=0,
        conaffinity=0,
    )
    offset, tip = half - geometry.fillet, geometry.peg_reach - geometry.fillet
    inner, upper = offset - RECESS, tip - RECESS
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    for number, (corner, following) in enumerate(zip(corners, np.roll(corners, -1, axis=0), strict=True)):
        edges = {
            f"peg_edge_{number}": (*corner * offset, 0.0, *corner * offset, tip),
            f"peg_tip_{number}": (*corner * inner, upper, *following * inner, upper),
        }
        for name, ends in edges.items():
            peg.add_geom(
                name=name,
                type=mujoco.mjtGeom.mjGEOM_CAPSULE,
                fromto=ends,
                size=[geometry.fillet, 0, 0],
                mass=0.0,
                rgba=[0.93, 0.58, 0.18, 1.0],
                group=3,
                contype=2,
                conaffinity=1,
                **_CONTACT,
            )
    peg.add_site(name="peg_tip", pos=[0, 0, geometry.peg_reach], size=[0.002, 0, 0], group=4)
