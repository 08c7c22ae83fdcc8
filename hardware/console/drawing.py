"""Draws a robot's MuJoCo model in the page's scene, at the joint positions that were measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from hardware.console.steering import ArmHandle

_MOVED = 1e-4
_HIDDEN_GROUP = 3
"""MuJoCo shows geoms of groups below this one; collision shapes lie beyond."""


class Drawing:
    """One frame per body, with its geoms as meshes; only bodies that moved are sent again."""

    def __init__(self, server: Any, arm: ArmHandle) -> None:
        """Send the shapes; bodies lie where the model's data has them until `show`."""
        self._arm = arm
        model = arm.model
        self._frames: dict[int, Any] = {}
        for geom in range(model.ngeom):
            rgba = np.asarray(model.geom_rgba[geom])
            mesh = _mesh(model, geom)
            if mesh is None or rgba[3] == 0 or model.geom_group[geom] >= _HIDDEN_GROUP:
                continue
            body = int(model.geom_bodyid[geom])
            if body not in self._frames:
                self._frames[body] = server.scene.add_frame(f"/model/{body}", show_axes=False)
            server.scene.add_mesh_simple(
                f"/model/{body}/{geom}",
                *mesh,
                color=tuple(int(255 * share) for share in rgba[:3]),
                opacity=None if rgba[3] >= 1 else float(rgba[3]),
                position=tuple(model.geom_pos[geom]),
                wxyz=tuple(model.geom_quat[geom]),
            )

    def show(self, joints: np.ndarray) -> None:
        """Move the bodies to where they are at joint positions (A,)."""
        positions, quaternions = self._arm.bodies(joints)
        for body, frame in self._frames.items():
            moved = np.abs(frame.position - positions[body]).max() + np.abs(frame.wxyz - quaternions[body]).max()
            if moved > _MOVED:
                frame.position, frame.wxyz = positions[body], quaternions[body]


def _mesh(model: Any, geom: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return vertices (V, 3) and faces (F, 3) of a geom; None for planes and others without an end."""
    import mujoco
    import trimesh

    kinds, size = mujoco.mjtGeom, np.asarray(model.geom_size[geom])
    kind = int(model.geom_type[geom])
    if kind == kinds.mjGEOM_MESH:
        number = int(model.geom_dataid[geom])
        vertex, face = int(model.mesh_vertadr[number]), int(model.mesh_faceadr[number])
        vertices = model.mesh_vert[vertex : vertex + int(model.mesh_vertnum[number])]
        return np.array(vertices), np.array(model.mesh_face[face : face + int(model.mesh_facenum[number])])
    if kind == kinds.mjGEOM_BOX:
        shape = trimesh.creation.box(2 * size)
    elif kind == kinds.mjGEOM_SPHERE:
        shape = trimesh.creation.icosphere(2, size[0])
    elif kind == kinds.mjGEOM_ELLIPSOID:
        shape = trimesh.creation.icosphere(2, 1.0)
        shape.vertices *= size
    elif kind == kinds.mjGEOM_CYLINDER:
        shape = trimesh.creation.cylinder(size[0], 2 * size[1], sections=24)
    elif kind == kinds.mjGEOM_CAPSULE:
        shape = trimesh.creation.capsule(2 * size[1], size[0], count=[16, 16])
        shape.vertices -= shape.vertices.mean(0)
    else:
        return None
    return np.array(shape.vertices), np.array(shape.faces)
