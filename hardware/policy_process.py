"""The policy's side: takes observations from a link, steps the policy as evaluation does, and sends chunks.

The same `PolicyRunner` as in evaluation decides when to plan, so that the same checkpoint and observations give the
same actions. A policy that plans ahead sends its chunk when it has planned; a policy that corrects its actions in
closed loop sends a chunk at every step, whose first action is corrected.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hardware.attempts import Attempt, Attempts
from hardware.control.realtime import computing
from hardware.control.statistics import Durations
from hardware.transport import PolicyLink
from robot_rl.core.env import Observation
from robot_rl.core.errors import HardwareError
from robot_rl.core.policy import ActionChunk, Policy
from robot_rl.core.realtime import Commitment, RealTimeConfig, require_real_time
from robot_rl.core.robot import StampedObservation
from robot_rl.rollout.player import PolicyRunner

logger = logging.getLogger(__name__)
_HELD = 8
"""Steps for which the one action of a chunk can be held."""


@dataclass
class PolicyReport:
    """What the policy side did and how long it took."""

    steps: int = 0
    """Observations processed."""
    chunks: int = 0
    """Chunks sent."""
    skipped: int = 0
    """Observations not answered because newer ones had queued up behind them; the history holds them all the same."""
    episodes: int = 0
    """Times that the history was forgotten for a new episode."""
    warm_up_seconds: float = 0.0
    """Duration of the inferences before the first observation."""
    failures: int = 0
    """Plans that a policy on another computer did not give."""
    largest_delay: int = 0
    """Most actions that were executed while a chunk was planned that went on from another, the present one included."""
    late: int = 0
    """Chunks that took longer than they were planned for: their beginning need not fit what had been executed."""
    attempts: list[Attempt] = field(default_factory=list)
    """What came of each attempt, where a verifier judges them."""
    inference: Durations = field(default_factory=Durations)
    """Time from reading an observation to sending its chunk, of the steps that sent one; warm-up excluded."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready figures."""
        return {
            "steps": self.steps,
            "chunks": self.chunks,
            "skipped": self.skipped,
            "episodes": self.episodes,
            "warm_up_seconds": self.warm_up_seconds,
            "failures": self.failures,
            "largest_delay": self.largest_delay,
            "late": self.late,
            "attempts": [asdict(one) for one in self.attempts],
            "inference": self.inference.to_json(),
        }


class PolicyServer:
    """Serves one policy to one executor; with ``real_time`` its chunks go on from each other."""

    def __init__(self, policy: Policy, link: PolicyLink, real_time: RealTimeConfig | None = None) -> None:
        self.policy, self.link = policy, link
        self.report = PolicyReport()
        self._keys = tuple(policy.spec.observation)
        self._runner = PolicyRunner(policy, 1, real_time)
        self._all = np.ones(1, bool)
        self._seq: int | None = None
        self._waiting: deque[StampedObservation] = deque()

    def serve_once(self, timeout: float = 0.0) -> bool:
        """Answer the newest unread observation, waiting up to ``timeout`` seconds for one; return whether one came.

        Those before it came while the policy was busy: their steps are over, and they only enter the history.
        """
        self._collect(timeout)
        if not self._waiting:
            return False
        while len(self._waiting) > 1:
            passed = self._waiting.popleft()
            self._catch_up(passed.seq)
            self._runner.pass_by(self._values(passed))
            self.report.skipped += 1
        self._answer(self._waiting.popleft())
        return True

    def serve_in_spite(self, timeout: float) -> None:
        """`serve_once`, but a policy on another computer that does not answer is asked anew at the next observation.

        The executor brakes and holds by itself meanwhile.
        """
        try:
            self.serve_once(timeout)
        except HardwareError as error:
            logger.error("%s", error)
            self.report.failures += 1
            self._runner.player.reset(self._all)

    def _collect(self, timeout: float) -> None:
        """Read what came, waiting up to ``timeout`` seconds if there is nothing."""
        observation = self.link.receive_observation(0.0 if self._waiting else timeout)
        while observation is not None:
            self._waiting.append(observation)
            observation = self.link.receive_observation(0.0)

    def _values(self, observation: StampedObservation) -> Observation:
        return {key: np.asarray(observation.values[key])[None] for key in self._keys}

    def _answer(self, observation: StampedObservation) -> None:
        started = time.perf_counter()
        self._catch_up(observation.seq)
        action = self._runner.step(self._values(observation))[0]
        self.report.steps += 1
        if self._runner.planned[0] or self.policy.closed_loop:
            self.link.send_chunk(held(self._runner.chunk(action, observation.seq, observation.stamp)))
            self.report.chunks += 1
            self.report.inference.add(time.perf_counter() - started)
        if self._runner.planned[0]:
            self._count_delay(observation.seq)

    def _count_delay(self, seq: int) -> None:
        """Count the steps that began while the chunk of step ``seq`` was planned, if it went on from another one.

        The first chunk after a start or a flush does not count: the very first inference is slow, and nothing waits.
        """
        self._collect(0.0)
        begun = sum(seq < one.seq <= seq + self.policy.horizon for one in self._waiting)
        planned_for = self._runner.commitment
        if planned_for is None:
            return
        self._runner.delays.add(begun)
        self.report.largest_delay = max(self.report.largest_delay, begun + 1)
        self.report.late += begun + 1 > planned_for.delay

    def _catch_up(self, seq: int) -> None:
        """Keep step with the executor: forget the history for a new episode, skip the actions of steps not seen."""
        last, self._seq = self._seq, seq
        if last is None or seq <= last:
            self._runner.reset(self._all)
            if hasattr(self.policy, "restart"):
                self.policy.restart()
            self.report.episodes += 1
            return
        for _ in range(min(seq - last - 1, self.policy.horizon)):
            self._runner.player.pop()


