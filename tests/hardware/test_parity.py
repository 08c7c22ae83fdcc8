"""The same checkpoint and observations give the same actions in evaluation and deployment."""

import numpy as np
import pytest
from deployment_rig import VirtualClock, WanderingPolicy

from hardware.control.executor import Executor, ExecutorConfig
from hardware.policy_process import PolicyServer, warm_up
from hardware.transport import InProcessTransport
from robot_rl.core.bridge import EnvRobot
from robot_rl.core.env import Step
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.core.teleop import OperatorEvent, OperatorInput
from robot_rl.rollout.evaluate import evaluate

STEPS = 40


class PointEnv:
    """A point with inertia that is pulled to its target; integrates in substeps, as the engine does."""

    def __init__(self, num_envs=1, size=3):
        self.num_envs, self.substeps, self.max_episode_steps = num_envs, 10, STEPS
        low, high = (-1.0,) * size, (1.0,) * size
        action = ArraySpec((size,), unit="m", low=low, high=high)
        self.spec = Spec({"state": ArraySpec((size,))}, action, 20.0)
        self.size, self.actions = size, []

    def reset(self, seed=None):
        start = np.random.default_rng(0 if seed is None else seed).uniform(-0.3, 0.3, (self.num_envs, self.size))
        self.position, self.velocity, self.elapsed = start, np.zeros_like(start), 0
        self.set_action(start)
        return self.observe()

    def set_action(self, actions):
        self.target = np.asarray(actions, float)

    def advance(self, substeps):
        for _ in range(substeps):
            self.velocity += 0.005 * (200 * (self.target - self.position) - 20 * self.velocity)
            self.position = self.position + 0.005 * self.velocity

    def observe(self):
        return {"state": self.position.astype(np.float32)}

    def hold_action(self):
        return self.position.copy()

    def finish(self):
        self.actions.append(self.target[0].copy())
        self.elapsed += 1
        over = np.full(self.num_envs, self.elapsed >= self.max_episode_steps)
        info = {"success": over & False, "episode_seed": np.arange(self.num_envs) + 1_000_000}
        final = self.observe()
        first = self.reset(1) if over.any() else final
        return Step(first, np.zeros(self.num_envs, np.float32), over & False, over, final, info)

    def step(self, actions):
        self.set_action(actions)
        self.advance(self.substeps)
        return self.finish()


def deploy_in_lock_step(policy, env, seed, steps, closed_loop=False):
    """Return the executed actions (steps, A) of a deployment in which nothing is late."""
    clock = VirtualClock()
    robot = EnvRobot(env, lock_step=True, seed=seed, clock=clock)
    transport = InProcessTransport(quiet=True)
    warm_up(policy, seed)
    server = PolicyServer(policy, transport.policy)
    transport.on_observation = server.serve_once
    settings = ExecutorConfig(
        tick_rate_hz=robot.tick_rate_hz,
        execute_steps=1 if closed_loop else policy.execute_steps,
        late_steps=0,
        interpolation="hold",
        blend_seconds=0.0,
    )
    executor = Executor(robot, transport.executor, settings, clock=clock)
    executor.connect()
    size = env.spec.action.size
    transport.send_operator(OperatorInput(clock.now, 0, False, np.zeros(size), (OperatorEvent.ENABLE,)))
    actions = []
    for _ in range(steps):
        for _ in range(executor.ticks_per_step):
            verdict = executor.tick()
            robot.advance()
            clock.now += executor.dt
        actions.append(verdict.command)
    assert executor.arbiter.mode.value == "auto"
    assert not executor.safety.counts
    return np.array(actions)


@pytest.mark.parametrize("closed_loop", [False, True])
def test_deployment_plays_exactly_the_actions_of_evaluation(closed_loop):
    seed = 1_000_000
    evaluated = PointEnv()
    # Slow enough that no stage of the safety chain has a reason to intervene.
    policy = WanderingPolicy(evaluated.spec, closed_loop=closed_loop, speed=0.002)
    evaluate(policy, evaluated, episodes=1, seed=seed)
    executed = deploy_in_lock_step(policy, PointEnv(), seed, STEPS - 1, closed_loop)
    np.testing.assert_array_equal(executed, np.array(evaluated.actions)[: STEPS - 1])
    assert np.ptp(executed, axis=0).min() > 0.001


def tuned(kind, spec):
    """Return a small policy of ``kind`` in which every part has a say, as after training."""
    torch = pytest.importorskip("torch")
    from robot_rl.data.normalizer import Normalizer
    from robot_rl.policies.best_of import BestOfConfig, BestOfPolicy
    from robot_rl.policies.chunk_critic import ChunkCritic, ChunkCriticConfig
    from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
    from robot_rl.policies.residual import ResidualPolicy, ResidualPolicyConfig
    from robot_rl.policies.steered import SteeredPolicy, SteeredPolicyConfig

    torch.manual_seed(0)
    base = ChunkedPolicy(spec, ChunkedConfig(width=32, depth=1, sample_steps=2), Normalizer(spec))
    make = {
        "chunked": lambda: base,
        "residual": lambda: ResidualPolicy(base, ResidualPolicyConfig(hidden=(16,))),
        "steered": lambda: SteeredPolicy(base, SteeredPolicyConfig(hidden=(16,))),
        "best_of": lambda: BestOfPolicy(
            base, ChunkCritic(spec, ChunkCriticConfig(hidden=(16,))), BestOfConfig(candidates=4, edits=2)
        ),
    }
    policy = make[kind]()
    with torch.no_grad():
        for parameter in policy.parameters():  # some begin at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def play(policy, env, seed, steps):
    """Return the actions (steps, A) of an evaluation's episode."""
    from robot_rl.rollout.player import PolicyRunner

    policy.seed(seed)
    runner, observation, actions = PolicyRunner(policy, 1), env.reset(seed), []
    for _ in range(steps):
        actions.append(runner.step(observation)[0])
        observation = env.step(actions[-1][None]).observation
    return np.array(actions)


@pytest.mark.parametrize("kind", ["chunked", "residual", "steered", "best_of"])
def test_a_checkpoint_plays_the_same_on_a_simulated_task(kind, tmp_path):
    pytest.importorskip("torch")
    from robot_rl.core.registry import make_env
    from robot_rl.policies.checkpoint import load_policy, save_policy

    seed, steps = 1_000_003, 20
    env, other = (make_env("navigate", 1, threads=1) for _ in range(2))
    path = save_policy(tuned(kind, env.spec), tmp_path / "best")
    actions = play(load_policy(path), env, seed, steps)
    if kind != "chunked":
        assert (actions != play(load_policy(path).base, env, seed, steps)).any(), "what was tuned has a say"
    # An untrained policy jumps; with its limits out of reach the chain passes everything.
    other.command_velocity, other.command_acceleration = np.full(2, 1e6), np.full(2, 1e9)
    deployed = load_policy(path)
    executed = deploy_in_lock_step(deployed, other, seed, steps, deployed.closed_loop)
    np.testing.assert_array_equal(executed.astype(np.float32), actions)
    env.close()
    other.close()
