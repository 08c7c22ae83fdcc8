"""How a policy does alone, on the path on which it will run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from hardware.control.settings import ExecutorConfig
from hardware.hil.lockstep import LockStep, SimulatedClock
from hardware.hil.operator import OperatorHabits, ScriptedOperator
from hardware.robots.sim import SimRobot
from hardware.safety.protection import Protection
from hardware.transport import InProcessTransport
from robot_rl.core.errors import CapabilityError
from robot_rl.core.robot import Robot


def run_alone(
    policy: Any,
    task: str,
    executor: ExecutorConfig,
    episodes: int,
    first_seed: int,
    options: Mapping[str, Any] | None = None,
    protect: Callable[[Robot], Protection | None] = lambda robot: None,
) -> list[bool]:
    """Let a policy act in a simulated task through the executor, on simulated time and without help.

    Args:
        policy: the policy; one that explores should have been told not to.
        task: registered task.
        executor: settings of the control loop.
        episodes: number of episodes.
        first_seed: seed of the first scene; the others follow it.
        options: further options of the simulated robot.
        protect: what the safety chain is told besides the robot's limits.

    Returns:
        Whether each episode succeeded.

    Raises:
        CapabilityError: the task's episodes do not end.
    """
    clock = SimulatedClock()
    chosen: dict[str, Any] = {"task": task, "tick_rate_hz": executor.tick_rate_hz, **(options or {})}
    robot = SimRobot(**chosen | {"seed": first_seed, "lock_step": True, "clock": clock})
    transport = InProcessTransport(quiet=True)
    attendant = ScriptedOperator(robot, lambda: transport.status, OperatorHabits(corrects=False), clock=clock)
    steps = 1 if policy.closed_loop else policy.execute_steps
    settings = dataclasses.replace(executor, execute_steps=steps, autostart=True)
    policy.seed(first_seed)
    path = LockStep(robot, policy, settings, clock, transport, teleop=attendant, protection=protect(robot))
    patience = 10 * episodes * robot.env.max_episode_steps * path.executor.ticks_per_step
    try:
        for _ in range(patience):
            if len(robot.outcomes) >= episodes:
                return robot.outcomes[:episodes]
            path.tick()
    finally:
        path.close()
    raise CapabilityError(f"the task '{task}' ended {len(robot.outcomes)} of {episodes} episodes")
