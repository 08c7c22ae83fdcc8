"""Tries again: a verifier judges each attempt, the robot goes back the way it came, and the policy has another go.

A policy that succeeds three times in four succeeds in fifteen of sixteen pairs of attempts, if its failures are
independent and the judge is right (the idea of RUMs, arXiv 2409.05865). Neither is quite so: a false yes ends the task
undone and is not mended by trying again, so measure the verifier's false alarms first (``robot-rl reward check``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from robot_rl.core.env import Observation
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.policy import Policy
from robot_rl.core.spec import Spec

logger = logging.getLogger(__name__)
Phase = Literal["acting", "returning", "finished"]
_LAST_WORDS = 0.2
"""Seconds from the last verdict to the end, in which the executor takes it in."""


@dataclass(frozen=True)
class AttemptConfig:
    """How attempts begin and end."""

    retries: int = 2
    """Attempts after the first; -1 for any number."""
    seconds: float = 20.0
    """An attempt that has not succeeded by then has failed."""
    confirmations: int = 3
    """Consecutive observations that must show success."""
    return_speed: float = 1.0
    """Speed of the way back, as a multiple of that of the attempt; the safety chain's limits hold in any case."""


@dataclass(frozen=True)
class Attempt:
    """What came of one attempt."""

    success: bool
    """Verdict."""
    steps: int
    """Policy steps that it took."""
    probability: float
    """Largest probability of success that the verifier saw; NaN where somebody else judged."""


class Attempts:
    """A policy that makes attempts with another one.

    Between two attempts it goes through the places of the last one in reverse order: the robot has been there, and ends
    where the attempt began. That takes actions that are places; actions that are rates cannot be taken back.

    Verdicts, ends of returns and the end of it all are reported through ``listen``, in the thread that plans.
    """

    closed_loop = True

    def __init__(
        self,
        base: Policy,
        config: AttemptConfig | None = None,
        verifier: Any = None,
        *,
        listen: Callable[[str, Attempt | None], None] = lambda what, attempt: None,
        driven: Callable[[], bool] = lambda: True,
        obeyed: Callable[[], bool] | None = None,
        place: Callable[[], np.ndarray | None] = lambda: None,
        again: bool = False,
    ) -> None:
        """Wrap ``base``.

        Args:
            base: the policy that acts.
            config: number and length of attempts.
            verifier: a `robot_rl.policies.success.SuccessClassifier`; None where only `judge` ends an attempt.
            listen: called with ``("attempt", attempt)`` after each (``"judged"`` where the verdict came from `judge`),
                ``("returned", None)`` when the robot is back, and ``("finished", last)`` at the end.
            driven: whether the attempt is under way; while it is not, it takes no time and does not end.
            obeyed: whether the robot does what this policy says; while it does not, the way back waits. ``driven`` by
                default; where a human may drive in an attempt, the two differ.
            place: the command (A,) executed last, where it is known: whoever drove, the way back is the way there.
            again: go on after a success as well, with the next attempt.

        Raises:
            CapabilityError: the actions are rates.
            ConfigError: a setting is out of range.
        """
        self.config = config or AttemptConfig()
        if self.config.seconds <= 0 or self.config.confirmations < 1 or self.config.return_speed <= 0:
            raise ConfigError("attempts need seconds and return_speed above 0, and at least one confirmation")
        if any(unit.strip().endswith("/s") for unit in base.spec.action.unit.split(",")):
            raise CapabilityError(f"actions in '{base.spec.action.unit}' cannot be taken back: they are rates")
        self.base, self.verifier, self._listen, self._again = base, verifier, listen, again
        self._driven, self._obeyed, self._place = driven, obeyed or driven, place
        self.horizon, self.execute_steps = base.horizon, base.execute_steps
        self.obs_steps, self.spec = base.obs_steps, base.spec
        if verifier is not None:
            seen = {**verifier.spec.observation, **base.spec.observation}
            self.spec = Spec(seen, base.spec.action, base.spec.rate_hz)
            self.obs_steps = max(base.obs_steps, verifier.obs_steps)
        self.attempts: list[Attempt] = []
        """Attempts that have ended."""
        self.phase: Phase = "acting"
        """What happens now."""
        self._verdict: bool | None = None
        self._lock = threading.Lock()
        self.restart()

    @property
    def under_way(self) -> bool:
        """Whether an attempt is made that nobody has judged yet."""
        return self.phase == "acting" and self._verdict is None

    def restart(self) -> None:
        """Begin anew where the robot stands, with the first attempt."""
        self.phase = "acting"
        self._count = 0
        self._begin()

    def seed(self, seed: int) -> None:
        """Make the base's sampling reproducible."""
        self.base.seed(seed)

    def judge(self, success: bool) -> None:
        """End the present attempt with the verdict of an operator or a task; any thread may call it."""
        with self._lock:
            self._verdict = success

    def plan(self, history: Observation) -> np.ndarray:
        """Return the base's chunks (1, H, A)."""
        return self.base.plan(self._newest(history, self.base))

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return the action (1, A) of this step: the base's, one of the way back, or the last one again."""
        if self.phase == "acting":
            if self.base.closed_loop:
                actions = self.base.refine(self._newest(history, self.base), actions)
            place = self._place()
            if place is not None or self._driven():
                self._path.append(actions[0].copy() if place is None else np.array(place, np.float32))
            if self._driven():
                self._steps += 1
                self._watch(history)
            return actions
        if self.phase == "returning":
            return self._go_back()[None]
        return self._path[-1][None]

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _go_back(self) -> np.ndarray:
        """Return the next action (A,) of the way back; while others drive or hold the robot, it waits for them."""
        if not self._obeyed():
            self._held = True
        elif self._held:
            self._held = False
            place = self._place()
            if place is not None:  # wherever they left it, the way back leads on from what is nearest to there
                ahead = np.stack(self._path[: max(1, int(self._back) + 1)])
                self._back = float(np.argmin(np.square(ahead - place).sum(1)))
        else:
            self._back -= self.config.return_speed
            if self._back <= 0:
                self._arrive()
        return self._path[max(0, min(int(self._back), len(self._path) - 1))]

    def _begin(self) -> None:
        self._steps, self._shown, self._largest, self._held = 0, 0, 0.0, False
        self._path: list[np.ndarray] = []
        with self._lock:
            self._verdict = None

    def _watch(self, history: Observation) -> None:
        """End the attempt if its verdict is known."""
        with self._lock:
            verdict = self._verdict
        if verdict is None and self.verifier is not None:
            probability = float(self.verifier.probability(self._newest(history, self.verifier))[0])
            self._largest = max(self._largest, probability)
            self._shown = self._shown + 1 if probability > self.verifier.threshold else 0
            if self._shown >= self.config.confirmations:
                verdict = True
        if verdict is None and self._steps >= self.config.seconds * self.spec.rate_hz:
            verdict = False
        if verdict is not None:
            self._end(verdict, given=self._verdict is not None)

    def _end(self, success: bool, given: bool) -> None:
        self._count += 1
        attempt = Attempt(success, self._steps, self._largest if self.verifier is not None else float("nan"))
        self.attempts.append(attempt)
        logger.info("attempt %d: %s after %d steps", self._count, "success" if success else "failure", attempt.steps)
        self._listen("judged" if given else "attempt", attempt)
        more = self.config.retries < 0 or self._count <= self.config.retries
        if (success and not self._again) or not more:
            self.phase = "finished"
            self._listen("finished", attempt)
            return
        self.phase, self._back = "returning", float(len(self._path))

    def _arrive(self) -> None:
        self.phase = "acting"
        first = self._path[0]
        self._begin()
        self._path.append(first)
        self._listen("returned", None)

    @staticmethod
    def _newest(history: Observation, who: Any) -> Observation:
        return {key: history[key][:, -who.obs_steps :] for key in who.spec.observation}


