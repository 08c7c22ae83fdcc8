"""Who may write commands: a state machine with exactly one writer and a latched stop.

    IDLE ──enable──► HOLD (waits for a fresh plan) ──plan──► ALIGN ──blended──► AUTO
      ▲               ▲  ▲                                     │                 │
      │ reset         │  └─── faults, operator, hand back ─────┴──────┬──────────┘
      │               │ hand back, heartbeat lost                     │ take over (one press)
    STOPPED (latched) └───────────────────────────────────────────── HUMAN
      ▲ emergency stop, from anywhere

Nothing moves after an emergency stop until it is reset, and then enabled. Control never goes to the policy without an
explicit act and a plan made after it; while it does (ALIGN), commands go over smoothly from the last one to the plan.
The operator's devices wish for motions, which are added to the last command: they need no alignment.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum

import numpy as np

from robot_rl.core.teleop import OperatorEvent, OperatorInput

logger = logging.getLogger(__name__)


class Mode(str, Enum):
    """States of the arbiter."""

    IDLE = "idle"
    """Connected, not enabled: the robot holds."""
    AUTO = "auto"
    """The policy writes."""
    HOLD = "hold"
    """Nobody writes: the robot brakes and holds."""
    HUMAN = "human"
    """The operator writes."""
    STOPPED = "stopped"
    """Latched after an emergency stop or a fault of the robot: reset, then enable."""
    ALIGN = "align"
    """The policy writes, blended from the last command into its plan: not yet what it would do by itself."""


WRITERS = {Mode.AUTO: "policy", Mode.ALIGN: "policy", Mode.HUMAN: "human"}
"""Who writes in which mode; nobody in the others."""
DRIVEN = (Mode.AUTO, Mode.ALIGN)
"""Modes in which the policy writes."""

REASONS = (
    "started",
    "enabled",
    "hand_back",
    "episode_restart",
    "policy_resumed",
    "operator_takeover",
    "operator_motion",
    "operator_hold",
    "operator_lost",
    "no_plan",
    "policy_starved",
    "action_malformed",
    "action_not_finite",
    "command_stale",
    "state_stale",
    "camera_stale",
    "emergency_stop",
    "reset",
    "tracking_error",
    "post_check_failed",
    "exception",
    "robot_fault",
    "shutdown",
    "observation_not_finite",
    "force_exceeded",
)
"""Why a mode was entered; recordings hold the index into this list, so it only ever grows at its end."""


@dataclass(frozen=True)
class ArbiterConfig:
    """Thresholds of the operator's device and time limits."""

    takeover_by_motion: bool = True
    """Take over as soon as the operator moves the device with the dead-man switch held."""
    engage: float = 0.2
    """Size of a motion wish, in [0, 1], that takes over."""
    release: float = 0.05
    """Size below which the device counts as released; after a hand-back it must be released once before it engages."""
    dwell: float = 0.15
    """Seconds for which a new mode or a released device must last before it can change back."""
    heartbeat_timeout: float = 0.25
    """Seconds without a reading after which the operator counts as lost."""
    plan_timeout: float = 2.0
    """Seconds to wait for a fresh plan after enabling or handing back before giving up."""
    align_seconds: float = 0.3
    """Seconds for which commands are blended into the policy's plan before it drives alone; 0 leaves ALIGN out."""
    starvation_resume: float = 0.5
    """Seconds within which a starved policy may resume by itself with a fresh plan."""


