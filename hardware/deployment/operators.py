"""The operator's devices of a deployment: one that was asked for, and the page."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hardware.console.server import Console
from hardware.deployment.config import DeploymentConfig
from hardware.teleop.build import build_teleop
from hardware.teleop.keyboard import KeyboardTeleop, key_map
from hardware.teleop.script import ScriptedTeleop, load_script
from robot_rl.core.errors import ConfigError
from robot_rl.core.spec import Spec
from robot_rl.core.teleop import Teleop

logger = logging.getLogger(__name__)

SIMULATED = ("sim", "fake")
"""Robots that may run without anybody watching."""


@contextmanager
def connected_operator(config: DeploymentConfig, spec: Spec) -> Iterator[Teleop | None]:
    """Connect the operator's device; its terminal is restored whatever happens."""
    kind, _, script = config.operator.partition(":")
    teleop: Teleop
    if kind == "none" and config.console:
        yield None
        return
    if kind == "none":
        if config.robot not in SIMULATED:
            raise ConfigError(f"the robot '{config.robot}' needs an operator; 'none' is for {', '.join(SIMULATED)}")
        logger.warning("NO OPERATOR: the robot starts by itself, and nobody can take over")
        yield None
        return
    if kind == "keyboard":
        teleop = KeyboardTeleop(spec.action.size)
        logger.info("%s", key_map(spec.action.size, spec.action.names))
    elif kind == "script":
        teleop = ScriptedTeleop(
            spec.action.size, load_script(script or "demonstration", spec.action.size, config.duration)
        )
    else:
        teleop = build_teleop(kind, spec.action.size, config=script or None)
    teleop.connect()
    try:
        yield teleop
    finally:
        teleop.disconnect()


@contextmanager
def opened_console(config: DeploymentConfig, spec: Spec) -> Iterator[Console | None]:
    """Open the page, if one is wanted."""
    if not config.console:
        yield None
        return
    with Console(spec, config.console_options) as console:
        yield console


def start_script(devices: Sequence[Teleop]) -> None:
    """Start the clock of rehearsed operators; a second call changes nothing."""
    for device in devices:
        if isinstance(device, ScriptedTeleop):
            device.start()
