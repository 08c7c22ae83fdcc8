"""A deployment on a virtual clock: fake policy, fake robot, lock-step transport. Imported by the tests beside it."""

import numpy as np

from hardware.control.executor import Executor, ExecutorConfig
from hardware.policy_process import PolicyServer
from hardware.robots.fake import FakeRobot, FaultyRobot
from hardware.transport import InProcessTransport
from robot_rl.core.spec import Spec
from robot_rl.core.teleop import OperatorEvent, OperatorInput


class VirtualClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class WanderingPolicy:
    """Plans smooth chunks that depend on the newest observation, the oldest one and a seeded stream of noise."""

    closed_loop = False

    def __init__(self, spec, obs_steps=2, horizon=8, execute_steps=4, closed_loop=False, speed=0.01):
        self.spec = Spec({"state": spec.observation["state"]}, spec.action, spec.rate_hz)
        self.obs_steps, self.horizon, self.execute_steps = obs_steps, horizon, execute_steps
        self.closed_loop, self.speed = closed_loop, speed
        self.planned = 0
        self.seed(0)

    def seed(self, seed):
        self._rng = np.random.default_rng(seed)

    def plan(self, history):
        self.planned += 1
        state = history["state"]
        drift = state[:, -1] - state[:, 0]
        direction = self._rng.uniform(-1, 1, state[:, -1].shape)
        steps = self.speed * np.arange(1, self.horizon + 1)
        chunk = state[:, -1:] + 0.1 * drift[:, None] + direction[:, None] * steps[None, :, None]
        return np.clip(chunk, -0.9, 0.9).astype(np.float32)

    def refine(self, history, actions):
        if not self.closed_loop:
            return actions
        return (actions + 0.01 * np.sin(7 * history["state"][:, -1])).astype(np.float32)


class Rig:
    """Everything of a deployment, ticked by hand."""

    def __init__(self, policy=None, camera=False, faulty=False, limits=None, size=3, **config):
        self.clock = VirtualClock()
        self.plain = FakeRobot(size, camera=camera, clock=self.clock, limits=limits)
        self.robot = FaultyRobot(self.plain) if faulty else self.plain
        self.policy = policy or WanderingPolicy(self.plain.spec)
        self.transport = InProcessTransport(quiet=True)
        self.server = PolicyServer(self.policy, self.transport.policy)
        self.transport.on_observation = self.serve
        self.alive = True
        closed = self.policy.closed_loop
        defaults = {"execute_steps": 1 if closed else self.policy.execute_steps, "blend_seconds": 0.0}
        config = {"interpolation": "hold", **defaults, **config}
        self.executor = Executor(self.robot, self.transport.executor, ExecutorConfig(**config), clock=self.clock)
        self.executor.connect()
        self.seq = 0
        self.steering = np.zeros(size)
        self.operator_alive = True

    def serve(self):
        if self.alive:
            self.server.serve_once()

    def tick(self, *events, count=1):
        verdict = None
        for _ in range(count):
            if self.operator_alive:
                self.seq += 1
                enabled = bool(self.steering.any())
                self.transport.send_operator(OperatorInput(self.clock.now, self.seq, enabled, self.steering, events))
            events = ()
            verdict = self.executor.tick()
            self.clock.now += self.executor.dt
        return verdict

    def start(self):
        """Enable and run until the policy drives."""
        self.tick(OperatorEvent.ENABLE)
        assert self.mode in ("align", "auto")
        return self

    @property
    def mode(self):
        return self.executor.arbiter.mode.value

    @property
    def reason(self):
        return self.executor.arbiter.reason

    def moved(self, ticks):
        """Return by how much the command moved in each of the next ``ticks`` ticks."""
        sizes = []
        for _ in range(ticks):
            before = self.executor.safety.command.copy()
            self.tick()
            sizes.append(float(np.abs(self.executor.safety.command - before).max()))
        return np.array(sizes)


def smooth_path(rng, dt, rise, count=500, size=7):
    """Return a random path (count, size) in ticks of ``dt`` seconds; ``rise`` - 1 of its derivatives start at 0."""
    time = np.arange(count)[:, None] * dt
    waves = [np.sin(time * rng.uniform(0.2, 6.0, size) + rng.uniform(0, 6.3, size)) for _ in range(4)]
    return rng.uniform(-2, 2, size) + 10 ** rng.uniform(-3, 0, size) * sum(waves) * (1 - np.exp(-time)) ** rise
