"""Between the pose of a handle in the page's scene and the robot's action: what dragging the end effector means.

Where the action is the tool's pose, its elements are the handle's coordinates. Where it is joint positions and a MuJoCo
model of the robot is given, damped differential inverse kinematics leads from the present joints to the handle.
Elsewhere there is no handle, and the elements have sliders only.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from robot_rl.core.errors import ConfigError, DataError, UnknownNameError
from robot_rl.core.spec import ArraySpec

_ITERATIONS, _DAMPING, _REACHED = 30, 1e-4, 1e-5
_LONGEST_STEP = 0.3


class Handle(Protocol):
    """Translates both ways."""

    moves: tuple[bool, bool, bool]
    """Whether it can be moved along x, y and z."""
    turns: bool
    """Whether it can be turned."""

    def pose(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return position (3,) in m and unit quaternion (4,), w first, of the handle for an action (A,)."""

    def action(self, position: np.ndarray, quaternion: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Return the action (A,), starting from ``near`` (A,), that brings the end effector to the handle."""


def make_handle(
    action: ArraySpec, model: Path | None = None, site: str = "", joints: Sequence[str] = ()
) -> Handle | None:
    """Return the handle for a robot's action, None where there can be none.

    Args:
        action: what the robot takes.
        model: MuJoCo model of a robot that is commanded by joint positions.
        site: its end effector, by default the model's last site.
        joints: (A,) the commanded joints, by default those named like the action's elements.

    Raises:
        ConfigError, DataError, UnknownNameError: the model does not fit the action.
    """
    if model is not None:
        return ArmHandle(action, Path(model), site, joints or action.names)
    places = [action.names.index(axis) if axis in action.names else None for axis in ("x", "y", "z")]
    rates = any(unit.strip().endswith("/s") for unit in action.unit.split(","))
    if rates or sum(place is not None for place in places) < 2:
        return None
    return PoseHandle(action, places)


class PoseHandle:
    """For actions that name the end effector's coordinates: x, y, z and a rotation vector rx, ry, rz."""

    def __init__(self, action: ArraySpec, places: list[int | None]) -> None:
        self._places = places
        self.moves = (places[0] is not None, places[1] is not None, places[2] is not None)
        rotation = [action.names.index(name) for name in ("rx", "ry", "rz") if name in action.names]
        self.turns = len(rotation) == 3
        self._rotation = rotation if self.turns else []

    def pose(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the handle's pose: the action's own numbers."""
        position = np.array([0.0 if place is None else action[place] for place in self._places])
        return position, to_quaternion(action[self._rotation] if self.turns else np.zeros(3))

    def action(self, position: np.ndarray, quaternion: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Return ``near`` with the handle's coordinates in it."""
        found = np.array(near, float)
        for place, value in zip(self._places, position, strict=True):
            if place is not None:
                found[place] = value
        if self.turns:
            found[self._rotation] = to_rotation_vector(quaternion)
        return found


class ArmHandle:
    """For actions that are joint positions, by the robot's MuJoCo model."""

    moves, turns = (True, True, True), True

    def __init__(self, action: ArraySpec, path: Path, site: str, joints: Sequence[str]) -> None:
        import mujoco

        self._mujoco: Any = mujoco
        try:
            self.model = mujoco.MjModel.from_xml_path(str(path))
        except ValueError as error:
            raise DataError(f"model {path} cannot be read: {error}") from error
        self.data = mujoco.MjData(self.model)
        self._lock = threading.Lock()  # the page draws in one thread and hears of drags in another
        sites = [self.model.site(k).name for k in range(self.model.nsite)]
        known = [self.model.joint(k).name for k in range(self.model.njnt)]
        if not sites:
            raise ConfigError(f"model {path} has no site to be its end effector")
        if len(joints) != action.size:
            raise ConfigError(f"{len(joints)} joints are named for an action of {action.size}; give them by name")
        for kind, names, available in (("site", [site or sites[-1]], sites), ("joint", joints, known)):
            for name in names:
                if name not in available:
                    raise UnknownNameError(f"{kind} of {path.name}", name, available)
        self._site = self.model.site(site or sites[-1]).id
        numbers = [self.model.joint(name).id for name in joints]
        self._places, self._rates = self.model.jnt_qposadr[numbers], self.model.jnt_dofadr[numbers]
        low, high = action.bounds()
        self._low, self._high = low.ravel(), high.ravel()

    def pose(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the end effector's pose at joint positions (A,)."""
        with self._lock:
            return self._pose(action)

    def bodies(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return positions (B, 3) in m and quaternions (B, 4) of all bodies of the model at joint positions (A,)."""
        with self._lock:
            self._pose(action)
            return self.data.xpos.copy(), self.data.xquat.copy()

    def _pose(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.data.qpos[self._places] = action
        self._mujoco.mj_kinematics(self.model, self.data)
        quaternion = np.zeros(4)
        self._mujoco.mju_mat2Quat(quaternion, self.data.site_xmat[self._site].ravel())
        return np.array(self.data.site_xpos[self._site]), quaternion

    def action(self, position: np.ndarray, quaternion: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Return joint positions (A,) at the handle or as near as the joints' ranges permit."""
        with self._lock:
            return self._solve(position, quaternion, np.array(near, float))

    def _solve(self, position: np.ndarray, quaternion: np.ndarray, joints: np.ndarray) -> np.ndarray:
        jacobian = np.zeros((6, self.model.nv))
        for _ in range(_ITERATIONS):
            here, turned = self._pose(joints)
            self._mujoco.mj_comPos(self.model, self.data)
            self._mujoco.mj_jacSite(self.model, self.data, jacobian[:3], jacobian[3:], self._site)
            wanted = to_rotation_vector(multiply(quaternion, turned * [1, -1, -1, -1]))
            error = np.concatenate([position - here, wanted])
            if np.abs(error).max() < _REACHED:
                break
            rows = jacobian[:, self._rates]
            step = rows.T @ np.linalg.solve(rows @ rows.T + _DAMPING * np.eye(6), error)
            step *= min(1.0, _LONGEST_STEP / max(float(np.abs(step).max()), 1e-12))
            joints = np.clip(joints + step, self._low, self._high)
        return joints


def to_quaternion(vector: np.ndarray) -> np.ndarray:
    """Return the unit quaternion (4,), w first, of a rotation vector (3,) in rad."""
    angle = float(np.linalg.norm(vector))
    return np.concatenate([[np.cos(angle / 2)], np.asarray(vector) * 0.5 * np.sinc(angle / (2 * np.pi))])


def to_rotation_vector(quaternion: np.ndarray) -> np.ndarray:
    """Return the rotation vector (3,) in rad, no longer than π, of a unit quaternion (4,), w first."""
    w, xyz = float(quaternion[0]), np.asarray(quaternion[1:], float)
    if w < 0:
        w, xyz = -w, -xyz
    sine = float(np.linalg.norm(xyz))
    return xyz * (2.0 if sine < 1e-12 else 2.0 * np.arctan2(sine, w) / sine)


def multiply(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the product (4,) of two quaternions (4,), w first."""
    a, b = np.asarray(left, float), np.asarray(right, float)
    vector = a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
    return np.concatenate([[a[0] * b[0] - a[1:] @ b[1:]], vector])
