"""Tiny problems with known answers, and what every fine-tuning method must do with them.

A plug-in's author runs the checks on a method by its registered name, in a second or two each:

    check_learns("my_method", TWO_MODES, tmp_path, steps=2000)
    check_resumes("my_method", TWO_MODES, tmp_path)
    check_stops_at_nan("my_method", TWO_MODES, tmp_path)

Each check raises `AssertionError` with a sentence that says which rule was broken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from robot_rl.core import registry
from robot_rl.core.env import Observation, Step
from robot_rl.core.errors import CapabilityError
from robot_rl.core.policy import Policy
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames
from robot_rl.data.normalizer import Normalizer
from robot_rl.policies.checkpoint import load_policy
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
from robot_rl.rl.guard import NonFiniteError
from robot_rl.rl.options import config_class, describe, override
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run, read_metrics

SPEC = Spec({"state": ArraySpec((2,))}, ArraySpec((1,), low=(-1.0,), high=(1.0,)), 10.0)
"""Interface of the problems: what matters and a number that does not; one action in [-1, 1]."""


NanIn = Literal["reward", "observation", "reset"]
"""What of a toy environment stops being a number: ``reset`` is the observation of its ``reset``."""


class ToyEnv:
    """N lanes of a problem that is written in a few lines: `begin` and `play`."""

    spec = SPEC
    max_episode_steps = 4
    endless = False
    """Whether only the time limit ends an episode, whatever succeeds or fails."""

    def __init__(self, num_envs: int = 1, nan_at: int = 0, nan_in: NanIn = "reward") -> None:
        """Make ``num_envs`` lanes; from the step (or reset) ``nan_at`` on, if it is not 0, ``nan_in`` is not finite."""
        self.num_envs, self.nan_at, self.nan_in = num_envs, nan_at, nan_in
        self.state = np.zeros((num_envs, 2), np.float32)
        """(N, 2): what is observed."""
        self._time, self._steps, self._resets = np.zeros(num_envs, int), 0, -1
        self._seed, self._following = np.zeros(num_envs, np.int64), np.arange(num_envs)
        self.reset(0)

    def begin(self, rng: np.random.Generator) -> float:
        """Return the first number of a new episode's state."""
        raise NotImplementedError

    def play(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Act (N,) in [-1, 1] on `state`; return reward (N,), success (N,) and failure (N,)."""
        raise NotImplementedError

    def reset(self, seed: int | Sequence[int] | None = None) -> Observation:
        """Start a new episode in every lane."""
        if seed is not None:
            self._following = np.asarray(seed, np.int64) + (np.arange(self.num_envs) if np.ndim(seed) == 0 else 0)
        self._resets += 1
        self._begin(np.ones(self.num_envs, bool))
        return {"state": self._spoiled("reset", self.state, self._resets)}

    def step(self, actions: np.ndarray) -> Step:
        """Apply ``actions`` (N, 1)."""
        self._time += 1
        self._steps += 1
        reward, success, failure = self.play(np.clip(actions[:, 0], -1, 1))
        reward = self._spoiled("reward", reward, self._steps)
        terminated = np.zeros_like(success) if self.endless else success | failure
        truncated = ~terminated & (self._time >= self.max_episode_steps)
        final = {"state": self.state.copy()}
        info = {"success": success, "episode_seed": self._seed.copy()}
        self._begin(terminated | truncated)
        state = self._spoiled("observation", self.state, self._steps)
        return Step({"state": state}, reward.astype(np.float32), terminated, truncated, final, info)

    def render(self, lane: int = 0) -> np.ndarray:
        """Return a black frame."""
        return np.zeros((8, 8, 3), np.uint8)

    def close(self) -> None:
        """Nothing to release."""

    def _spoiled(self, what: NanIn, values: np.ndarray, count: int) -> np.ndarray:
        """Return a copy of ``values``, without a number in it if it is time."""
        return np.full_like(values, np.nan) if what == self.nan_in and 0 < self.nan_at <= count else values.copy()

    def _begin(self, lanes: np.ndarray) -> None:
        for i in np.flatnonzero(lanes):
            rng = np.random.default_rng(self._following[i])
            self.state[i] = self.begin(rng), rng.uniform(-1, 1)
        self._seed[lanes] = self._following[lanes]
        self._following[lanes] += self.num_envs
        self._time[lanes] = 0


class TwoModesEnv(ToyEnv):
    """One step: the base does -0.5 or 0.5, and only what is within 0.25 of 0.5 succeeds."""

    max_episode_steps = 1

    def begin(self, rng: np.random.Generator) -> float:
        """The state says nothing."""
        return 0.0

    def play(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reward 1 near 0.5."""
        success = np.abs(action - 0.5) < 0.25
        return success.astype(float), success, ~success


class OffsetEnv(ToyEnv):
    """Act within 0.1 of the goal that is observed, within four steps; the base is off by 0.16."""

    def begin(self, rng: np.random.Generator) -> float:
        """Draw the goal."""
        return rng.uniform(-0.6, 0.6)

    def play(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reward 1 near the goal."""
        success = np.abs(action - self.state[:, 0]) < 0.1
        return success.astype(float), success, np.zeros_like(success)


class ChainEnv(ToyEnv):
    """Five places in a row, start in the middle: actions above 0 go right, where 1 waits; on the left waits 0.3.

    The base goes either way; going right is worth ``discount ** (steps - 1)``: 1 from place 3, the discount from 2.
    """

    max_episode_steps = 12

    def begin(self, rng: np.random.Generator) -> float:
        """Start in the middle."""
        return 0.0

    def play(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Go one place to the right or to the left."""
        self.state[:, 0] += np.where(action > 0, 0.5, -0.5)
        success, failure = self.state[:, 0] >= 1, self.state[:, 0] <= -1
        return success + 0.3 * failure, success, failure


class RegulatorEnv(ToyEnv):
    """Linear-quadratic regulator: x += a costs x^2 + a^2 in each of four steps; the base does a = -x.

    Undiscounted the best is a = -0.618 x: the Riccati equation p = 1 + p / (1 + p) has the golden ratio as its solution
    and p / (1 + p) as its gain. Any other action costs (1 + p) (a + 0.618 x)^2 more in the end, and an episode succeeds
    if that stays below 0.05.
    """

    endless = True
    cost = (1 + 5**0.5) / 2
    gain = cost / (1 + cost)
    _regret = np.zeros(1)

    def begin(self, rng: np.random.Generator) -> float:
        """Draw the start."""
        return rng.uniform(-1, 1)

    def play(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pay for the state and the action, and move."""
        x = self.state[:, 0].copy()
        self.state[:, 0] += action
        more = (1 + self.cost) * (action + self.gain * x) ** 2
        self._regret = np.where(self._time == 1, 0.0, self._regret) + more
        success = self._regret < 0.05
        return -(x**2) - action**2, success, ~success


@dataclass(frozen=True)
class Problem:
    """A tiny environment, what the base does in it, and what an improved policy reaches."""

    env: Callable[..., ToyEnv]
    """``env(num_envs=…) -> VecEnv``."""
    demonstrate: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    """Actions (F,) of the base for states (F, 2)."""
    solved: float
    """Success rate that counts as solved; the optimum is 1."""


def _both_ways(state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.choice([-0.5, 0.5], len(state)) + 0.06 * rng.standard_normal(len(state))


def _beside(state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return state[:, 0] + 0.16 + 0.01 * rng.standard_normal(len(state))


def _too_much(state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return -state[:, 0] + 0.01 * rng.standard_normal(len(state))


TWO_MODES = Problem(TwoModesEnv, _both_ways, 0.9)
"""Bandit with a base of two modes: choose the better one."""
OFFSET = Problem(OffsetEnv, _beside, 0.9)
"""Undo a constant error of the base."""
CHAIN = Problem(ChainEnv, _both_ways, 0.9)
"""Forgo a small reward nearby for a larger one that takes the same choice twice."""
REGULATOR = Problem(RegulatorEnv, _too_much, 0.9)
"""Find a gain that is known: weigh what an action costs now against what it saves later."""

SMALL = {
    "lanes": 16,
    "block": 4,
    "batch_size": 64,
    "start_steps": 320,
    "replay_capacity": 5_000,
    "updates_per_step": 0.3,
    "critic_learning_rate": 3e-3,
    "actor_learning_rate": 3e-3,
    "rollout_steps": 8,
    "epochs": 4,
    "minibatches": 4,
    "precision": "fp32",
}
"""Settings, by their last name, that suit tiny problems; hidden layers become (32, 32) everywhere."""


@cache
def clone(problem: Problem, head: str = "flow", train_steps: int = 400) -> ChunkedPolicy:
    """Return a small chunked policy that does what the problem's base does; made once per problem and head."""
    rng, size = np.random.default_rng(0), 512
    env = problem.env(num_envs=size)
    state = env.state.copy()
    if problem is CHAIN:
        state[:, 0] = rng.integers(-1, 2, size) / 2
    action = problem.demonstrate(state, rng).astype(np.float32)[:, None]
    frames = Frames({"state": state}, action, np.arange(1, size + 1), SPEC)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = ChunkedConfig(head, obs_steps=1, horizon=2, execute_steps=1, sample_steps=5, width=32, depth=1)
        policy = ChunkedPolicy(SPEC, shape, Normalizer.fit(frames))
        optimizer = torch.optim.Adam(policy.head.parameters(), 3e-3)
        cond = policy.encode({"state": torch.from_numpy(state[:, None])})
        chunks = policy.normalize_action(torch.from_numpy(np.repeat(action[:, None], 2, axis=1)))
        for _ in range(train_steps):
            rows = torch.randint(size, (128,))
            optimizer.zero_grad()
            policy.head.loss(chunks[rows], cond[rows]).mean().backward()
            optimizer.step()
    return policy.requires_grad_(False).eval()


def small_settings(finetune: Any, options: Sequence[str] = ()) -> Any:
    """Return the method's configuration with `SMALL` settings where it has such, and then ``options`` (name=value)."""
    found = []
    for name, value, _ in describe(config_class(finetune)()):
        last = name.rsplit(".", 1)[-1]
        if last in SMALL:
            found.append(f"{name}={SMALL[last]}")
        elif last.endswith("hidden") and isinstance(value, tuple):
            found.append(f"{name}=32,32")
    return override(override(config_class(finetune)(), found), options)


def run_method(
    name: str,
    problem: Problem,
    directory: Path,
    *,
    steps: int,
    options: Sequence[str] = (),
    base: Policy | None = None,
    nan_at: int = 0,
    nan_in: NanIn = "reward",
    resume: bool = False,
    evaluations: int = 3,
) -> Policy:
    """Fine-tune with the registered method ``name`` on ``problem`` and return the best policy.

    Args:
        name: of the method.
        problem: what to solve.
        directory: of the run.
        steps: environment steps.
        options: settings of the method, each ``name=value``.
        base: policy to start from; a flow policy that does what the problem's base does by default.
        nan_at: step or reset of the training environment from which ``nan_in`` is not a number; 0 for never.
        nan_in: what of it.
        resume: continue the run in ``directory``.
        evaluations: validations besides the one at the start.
    """
    finetune = registry.load("finetuners", name)
    base = base or _clone_for(name, problem)
    session = SessionConfig(steps=steps, evaluations=evaluations, eval_episodes=40, eval_lanes=40)

    def factory(num_envs: int) -> ToyEnv:
        # The session makes one environment to train in and one to validate in; only the former is spoiled.
        spoiled = num_envs != session.eval_lanes
        return problem.env(num_envs=num_envs, nan_at=nan_at if spoiled else 0, nan_in=nan_in)

    with Run.create(directory, {"method": name}, spec=SPEC, resume=resume) as run:
        policy: Policy = finetune(base, factory, small_settings(finetune, options), run, session=session)
    return policy


def check_learns(name: str, problem: Problem, directory: Path, *, steps: int, options: Sequence[str] = ()) -> None:
    """The method solves the problem within ``steps``, and the result is a policy that can be loaded and acts alike."""
    policy = run_method(name, problem, directory, steps=steps, options=options)
    rows = read_metrics(directory, "eval")
    first, best = rows[0]["success"], max(row["success"] for row in rows[1:])
    assert best >= problem.solved, (
        f"{name} reached {best:.2f} from {first:.2f} in {steps} steps: {problem.solved} wanted"
    )
    loaded = load_policy(directory / "checkpoints" / "best")
    history = {"state": np.random.default_rng(0).uniform(-0.5, 0.5, (4, policy.obs_steps, 2)).astype(np.float32)}
    chunks = []
    for one in (policy, loaded):
        one.seed(1)
        planned = one.plan(history)
        chunks.append(np.append(planned, one.refine(history, planned[:, 0])))
    assert np.array_equal(chunks[0], chunks[1]), (
        f"{name}: the policy that was returned and the one that was saved act differently"
    )


def check_resumes(name: str, problem: Problem, directory: Path, *, options: Sequence[str] = ()) -> None:
    """A run that ended goes on where it was: steps and time go on, and no row of the log is written twice."""
    run_method(name, problem, directory, steps=700, options=options, evaluations=1)
    logged = read_metrics(directory, "finetune")
    assert logged, f"{name} has no rows of stage 'finetune' in its log: one of its metrics is called 'stage'?"
    before = logged[-1]
    run_method(name, problem, directory, steps=1400, options=options, evaluations=2, resume=True)
    rows = read_metrics(directory, "finetune")
    later = [row for row in rows if row["step"] > before["step"]]
    assert later, f"{name} did not go on after {before['step']} steps"
    assert later[0]["step"] - before["step"] < before["step"], f"{name} lost its count of steps"
    assert later[0]["seconds"] > before["seconds"], f"{name} lost its count of time"
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), f"{name} wrote a step of the log twice"


def check_stops_at_nan(
    name: str,
    problem: Problem,
    directory: Path,
    *,
    where: NanIn | Literal["loss"] = "reward",
    options: Sequence[str] = (),
) -> None:
    """What is not a number ends the run with its step and name, a dump, and the last good policy.

    Args:
        name: of the method.
        problem: what to solve.
        directory: of the run.
        where: what is not a number: a reward, an observation, that of the reset with which a run is resumed, or a loss.
        options: settings of the method, each ``name=value``.
    """
    what = {"reset": "first observation 'state'", "observation": "observation 'state'"}.get(where, where)
    spoil: dict[str, Any] = {"nan_at": 10, "nan_in": where}
    if where == "loss":
        options, spoil = (*options, "core.critic_learning_rate=1e30"), {}
    elif where == "reset":
        run_method(name, problem, directory, steps=300, options=options, evaluations=1)
        spoil = {"nan_at": 2, "nan_in": where, "resume": True}  # the first reset is that of a new learner
    try:
        run_method(name, problem, directory, steps=5000, options=options, evaluations=1, **spoil)
    except NonFiniteError as error:
        message = str(error)
    else:
        raise AssertionError(f"{name} learned from a {where} that is not a number")
    found = re.match(rf"\w*{what} is not finite at environment step (\d+)", message)
    assert found, f"{name} does not say that it is the {where}: {message}"
    assert int(found[1]) > 0, f"{name} does not say at which step: {message}"
    assert (Path(directory) / f"not_finite_{found[1]}.npz").exists(), f"{name} left no dump"
    policy = load_policy(Path(directory) / "checkpoints" / "best")
    plan = policy.plan({"state": np.zeros((4, policy.obs_steps, 2), np.float32)})
    assert np.isfinite(plan).all(), f"{name} kept a policy that is broken"


def check_refuses(name: str, base: Policy, problem: Problem, directory: Path, listed: str) -> None:
    """A base that the method cannot use is refused in one line that names one it can (``listed``)."""
    try:
        run_method(name, problem, directory, steps=100, base=base, evaluations=1)
    except CapabilityError as error:
        message = str(error)
    else:
        raise AssertionError(f"{name} took a base that it cannot use")
    assert "\n" not in message, f"{name} refuses in more than one line"
    assert listed in message, f"{name} does not say that '{listed}' would do: {message}"


def _clone_for(name: str, problem: Problem) -> ChunkedPolicy:
    """Return a clone with a head that the method takes."""
    return clone(problem, HEADS.get(name, "flow"))


HEADS = {"dppo": "diffusion"}
"""Head of the base for methods that do not take a flow."""
