"""Bridges between environments and robots: a simulated lane as a `Robot`, and a robot as a one-lane `VecEnv`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from robot_rl.core.clock import Rate
from robot_rl.core.env import Observation, Step, VecEnv
from robot_rl.core.errors import HardwareError
from robot_rl.core.robot import Limits, Robot, RobotState, StampedObservation, StopKind

logger = logging.getLogger(__name__)
T = TypeVar("T")


class EnvRobot:
    """One lane of a simulated environment behind the `Robot` contract, in real time or in lock-step.

    In real time a thread of its own advances the physics at absolute deadlines and applies the newest command, held
    until the next, as a real drive does. In lock-step nothing moves until `advance` is called.

    Environments of our engine (``set_action``, ``advance``, ``observe``) run several ticks per control step; any
    other runs one control step at a time. At the end of an episode the scene is set up anew if ``restart`` is given
    (`epoch` counts that); otherwise the episode never ends. An episode's time limit runs from the first command that
    is not its start, so that waiting for an operator is no failure.
    """

    def __init__(
        self,
        env: VecEnv,
        lane: int = 0,
        *,
        tick_rate_hz: float = 100.0,
        restart: bool = True,
        seed: int | None = None,
        lock_step: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wrap ``env``, which must not be stepped by anybody else.

        Args:
            env: the environment; all its lanes are stepped, the others with the same command.
            lane: which lane is the robot.
            tick_rate_hz: how often the physics is advanced and measured at most; see the property for what it is.
            restart: start a new episode when one ends.
            seed: of the first episode.
            lock_step: start no thread; the caller calls `advance`.
            clock: monotonic time in seconds.
        """
        self.env, self.lane, self.spec = env, lane, env.spec
        self.restart, self.lock_step = restart, lock_step
        self.limits = env_limits(env)
        self.epoch = 0
        """Counts episodes, as of the newest `observe`; the robot may be anywhere after a change."""
        self.outcomes: list[bool] = []
        """Whether each finished episode succeeded."""
        self.lateness: list[float] = []
        """Largest lateness in seconds of the simulation's ticks in each second of real time."""
        self._fine = hasattr(env, "set_action") and hasattr(env, "advance") and hasattr(env, "observe")
        self._ticks, self._substeps = self._divide(tick_rate_hz)
        self._seed, self._now = seed, clock
        self._lock = threading.RLock()
        self._state = RobotState.DISCONNECTED
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._finished = threading.Event()
        self._tick = 0
        self._command = np.zeros(self.spec.action.shape)
        self._start, self._moved = self._command, False
        self._episodes = 0
        self._latest = (StampedObservation({}, -1, -np.inf), self._command, 0)

    @property
    def tick_rate_hz(self) -> float:
        """How often the physics is advanced and measured."""
        return self.spec.rate_hz * self._ticks

    def connect(self) -> None:
        """Start the first episode and, in real time, the thread."""
        with self._lock:
            observation = self.env.reset(self._seed)
            self._begin_episode()
            self._measure(observation)
            self._state = RobotState.READY
        if not self.lock_step:
            self._finished.clear()
            self._thread = threading.Thread(target=self._run, name="simulated-robot", daemon=True)
            self._thread.start()

    def observe(self) -> StampedObservation:
        """Return the newest measurement; its arrays are never written again."""
        self._require_alive()
        observation, _, self.epoch = self._latest
        return observation

    def hold_command(self) -> np.ndarray:
        """Return the command (A,) that keeps the robot where it was measured last."""
        self._require_alive()
        return self._latest[1].copy()

    def command(self, action: np.ndarray) -> np.ndarray:
        """Set the command (A,) held from now on; returns it clipped to the action's bounds."""
        self._require_alive()
        low, high = self.spec.action.bounds()
        self.spec.action.validate(np.asarray(action), "command")
        action = np.clip(np.asarray(action, float), low, high)
        # A command computed before the scene was set up anew belongs to a robot that stood elsewhere.
        if self._state is RobotState.READY and self.epoch == self._episodes:
            self._command = action
        return action

    def stop(self, kind: StopKind = StopKind.CONTROLLED) -> bool:
        """Hold where the robot is; the simulated drives are never switched off. Returns whether it is alive."""
        if self._state is RobotState.DISCONNECTED or self._failure is not None:
            return False
        self._command = self._latest[1].copy()
        return True

    def state(self) -> RobotState:
        """Return the life-cycle state; a simulation that raised is a fault."""
        return self._state

    def disconnect(self) -> None:
        """Stop and end the thread; the environment stays open."""
        self.stop()
        self._finished.set()
        if self._thread is not None:
            self._thread.join(5.0)
            self._thread = None
        self._state = RobotState.DISCONNECTED

    def advance(self, ticks: int = 1) -> None:
        """Let the held command act for ``ticks`` ticks, and measure (lock-step, or the thread's own work)."""
        for _ in range(ticks):
            with self._lock:
                self._advance_once()

    def render(self) -> np.ndarray:
        """Return an RGB frame (height, width, 3) uint8 of the scene."""
        with self._lock:
            return self.env.render(self.lane)

    def inspect(self, look: Callable[[], T]) -> T:
        """Return what ``look`` finds in the scene while nothing moves; for scripted operators and verifiers."""
        with self._lock:
            return look()

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _divide(self, most_hz: float) -> tuple[int, int]:
        """Return (ticks per control step, substeps per tick) for the fastest ticks of at most ``most_hz``."""
        if not self._fine:
            return 1, 0
        substeps: int = self.env.substeps  # type: ignore[attr-defined]
        most = max(1, int(most_hz / self.spec.rate_hz + 1e-6))
        ticks = max(n for n in range(1, substeps + 1) if substeps % n == 0 and n <= most)
        return ticks, substeps // ticks

    def _actions(self) -> np.ndarray:
        return np.repeat(self._command[None], self.env.num_envs, axis=0)

    def _advance_once(self) -> None:
        env: Any = self.env
        if not self._fine:
            self._end_of_step(env.step(self._actions()))
            return
        actions = self._actions()
        env.set_action(actions)
        env.advance(self._substeps)
        self._moved = self._moved or not np.array_equal(actions[self.lane], self._start)
        self._tick += self._moved
        if self._moved and self._tick % self._ticks == 0 and self.restart:
            self._end_of_step(env.finish())
        else:
            self._measure()

    def _end_of_step(self, step: Step) -> None:
        if step.done[self.lane]:
            self.outcomes.append(bool(step.info["success"][self.lane]))
            self._begin_episode()
            self._episodes += 1
        self._measure(step.observation)

    def _begin_episode(self) -> None:
        self._tick, self._moved = 0, False
        self._command = self._start = self._where()

    def _where(self) -> np.ndarray:
        """Return the command (A,) that holds the present place; zeros where the environment does not say."""
        hold = getattr(self.env, "hold_action", None)
        if hold is None:
            low, high = self.spec.action.bounds()
            return np.clip(np.zeros(self.spec.action.shape), low, high)
        return np.asarray(hold()[self.lane], float)

    def _measure(self, observation: Observation | None = None) -> None:
        if observation is None:
            observation = self.env.observe()  # type: ignore[attr-defined]
        values = {key: value[self.lane].copy() for key, value in observation.items()}
        stamp = self._now()
        stamps = {key: stamp for key in values if self.spec.observation[key].is_image}
        seq = self._latest[0].seq + 1
        # One assignment, so that a reader in another thread never sees parts of two measurements.
        self._latest = (StampedObservation(values, seq, stamp, stamps), self._where(), self._episodes)

    def _run(self) -> None:
        rate, worst, since = Rate(self.tick_rate_hz), 0.0, self._now()
        try:
            while not self._finished.is_set():
                worst = max(worst, rate.wait())
                self.advance()
                if self._now() - since >= 1.0:
                    self.lateness.append(worst)
                    worst, since = 0.0, self._now()
        except Exception as error:
            logger.exception("the simulated robot failed")
            self._failure, self._state = error, RobotState.FAULT

    def _require_alive(self) -> None:
        if self._failure is not None:
            raise HardwareError(f"the simulated robot failed: {self._failure}")
        if self._state is RobotState.DISCONNECTED:
            raise HardwareError("the simulated robot is not connected")


