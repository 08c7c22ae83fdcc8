"""Settings and report of human-in-the-loop learning."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hardware.control.settings import ExecutorConfig
from hardware.hil.operator import OperatorHabits
from robot_rl.core.errors import ConfigError


@dataclass(frozen=True)
class HILConfig:
    """Settings of ``robot-rl hil``."""

    demos: Path
    """Data set of demonstrations with the robot's observations and actions; 20 are a good beginning."""
    method: Literal["serl", "hil_serl", "hg_dagger"] = "hil_serl"
    """serl learns from demonstrations and reward, hil_serl from corrections as well; hg_dagger imitates demonstrations
    and corrections, needs no reward, and starts from --policy."""
    policy: Path | None = None
    """Checkpoint to start from (hg_dagger); the others start from nothing and take its normaliser only."""
    robot: str = "sim"
    """Robot by name (`robot-rl list robots`)."""
    robot_config: Path | None = None
    """YAML file of the robot's settings and of its cameras."""
    robot_options: tuple[str, ...] = ()
    """Further settings of the robot, or of the simulated task, each name=value."""
    safety: Path | None = None
    """Safety file (YAML) as in `robot-rl deploy`."""
    task: str = "peg_insert"
    """Task that the simulated robot is in."""
    operator: str = "keyboard"
    """Who corrects: keyboard (this terminal) or another device by name (`robot-rl list teleop`), scripted (an imperfect
    operator for simulated tasks that have an expert), or none (simulation only)."""
    operator_config: Path | None = None
    """YAML file of the operator device's settings."""
    reward: str = "task"
    """What success is: task (what the simulated task says), operator (keys y and x), or classifier:PATH
    (robot-rl reward train)."""
    clock: Literal["real", "fast"] = "real"
    """fast lets a simulated robot run on simulated time, as fast as the machine computes; the path is the same."""
    minutes: float = 0.0
    """Wall-clock minutes, validation included; 0 for no limit."""
    steps: int = 0
    """Control steps; 0 for no limit. Without any limit it ends with Ctrl-C."""
    out: Path = Path("runs/hil")
    """Run directory; the learner's state is in learner/, the policy in checkpoints/."""
    resume: bool = False
    """Continue an interrupted run in the same directory."""
    record: Path | None = None
    """Data set directory that everything executed is recorded into, with who acted and why."""
    options: tuple[str, ...] = ()
    """Settings of the method as name=value, for example: updates_per_step=4 relative_to=state[0:6]."""
    pretrain: int = 1000
    """Updates on the demonstrations alone before the robot moves."""
    attempt_seconds: float = 20.0
    """Longest attempt where the reward is not the task's; then the robot goes back the way it came."""
    wait_after_attempt: bool = True
    """Hold after going back until the operator hands back (key b), where the reward is not the task's: somebody has to
    set the scene."""
    validate_every: int = 5_000
    """Control steps between validations without exploration and operator, where clock is fast; 0 for none."""
    validation_episodes: int = 30
    """Episodes per validation."""
    stop_at: float = 1.01
    """End when a validation's success rate reaches this (clock=fast); above 1 for never."""
    seed: int = 0
    """Seed of weights, exploration and scenes."""
    threads: int = 1
    """Processor threads of the learner."""
    device: str = "cpu"
    """Where the learner's networks run: cpu, cuda, cuda:1; the policy acts on the processor."""
    habits: OperatorHabits = field(default_factory=OperatorHabits)
    """The scripted operator."""
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    """The control loop; execute_steps is taken from the policy."""


@dataclass
class Validation:
    """Success without exploration and without anybody's help."""

    steps: int
    """Control steps of learning before it."""
    seconds: float
    """Wall-clock time of learning before it."""
    success: float
    """Share of the episodes."""
    episodes: int
    """Episodes."""


@dataclass
class HILReport:
    """What came of a run."""

    steps: int = 0
    """Control steps."""
    human_steps: int = 0
    """Steps in which the operator drove."""
    episodes: int = 0
    """Episodes."""
    takeovers: int = 0
    """Times that the operator took over."""
    seconds: float = 0.0
    """Wall-clock time, over all interruptions."""
    learner_restarts: int = 0
    """How often the learner died and was started again."""
    validations: list[Validation] = field(default_factory=list)
    """All validations."""
    policy: Path = Path()
    """Checkpoint of the best policy by validation; of the last one where there was none."""


def check(config: HILConfig) -> None:
    """Raise `ConfigError` for settings that do not go together."""
    if config.clock == "fast" and (config.robot != "sim" or config.operator not in ("scripted", "none")):
        raise ConfigError("clock=fast is for the simulated robot 'sim' with operator=scripted or none")
    if config.clock != "fast" and config.stop_at <= 1.0:
        raise ConfigError("stop_at looks at validations, and there are none while the clock is real: clock=fast")
    if config.operator == "none" and config.robot != "sim":
        raise ConfigError(f"the robot '{config.robot}' needs an operator; 'none' is for the simulated robot")
    if config.method == "hg_dagger" and config.operator == "none":
        raise ConfigError("hg_dagger learns from corrections, and operator=none makes none")
    if config.method == "hg_dagger" and config.policy is None:
        raise ConfigError("hg_dagger corrects a policy: give one (--policy)")
    kind, _, path = config.reward.partition(":")
    if kind not in ("task", "operator", "classifier") or (kind == "classifier") != bool(path):
        raise ConfigError(f"reward is 'task', 'operator' or 'classifier:PATH', got '{config.reward}'")
    if kind == "task" and config.robot != "sim":
        raise ConfigError(
            f"the robot '{config.robot}' does not know what success is: reward=operator or classifier:PATH"
        )
