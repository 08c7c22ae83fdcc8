"""Run a policy on a robot in real time, with an operator who can take over and a safety chain that has the last word.

The executor brakes and holds whatever goes wrong; this is no certified safety function. Everything executed can be
recorded as a data set (--record). Keys are shown at the start. Ctrl-C ends with a controlled stop.
"""

from __future__ import annotations

import logging

from hardware.control.logs import start_log
from hardware.deployment.config import DeploymentConfig as Config
from hardware.deployment.report import DeploymentReport
from hardware.deployment.run import deploy
from hardware.teleop.keyboard import key_map
from hardware.transport import ExecutorStatus
from robot_rl.core.spec import ArraySpec, Spec

__all__ = ["Config", "DeploymentReport", "deploy", "run"]


def run(config: Config) -> None:
    """Deploy, show live what happens, and print what came of it."""
    from robot_rl.train.progress import say

    report = deploy_shown(config)
    if report.note:
        say(report.note, style="bold yellow")
    say(report.summary())
    if report.recording:
        say(f"Recorded {report.recording['steps']} steps in {report.recording['path']}")
    say(f"Report: {report.path}")


def deploy_shown(config: Config) -> DeploymentReport:
    """Deploy with a live line: who drives and why, rate, lateness and interventions."""
    from robot_rl.train.progress import progress, say

    start_log(logging.WARNING, "%(levelname)s %(message)s")
    if config.operator == "keyboard":
        action = _action(config)
        say(key_map(action.size, action.names))
    total = max(1, round(config.duration)) if config.duration > 0 else 24 * 3600
    with progress("deploy", total, unit="second") as bar:
        begun: list[float] = []

        def show(status: ExecutorStatus) -> None:
            if status.counters.get("chunks_received"):
                begun[:] = begun or [status.stamp]
            done = int(status.stamp - begun[0]) if begun else 0
            bar.advance(max(0, min(done, total) - bar.done), **shown(status))

        return deploy(config, show)


def _action(config: Config) -> ArraySpec:
    """Return what the policy commands, read from its checkpoint."""
    from robot_rl.policies.checkpoint import read_description

    return Spec.from_json(read_description(config.policy)["policy"]["spec"]).action


def shown(status: ExecutorStatus) -> dict[str, str]:
    """Return what the live line shows of a status."""
    safety = sum(
        count for name, count in status.counters.items() if not name.startswith(("chunks", "observe", "command_f"))
    )
    return {
        "mode": f"{status.mode.upper()} ({status.reason.replace('_', ' ')})",
        "rate": f"{status.loop.get('rate_hz', 0.0):.0f} Hz",
        "late": f"{status.loop.get('lateness_p99_ms', 0.0):.2f} ms",
        "safety": str(safety),
    }
