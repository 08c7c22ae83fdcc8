"""A simulated robot on a simulated clock: the executor's whole path, as fast as the machine computes it."""

from __future__ import annotations

from typing import Any

from hardware.control.executor import Executor, ExecutorConfig
from hardware.policy_process import PolicyServer
from hardware.transport import InProcessTransport
from robot_rl.core.bridge import EnvRobot
from robot_rl.core.policy import Policy


class SimulatedClock:
    """Time that passes only where it is told to."""

    def __init__(self, start: float = 1000.0) -> None:
        self.time = start

    def __call__(self) -> float:
        """Return the present time in seconds."""
        return self.time


class LockStep:
    """An executor, its robot and its policy, which take turns.

    Nothing is left out against real time: arbiter, chunk player, safety chain, operator and recorder run tick by tick.
    Only nothing is ever late.
    """

    def __init__(
        self,
        robot: EnvRobot,
        policy: Policy,
        config: ExecutorConfig,
        clock: SimulatedClock,
        transport: InProcessTransport | None = None,
        **executor: Any,
    ) -> None:
        """Put ``robot`` (in lock-step, on ``clock``) under an executor, whose other arguments are ``executor``."""
        self.robot, self.clock = robot, clock
        self.transport = transport or InProcessTransport(quiet=True)
        server = PolicyServer(policy, self.transport.policy)
        self.transport.on_observation = server.serve_once
        self.executor = Executor(robot, self.transport.executor, config, clock=clock, **executor)
        self.executor.connect()

    def tick(self) -> None:
        """Let one tick pass."""
        self.executor.tick()
        self.robot.advance()
        self.clock.time += self.executor.dt

    def close(self) -> None:
        """Stop and disconnect the robot."""
        self.executor.shut_down()