def held(chunk: ActionChunk) -> ActionChunk:
    """Return the chunk of a policy that plans one action at a time with that action held; others as they are.

    There would be none to execute while the next one is on its way. For how long it may be late the executor says.
    """
    if len(chunk.actions) > 1:
        return chunk
    wanted = chunk.policy_actions
    return replace(
        chunk,
        actions=np.repeat(chunk.actions, _HELD, axis=0),
        policy_actions=None if wanted is None else np.repeat(wanted, _HELD, axis=0),
    )


def warm_up(policy: Policy, seed: int = 0, rounds: int = 3, real_time: RealTimeConfig | None = None) -> float:
    """Run inference on zeros until caches and kernels are ready; return the seconds it took.

    With ``real_time`` the policy also plans as it will while it drives, from the rest of a running chunk: that is other
    work than a first plan. The policy is seeded afterwards, so that warming up changes none of its actions.
    """
    started = time.perf_counter()
    zeros: Observation = {}
    for key, spec in policy.spec.observation.items():
        low, high = spec.bounds()
        zero = np.clip(np.zeros(spec.shape), low, high).astype(spec.dtype)
        zeros[key] = np.repeat(zero[None, None], policy.obs_steps, axis=1)
    for _ in range(rounds):
        chunk = policy.plan(zeros)
        policy.refine(zeros, chunk[:, 0])
        if real_time is not None and real_time.method != "off":
            rest = np.array([policy.horizon - policy.execute_steps])
            running = Commitment(np.asarray(chunk, np.float32), rest, real_time.max_delay, real_time)
            policy.plan(zeros, commitment=running)  # type: ignore[call-arg]
    policy.seed(seed)
    return time.perf_counter() - started


def trace_network(policy: Policy) -> bool:
    """Let the generative network of ``policy`` run without Python between its operations; return whether it does now.

    The operations stay the same, and the traced network is used only if it gives the same numbers bit for bit on random
    inputs: about a quarter less time per plan on one core. (bfloat16 was slower there: batch-1 inference is bound by
    memory and the weights are cast on the way.) TorchScript is what does it, which torch keeps but no longer develops.
    """
    inner: Any = policy
    while getattr(inner, "base", None) is not None:
        inner = inner.base
    head = getattr(inner, "head", None)
    if head is None or not hasattr(inner, "cond_size") or head.prefix_steps:
        return False

    import torch

    device = next(head.parameters()).device
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", DeprecationWarning)
        shapes = ((1, *head.noise_shape), (1,), (1, inner.cond_size))
        inputs = [tuple(torch.rand(shape, device=device) for shape in shapes) for _ in range(4)]
        try:
            network = torch.jit.freeze(torch.jit.trace(head.backbone.eval(), inputs[0]))
            same = all(torch.equal(network(*one), head.backbone(*one)) for one in inputs)
        except (RuntimeError, AttributeError) as error:
            logger.warning("the policy's network cannot be traced: %s", error)
            return False
    if not same:
        logger.warning("the traced network of the policy does not give the same numbers; it is not used")
        return False
    head.backbone = network
    return True


def load_and_warm(
    path: str | Path,
    *,
    threads: int = 1,
    seed: int = 0,
    device: str = "cpu",
    trace: bool = False,
    real_time: RealTimeConfig | None = None,
) -> Policy:
    """Load a checkpoint for inference on ``threads`` threads, seed it and warm it up.

    ``trace`` as `trace_network`, ``real_time`` as `warm_up`; what the policy cannot do is refused as by
    `require_real_time`.
    """
    from robot_rl.policies.checkpoint import load_policy

    policy = load_policy(path, device=device, threads=threads)
    if trace:
        trace_network(policy)
    require_real_time(policy, real_time or RealTimeConfig())
    logger.info("policy %s ready, warmed up in %.2f s", path, warm_up(policy, seed, real_time=real_time))
    return policy


def serve(
    policy: Policy,
    link: PolicyLink,
    stop: threading.Event,
    *,
    seed: int | None = None,
    warm: bool = True,
    pin: bool = False,
    real_time: RealTimeConfig | None = None,
    over: Callable[[], bool] = lambda: False,
) -> PolicyReport:
    """Serve ``policy`` over ``link`` until ``stop`` is set or it is ``over``, and return what was done.

    Args:
        policy: the policy.
        link: the policy's end of a transport.
        stop: set by whoever wants to end it; looked at ten times per second.
        seed: of the policy's sampling after the warm-up.
        warm: run the first, slow inferences before anything is answered.
        pin: keep off the control loop's processor, where there is more than one.
        real_time: how new chunks go on from the running one; by default they do not.
        over: whether there is nothing left to do; asked as often.
    """
    server = PolicyServer(policy, link, real_time)
    if warm:
        server.report.warm_up_seconds = warm_up(policy, 0 if seed is None else seed, real_time=real_time)
    with computing(pin):
        while not stop.is_set() and not over():
            server.serve_in_spite(0.1)
    if isinstance(policy, Attempts):
        server.report.attempts = policy.attempts
    return server.report
