"""A camera on a simulated scene of its own, for trying out what cameras are connected to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hardware.cameras.base import CameraConfig, ThreadedCamera
from robot_rl.core.clock import Rate
from robot_rl.core.env import VecEnv
from robot_rl.core.errors import ConfigError
from robot_rl.core.registry import make_env


@dataclass(frozen=True)
class TaskCameraConfig(CameraConfig):
    """Settings of a camera on a simulated scene."""

    task: str = "push_t"
    """Task whose scene is shown (``robot-rl list tasks``); nobody acts in it."""
    seed: int = 0
    """Of the scene."""
    rate_hz: float = 30.0
    """Images per second."""
    connect_timeout: float = 60.0
    """Seconds to wait for the first image; a renderer may have to be compiled."""
    max_identical: int = 0
    """Images in a row that may be equal to the byte; 0 for any number, as in a scene at rest."""

    def __post_init__(self) -> None:
        if self.rate_hz <= 0:
            raise ConfigError(f"rate_hz is {self.rate_hz:g}, expected more than 0")


class TaskCamera(ThreadedCamera):
    """Renders a lane of a task; it is not the scene of a simulated robot in another process."""

    Config = TaskCameraConfig

    def __init__(self, config: TaskCameraConfig) -> None:
        super().__init__(config)
        self.config: TaskCameraConfig = config
        self._env: VecEnv | None = None
        self._rate: Rate | None = None

    @property
    def name(self) -> str:
        """What the camera is called in messages."""
        return f"the camera on the task '{self.config.task}'"

    def _open(self) -> None:
        self._env = make_env(self.config.task, 1, seed=self.config.seed)
        self._env.reset(self.config.seed)
        self._rate = Rate(self.config.rate_hz)

    def _grab(self) -> np.ndarray:
        assert self._env is not None
        assert self._rate is not None
        self._rate.wait()
        return self._env.render(0)

    def _close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None
