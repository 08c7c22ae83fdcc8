"""Headless cameras: images of MuJoCo scenes from the mujoco-warp ray tracer, without a display or any GL library.

Importing warp takes seconds, so this module does it when the first renderer is made. The first image of a kind of scene
compiles kernels for a few seconds more; they are cached on disk.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mujoco
import numpy as np
from mujoco.batch import Batch

from robot_rl.core.errors import ConfigError

_lock = threading.Lock()
"""Warp compiles and launches from one thread at a time."""


class Renderer:
    """Renders one camera of a model at a fixed size, in one or several worlds per call.

    Poses are set from outside: `render_data` and `render_lanes` compute them from simulation states, so that an image
    shows the present state even where a batch's derived arrays are a substep behind.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        width: int = 320,
        height: int = 240,
        camera: str | int = -1,
        *,
        worlds: int = 1,
        shadows: bool = False,
        geom_groups: Sequence[int] = (0, 1, 2),
        background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        """Build the scene.

        Args:
            model: the model; its cameras, lights, materials and meshes are used.
            width: image width in pixels.
            height: image height in pixels.
            camera: name or index of a camera of the model; -1 for the first.
            worlds: images per call of `render_lanes`.
            shadows: cast shadows of lights that ask for it; slower.
            geom_groups: geom groups that are visible.
            background: colour where no geom is hit, in [0, 1].

        Raises:
            ConfigError: the model has no such camera.
        """
        self.model, self.width, self.height, self.worlds = model, width, height, worlds
        self.camera = _camera_index(model, camera)
        self._data = mujoco.MjData(model)
        self._lane_model = copy.copy(model)
        mujoco.mj_forward(model, self._data)
        with _lock:
            self._wp, self._mjw = _import_warp()
            scene = _drawable(model)
            self._model = self._mjw.put_model(scene)
            self._scene = self._mjw.put_data(scene, mujoco.MjData(scene), nworld=worlds)
            self._context = self._mjw.create_render_context(
                scene,
                nworld=worlds,
                cam_res=(width, height),
                render_rgb=True,
                use_shadows=shadows,
                enabled_geom_groups=list(geom_groups),
                cam_active=[self.camera],
                background_color=(*background, 1.0),
            )
            self._image = self._wp.zeros((worlds, height, width), dtype=self._wp.vec3)
        self._poses = {
            name: np.zeros(getattr(self._scene, name).numpy().shape, np.float32)
            for name in ("geom_xpos", "geom_xmat", "cam_xpos", "cam_xmat", "light_xpos", "light_xdir")
        }

    def render_data(self, data: mujoco.MjData) -> np.ndarray:
        """Return an image (height, width, 3) uint8 of the poses in ``data``, as its last kinematics left them."""
        for world in range(self.worlds):
            self._copy_poses(world, data)
        return self._trace()[0]

    def render_lane(self, batch: Batch, lane: int) -> np.ndarray:
        """Return an image (height, width, 3) uint8 of the present state of one lane."""
        return self.render_lanes(batch, [lane])[0]

    def render_lanes(self, batch: Batch, lanes: Sequence[int]) -> np.ndarray:
        """Return images (K, height, width, 3) uint8 of the present states of ``lanes``, ``worlds`` at a time.

        Sizes and colours of geoms are those of each lane while one world is rendered at a time, else the model's.
        """
        images = []
        for start in range(0, len(lanes), self.worlds):
            chunk = lanes[start : start + self.worlds]
            for world, lane in enumerate(chunk):
                model = batch.get_model(lane, self._lane_model) if self.worlds == 1 else self.model
                batch.get_data(lane, self._data)
                mujoco.mj_kinematics(model, self._data)
                mujoco.mj_comPos(model, self._data)
                mujoco.mj_camlight(model, self._data)
                self._copy_poses(world, self._data)
                if self.worlds == 1:
                    self._copy_looks(model)
            images.append(self._trace()[: len(chunk)])
        return np.concatenate(images)

    def _copy_poses(self, world: int, data: mujoco.MjData) -> None:
        for name, value in self._poses.items():
            value[world] = getattr(data, name).reshape(value.shape[1:])

    def _copy_looks(self, model: mujoco.MjModel) -> None:
        for name in ("geom_size", "geom_rgba"):
            target = getattr(self._model, name)
            target.assign(np.ascontiguousarray(getattr(model, name), np.float32).reshape(1, model.ngeom, -1))

    def _trace(self) -> np.ndarray:
        """Return images (worlds, height, width, 3) uint8 of the poses that were copied."""
        with _lock:
            for name, value in self._poses.items():
                getattr(self._scene, name).assign(value)
            self._mjw.refit_bvh(self._model, self._scene, self._context)
            self._mjw.render(self._model, self._scene, self._context)
            self._mjw.get_rgb(self._context, 0, self._image)
            return (np.clip(self._image.numpy(), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _import_warp() -> tuple[Any, Any]:
    import warp

    warp.config.log_level = warp.LOG_WARNING
    with _without_driver_warning():
        warp.init()
    import mujoco_warp

    return warp, mujoco_warp


@contextmanager
def _without_driver_warning() -> Iterator[None]:
    """Drop the line that warp's native code prints on machines without an NVIDIA driver; pass on everything else."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            lines = [line for line in caught.read().splitlines(keepends=True) if b"NVIDIA CUDA driver" not in line]
            os.write(2, b"".join(lines))


def _camera_index(model: mujoco.MjModel, camera: str | int) -> int:
    names = [model.camera(i).name or str(i) for i in range(model.ncam)]
    if not names:
        raise ConfigError("the model has no camera; add a <camera> element to render it")
    if isinstance(camera, str):
        if camera not in names:
            raise ConfigError(f"no camera '{camera}'. Available: {', '.join(names)}")
        return names.index(camera)
    if camera >= model.ncam:
        raise ConfigError(f"no camera {camera}; the model has {model.ncam}")
    return max(camera, 0)


def _drawable(model: mujoco.MjModel) -> mujoco.MjModel:
    """Return a copy whose physics options the ray tracer's importer accepts; it never steps them."""
    scene = copy.copy(model)
    scene.opt.integrator = int(mujoco.mjtIntegrator.mjINT_EULER)
    scene.opt.cone = int(mujoco.mjtCone.mjCONE_PYRAMIDAL)
    scene.opt.noslip_iterations = 0
    scene.opt.disableflags = 0
    scene.opt.enableflags = 0
    scene.opt.jacobian = int(mujoco.mjtJacobian.mjJAC_AUTO)
    return scene
