"""The policy process: loads a checkpoint, takes observations from ROS 2 and answers with chunks of actions."""

from __future__ import annotations

import json
import logging
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hardware.policy_process import load_and_warm, serve
from hardware.ros.endpoint import Endpoint
from hardware.ros.lifecycle import ManagedConfig, run_managed_node
from hardware.ros.link import CHUNK, RosPolicyLink
from hardware.ros.node import wait_for_robot
from hardware.ros.parameters import Range
from robot_rl.core.errors import ConfigError
from robot_rl.core.realtime import RealTimeConfig, require_real_time

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicyNodeConfig(ManagedConfig):
    """Settings of the policy process."""

    policy: str = ""
    """Directory of the policy's checkpoint or export, or the address of a policy server."""
    device: str = "cpu"
    """Torch device of the inference."""
    threads: Annotated[int, Range(1)] = 1
    """Threads of the inference; 1 leaves the other cores to the control loop."""
    trace: bool = False
    """Run the network without Python between its operations: the same numbers, sooner (see `trace_network`)."""
    pin: bool = False
    """Keep off the processor of a control loop that is pinned too."""
    seed: int = 0
    """Seed of the policy's sampling."""
    robot_timeout: Annotated[float, Range(0.0)] = 60.0
    """Seconds to wait for an executor to announce its robot."""
    real_time: str = "off"
    """How a new chunk goes on from the running one: off, guided_full, guided_identity or prefix."""
    real_time_max_delay: Annotated[int, Range(1)] = 4
    """Most actions that may be executed while a chunk is planned that goes on from another."""
    real_time_max_weight: Annotated[float, Range(0.0)] = 5.0
    """Of the guided ways: largest weight of the correction."""
    report: str = ""
    """JSON file that gets the counts and inference times at the end; empty for none."""

    def __post_init__(self) -> None:
        if not self.policy:
            raise ConfigError("no policy given: --policy <checkpoint directory>, or the parameter 'policy'")


class PolicyWork:
    """A policy, loaded and warm, that serves one robot while it is active."""

    def __init__(self, config: PolicyNodeConfig, endpoint: Endpoint) -> None:
        """Load the policy and warm it up; `HardwareError` where another policy process runs already."""
        self.config = config
        self.policy = load_and_warm(
            config.policy, threads=config.threads, seed=config.seed, device=config.device, trace=config.trace
        )
        self.real_time = RealTimeConfig.of(config.real_time, config.real_time_max_delay, config.real_time_max_weight)
        require_real_time(self.policy, self.real_time)
        images = tuple(key for key, one in self.policy.spec.observation.items() if one.is_image)
        self.link = RosPolicyLink(endpoint, images)
        endpoint.require_alone(CHUNK, "policy process")

    def start(self) -> None:
        """Forget observations of the time before."""
        while self.link.receive_observation(0.0) is not None:
            pass

    def run(self, stop: threading.Event) -> None:
        """Wait for a robot, check that the policy fits it, and serve it until ``stop`` is set.

        Raises:
            SpecMismatchError: the policy was made for another robot; the message lists the differences.
            HardwareError: no executor announced itself in time.
        """
        config = self.config
        robot = wait_for_robot(self.link, config.robot_timeout, stop)
        if robot is None:
            return
        self.policy.spec.require(robot, f"Policy '{config.policy}'", "the robot")
        report = serve(self.policy, self.link, stop, warm=False, pin=config.pin, real_time=self.real_time)
        inference = report.inference.summary("inference")
        logger.info("served %d steps with %d chunks, %s", report.steps, report.chunks, inference)
        if config.report:
            path = Path(config.report)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report.to_json(), indent=2) + "\n")

    def close(self) -> None:
        """Nothing to release: the policy goes with this object."""


def main(argv: list[str] | None = None) -> int:
    """Run the policy process and return its exit code."""
    return run_managed_node("policy", PolicyNodeConfig, PolicyWork, argv)


if __name__ == "__main__":
    sys.exit(main())
