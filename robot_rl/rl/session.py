"""The one outer loop of fine-tuning: budget, evaluation, checkpoints, resumption, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from robot_rl.core.env import VecEnv
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.policy import Policy
from robot_rl.core.ranges import require_range
from robot_rl.nets.device import device_of
from robot_rl.policies.checkpoint import load_policy, save_policy
from robot_rl.rl.guard import Guard
from robot_rl.rl.state import keeping_generators, load_state, save_state
from robot_rl.rollout.evaluate import EvaluationResult, evaluate
from robot_rl.train import distributed
from robot_rl.train.interrupt import finishing_steps
from robot_rl.train.progress import progress
from robot_rl.train.run import Run

VALIDATION_SEED = 900_000
"""First episode seed of evaluations while learning; below it are training seeds, above are test seeds."""
_SEED_BLOCK = 50_000


class Learner(Protocol):
    """A core with its method plugged in."""

    @property
    def steps(self) -> int:
        """Environment steps taken, over all lanes."""

    @property
    def policy(self) -> Any:
        """The policy being improved, which acts without exploration."""

    def iterate(self, fraction: float) -> dict[str, float]:
        """Collect and update once, with ``fraction`` of the budget spent; returns metrics."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return what `restore` needs."""

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Continue from `state`."""


@dataclass(frozen=True)
class SessionConfig:
    """Budget and evaluation of a fine-tuning run."""

    steps: int = 0
    """Environment steps over all lanes; 0 for no limit."""
    minutes: float = 0.0
    """Wall-clock minutes, evaluation included; 0 for no limit."""
    evaluations: int = 5
    """Evaluations spread evenly over the budget, after the one at the start."""
    eval_episodes: int = 100
    """Episodes per evaluation, on validation seeds."""
    eval_lanes: int = 50
    """Environments stepped at once in an evaluation."""
    eval_share: float = 0.25
    """Where minutes are limited: share of the time that evaluations may take. One that comes when they have taken more
    is put off; the last one always happens."""
    stop_at: float = 1.01
    """Stop when an evaluation's success rate reaches this; above 1 for never."""
    save_every: float = 1.0
    """Minutes between saved states, from which a killed run continues."""

    def __post_init__(self) -> None:
        if self.steps <= 0 and self.minutes <= 0:
            raise ConfigError("fine-tuning needs a budget: steps, minutes or both")
        if not 0 < self.eval_share <= 1:
            raise ConfigError(f"eval_share must be above 0 and at most 1, got {self.eval_share:g}")
        require_range(self, "evaluations", "save_every")
        require_range(self, "eval_episodes", "eval_lanes", low=1)

    def fraction(self, steps: int, seconds: float) -> float:
        """Return the share of the budget that is spent, by whichever limit is nearer."""
        by_steps = steps / self.steps if self.steps > 0 else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes > 0 else 0.0
        return max(by_steps, by_time)

    def training_seed(self, seed: int) -> int:
        """Return the first episode seed of training for the run's seed, below the validation seeds."""
        return (1 + seed % (VALIDATION_SEED // _SEED_BLOCK - 2)) * _SEED_BLOCK


def resumed_seed(first: int, steps: int) -> int:
    """Return the first episode seed of a run resumed after ``steps``, within the block that begins at ``first``."""
    return first + steps % _SEED_BLOCK


class _Session:
    """A fine-tuning run under way."""

    def __init__(
        self, learner: Learner, env_factory: Callable[..., VecEnv] | None, run: Run, config: SessionConfig
    ) -> None:
        self.learner, self.run, self.config = learner, run, config
        self.guard = Guard(run.path)
        lanes = min(config.eval_lanes, config.eval_episodes)
        self.eval_env = env_factory(num_envs=lanes) if env_factory is not None else None
        self.best, self.evaluated, self.before = -math.inf, 0, 0.0
        self.evaluating = 0.0
        self.began = self.saved = time.monotonic()
        self.state_path = run.path / "learner.safetensors"

    @property
    def seconds(self) -> float:
        """Time spent so far, in this process and in those before it."""
        return self.before + time.monotonic() - self.began

    @property
    def fraction(self) -> float:
        return self.config.fraction(self.learner.steps, self.seconds)

    def resume(self) -> bool:
        """Continue from a saved state if there is one; what was logged after it will be logged again."""
        found = self.state_path.exists()
        if found:
            tensors, numbers = load_state(self.state_path)
            self.best, self.evaluated = numbers.pop("best"), int(numbers.pop("evaluated"))
            self.before, self.evaluating = numbers.pop("seconds"), numbers.pop("evaluating", 0.0)
            self.learner.restore(tensors, numbers)
        for stage in ("finetune", "eval"):
            self.run.rewind(self.learner.steps if found else -1, stage)
        return found

    def evaluate(self) -> EvaluationResult:
        """Evaluate on validation seeds and keep the policy if it is the best so far."""
        assert self.eval_env is not None
        start = time.monotonic()
        policy = self.learner.policy
        with keeping_generators(policy):  # a behaviour may explore with the policy's own
            result = evaluate(policy, self.eval_env, self.config.eval_episodes, VALIDATION_SEED)
        self.evaluating += time.monotonic() - start
        low, high = result.success_interval
        metrics = {"success": result.success_rate, "success_low": low, "success_high": high}
        metrics |= {"return": float(result.returns.mean()), "length": float(result.lengths.mean())}
        self.run.log(metrics | {"seconds": self.seconds}, self.learner.steps, "eval")
        # Return breaks ties of success, so that tasks without a success are served as well.
        score = result.success_rate + 1e-6 * float(np.tanh(result.returns.mean() / 1e3))
        if score >= self.best:
            self.best = score
            self._save_policy("best", metrics)
            self.saved = -math.inf  # its score belongs on disk before a worse one can come
        return result

    def evaluation_due(self) -> bool:
        """Whether the next of the evenly spread evaluations has come, and its time can be spared; counts it."""
        config, fraction = self.config, self.fraction
        if self.eval_env is None or fraction * config.evaluations < self.evaluated + 1:
            return False
        if config.minutes > 0 and fraction < 1 and self.evaluating > config.eval_share * self.seconds:
            return False
        self.evaluated = min(int(fraction * config.evaluations), config.evaluations)
        return True

    def save(self, force: bool = False) -> None:
        """Write what a killed run continues from, if it is time."""
        if not force and time.monotonic() - self.saved < 60 * self.config.save_every:
            return
        self.guard.check(self.learner.steps, {f"weight '{k}'": v for k, v in self.learner.policy.named_parameters()})
        tensors, numbers = self.learner.state()
        numbers = {**numbers, "best": self.best, "evaluated": self.evaluated, "seconds": self.seconds}
        numbers["evaluating"] = self.evaluating
        save_state(self.state_path, tensors, numbers)
        self._save_policy("last", {})
        self.saved = time.monotonic()

    def _save_policy(self, name: str, metrics: dict[str, float]) -> None:
        facts = {"steps": self.learner.steps, "seconds": round(self.seconds, 1), **metrics}
        save_policy(self.learner.policy, self.run.path / "checkpoints" / name, {"finetune": facts})


def run_session(learner: Learner, env_factory: Callable[..., VecEnv] | None, run: Run, config: SessionConfig) -> Policy:
    """Drive ``learner`` until its budget is spent and return the best policy by validation success.

    Without ``env_factory`` nothing is validated here, and the last policy is returned: the episodes are another
    process's. A learner whose ``finished`` becomes true ends the session. Ctrl-C saves the state before it goes up.

    Under `robot_rl.train.distributed` the first process decides, evaluates and saves; the others learn along.

    Raises:
        NonFiniteError: a reward, observation, loss or weight is not finite; the last good checkpoints are kept.
        CapabilityError: several processes, and a learner that cannot share its updates.
    """
    if distributed.world() > 1 and not getattr(learner, "data_parallel", False):
        raise CapabilityError("only on-policy methods learn in several processes; start this one without torchrun")
    if distributed.rank() > 0:
        return _follow(learner, run)
    session = _Session(learner, env_factory, run, config)
    try:
        resumed = session.resume()
        total, unit = _total(config)
        done = int(min(session.fraction, 1.0) * total)
        with progress("fine-tuning", total, unit) as bar:
            if resumed:
                bar.advance(done)
            elif session.eval_env is not None:
                result = session.evaluate()
                bar.advance(0, base=result.success_rate)
            stop = False
            with finishing_steps() if distributed.world() == 1 else nullcontext(lambda: False) as interrupted:
                while (fraction := distributed.from_first(1.0 if stop else session.fraction)) < 1:
                    metrics = learner.iterate(fraction)
                    session.guard.check(learner.steps, metrics)
                    run.log(metrics | {"seconds": session.seconds}, learner.steps, "finetune")
                    if not interrupted() and session.evaluation_due():
                        result = session.evaluate()
                        bar.advance(0, evaluated=result.success_rate)
                        stop = result.success_rate >= config.stop_at
                    stop |= getattr(learner, "finished", False)
                    halt = interrupted()
                    session.save(force=halt)
                    if halt:
                        raise KeyboardInterrupt
                    now = int(min(session.fraction, 1.0) * total)
                    latest = {name: metrics.get(name, float("nan")) for name in ("success", "return")}
                    bar.advance(now - done, **latest, steps=learner.steps)
                    done = now
        session.save(force=True)
        name = "best" if session.eval_env is not None else "last"
        policy: Policy = load_policy(run.path / "checkpoints" / name, device_of(learner.policy))
        return policy
    finally:
        if session.eval_env is not None:
            session.eval_env.close()


def _follow(learner: Learner, run: Run) -> Policy:
    """Learn along with the first process until it says that the budget is spent."""
    state = distributed.first_directory(run.path) / "learner.safetensors"
    if state.exists():
        tensors, numbers = load_state(state)
        learner.restore(tensors, numbers)
    while (fraction := distributed.from_first(1.0)) < 1:
        learner.iterate(fraction)
    policy: Policy = learner.policy
    return policy


def _total(config: SessionConfig) -> tuple[int, str]:
    """Return the size and unit of the progress bar: seconds if there is a time limit, else steps."""
    return (int(60 * config.minutes), "second") if config.minutes > 0 else (config.steps, "step")