class Arbiter:
    """Decides the mode once per tick from the operator's readings, the emergency stop and reported faults."""

    def __init__(self, config: ArbiterConfig | None = None) -> None:
        self.config = config or ArbiterConfig()
        self.mode, self.reason, self.since = Mode.IDLE, "started", 0.0
        self.estop_latched = False
        self.plan_requested = False
        """Whether a plan made from now on is waited for; the executor flushes its queue when this rises."""
        self.changes: list[tuple[float, Mode, str]] = []
        """Every change of mode: (monotonic time, mode, reason)."""
        self._plan_deadline = 0.0
        self._estop_pressed = False
        self._engageable = True
        self._released_since: float | None = -np.inf

    @property
    def writer(self) -> str:
        """``policy``, ``human`` or ``none``."""
        return WRITERS.get(self.mode, "none")

    def update(
        self, now: float, operator: OperatorInput | None, events: tuple[OperatorEvent, ...], estop: bool
    ) -> Mode:
        """Advance to the monotonic time ``now`` and return the mode of this tick.

        Args:
            now: monotonic time in seconds.
            operator: newest reading of the operator's device, or None if there never was one.
            events: what the operator asked for since the last tick, oldest first.
            estop: whether an emergency stop is pressed anywhere.
        """
        self._estop_pressed = estop
        if estop or OperatorEvent.EMERGENCY_STOP in events:
            self.stop(now, "emergency_stop")
        # A press of the emergency stop outweighs everything that came with it.
        elif self.mode is Mode.STOPPED:
            if OperatorEvent.RESET in events:
                self.estop_latched = False
                self._go(now, Mode.IDLE, "reset")
        else:
            for event in events:
                self._handle(now, event)
            self._watch(now, operator)
        return self.mode

    def stop(self, now: float, reason: str) -> None:
        """Latch a stop."""
        self.estop_latched = True
        self.plan_requested = False
        if self.mode is not Mode.STOPPED:
            self._go(now, Mode.STOPPED, reason)

    def hold(self, now: float, reason: str, resumable: bool = False) -> None:
        """Take control away from whoever writes; ``resumable`` lets a fresh plan that comes soon go on by itself."""
        if self.mode not in WRITERS:
            return
        self.plan_requested = resumable and self.mode in DRIVEN
        self._plan_deadline = now + self.config.starvation_resume
        self._go(now, Mode.HOLD, reason)

    def plan_ready(self, now: float) -> None:
        """Report a plan made after `plan_requested` rose: the policy takes control, blended in at first."""
        if self.plan_requested and self.mode is Mode.HOLD:
            self.plan_requested = False
            self._engageable = self._rested(now)
            reason = {"policy_starved": "policy_resumed"}.get(self.reason, self.reason)
            self._go(now, Mode.ALIGN if self.config.align_seconds > 0 else Mode.AUTO, reason)

    def blend(self, now: float) -> float:
        """Return the policy's share in [0, 1] of the command at the monotonic time ``now``: smooth while in ALIGN."""
        if self.mode is not Mode.ALIGN:
            return 1.0
        share = min(1.0, max(0.0, (now - self.since) / self.config.align_seconds))
        return share * share * (3.0 - 2.0 * share)

    def request_plan(self, now: float, reason: str) -> None:
        """Hold, and give control to the policy as soon as it has planned from a fresh observation."""
        self.plan_requested = True
        self._plan_deadline = now + self.config.plan_timeout
        self._go(now, Mode.HOLD, reason)

    def _handle(self, now: float, event: OperatorEvent) -> None:
        settled = now - self.since >= self.config.dwell
        if event is OperatorEvent.TAKE_OVER and self.mode in (*DRIVEN, Mode.HOLD):
            self._take_over(now, "operator_takeover")
        elif event is OperatorEvent.HOLD:
            self.plan_requested = False
            if self.mode in WRITERS:
                self._go(now, Mode.HOLD, "operator_hold")
        elif event is OperatorEvent.ENABLE and self.mode is Mode.IDLE:
            self.request_plan(now, "enabled")
        elif event is OperatorEvent.HAND_BACK and self.mode in (Mode.HUMAN, Mode.HOLD):
            if self.mode is Mode.HUMAN and not settled:
                logger.info("arbiter: hand-back ignored, %.0f ms after the takeover", 1e3 * (now - self.since))
            elif not self.plan_requested:
                self.request_plan(now, "hand_back")

    def _watch(self, now: float, operator: OperatorInput | None) -> None:
        """Judge the device's motion and heartbeat, and plans that do not come."""
        config = self.config
        wish = 0.0
        if operator is not None and operator.enabled and now - operator.stamp <= config.heartbeat_timeout:
            wish = float(np.max(np.abs(operator.motion), initial=0.0))
        if wish < config.release:
            self._released_since = now if self._released_since is None else self._released_since
            self._engageable |= self._rested(now)
        else:
            self._released_since = None
        if self.mode is Mode.ALIGN and self.blend(now) >= 1.0:
            self._go(now, Mode.AUTO, self.reason)
        if self.mode in DRIVEN and config.takeover_by_motion and self._engageable and wish >= config.engage:
            self._take_over(now, "operator_motion")
        if self.mode is Mode.HUMAN and (operator is None or now - operator.stamp > config.heartbeat_timeout):
            self._go(now, Mode.HOLD, "operator_lost")
        if self.plan_requested and now > self._plan_deadline:
            self.plan_requested = False
            self._go(now, Mode.HOLD, self.reason if self.reason == "policy_starved" else "no_plan")

    def _rested(self, now: float) -> bool:
        return self._released_since is not None and now - self._released_since >= self.config.dwell

    def _take_over(self, now: float, reason: str) -> None:
        self.plan_requested = False
        self._go(now, Mode.HUMAN, reason)

    def _go(self, now: float, mode: Mode, reason: str) -> None:
        if (mode, reason) == (self.mode, self.reason):
            return
        changed = mode is not self.mode
        logger.info("arbiter: %s -> %s (%s)", self.mode.value, mode.value, reason)
        self.mode, self.reason = mode, reason
        if changed:
            self.since = now
        self.changes.append((now, mode, reason))
