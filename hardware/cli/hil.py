"""Learn on the robot with a human who corrects: demonstrations, a learner in its own process, and an operator.

The robot moves through the same executor and safety chain as in `robot-rl deploy`; the weights change while it moves.

1. Collect about 20 demonstrations through the same robot: robot-rl collect (simulation), or robot-rl deploy --record.
2. Say what success is: the simulated task knows; on a robot mark it with the keys y and x, or train a classifier on
   marked episodes (robot-rl reward train) and give --reward classifier:PATH.
3. robot-rl hil --demos DATA: let the policy try for a second or two, take over where it is stuck or goes astray (any
   motion key), correct it, and hand back (b) soon. At first see to it that one episode in three succeeds; then help
   less and less. Long takeovers that carry the task to its end teach the critic too much optimism.
4. The policy is in OUT/checkpoints/best (or last); robot-rl deploy runs it. --resume continues a run that ended.

Where actions are target poses and the observation holds the pose, say so: --options relative_to=state[0:6]. The policy
then learns small offsets, which is much easier. Try it without a robot:

  robot-rl collect --task peg_insert --out demos --episodes 20
  robot-rl hil --demos demos --clock fast --operator scripted --minutes 10 --options "relative_to=state[0:6]"
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hardware.control.logs import start_log
from hardware.hil.config import HILConfig as Config
from hardware.hil.config import HILReport
from hardware.hil.session import learn

if TYPE_CHECKING:
    from hardware.hil.experience import Episode

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Learn, show how it goes, and say where the policy is."""
    from robot_rl.train.progress import progress, say

    start_log(logging.WARNING, "%(levelname)s %(message)s")
    if config.operator == "keyboard":
        from hardware.cli.deploy import key_map
        from robot_rl.data.dataset import open_dataset

        action = open_dataset(config.demos).spec.action
        say(key_map(action.size, action.names))
    total = round(60 * config.minutes) if config.minutes > 0 else config.steps if config.steps > 0 else 24 * 3600
    by_steps = config.minutes <= 0 < config.steps
    with progress("hil", max(1, total), unit="step" if by_steps else "second") as bar:
        recent: list[tuple[bool, float]] = []

        def show(report: HILReport, episode: Episode) -> None:
            recent[:] = [*recent[-19:], (episode.success, episode.human_steps / episode.steps)]
            done = report.steps if by_steps else int(report.seconds)
            values = {
                "episodes": str(report.episodes),
                "success": f"{sum(success for success, _ in recent) / len(recent):.0%}",
                "human": f"{sum(share for _, share in recent) / len(recent):.0%}",
            }
            if report.validations:
                values["alone"] = f"{report.validations[-1].success:.0%}"
            bar.advance(max(0, min(done, total) - bar.done), **values)

        report = learn(config, show)
    share = report.human_steps / max(1, report.steps)
    say(
        f"{report.episodes} episodes, {report.steps} steps, {share:.1%} of them by the operator in {report.takeovers} "
        f"takeovers"
    )
    for one in report.validations[-1:]:
        say(f"Alone, last validation: {one.success:.0%} of {one.episodes} episodes")
    say(f"Policy: {report.policy}")
