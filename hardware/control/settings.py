"""Settings of the executor, and what follows from them and the robot's spec."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hardware.safety.chain import SafetyConfig
from robot_rl.core.errors import ConfigError, UnknownNameError
from robot_rl.core.ranges import require_positive, require_range
from robot_rl.core.robot import Robot, StopKind


@dataclass(frozen=True)
class ExecutorConfig:
    """How the executor runs. Ages and times are in seconds."""

    tick_rate_hz: float = 100.0
    """Commands per second; a whole multiple of the policy's rate."""
    execute_steps: int = 8
    """Actions of a chunk that are executed before the next one is due; 1 for closed-loop policies."""
    late_steps: int = 2
    """Further actions that may be played while a chunk is late; then the robot stops."""
    interpolation: str = "hold"
    """Between policy steps: hold the action from the step's start, as in evaluation, or approach it linearly by the
    step's end (smoother, and on average half a step later)."""
    blend_seconds: float = 0.3
    """Time over which control is handed to the policy after enabling or a hand-back (mode ALIGN); 0 for none."""
    human_speed: float = 0.5
    """Speed of a full operator deflection, as a share of the velocity limit."""
    takeover_by_motion: bool = True
    """Whether moving the operator's device takes over, without the take-over key."""
    autostart: bool = False
    """Enable by itself as soon as the policy answers; for robots without an operator."""
    max_command_age: float = 0.0
    """Largest age of the observation behind a policy's command; 0 derives it from the steps above."""
    max_state_age: float = 0.1
    """Largest age of the robot's measurement."""
    max_camera_age: float = 0.25
    """Largest age of an image."""
    operator_timeout: float = 0.25
    """Largest time without a sign of life from the operator who drives."""
    tracking_seconds: float = 0.5
    """Lag behind the command that counts as a fault, in seconds at the velocity limit; 0 switches the check off."""
    stop_kind: str = "controlled"
    """What the robot itself is asked for where the loop cannot brake it: at the end, and when it did not take a
    command. controlled (brake within the limits, then hold), hold (stay where it is at once, whatever it was doing), or
    drives_off (no power; that already at an emergency stop or a latched fault: only where nothing can fall). With the
    first two, the loop itself brakes the robot at emergency stops and faults, and holds it with power on."""
    status_rate_hz: float = 10.0
    """Status messages per second."""
    replace_within_tick: bool = True
    """Whether a chunk that arrives between ticks may replace the present tick's command at once, on a robot that takes
    a second command (``accepts_replacement``), instead of waiting up to a tick; see `hardware.safety.chain`."""
    pin: bool = False
    """Keep the loop on one processor, which the policy keeps off, where there is more than one. For a computer that
    runs nothing else: where other programs fill the processors, a loop that cannot move misses ticks."""
    realtime_priority: int = 50
    """Real-time priority (SCHED_FIFO) of the loop where the system permits it; 0 asks for none."""

    def __post_init__(self) -> None:
        require_range(self, "execute_steps", low=1)
        require_range(self, "late_steps", "blend_seconds", "tracking_seconds")
        require_positive(self, "human_speed", "max_state_age", "max_camera_age", "operator_timeout", "status_rate_hz")


def ticks_per_step(tick_rate_hz: float, policy_rate_hz: float) -> int:
    """Return how many ticks a policy step has; raises `ConfigError` unless that is a whole number."""
    if policy_rate_hz <= 0 or tick_rate_hz <= 0:
        raise ConfigError(f"rates must be positive, got {tick_rate_hz:g} Hz ticks and {policy_rate_hz:g} Hz policy")
    ticks = round(tick_rate_hz / policy_rate_hz)
    if ticks < 1 or abs(ticks * policy_rate_hz - tick_rate_hz) > 1e-6 * tick_rate_hz:
        raise ConfigError(
            f"a tick rate of {tick_rate_hz:g} Hz is no whole multiple of the policy's {policy_rate_hz:g} Hz"
        )
    return ticks


def stop_kind(name: str) -> StopKind:
    """Return the kind of stop called ``name``; raises `UnknownNameError`."""
    known = {kind.value: kind for kind in StopKind}
    if name not in known:
        raise UnknownNameError("kind of stop", name, known)
    return known[name]


def rate_elements(robot: Robot) -> np.ndarray:
    """Return (A,) bool: the elements of the action that are rates, by their unit (``m/s``, ``rad/s``)."""
    size = robot.spec.action.size
    units = robot.spec.action.unit.split(",")
    if len(units) == 1:
        units *= size
    return np.array([unit.strip().endswith("/s") for unit in units] if len(units) == size else [False] * size)


def tolerances(config: ExecutorConfig, policy_rate_hz: float) -> SafetyConfig:
    """Return what the safety chain tolerates under ``config``."""
    derived = (config.execute_steps + config.late_steps) / policy_rate_hz + config.max_state_age
    return SafetyConfig(
        max_command_age=config.max_command_age or derived,
        max_state_age=config.max_state_age,
        max_camera_age=config.max_camera_age,
        max_operator_age=config.operator_timeout,
        tracking_seconds=config.tracking_seconds,
    )
