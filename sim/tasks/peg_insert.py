"""Peg insertion: a Panda that already holds a square peg inserts it into a square hole with 0.5 mm of clearance.

**World.** 2 ms physics (``discrete`` integrator, elliptic friction cones), 20 Hz commands, a 100 Hz Cartesian
controller (`sim.cartesian`) and joint position servos with perfect gravity compensation. Peg 20 x 20 mm with 0.5 mm
fillets, hole 20.5 mm wide (0.25 mm per side) and 30 mm deep (`sim.tasks.peg_scene`).

**The grasp** is a spring: three translations and three rotations between hand and peg with the stiffness of
`PegGeometry`, and armature that keeps contacts firm. It does not slip, and fingers do not touch. How the peg sits in
the hand (offset and tilt of the spring's rest pose) differs in each episode. The deflection of the springs is what the
wrench observation reads. Peg and block overlap by 0.01 mm in the median and 0.2 mm at the 99th percentile while the peg
is pushed about in the hole with 60 to 130 N, far more than an insertion takes.

**Episode.** The block is placed within ±40 mm and turned up to ±0.25 rad; the tool starts beside and above it; friction
between peg and block is 0.2 to 0.4. **Success**: the tip is at least 20 mm below the rim and within 1 mm and 5° of the
hole's axis. The episode terminates there.

**Rewards.** ``sparse``: 1 at success. ``shaped``: the same plus the increase of a potential in [0, 1] that grows as
the tip approaches the rim, lines up with the hole and sinks (`PegInsert.potential`). The increases telescope: an
episode's return is 1 at success plus the potential gained, however long it took.
"""

from __future__ import annotations

from typing import Any, ClassVar

import mujoco
import numpy as np

from robot_rl.core.env import Expert, Observation
from robot_rl.core.paths import data_file
from robot_rl.core.spec import ArraySpec, Spec
from sim.cartesian import CartesianController, ControllerLimits, tool_pose, tool_rotation
from sim.engine import ALL, BatchEnv, Lanes
from sim.ik import BatchIK, matrix_to_rotation_vector
from sim.tasks.peg_scene import HOME, PegGeometry, build_model

CENTRE = np.array([0.5, 0.0])
"""(2,) nominal place of the hole in the base frame, m."""
SUCCESS_DEPTH = 0.020
"""Depth of the tip below the rim that counts, m."""
FINE_RANGE = 0.005
"""The wrist camera sees the hole's offset from the tip up to this distance along each axis, m."""
FINE_ANGLE = 0.15
"""The wrist camera sees the misalignment up to this angle about each axis, rad."""

_STATE = {
    "tool_x tool_y tool_z": "m",
    "tool_rx tool_ry tool_rz": "rad",
    "tool_vx tool_vy tool_vz": "m/s",
    "target_error_x target_error_y target_error_z": "m",
    "target_error_rx target_error_ry target_error_rz": "rad",
    "force_x force_y force_z": "N",
    "torque_x torque_y torque_z": "N m",
    "hole_x hole_y hole_z": "m",
    "hole_yaw": "rad",
    "fine_x fine_y fine_height": "m",
    "fine_rx fine_ry fine_yaw": "rad",
}
_STATE_NAMES = tuple(name for group in _STATE for name in group.split())
_STATE_UNITS = ",".join(unit for group, unit in _STATE.items() for _ in group.split())

_NOISE = np.array([0.3] * 3 + [0.02] * 3 + [5e-5] * 3 + [2e-3] * 3)
"""Standard deviation per reading of wrench (N, N m) and of the wrist camera (m, rad)."""


def make_spec(geometry: PegGeometry) -> Spec:
    """Return the interface: ``state`` (31,), an absolute Cartesian action (6,) and 20 Hz."""
    lowest = geometry.block_height + geometry.peg_reach - geometry.hole_depth - 0.01
    action = ArraySpec(
        shape=(6,),
        names=("x", "y", "z", "rx", "ry", "rz"),
        unit="m,m,m,rad,rad,rad",
        frame="base",
        low=(CENTRE[0] - 0.10, CENTRE[1] - 0.10, lowest, -0.15, -0.15, -0.5),
        high=(CENTRE[0] + 0.10, CENTRE[1] + 0.10, lowest + 0.14, 0.15, 0.15, 0.5),
    )
    state = ArraySpec(shape=(len(_STATE_NAMES),), names=_STATE_NAMES, unit=_STATE_UNITS, frame="base")
    return Spec({"state": state}, action, rate_hz=20.0)


