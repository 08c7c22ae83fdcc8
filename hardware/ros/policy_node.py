"""The policy process: loads a checkpoint, takes observations from ROS 2 and answers with chunks of actions."""

from __future__ import annotations

import json
import logging
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from hardware.policy_process import load_and_warm, serve
from hardware.ros.endpoint import Endpoint
from hardware.ros.link import CHUNK, RosPolicyLink
from hardware.ros.node import run_node, wait_for_robot
from robot_rl.core.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicyNodeConfig:
    """Settings of the policy process."""

    policy: str = ""
    """Directory of the policy's checkpoint."""
    device: str = "cpu"
    """Torch device of the inference."""
    threads: int = 1
    """Threads of the inference; 1 leaves the other cores to the control loop."""
    trace: bool = False
    """Run the network without Python between its operations: the same numbers, sooner (see `trace_network`)."""
    pin: bool = False
    """Keep off the processor of a control loop that is pinned too."""
    seed: int = 0
    """Seed of the policy's sampling."""
    robot_timeout: float = 60.0
    """Seconds to wait for an executor to announce its robot."""
    report: str = ""
    """JSON file that gets the counts and inference times at the end; empty for none."""

    def __post_init__(self) -> None:
        if not self.policy:
            raise ConfigError("no policy given: --policy <checkpoint directory>, or the parameter 'policy'")
        if self.threads < 1:
            raise ConfigError(f"threads is {self.threads}, expected 1 or more")


def run(config: PolicyNodeConfig, endpoint: Endpoint, stop: threading.Event) -> None:
    """Load the policy, check that it fits the robot, and serve it until ``stop`` is set.

    Raises:
        SpecMismatchError: the policy was made for another robot; the message lists the differences.
        HardwareError: no executor announced itself in time, or another policy process runs already.
    """
    policy = load_and_warm(
        config.policy, threads=config.threads, seed=config.seed, device=config.device, trace=config.trace
    )
    images = tuple(key for key, one in policy.spec.observation.items() if one.is_image)
    link = RosPolicyLink(endpoint, images)
    endpoint.require_alone(CHUNK, "policy process")
    robot = wait_for_robot(link, config.robot_timeout, stop)
    if robot is None:
        return
    policy.spec.require(robot, f"Policy '{config.policy}'", "the robot")
    report = serve(policy, link, stop, warm=False, pin=config.pin)
    inference = report.inference.summary("inference")
    logger.info("served %d steps with %d chunks, %s", report.steps, report.chunks, inference)
    if config.report:
        path = Path(config.report)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report.to_json(), indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the policy process and return its exit code."""
    return run_node("policy", PolicyNodeConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
