"""The arm's Cartesian position controller: a commanded tool pose in, joint position targets out, at a fixed rate.

It does what the motion interface of a real arm does with a stream of poses: it follows the command with a bounded
velocity, smooths its steps with a first-order filter, and keeps the target on a leash around the measured pose, so
that a blocked arm pushes with a bounded force however far away the command is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim.ik import BatchIK, matrix_to_rotation_vector, rotation_vector_to_matrix

TOOL_DOWN = np.diag([1.0, -1.0, -1.0])
"""Nominal tool rotation (3, 3) in the base frame: z points down, x points forward."""


@dataclass(frozen=True)
class ControllerLimits:
    """Limits of the target's motion; translation in metres, rotation in radians, each per element."""

    linear_velocity: float = 0.2
    """Largest velocity of the target along each axis, m/s."""
    angular_velocity: float = 0.8
    """Largest rate of each rotation-vector element, rad/s."""
    smoothing: float = 0.04
    """Time constant of the first-order filter between command and target, s."""
    linear_leash: float = 0.006
    """Largest distance along each axis between target and measured position, m."""
    angular_leash: float = 0.05
    """Largest difference of each rotation-vector element between target and measured pose, rad."""

    def velocity(self) -> np.ndarray:
        """Return (6,): largest velocity of x, y, z in m/s and of rx, ry, rz in rad/s."""
        return np.repeat([self.linear_velocity, self.angular_velocity], 3)

    def acceleration(self) -> np.ndarray:
        """Return (6,): velocity reached from rest within one time constant of the filter, per second."""
        return self.velocity() / self.smoothing

    def leash(self) -> np.ndarray:
        """Return (6,): largest difference between target and measured pose, in m and rad."""
        return np.repeat([self.linear_leash, self.angular_leash], 3)


def tool_pose(position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Return poses (M, 6) of the tool: position (M, 3), then the rotation vector of rotation · `TOOL_DOWN`ᵀ."""
    return np.concatenate([position, matrix_to_rotation_vector(rotation @ TOOL_DOWN.T)], axis=-1)


def tool_rotation(pose: np.ndarray) -> np.ndarray:
    """Return the tool's rotation (M, 3, 3) in the base frame of poses (M, 6)."""
    return rotation_vector_to_matrix(pose[..., 3:]) @ TOOL_DOWN


class CartesianController:
    """Cartesian controllers of N arms that share one inverse kinematics."""

    def __init__(
        self, kinematics: BatchIK, num_envs: int, limits: ControllerLimits, lead: np.ndarray | float = 0.0
    ) -> None:
        """Prepare for ``num_envs`` arms; `reset` places them.

        Args:
            kinematics: the arm's inverse kinematics.
            num_envs: number N of arms.
            limits: bounds on the target's motion.
            lead: (n,) time in s by which joint targets run ahead of the path; damping over stiffness of the servos
                makes up for the lag that their damping causes.
        """
        self.kinematics, self.limits, self.lead = kinematics, limits, lead
        self.command = np.zeros((num_envs, 6))
        """(N, 6) newest commanded pose."""
        self.target = np.zeros((num_envs, 6))
        """(N, 6) pose that the joints are driven to."""
        self.joints = np.zeros((num_envs, kinematics.num_joints))
        """(N, n) joint angles in rad that put the tool at the target."""

    def reset(self, lanes: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Place the targets of ``lanes`` (K,) at ``pose`` (K, 6), reached from rest; return their joints (K, n)."""
        kinematics = self.kinematics
        start = np.tile(kinematics.rest, (len(lanes), 1))
        # A strong lean settles the redundant joint here, so that it does not creep while the tool stands still.
        joints = kinematics.solve(start, pose[:, :3], tool_rotation(pose), iterations=20, rest_gain=0.3)
        self.command[lanes] = self.target[lanes] = pose
        self.joints[lanes] = joints
        return joints

    def tick(self, measured: np.ndarray, period: float) -> np.ndarray:
        """Advance every target by ``period`` seconds and return the joint targets (N, n).

        ``measured`` (N, 6) is the tool's present pose.
        """
        limits = self.limits
        speed = limits.velocity()
        wish = (self.command - self.target) * (1 - np.exp(-period / limits.smoothing)) / period
        target = self.target + np.clip(wish, -speed, speed) * period
        leash = limits.leash()
        self.target = np.clip(target, measured - leash, measured + leash)
        before = self.joints
        self.joints = self.kinematics.solve(before, self.target[:, :3], tool_rotation(self.target), iterations=1)
        return self.joints + self.lead * (self.joints - before) / period
