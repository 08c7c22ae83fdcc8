"""What can be said of a deployment, and what follows from that alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hardware.console.server import ConsoleConfig
from hardware.control.executor import ExecutorConfig
from hardware.options import parse_options
from hardware.robots.build import build_robot
from hardware.safety.protection import Protection
from robot_rl.core.errors import ConfigError
from robot_rl.core.ranges import require_positive, require_range
from robot_rl.core.realtime import RealTimeConfig
from robot_rl.core.robot import Robot

TRACE = "trace.npz"
"""File of a simulated robot's commands, from which it is filmed."""


@dataclass(frozen=True)
class DeploymentConfig:
    """Settings of ``robot-rl deploy``."""

    policy: str | Path
    """Checkpoint or export directory, for example runs/train/checkpoints/best, or a policy server (ws://host:port)."""
    robot: str = "sim"
    """Robot by name (`robot-rl list robots`)."""
    task: str = "peg_insert"
    """Task that the simulated robot is in (`robot-rl list tasks`)."""
    robot_config: Path | None = None
    """YAML file of the robot's settings and of its cameras; see docs/robots.md."""
    robot_options: tuple[str, ...] = ()
    """Further settings of the robot, each name=value; they win over the file's."""
    transport: Literal["auto", "ros", "inprocess"] = "auto"
    """How policy and executor talk: ros runs them as two ROS 2 processes, inprocess as threads of this one; auto takes
    ros where it is installed."""
    duration: float = 0.0
    """Seconds to run after the policy first answered; 0 runs until Ctrl-C."""
    operator: str = "keyboard"
    """Who watches: keyboard (this terminal), script (a rehearsed operator), script:FILE, another device by name:FILE
    with its settings (leader:leader.yaml), or none (with --console the page alone; without, the robot starts by itself:
    simulation only)."""
    console: bool = False
    """Open a page for browsers as one more operator device: stop, takeover, recording, cameras; see docs/console.md."""
    console_options: ConsoleConfig = field(default_factory=ConsoleConfig)
    """Where the page is, and what dragging the end effector stands on."""
    record: Path | None = None
    """Data set directory that everything executed is recorded into."""
    video: Path | None = None
    """Film of a simulated robot, an .mp4 file: rendered afterwards, bordered in the colour of who was in control."""
    out: Path = Path("runs/deploy")
    """Directory of deployment.json and the logs."""
    seed: int = 2_000_000
    """Seed of the simulated robot's first scene."""
    policy_threads: int = 1
    """Processor threads of the policy's inference; 1 leaves the others to the control loop."""
    policy_trace: bool = False
    """Run the policy's network without Python between its operations: the same numbers, about a quarter sooner."""
    domain_id: int | None = None
    """ROS 2 domain; by default ROS_DOMAIN_ID, or 0."""
    safety: Path | None = None
    """Safety file (YAML): profile, jerk, workspace, what must stay apart, singularities, forces; see docs/deployment.md
    and launch/params/safety_peg.yaml. Without it the robot's own limits and all watchdogs hold."""
    verifier: Path | None = None
    """Success classifier (robot-rl reward train) that judges each attempt; a success ends the run. In simulation
    add --robot-options restart=false, so that the scene stays for the next attempt."""
    retries: int = 2
    """With a verifier: attempts after the first, each after going back the way the robot came."""
    attempt_seconds: float = 20.0
    """With a verifier: an attempt that has not succeeded by then has failed."""
    real_time: RealTimeConfig = field(default_factory=RealTimeConfig)
    """How a new chunk goes on from the one that is executed while it is planned."""
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    """The control loop; execute_steps is taken from the policy."""

    def __post_init__(self) -> None:
        require_range(self, "duration", "seed", "retries", "domain_id")
        require_range(self, "policy_threads", low=1)
        require_positive(self, "attempt_seconds")


def make_robot(config: DeploymentConfig) -> Robot:
    """Build the robot, not connected; raises `RobotRLError` for a setting that it does not know."""
    return build_robot(config.robot, robot_options(config), config.robot_config)


def robot_options(config: DeploymentConfig) -> dict[str, Any]:
    """Return the robot's options by name; values become numbers and booleans where they read as such."""
    found: dict[str, Any] = {}
    if config.video is not None and config.robot != "sim":
        raise ConfigError(f"--video films the simulated robot 'sim', not '{config.robot}'")
    if config.robot == "sim":
        found = {"task": config.task, "seed": config.seed, "tick_rate_hz": config.executor.tick_rate_hz}
        if config.video is not None:
            found["trace"] = str(config.out / TRACE)
    return found | parse_options(config.robot_options, "robot option")


def protection(config: DeploymentConfig, robot: Robot) -> Protection | None:
    """Return what the safety file says of the robot; its mistakes are found before anything is started."""
    if config.safety is None:
        return None
    from hardware.safety.settings import protection_from

    return protection_from(config.safety, robot, 1.0 / config.executor.tick_rate_hz)