class PegInsert(BatchEnv):
    """N lanes of the task.

    The action is the tool's absolute target in the base frame: position x, y, z in m and rotation vector rx, ry, rz in
    rad away from pointing straight down. The state (31 numbers, names in the spec) holds what a real cell measures:

    * pose of the tool like the action's, its linear velocity, and how far the controller's target is from it;
    * the wrench on the grasp in the hand's frame, with noise;
    * a coarse estimate of the hole (rim centre and yaw) relative to the tool, base frame, wrong by up to 2 mm and
      0.02 rad for the whole episode;
    * the wrist camera: position of the peg's tip in the hole's frame (x, y; height above the rim) and rotation of the
      peg against the hole, with noise (0.05 mm, 2 mrad); x, y saturate at 5 mm, height at 30 mm, angles at 0.15 rad.
    """

    name: ClassVar[str] = "peg_insert"
    camera: ClassVar[str | int] = "scene"
    render_size: ClassVar[tuple[int, int]] = (240, 320)

    def __init__(
        self,
        num_envs: int,
        *,
        geometry: PegGeometry | None = None,
        max_episode_steps: int = 120,
        **options: Any,
    ) -> None:
        self.geometry = geometry or PegGeometry()
        self._controller_period = 0.01
        super().__init__(
            build_model(self.geometry),
            num_envs,
            spec=make_spec(self.geometry),
            substeps=25,
            max_episode_steps=max_episode_steps,
            control_every=5,
            stage=mujoco.mjtStage.mjSTAGE_VEL,
            **options,
        )
        self.limits = ControllerLimits()
        self.command_velocity = self.limits.velocity()
        """(6,) largest velocity of each action element that the controller follows, m/s and rad/s."""
        self.command_acceleration = self.limits.acceleration()
        """(6,) largest acceleration of each action element that the controller follows, m/s² and rad/s²."""
        arm = mujoco.MjModel.from_xml_path(str(data_file("assets", "franka_panda", "panda.xml")))
        kinematics = BatchIK(arm, "tool", HOME, num_envs, threads=options.get("threads", 0))
        stiffness = np.asarray(self.model.actuator_gainprm)[:7, 0]
        lead = (self.model.dof_damping[:7] - np.asarray(self.model.actuator_biasprm)[:7, 2]) / stiffness
        self.controller = CartesianController(kinematics, num_envs, self.limits, lead)
        self._bind(num_envs)

    def _bind(self, num_envs: int) -> None:
        batch, model = self.batch, self.model
        self._qpos, self._qvel, self._ctrl = batch.bind("qpos"), batch.bind("qvel"), batch.bind("ctrl")
        self._block_pos, self._block_quat = batch.bind("mocap_pos"), batch.bind("mocap_quat")
        self._site_pos, self._site_mat = batch.bind("site_xpos"), batch.bind("site_xmat")
        self._cvel, self._com = batch.bind("cvel"), batch.bind("subtree_com")
        self._tool, self._tip = model.site("tool").id, model.site("peg_tip").id
        self._hand, self._peg = model.body("hand").id, model.body("peg").id
        self._root = int(model.body_rootid[self._hand])
        self._peg_pos, self._peg_quat = batch.expand("body_pos"), batch.expand("body_quat")
        self._friction = batch.expand("geom_friction")
        self._touching = np.flatnonzero(np.asarray(model.geom_contype) > 0)
        self._stiffness = np.asarray(model.jnt_stiffness).reshape(model.njnt, -1)[7:13, 0].copy()
        self.hole_position = np.zeros((num_envs, 3))
        """(N, 3) true centre of the rim in the base frame, m."""
        self.hole_yaw = np.zeros(num_envs)
        """(N,) true rotation of the hole about z, rad; the square repeats every π/2."""
        self._hole_bias = np.zeros((num_envs, 4))
        self._noise = np.zeros((num_envs, self.max_episode_steps + 1, len(_NOISE)), np.float32)
        self._potential = np.zeros(num_envs)

    # ---- hooks of the engine ----------------------------------------------------------------------------------------

    def reset_lanes(self, lanes: np.ndarray, rngs: list[np.random.Generator]) -> None:
        """Place block, tool and peg, and draw friction and sensor errors, from each episode's generator."""
        uniform = np.stack([rng.uniform(-1, 1, 20) for rng in rngs])
        self._noise[lanes] = np.stack([rng.standard_normal(self._noise.shape[1:]) for rng in rngs]) * _NOISE
        self.hole_position[lanes, :2] = CENTRE + 0.04 * uniform[:, 0:2]
        self.hole_position[lanes, 2] = self.geometry.block_height
        self.hole_yaw[lanes] = 0.25 * uniform[:, 2]
        self._block_pos[lanes, 0] = self.hole_position[lanes]
        half = 0.5 * self.hole_yaw[lanes]
        self._block_quat[lanes, 0] = np.stack([np.cos(half), 0 * half, 0 * half, np.sin(half)], axis=-1)
        pose = np.empty((len(lanes), 6))
        pose[:, :2] = CENTRE + 0.05 * uniform[:, 3:5]
        pose[:, 2] = self.geometry.block_height + self.geometry.peg_reach + 0.04 + 0.012 * uniform[:, 5]
        pose[:, 3:] = np.array([0.04, 0.04, 0.2]) * uniform[:, 6:9]
        joints = self.controller.reset(lanes, pose)
        self._qpos[lanes, :7] = self._ctrl[lanes, :7] = joints
        self._peg_pos[lanes, self._peg] = self.model.body_pos[self._peg] + [0.002, 0.002, 0.001] * uniform[:, 9:12]
        self._peg_quat[lanes, self._peg] = _small_quaternion(np.array([0.01, 0.01, 0.03]) * uniform[:, 12:15])
        friction = 0.3 + 0.1 * uniform[:, 15]
        self._friction[lanes[:, None], self._touching, 0] = friction[:, None]
        self._hole_bias[lanes] = np.array([0.002, 0.002, 0.001, 0.02]) * uniform[:, 16:20]
        start = np.concatenate([pose[:, :2] - self.hole_position[lanes, :2], np.full((len(lanes), 1), 0.04)], axis=-1)
        self._potential[lanes] = self.potential(start)

    def apply(self, actions: np.ndarray) -> None:
        """Take ``actions`` (N, 6) as the newest commanded pose."""
        self.controller.command[:] = actions

    def control(self) -> None:
        """Let the Cartesian controller advance its target by 10 ms."""
        self._ctrl[:, :7] = self.controller.tick(self.tool_pose(), self._controller_period)

    def observe(self, lanes: Lanes = ALL) -> Observation:
        """Return ``state`` (K, 31); the class docstring says what is in it."""
        pose = self.tool_pose(lanes)
        angular = self._cvel[lanes, self._hand, :3]
        arm = pose[:, :3] - self._com[lanes, self._root]
        velocity = self._cvel[lanes, self._hand, 3:] + np.cross(angular, arm)
        noise = self._noise[lanes][np.arange(len(pose)), np.minimum(self.elapsed[lanes], self.max_episode_steps)]
        offset, misalignment = self.alignment(lanes)
        limits = [FINE_RANGE, FINE_RANGE, 6 * FINE_RANGE]
        fine = np.clip(offset + noise[:, 6:9], np.negative(limits), limits)
        angles = np.clip(misalignment + noise[:, 9:], -FINE_ANGLE, FINE_ANGLE)
        bias = self._hole_bias[lanes]
        hole = self.hole_position[lanes] - pose[:, :3] + bias[:, :3]
        yaw = self.hole_yaw[lanes] - pose[:, 5] + bias[:, 3]
        parts = [pose, velocity, self.controller.target[lanes] - pose, self.wrench(lanes) + noise[:, :6]]
        return {"state": np.concatenate([*parts, hole, yaw[:, None], fine, angles], axis=-1).astype(np.float32)}

    def measure(self) -> None:
        """Compute the pose of the peg in the hole's frame once for success, reward and info."""
        self._offset, self._misalignment = self.alignment()

    def success(self) -> np.ndarray:
        """Return (N,) bool: at least 20 mm deep, and within 1 mm and 5° of the hole's axis."""
        lateral = np.linalg.norm(self._offset[:, :2], axis=-1)
        tilt = np.linalg.norm(self._misalignment[:, :2], axis=-1)
        return (self._offset[:, 2] < -SUCCESS_DEPTH) & (lateral < 1e-3) & (tilt < np.deg2rad(5))

    def reward(self, first_success: np.ndarray) -> np.ndarray:
        """Return (N,): 1 at success; with ``shaped`` also the increase of the potential."""
        if self.reward_kind == "sparse":
            return first_success.astype(np.float32)
        before, self._potential = self._potential, self.potential(self._offset)
        return (first_success + self._potential - before).astype(np.float32)

    def episode_info(self) -> dict[str, np.ndarray]:
        """Return the tip's ``depth`` below the rim (N,) in m and the ``contact_force`` (N,) in N."""
        return {"depth": -self._offset[:, 2], "contact_force": np.linalg.norm(self.wrench()[:, :3], axis=-1)}

    def make_expert(self, noise: float = 1.0, seed: int = 0) -> Expert:
        """Return the scripted expert of `sim.tasks.peg_expert`; ``noise`` 0 is the competent one."""
        from sim.tasks.peg_expert import PegExpert

        return PegExpert(self, noise=noise, seed=seed)

    # ---- state of the task ------------------------------------------------------------------------------------------

    def tool_pose(self, lanes: Lanes = ALL) -> np.ndarray:
        """Return the measured pose (K, 6) of the tool, in the units and frame of the action."""
        rotation = self._site_mat[lanes, self._tool].reshape(-1, 3, 3)
        return tool_pose(self._site_pos[lanes, self._tool], rotation)

    def hold_action(self) -> np.ndarray:
        """Return the action (N, 6) float32 that keeps the tool where it is now."""
        low, high = self.spec.action.bounds()
        return np.clip(self.tool_pose(), low, high).astype(np.float32)

    def tip_position(self, lanes: Lanes = ALL) -> np.ndarray:
        """Return the position (K, 3) of the centre of the peg's tip in the base frame, m."""
        return self._site_pos[lanes, self._tip]

    def alignment(self, lanes: Lanes = ALL) -> tuple[np.ndarray, np.ndarray]:
        """Return the tip's offset (K, 3) in m and the peg's rotation vector (K, 3) in rad in the hole's frame.

        The frame's origin is the centre of the rim and its z axis points up; the peg is aligned at zero rotation.
        """
        yaw = self.hole_yaw[lanes]
        cosine, sine, zero = np.cos(yaw), np.sin(yaw), np.zeros_like(yaw)
        to_hole = np.stack([cosine, sine, zero, -sine, cosine, zero, zero, zero, zero + 1], axis=-1).reshape(-1, 3, 3)
        offset = np.einsum("kij,kj->ki", to_hole, self._site_pos[lanes, self._tip] - self.hole_position[lanes])
        peg = self._site_mat[lanes, self._tip].reshape(-1, 3, 3)
        down = tool_rotation(np.zeros((1, 6)))
        return offset, matrix_to_rotation_vector(to_hole @ peg @ down.swapaxes(-1, -2))

    def wrench(self, lanes: Lanes = ALL) -> np.ndarray:
        """Return the wrench (K, 6) on the grasp in the hand's frame, N and N m, from the deflection of its springs."""
        return self._stiffness * self._qpos[lanes, 7:13]

    def progress(self) -> np.ndarray:
        """Return (N,) how far each lane has got, in [0, 1]: the potential of where the tip is."""
        return self.potential(self.alignment()[0])

    def potential(self, offset: np.ndarray) -> np.ndarray:
        """Return the potential (K,) in [0, 1] of tip offsets (K, 3) in the hole's frame.

        0.25 for nearing the rim (1 - distance / 0.15 m), 0.25 for lining up (exp(-lateral / 3 mm)) and 0.5 for depth as
        a part of `SUCCESS_DEPTH`.
        """
        lateral = np.linalg.norm(offset[:, :2], axis=-1)
        height = np.maximum(offset[:, 2], 0)
        near = 1 - np.clip(np.hypot(lateral, height) / 0.15, 0, 1)
        depth = np.clip(-offset[:, 2] / SUCCESS_DEPTH, 0, 1) * (lateral < 2e-3)
        return 0.25 * near + 0.25 * np.exp(-lateral / 3e-3) + 0.5 * depth


def _small_quaternion(vector: np.ndarray) -> np.ndarray:
    """Return unit quaternions (K, 4), w first, of rotation vectors (K, 3) in rad."""
    angle = np.linalg.norm(vector, axis=-1, keepdims=True)
    return np.concatenate([np.cos(angle / 2), vector * 0.5 * np.sinc(angle / (2 * np.pi))], axis=-1)


def make(num_envs: int = 1, **options: Any) -> PegInsert:
    """Build the task.

    Options: ``seed``, ``threads``, ``reward`` (sparse or shaped), ``max_episode_steps`` (120, which is 6 s) and
    ``geometry`` (a `PegGeometry`).
    """
    return PegInsert(num_envs, **options)