def judged_attempts(
    policy: Policy,
    verifier: Any,
    config: AttemptConfig,
    *,
    send: Callable[[Any], None],
    driven: Callable[[], bool],
    place: Callable[[], np.ndarray | None],
    over: Callable[[], None],
) -> Attempts:
    """Let ``policy`` make attempts until the verifier is content or no retries are left, and the executor know of them.

    Args:
        policy: the policy that acts.
        verifier: a `robot_rl.policies.success.SuccessClassifier`.
        config: number and length of attempts.
        send: takes the `OperatorInput` of a `Reporter`.
        driven: whether the policy drives.
        place: the command (A,) executed last, where it is known.
        over: called when all attempts are made and the executor has had time to take that in.
    """
    tell = Reporter(send, policy.spec.action.size)

    def listen(what: str, attempt: Attempt | None) -> None:
        tell(what, attempt)
        if what == "finished":
            threading.Timer(_LAST_WORDS, over).start()

    return Attempts(policy, config, verifier, listen=listen, driven=driven, place=place)


class Reporter:
    """Tells the executor about attempts, as an operator would: by marks, and by asking it to hold at the end."""

    def __init__(
        self, send: Callable[[Any], None], size: int, clock: Callable[[], float] = time.monotonic, wait: bool = False
    ) -> None:
        """Send readings of a device that never moves anything.

        Args:
            send: takes an `OperatorInput`, such as that of a transport.
            size: number of action elements.
            clock: monotonic time in seconds.
            wait: hold after each return as well, until the operator hands back: somebody has to set the scene.
        """
        self._send, self._size, self._now, self._wait, self._seq = send, size, clock, wait, 0

    def __call__(self, what: str, attempt: Attempt | None) -> None:
        """Pass on one report of `Attempts`."""
        from robot_rl.core.teleop import OperatorEvent, OperatorInput

        events: tuple[OperatorEvent, ...]
        if what == "judged":
            return  # whoever judged has said so
        if what == "attempt" and attempt is not None:
            events = (OperatorEvent.SUCCESS if attempt.success else OperatorEvent.FAILURE,)
        elif what == "returned":
            # The way back is an episode of its own in the record, and no success.
            events = (OperatorEvent.FAILURE, OperatorEvent.HOLD) if self._wait else (OperatorEvent.FAILURE,)
        else:
            events = (OperatorEvent.HOLD,)
        self._seq += 1
        self._send(OperatorInput(self._now(), self._seq, False, np.zeros(self._size), events, "attempts"))
