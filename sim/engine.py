"""The vector environment: many lanes of one MuJoCo model, stepped by a native thread pool.

A task subclasses `BatchEnv`, hands it a model and a spec, and fills in what the task means: how an episode starts,
what an action does, what is observed, and what counts. Seeds, time limits, same-step resets and checks are here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import mujoco
import numpy as np
from mujoco.batch import Batch, SimulationError

from robot_rl.core.env import Expert, Observation, Step
from robot_rl.core.errors import CapabilityError, ConfigError, RobotRLError
from robot_rl.core.spec import Spec
from sim.lanes import ActionGate, EpisodeSeeds

if TYPE_CHECKING:
    from sim.render import Renderer

Lanes = slice | np.ndarray
"""Which lanes a hook is about: `ALL`, or sorted indices (K,). Both index the leading axis of a bound array."""

ALL: slice = slice(None)
"""Every lane; indexing with it makes no copy."""

_UNSTABLE = slice(int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADQACC) + 1)
"""Rows of a lane's warning counters that say that its physics blew up: position, velocity, acceleration."""
_DENSE_LIMIT = 60
_log = logging.getLogger(__name__)


def load_model(source: mujoco.MjModel | mujoco.MjSpec | str | Path) -> mujoco.MjModel:
    """Compile ``source``: a path, MJCF text, a spec, or a model that is already compiled."""
    quiet_log_file()
    if isinstance(source, mujoco.MjModel):
        return source
    if isinstance(source, mujoco.MjSpec):
        return source.compile()
    if isinstance(source, Path) or not source.lstrip().startswith("<"):
        return mujoco.MjModel.from_xml_path(str(Path(source).resolve()))
    return mujoco.MjModel.from_xml_string(source)


def quiet_log_file() -> None:
    """Keep MuJoCo from writing ``MUJOCO_LOG.TXT`` into the working directory; the console still hears its warnings."""
    config = mujoco.MjLogConfig.get()
    config.logto_file = False
    config.set()