def env_limits(env: VecEnv) -> Limits:
    """Return the limits of an environment's action: its bounds, and ``command_velocity`` and ``command_acceleration``.

    Without these attributes a command may cross its whole range within one control step and reach that speed within
    another. Unbounded actions are limited to ±1e6.
    """
    low, high = (np.clip(bound, -1e6, 1e6) for bound in env.spec.action.bounds())
    rate = env.spec.rate_hz or 1.0
    velocity = np.asarray(getattr(env, "command_velocity", np.maximum(high - low, 1e-9) * rate), float)
    acceleration = np.asarray(getattr(env, "command_acceleration", velocity * rate), float)
    shape = env.spec.action.shape
    return Limits(low, high, np.broadcast_to(velocity, shape).copy(), np.broadcast_to(acceleration, shape).copy())


class RobotTask:
    """What a task on a real robot must say; subclass and fill in."""

    max_episode_steps = 200
    """Time limit in control steps."""

    def start(self, robot: Robot, episode: int) -> None:
        """Bring ``robot`` to the start of episode number ``episode``; waits until it is there."""

    def success(self, observation: Observation) -> bool:
        """Return whether ``observation`` (each (1, …)) shows that the task is achieved."""
        return False


class RobotEnv:
    """A robot as a `VecEnv` of one lane, so that what trains or evaluates in simulation also runs on it.

    ``task`` says what a robot cannot know: rewards, success and what an episode's start is. A step sends the command,
    waits for the next deadline of the control rate and observes; time does not stand still while a policy thinks.
    """

    num_envs = 1

    def __init__(
        self,
        robot: Robot,
        task: RobotTask,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.robot, self.task = robot, task
        self.spec, self.max_episode_steps = robot.spec, task.max_episode_steps
        self._clock, self._sleep = clock, sleep
        self._rate: Rate | None = None
        self._elapsed = 0
        self._episode = -1
        self._succeeded = False

    def reset(self, seed: int | None = None) -> Observation:
        """Let the task bring the robot to a start, and return the first observation."""
        self._episode = self._episode + 1 if seed is None else int(np.ravel(seed)[0])
        self._elapsed, self._succeeded = 0, False
        self.task.start(self.robot, self._episode)
        self._rate = Rate(self.spec.rate_hz, self._clock, self._sleep)
        return self._observe()

    def step(self, actions: np.ndarray) -> Step:
        """Command ``actions`` (1, A) for one control period."""
        if self._rate is None:
            raise HardwareError("call reset() before the first step")
        self.robot.command(np.asarray(actions[0], float))
        self._rate.wait()
        observation = self._observe()
        self._elapsed += 1
        success = self.task.success(observation)
        first, self._succeeded = success and not self._succeeded, self._succeeded or success
        truncated = self._elapsed >= self.max_episode_steps and not self._succeeded
        info = {"success": np.array([self._succeeded]), "episode_seed": np.array([self._episode])}
        terminated, reward = np.array([self._succeeded]), np.array([first], np.float32)
        following = self.reset() if self._succeeded or truncated else observation
        return Step(following, reward, terminated, np.array([truncated]), observation, info)

    def render(self, lane: int = 0) -> np.ndarray:
        """Return the newest image that the robot observes; raises `HardwareError` if it has no camera."""
        for key, spec in self.spec.observation.items():
            if spec.is_image:
                return self.robot.observe().values[key]
        raise HardwareError("this robot has no camera")

    def close(self) -> None:
        """Disconnect the robot."""
        self.robot.disconnect()

    def _observe(self) -> Observation:
        return {key: value[None] for key, value in self.robot.observe().values.items()}
