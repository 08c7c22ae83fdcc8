"""The page's scene: where the end effector is, where it shall go, and the range that it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hardware.console.drawing import Drawing
from hardware.console.steering import ArmHandle, Handle, PoseHandle
from robot_rl.core.spec import ArraySpec

_MOVED = 1e-4
Dragged = Callable[[Any, np.ndarray, np.ndarray, Handle], None]


class Scene:
    """A handle that can be dragged, and a frame that follows the robot; empty for robots without a handle."""

    def __init__(self, server: Any, action: ArraySpec, handle: Handle | None, on_drag: Dragged) -> None:
        """Build the scene.

        Args:
            server: a running ``viser.ViserServer``.
            action: what the robot takes.
            handle: what dragging means, None for none.
            on_drag: called with event, position (3,), quaternion (4,) and the handle when a tab drags it.
        """
        self.handle = handle
        self._dragged = False
        if handle is None:
            return
        server.scene.configure_default_lights(cast_shadow=False)  # a tablet draws this too
        centre, extent = _range(action, handle)
        size = float(np.max(extent))
        server.scene.add_grid("/floor", width=4 * size, height=4 * size, cell_size=size / 4, section_size=size)
        server.initial_camera.position = tuple(centre + size * np.array([-1.0, -1.6, 1.1]))
        server.initial_camera.look_at = tuple(centre)
        if isinstance(handle, PoseHandle):
            server.scene.add_box(
                "/range", color=(120, 130, 145), dimensions=tuple(extent), wireframe=True, position=tuple(centre)
            )
        self._drawing = Drawing(server, handle) if isinstance(handle, ArmHandle) else None
        self._robot = server.scene.add_frame("/robot", axes_length=0.2 * size, axes_radius=0.008 * size)
        self.gizmo = server.scene.add_transform_controls(
            "/target", scale=0.5 * size, active_axes=handle.moves, disable_rotations=not handle.turns, depth_test=False
        )

        @self.gizmo.on_update
        async def _(event: Any) -> None:
            self._dragged = event.phase != "end"
            on_drag(event, np.array(event.target.position), np.array(event.target.wxyz), handle)

    def show(self, measured: np.ndarray | None, target: np.ndarray | None) -> None:
        """Move the robot's frame to ``measured`` (A,), and the handle to ``target`` (A,) unless a tab drags it."""
        if self.handle is None:
            return
        if measured is not None:
            self._move(self._robot, measured)
            if self._drawing is not None:
                self._drawing.show(measured)
        if target is not None and not self._dragged:
            self._move(self.gizmo, target)

    def _move(self, node: Any, action: np.ndarray) -> None:
        """Send only what moved: each message makes every open tab draw its scene anew."""
        assert self.handle is not None
        position, quaternion = self.handle.pose(action)
        if not np.allclose(node.position, position, atol=_MOVED) or not np.allclose(node.wxyz, quaternion, atol=_MOVED):
            node.position, node.wxyz = position, quaternion


def _range(action: ArraySpec, handle: Handle) -> tuple[np.ndarray, np.ndarray]:
    """Return centre (3,) and extent (3,) in m of what to show: the action's range where it is a pose."""
    low, high = (np.clip(bound.ravel(), -2.0, 2.0) for bound in action.bounds())
    if not isinstance(handle, PoseHandle):
        position, _ = handle.pose(0.5 * (low + high))
        return position * [0.5, 0.5, 0.7], np.full(3, 0.65)
    corners = np.stack([handle.pose(low)[0], handle.pose(high)[0]])
    return corners.mean(0), np.maximum(corners[1] - corners[0], 0.02)