class BatchEnv:
    """N lanes of one task on `mujoco.batch.Batch`; implements `robot_rl.core.env.VecEnv`.

    A task overrides `reset_lanes`, `apply`, `observe` and, as it needs them, `measure`, `success`, `terminated`,
    `reward`, `episode_info` and `make_expert`. All of them work on whole arrays of lanes. ``self.batch`` gives live
    arrays: ``self.batch.bind("qpos")`` (N, nq), and per-lane model fields, ``self.batch.expand("geom_friction")``,
    which a task writes in `reset_lanes` to randomise.

    Derived fields (``xpos``, ``sensordata``) are one substep behind the state unless ``stage`` asks for them.
    """

    name: ClassVar[str] = "task"
    """What error messages call the task."""
    camera: ClassVar[str | int] = -1
    """Camera of `render`: a name, an index, or -1 for a view of the whole model."""
    render_size: ClassVar[tuple[int, int]] = (240, 320)
    """Height and width of a rendered frame in pixels."""

    def __init__(
        self,
        model: mujoco.MjModel | mujoco.MjSpec | str | Path,
        num_envs: int,
        *,
        spec: Spec,
        substeps: int,
        max_episode_steps: int,
        seed: int = 0,
        threads: int = 0,
        reward: str = "sparse",
        rewards: Sequence[str] = ("sparse", "shaped"),
        control_every: int | None = None,
        stage: mujoco.mjtStage = mujoco.mjtStage.mjSTAGE_NONE,
        on_unstable: str = "truncate",
    ) -> None:
        """Compile the model and allocate the lanes; no episode starts before `reset`.

        Args:
            model: what `load_model` accepts.
            num_envs: number of lanes N.
            spec: observations, action and control rate; ``rate_hz`` must equal ``1 / (timestep * substeps)``.
            substeps: physics steps per control step.
            max_episode_steps: time limit in control steps, after which an episode is truncated.
            seed: first episode seed where `reset` is called without one.
            threads: worker threads, 0 for all cores.
            reward: one of ``rewards``; kept in ``self.reward_kind``.
            rewards: reward kinds that the task knows.
            control_every: substeps between calls of `control`, or None to call it only when an action is set.
            stage: what is computed at the new state after each `advance`, so that derived fields are current.
            on_unstable: ``"truncate"`` ends the episode of a lane whose physics blew up and logs a warning;
                ``"raise"`` raises.

        Raises:
            ConfigError: a setting that cannot work.
        """
        if num_envs < 1:
            raise ConfigError(f"{self.name}: num_envs must be at least 1, got {num_envs}")
        if reward not in rewards:
            raise ConfigError(f"{self.name}: unknown reward '{reward}'. Available: {', '.join(rewards)}")
        if on_unstable not in ("truncate", "raise"):
            raise ConfigError(f"{self.name}: on_unstable must be 'truncate' or 'raise', got '{on_unstable}'")
        self.model = _checked_model(load_model(model), self.name, spec, substeps)
        self.batch = Batch(self.model, num_envs, min(threads or _usable_cores(), num_envs))
        self.num_envs, self.spec, self.max_episode_steps = num_envs, spec, max_episode_steps
        self.substeps, self.physics_dt = substeps, float(self.model.opt.timestep)
        self.control_every, self.stage = control_every, int(stage)
        self.reward_kind, self.on_unstable = reward, on_unstable

        self.elapsed = np.zeros(num_envs, np.int64)
        """(N,) control steps since the episode began."""
        self.succeeded = np.zeros(num_envs, bool)
        """(N,) whether the present episode has succeeded."""
        self.measured = False
        """Whether `observe` is called right after `measure`, whose results then fit the present state."""
        self._seeds = EpisodeSeeds(self.name, num_envs, seed)
        self._gate = ActionGate(self.name, num_envs, spec.action)
        self._substep = 0
        self._broken: np.ndarray | None = None
        self._observation: Observation = {}
        self._warnings = self.batch.warning
        self._state = self.batch.state
        self._renderers: dict[tuple[str | int, int, int], Renderer] = {}

    @property
    def episode_seed(self) -> np.ndarray:
        """(N,) seed of the present episode."""
        return self._seeds.current

    @property
    def seed_stride(self) -> int:
        """From an episode's seed to that of the lane's next episode: N, or more for a part of a larger environment."""
        return self._seeds.stride

    @seed_stride.setter
    def seed_stride(self, stride: int) -> None:
        self._seeds.stride = stride

    # ---- what a task fills in -------------------------------------------------------------------------------------

    def reset_lanes(self, lanes: np.ndarray, rngs: list[np.random.Generator]) -> None:
        """Write the initial state (and model fields) of ``lanes`` (K,); they hold the model's defaults already.

        All randomness comes from ``rngs[j]``, made from the episode seed of ``lanes[j]``, so that a seed gives the
        same episode in any lane. Forward kinematics run afterwards.
        """
        raise NotImplementedError

    def apply(self, actions: np.ndarray) -> None:
        """Write what ``actions`` (N, A), finite and within bounds, set for this control step (``ctrl``, targets)."""
        raise NotImplementedError

    def control(self) -> None:
        """Run an inner control loop: called before every ``control_every`` substeps if that is set."""

    def observe(self, lanes: Lanes = ALL) -> Observation:
        """Return fresh float32 observation arrays of ``lanes``, each (K, …) with K = N for `ALL`."""
        raise NotImplementedError

    def measure(self) -> None:
        """Compute once per control step what `success`, `terminated`, `reward` and `episode_info` share."""

    def success(self) -> np.ndarray:
        """Return (N,) bool: the task is achieved in the present state."""
        return np.zeros(self.num_envs, bool)

    def terminated(self) -> np.ndarray:
        """Return (N,) bool: the episode ends here; by default when it has succeeded."""
        return self.succeeded.copy()

    def reward(self, first_success: np.ndarray) -> np.ndarray:
        """Return (N,) rewards; ``first_success`` (N,) bool marks lanes that succeed with this step (sparse reward)."""
        return first_success.astype(np.float32)

    def episode_info(self) -> dict[str, np.ndarray]:
        """Return further arrays (N, …) for `Step.info`, of the state before any reset."""
        return {}

    def make_expert(self, noise: float = 1.0, seed: int = 0) -> Expert:
        """Return a scripted expert that reads this environment's state; ``noise`` scales its imperfection."""
        raise CapabilityError(f"task '{self.name}' has no scripted expert")

    # ---- VecEnv ---------------------------------------------------------------------------------------------------

    def reset(self, seed: int | Sequence[int] | None = None) -> Observation:
        """Start a new episode in every lane and return its observations.

        With an integer, episode k of lane i has the seed ``seed + i + k * N``; a sequence names the first seed of each
        lane; None continues counting.
        """
        self._seeds.restart(seed)
        self._begin(np.arange(self.num_envs))
        self._observation = self.observe(ALL)
        return self._observation

    def step(self, actions: np.ndarray) -> Step:
        """Apply ``actions`` (N, A) for one control step; values outside the bounds are clipped.

        Raises:
            DataError: wrong shape, or a value that is not finite.
        """
        self.set_action(actions)
        self.advance(self.substeps)
        return self.finish()

    def render(self, lane: int = 0) -> np.ndarray:
        """Return an RGB frame (height, width, 3) uint8 of one lane from the task's camera."""
        return self.render_camera(self.camera, lane, *self.render_size)

    def render_camera(self, camera: str | int, lane: int, height: int, width: int) -> np.ndarray:
        """Return an RGB frame (height, width, 3) uint8 of one lane from any camera of the model."""
        key = (camera, height, width)
        if key not in self._renderers:
            from sim.render import Renderer  # the ray tracer takes seconds to import, and most runs never render

            self._renderers[key] = Renderer(self.model, width=width, height=height, camera=camera)
        return self._renderers[key].render_lane(self.batch, lane)

    def close(self) -> None:
        """Release the renderers; the thread pool goes with the object."""
        self._renderers.clear()

    def stagger(self, seed: int) -> None:
        """Let the episodes under way reach the time limit at different times, as if lanes had begun one by one."""
        self.elapsed[:] = (
            np.random.default_rng(seed).permutation(self.num_envs) * self.max_episode_steps // self.num_envs
        )

    # ---- parts of a step, for a robot that runs in real time --------------------------------------------------------

    def set_action(self, actions: np.ndarray) -> None:
        """Check, clip and apply ``actions`` (N, A); time stands still. May be called again within a control step."""
        self.apply(self._gate.admit(actions, self._seeds))

    def advance(self, substeps: int) -> None:
        """Advance the physics of every lane by ``substeps`` steps of ``physics_dt``; no rewards, no resets."""
        remaining = substeps
        while remaining > 0:
            count = remaining
            if self.control_every:
                phase = self._substep % self.control_every
                if phase == 0:
                    self.control()
                count = min(remaining, self.control_every - phase)
            remaining -= count
            self._substep += count
            try:
                self.batch.step(nstep=count, stage=self.stage if remaining == 0 else 0)
            except SimulationError as error:
                self._mark_broken(error.ids)

    def finish(self) -> Step:
        """Close the control step: rewards, ends of episodes, resets and observations."""
        self._substep = 0
        self.elapsed += 1
        unstable = self._unstable()
        self.measure()
        success = self.success()
        self.measured = True
        observation = self.observe(ALL)
        self.measured = False
        if unstable is not None:
            success = success & ~unstable
            for key, value in observation.items():
                value[unstable] = self._observation[key][unstable]
        first_success = success & ~self.succeeded
        self.succeeded |= success
        reward = np.asarray(self.reward(first_success), np.float32)
        terminated = self.terminated()
        truncated = (self.elapsed >= self.max_episode_steps) & ~terminated
        info = {"success": self.succeeded.copy(), "episode_seed": self.episode_seed.copy(), **self.episode_info()}
        if unstable is not None:
            terminated = terminated & ~unstable
            truncated |= unstable
            reward[unstable] = 0.0
            info = {key: _finite(value) for key, value in info.items()}
        final = observation
        done = terminated | truncated
        if done.any():
            lanes = np.flatnonzero(done)
            self._begin(lanes)
            observation = {key: value.copy() for key, value in final.items()}
            for key, value in self.observe(lanes).items():
                observation[key][lanes] = value
        self._observation = observation
        return Step(observation, reward, terminated, truncated, final, info)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _begin(self, lanes: np.ndarray) -> None:
        """Start the next episode in ``lanes`` (K,)."""
        ids = None if len(lanes) == self.num_envs else lanes
        self.batch.reset(ids, stage=0)
        self._seeds.advance(lanes)
        self.elapsed[lanes] = 0
        self.succeeded[lanes] = False
        self.reset_lanes(lanes, [np.random.default_rng(int(seed)) for seed in self.episode_seed[lanes]])
        self.batch.forward(ids)

    def _mark_broken(self, lanes: np.ndarray) -> None:
        if self._broken is None:
            self._broken = np.zeros(self.num_envs, bool)
        self._broken[lanes] = True

    def _unstable(self) -> np.ndarray | None:
        """Return (N,) bool where the physics blew up in this control step, or None if it did nowhere."""
        if np.isfinite(self._state.sum()) and not self._warnings[:, _UNSTABLE, 1].any() and self._broken is None:
            return None
        unstable = self._warnings[:, _UNSTABLE, 1].any(axis=1) | ~np.isfinite(self._state).all(axis=1)
        if self._broken is not None:
            unstable |= self._broken
            self._broken = None
        for lane in np.flatnonzero(unstable):
            message = (
                f"{self.name}: the simulation of lane {lane} became unstable at step {self.elapsed[lane]} of the "
                f"episode with seed {self.episode_seed[lane]}"
            )
            if self.on_unstable == "raise":
                raise RobotRLError(message)
            _log.warning("%s; the episode was ended", message)
        return unstable if unstable.any() else None


def _checked_model(model: mujoco.MjModel, name: str, spec: Spec, substeps: int) -> mujoco.MjModel:
    """Return ``model`` set up for the engine, or raise `ConfigError`."""
    rate = 1.0 / (model.opt.timestep * substeps)
    if abs(rate - spec.rate_hz) > 1e-6 * rate:
        raise ConfigError(
            f"{name}: {substeps} substeps of {model.opt.timestep:g} s are {rate:g} Hz, not {spec.rate_hz:g}"
        )
    # MuJoCo 4.0.0 computes wrong Newton Hessians from sparse constraint Jacobians, its automatic choice from 60 on.
    if model.nv >= _DENSE_LIMIT and model.opt.jacobian != int(mujoco.mjtJacobian.mjJAC_DENSE):
        raise ConfigError(f'{name}: a model with {model.nv} degrees of freedom needs <option jacobian="dense"/>')
    # A silent reset to the default pose would hide a blow-up; the engine ends the episode instead.
    model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
    return model


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finite(value: np.ndarray) -> np.ndarray:
    return np.nan_to_num(value) if np.issubdtype(value.dtype, np.floating) else value
