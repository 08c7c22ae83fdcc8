"""Contract suites that anyone who writes a plug-in can run: ``check_vec_env(lambda n, **options: make(n, **options))``.

Each check raises `AssertionError` with a sentence that says which rule was broken.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from robot_rl.core.env import Observation, Step, VecEnv
from robot_rl.core.errors import RobotRLError
from robot_rl.core.spec import ArraySpec

EnvFactory = Callable[..., VecEnv]
"""``factory(num_envs) -> VecEnv``."""


def check_vec_env(factory: EnvFactory, *, seed: int = 11, max_steps: int = 1100, tolerance: float = 0.0) -> None:
    """Check every rule of `robot_rl.core.env.VecEnv` on environments that ``factory`` makes.

    Args:
        factory: builds an environment from a number of lanes.
        seed: first episode seed.
        max_steps: control steps after which the search for ends of episodes is given up.
        tolerance: largest difference of observations that must be equal; 0 for bitwise.
    """
    check_interface(factory, seed)
    check_determinism(factory, seed, tolerance)
    check_lane_independence(factory, seed, tolerance)
    check_episodes(factory, seed, max_steps, tolerance)
    check_bad_input(factory, seed)


def random_actions(spec: ArraySpec, num_envs: int, rng: np.random.Generator) -> np.ndarray:
    """Return actions (N, A): uniform within the bounds, standard normal where there are none."""
    low, high = spec.bounds()
    bounded = np.isfinite(low) & np.isfinite(high)
    uniform = rng.uniform(np.where(bounded, low, 0.0), np.where(bounded, high, 1.0), (num_envs, *spec.shape))
    return np.where(bounded, uniform, rng.standard_normal((num_envs, *spec.shape))).astype(np.float32)


def check_interface(factory: EnvFactory, seed: int) -> None:
    """Attributes, observations and steps have the shapes and element types that the spec and the contract say."""
    env = factory(3)
    assert isinstance(env, VecEnv), f"{type(env).__name__} lacks a member of VecEnv"
    assert env.num_envs == 3, f"num_envs is {env.num_envs} after building 3 lanes"
    assert env.max_episode_steps > 0, "max_episode_steps must be positive"
    assert env.spec.observation, "the spec names no observation"
    first = env.reset(seed)
    _check_observation(env, first, "reset")
    kept = {key: value.copy() for key, value in first.items()}
    rng = np.random.default_rng(seed)
    for _ in range(3):
        _check_step(env, env.step(random_actions(env.spec.action, 3, rng)))
    for key, value in kept.items():
        assert np.array_equal(first[key], value), f"step() overwrote observation '{key}' that reset() had returned"
    env.close()


def check_determinism(factory: EnvFactory, seed: int, tolerance: float = 0.0) -> None:
    """The same seed and actions give the same roll-out, in the same object and in a new one; another seed differs."""
    env = factory(2)
    runs = [_roll_out(env, seed, 8), _roll_out(env, seed, 8)]
    env.close()
    fresh = factory(2)
    runs.append(_roll_out(fresh, seed, 8))
    for run in runs[1:]:
        for before, after in zip(runs[0], run, strict=True):
            _assert_equal(before, after, tolerance, "two roll-outs with the same seed and actions")
    other = fresh.reset(seed + 1000)
    same = all(np.array_equal(other[key], runs[0][0][key]) for key in other)
    assert not same, "another seed gives the same first observation"
    fresh.close()


def check_lane_independence(factory: EnvFactory, seed: int, tolerance: float = 0.0) -> None:
    """An episode seed gives the same episode in any lane of any number of lanes."""
    many, one = factory(3), factory(1)
    actions = np.repeat(random_actions(many.spec.action, 1, np.random.default_rng(seed)), 3, axis=0)
    first = many.reset(seed)
    steps = [many.step(actions) for _ in range(5)]
    for lane in range(3):
        _assert_equal(_lane(first, lane), _lane(one.reset(seed + lane), 0), tolerance, f"seed {seed + lane} alone")
        for step in steps:
            alone = one.step(actions[:1])
            _assert_equal(
                _lane(step.final_observation, lane), _lane(alone.final_observation, 0), tolerance, f"lane {lane} alone"
            )
            if alone.done[0]:
                break
    reordered = many.reset([seed + 2, seed, seed + 1])
    for lane, source in enumerate((2, 0, 1)):
        _assert_equal(_lane(reordered, lane), _lane(first, source), tolerance, "reset with a list of seeds")
    many.close()
    one.close()


def check_episodes(factory: EnvFactory, seed: int, max_steps: int, tolerance: float = 0.0) -> None:
    """Episodes end once, by one cause, within the time limit, and the next one starts in the same step."""
    env, single = factory(2), factory(1)
    env.reset(seed)
    rng = np.random.default_rng(seed)
    elapsed, count, succeeded = np.zeros(2, int), np.zeros(2, int), np.zeros(2, bool)
    for _ in range(min(max_steps, env.max_episode_steps + 5)):
        step = env.step(random_actions(env.spec.action, 2, rng))
        _check_step(env, step)
        elapsed += 1
        expected = seed + np.arange(2) + 2 * count
        assert np.array_equal(step.info["episode_seed"], expected), (
            f"episode_seed is {step.info['episode_seed']}, expected seed + lane + episode * lanes = {expected}"
        )
        success = step.info["success"]
        assert not (succeeded & ~success).any(), "success was taken back within an episode"
        assert (elapsed <= env.max_episode_steps).all(), f"an episode lasted more than {env.max_episode_steps} steps"
        late = (elapsed == env.max_episode_steps) & ~step.done
        assert not late.any(), f"no end at the time limit of {env.max_episode_steps} steps"
        succeeded = success & ~step.done
        for lane in np.flatnonzero(step.done).tolist():
            fresh = single.reset(seed + lane + 2 * (int(count[lane]) + 1))
            _assert_equal(_lane(step.observation, lane), _lane(fresh, 0), tolerance, "the automatic reset")
        count[step.done] += 1
        elapsed[step.done] = 0
    env.reset(None)
    after = env.step(random_actions(env.spec.action, 2, rng)).info["episode_seed"]
    expected = seed + np.arange(2) + 2 * (count + 1)
    assert np.array_equal(after, expected), f"reset(None) went on with seeds {after}, expected {expected}"
    env.close()
    single.close()


def check_bad_input(factory: EnvFactory, seed: int) -> None:
    """Wrong actions raise one-line errors; actions beyond the bounds act like the nearest permitted ones."""
    env = factory(2)
    env.reset(seed)
    good = random_actions(env.spec.action, 2, np.random.default_rng(seed))
    not_finite = good.copy()
    not_finite.flat[-1] = np.nan
    for actions, fault in ((good[:, :-1], "shape"), (good[0], "shape"), (not_finite, "finite")):
        message = _refusal(env, actions)
        assert message is not None, f"actions with a wrong {fault} were accepted"
        assert "\n" not in message, f"the error about {fault} has more than one line"
        assert fault in message, f"the error does not speak of {fault}: {message}"
    low, high = env.spec.action.bounds()
    if np.isfinite(high).all() and np.isfinite(low).all():
        env.reset(seed)
        inside = env.step(np.stack([high, low]).astype(np.float32))
        env.reset(seed)
        beyond = env.step(np.stack([high + 10.0, low - 10.0]).astype(np.float32))
        _assert_equal(inside.final_observation, beyond.final_observation, 1e-5, "actions beyond and at the bounds")
    env.close()


def _refusal(env: VecEnv, actions: np.ndarray) -> str | None:
    try:
        env.step(actions)
    except RobotRLError as error:
        return str(error)
    return None


def _check_observation(env: VecEnv, observation: Observation, where: str) -> None:
    missing = set(env.spec.observation) ^ set(observation)
    assert not missing, f"{where}: observation keys differ from the spec: {sorted(missing)}"
    for key, spec in env.spec.observation.items():
        value = observation[key]
        shape = (env.num_envs, *spec.shape)
        assert value.shape == shape, f"{where}: '{key}' has shape {value.shape}, the spec says {shape}"
        assert value.dtype == spec.dtype, f"{where}: '{key}' is {value.dtype}, the spec says {spec.dtype}"
        assert np.isfinite(value).all(), f"{where}: '{key}' holds a value that is not finite"


def _check_step(env: VecEnv, step: Step) -> None:
    _check_observation(env, step.observation, "step")
    _check_observation(env, step.final_observation, "final_observation")
    lanes = (env.num_envs,)
    for name, dtype in (("reward", np.float32), ("terminated", np.bool_), ("truncated", np.bool_)):
        value = getattr(step, name)
        assert value.shape == lanes, f"{name} has shape {value.shape}, expected {lanes}"
        assert value.dtype == dtype, f"{name} is {value.dtype}, expected {np.dtype(dtype)}"
    assert np.isfinite(step.reward).all(), "reward holds a value that is not finite"
    assert not (step.terminated & step.truncated).any(), "terminated and truncated are both set"
    for name, kind in (("success", "b"), ("episode_seed", "i")):
        assert name in step.info, f"info lacks '{name}'"
        assert step.info[name].dtype.kind == kind, f"info['{name}'] is {step.info[name].dtype}"
    for name, value in step.info.items():
        assert len(value) == env.num_envs, f"info['{name}'] has {len(value)} rows, expected {env.num_envs}"
    going = ~step.done
    for key, value in step.observation.items():
        same = np.array_equal(value[going], step.final_observation[key][going])
        assert same, f"'{key}' of a lane that goes on differs between observation and final_observation"


def _roll_out(env: VecEnv, seed: int, steps: int) -> list[Observation]:
    rng = np.random.default_rng(seed)
    observations = [env.reset(seed)]
    for _ in range(steps):
        step = env.step(random_actions(env.spec.action, env.num_envs, rng))
        observations.append({**step.observation, "reward": step.reward})
    return observations


def _lane(observation: Observation, lane: int) -> Observation:
    return {key: value[lane] for key, value in observation.items()}


def _assert_equal(left: Observation, right: Observation, tolerance: float, what: str) -> None:
    for key, value in left.items():
        if np.issubdtype(value.dtype, np.floating):
            gap = float(np.max(np.abs(value - right[key]), initial=0.0))
            assert gap <= tolerance, f"{what}: '{key}' differs by {gap:g}"
        else:
            assert np.array_equal(value, right[key]), f"{what}: '{key}' differs"
