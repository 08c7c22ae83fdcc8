"""Write a policy as ONNX for fast inference without torch; the result is a policy that eval and deploy take.

Normaliser, specs and a record of the policy's own answers go with it; loading refuses an export that does not repeat
them. Chunked policies can be exported, and residual and steered ones on top of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Config:
    """Settings of ``robot-rl export``."""

    policy: Annotated[Path, tyro.conf.Positional]
    """Checkpoint directory, for example runs/train/checkpoints/best."""
    out: Path = Path("runs/exported")
    """Where the export is written; an earlier export is replaced."""


def run(config: Config) -> None:
    """Export, read the export back, and say how well it agrees."""
    from robot_rl.policies.checkpoint import load_policy, read_description
    from robot_rl.policies.export import export_policy
    from robot_rl.train.progress import say

    say(f"Exporting {config.policy} (this takes some seconds)")
    facts = {**read_description(config.policy).get("metadata", {}), "exported_from": str(config.policy)}
    exported = export_policy(load_policy(config.policy), config.out, facts)
    worst = exported.parity(config.out)
    say(f"Policy: {config.out} (largest difference to the original {worst:.1e} of the action's half range)")
