"""Differential inverse kinematics for many arms at once.

Damped least squares (Wampler 1986; Nakamura and Hanafusa 1986): with the task Jacobian J (6, n) and the pose error
e = (target position - position, log(target rotation · rotationᵀ)) in the base frame, one iteration moves the joints by

    dq = J⁺ e + (I - J⁺ J) g (q_rest - q),     J⁺ = Jᵀ (J Jᵀ + λ² I)⁻¹,

where λ bounds the joint speed near singular poses and the second term uses the redundant degree of freedom to lean
towards a resting posture without (to first order) moving the tool. Each iteration is limited in size and clipped to
the joint limits.
"""

from __future__ import annotations

import mujoco
import numpy as np
from mujoco.batch import Batch

from robot_rl.core.errors import ConfigError


def rotation_vector_to_matrix(vector: np.ndarray) -> np.ndarray:
    """Return rotation matrices (..., 3, 3) of rotation vectors (..., 3) in rad (Rodrigues' formula)."""
    vector = np.asarray(vector, float)
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vector, -1, 0)
    zero = np.zeros_like(x)
    skew = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*vector.shape[:-1], 3, 3)
    small = angle < 1e-8
    safe = np.where(small, 1.0, angle)
    first = np.where(small, 1.0, np.sin(safe) / safe)
    second = np.where(small, 0.5, (1 - np.cos(safe)) / safe**2)
    return np.eye(3) + first * skew + second * (skew @ skew)


def matrix_to_rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """Return rotation vectors (..., 3) in rad of rotation matrices (..., 3, 3); exact for angles below π - 1e-4."""
    vector = 0.5 * np.stack(
        [
            matrix[..., 2, 1] - matrix[..., 1, 2],
            matrix[..., 0, 2] - matrix[..., 2, 0],
            matrix[..., 1, 0] - matrix[..., 0, 1],
        ],
        axis=-1,
    )
    sine = np.linalg.norm(vector, axis=-1, keepdims=True)
    cosine = 0.5 * (np.trace(matrix, axis1=-2, axis2=-1)[..., None] - 1)
    angle = np.arctan2(sine, cosine)
    return vector * np.where(sine < 1e-9, 1.0, angle / np.maximum(sine, 1e-12))


class BatchIK:
    """Inverse kinematics of one site of an arm, for up to ``num_envs`` arms per call.

    The kinematics run in a `mujoco.batch.Batch` of their own, so that solving never touches a simulation. The first
    ``len(rest)`` joints of the model must be the arm's hinges.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        site: str,
        rest: np.ndarray,
        num_envs: int,
        *,
        threads: int = 0,
        damping: float = 0.01,
        rest_gain: float = 0.005,
        max_step: float = 0.3,
    ) -> None:
        """Prepare for ``num_envs`` arms.

        Args:
            model: an arm whose first joints are the hinges to be solved for; a model of the arm alone is fastest.
            site: the site to be placed.
            rest: (n,) resting posture in rad.
            num_envs: number of arms.
            threads: threads of the batch; 0 takes all processors.
            damping: λ of the formula above.
            rest_gain: g of the formula above, per iteration.
            max_step: largest change of a joint per iteration in rad.

        Raises:
            ConfigError: one of those joints is not a hinge.
        """
        self.rest = np.asarray(rest, float)
        count = self.num_joints = len(self.rest)
        if not (np.asarray(model.jnt_type[:count]) == int(mujoco.mjtJoint.mjJNT_HINGE)).all():
            raise ConfigError(f"inverse kinematics needs the first {count} joints of the model to be hinges")
        self.low, self.high = model.jnt_range[:count].T.copy()
        self.damping, self.rest_gain, self.max_step = damping, rest_gain, max_step
        self._site = model.site(site).id
        self._body = int(model.site_bodyid[self._site])
        self._batch = Batch(model, num_envs, nthread=threads)
        self._qpos = self._batch.bind("qpos")
        self._position = self._batch.bind("site_xpos")
        self._rotation = self._batch.bind("site_xmat")

    def forward(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the site's position (M, 3) in m and rotation (M, 3, 3) for joint angles (M, n)."""
        lanes = np.arange(len(joints))
        self._qpos[lanes, : self.num_joints] = joints
        self._batch.forward(lanes, stage=int(mujoco.mjtStage.mjSTAGE_POS))
        position = self._position[lanes, self._site].copy()
        return position, self._rotation[lanes, self._site].reshape(-1, 3, 3).copy()

    def solve(
        self,
        joints: np.ndarray,
        position: np.ndarray,
        rotation: np.ndarray,
        iterations: int = 2,
        rest_gain: float | None = None,
    ) -> np.ndarray:
        """Return joint angles (M, n) in rad within the limits that bring the site near the target pose.

        Args:
            joints: (M, n) angles to start from, M ≤ ``num_envs``.
            position: (M, 3) target position in m, base frame.
            rotation: (M, 3, 3) target rotation in the base frame.
            iterations: steps of the formula; 1 or 2 follow a target that moves slowly, 30 solve from afar.
            rest_gain: g of the formula for this call, if not the usual one.
        """
        joints = np.array(joints, float)
        lanes = np.arange(len(joints))
        identity = np.eye(6) * self.damping**2
        gain = self.rest_gain if rest_gain is None else rest_gain
        for _ in range(iterations):
            current, matrix = self.forward(joints)
            twist = matrix_to_rotation_vector(rotation @ matrix.swapaxes(-1, -2))
            error = np.concatenate([position - current, twist], axis=-1)
            translational, rotational = self._batch.jac(self._body, current, lanes)
            jacobian = np.concatenate([translational, rotational], axis=1)[:, :, : self.num_joints]
            transposed = jacobian.swapaxes(-1, -2)
            lean = gain * (self.rest - joints)
            residual = error - np.einsum("mij,mj->mi", jacobian, lean)
            weights = np.linalg.solve(jacobian @ transposed + identity, residual[..., None])
            step = lean + (transposed @ weights)[..., 0]
            joints = np.clip(joints + np.clip(step, -self.max_step, self.max_step), self.low, self.high)
        return joints
