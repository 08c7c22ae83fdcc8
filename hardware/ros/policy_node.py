"""The policy process: loads a checkpoint, takes observations from ROS 2 and answers with chunks of actions."""

from __future__ import annotations

import json
import logging
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np

from hardware.attempts import AttemptConfig, judged_attempts
from hardware.policy_process import PolicyReport, load_and_warm, serve
from hardware.ros.endpoint import Endpoint
from hardware.ros.lifecycle import ManagedConfig, run_managed_node
from hardware.ros.link import CHUNK, RosOperatorLink, RosPolicyLink
from hardware.ros.node import wait_for_robot
from hardware.ros.parameters import Range
from robot_rl.core.errors import ConfigError
from robot_rl.core.policy import Policy
from robot_rl.core.realtime import RealTimeConfig, require_real_time
from robot_rl.core.spec import Spec

if TYPE_CHECKING:
    from robot_rl.policies.success import SuccessClassifier

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
    verifier: str = ""
    """Success classifier that judges each attempt, a directory; the process ends after a success or the last attempt.
    The executor's execute_steps must be 1, and its status_rate_hz no less than the policy's rate."""
    retries: Annotated[int, Range(0)] = 2
    """With a verifier: attempts after the first, each after going back the way the robot came."""
    attempt_seconds: Annotated[float, Range(0.0)] = 20.0
    """With a verifier: an attempt that has not succeeded by then has failed."""
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
        self.real_time = RealTimeConfig.of(config.real_time, config.real_time_max_delay, config.real_time_max_weight)
        self.policy: Policy = load_and_warm(
            config.policy,
            threads=config.threads,
            seed=config.seed,
            device=config.device,
            trace=config.trace,
            real_time=self.real_time,
        )
        seen = dict(self.policy.spec.observation)
        self.verifier: SuccessClassifier | None = None
        if config.verifier:
            from robot_rl.policies.success import load_classifier

            self.verifier = load_classifier(config.verifier)
            seen |= self.verifier.spec.observation
            # What the executor does arrives with its status; the verdicts on attempts go out as an operator's wishes.
            self.executor = RosOperatorLink(endpoint)
        images = tuple(key for key, one in seen.items() if one.is_image)
        self.link = RosPolicyLink(endpoint, images)
        endpoint.require_alone(CHUNK, "policy process")

    def start(self) -> None:
        """Forget observations of the time before."""
        while self.link.receive_observation(0.0) is not None:
            pass

    def run(self, stop: threading.Event) -> None:
        """Wait for a robot, check that the policy fits it, and serve it until ``stop`` is set.

        Raises:
            SpecMismatchError: policy or verifier were made for another robot; the message lists the differences.
            HardwareError: no executor announced itself in time.
        """
        config = self.config
        robot = wait_for_robot(self.link, config.robot_timeout, stop)
        if robot is None:
            return
        self.policy.spec.require(robot, f"Policy '{config.policy}'", "the robot")
        report = self._serve(robot, stop)
        inference = report.inference.summary("inference")
        logger.info("served %d steps with %d chunks, %s", report.steps, report.chunks, inference)
        if config.report:
            path = Path(config.report)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report.to_json(), indent=2) + "\n")

    def _serve(self, robot: Spec, stop: threading.Event) -> PolicyReport:
        config, policy, over = self.config, self.policy, threading.Event()
        if self.verifier is not None:
            self.verifier.spec.require(robot, f"Classifier '{config.verifier}'", "the robot")
            executor = self.executor

            def place() -> np.ndarray | None:
                return None if executor.status is None else np.array(executor.status.command, np.float32)

            policy = judged_attempts(
                policy,
                self.verifier,
                AttemptConfig(config.retries, config.attempt_seconds),
                send=executor.send_operator,
                driven=lambda: executor.status is not None and executor.status.writer == "policy",
                place=place,
                over=over.set,
            )
            require_real_time(policy, self.real_time)
        return serve(policy, self.link, stop, warm=False, pin=config.pin, real_time=self.real_time, over=over.is_set)

    def close(self) -> None:
        """Nothing to release: the policy goes with this object."""


def main(argv: list[str] | None = None) -> int:
    """Run the policy process and return its exit code."""
    return run_managed_node("policy", PolicyNodeConfig, PolicyWork, argv)


if __name__ == "__main__":
    sys.exit(main())
