"""What a deployment reports, whatever carried it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardware.control.arbiter import Mode


@dataclass
class DeploymentReport:
    """What happened. Durations are mappings with ``p50_ms``, ``p99_ms``, ``max_ms``, ``bins_ms``, ``bin_counts``."""

    transport: str
    """``ros`` or ``inprocess``."""
    note: str
    """What a reader must know, for example that ROS 2 was absent; empty if nothing."""
    seconds: float
    """From the policy's first answer to the end."""
    rate_hz: float
    """Ticks per second, measured."""
    lateness: Mapping[str, Any]
    """Lateness of the control ticks."""
    latency: Mapping[str, Any]
    """From an observation's stamp to the chunk planned from it, in the executor."""
    command_latency: Mapping[str, Any]
    """From the newest observation's stamp to the command of its tick."""
    missed_ticks: int
    """Ticks that were skipped because the loop was late by a whole period."""
    safety: Mapping[str, int]
    """Ticks on which each safety stage intervened, by name."""
    chunks: Mapping[str, int]
    """Chunks by what became of them."""
    modes: Sequence[tuple[float, float, str]]
    """(start, end, mode) in seconds; ``IDLE``, ``AUTO`` (ALIGN is counted here), ``HOLD``, ``HUMAN`` or ``STOPPED``."""
    mode_changes: Sequence[Mapping[str, Any]]
    """``time``, ``mode`` and ``reason`` of every change."""
    events: Sequence[tuple[float, str]]
    """(seconds, what the operator asked for)."""
    acted: Mapping[str, float]
    """Share of the executed steps by who wrote them: ``policy``, ``human``, ``none``."""
    episodes: Sequence[bool]
    """Whether each finished episode of a simulated robot succeeded."""
    recording: Mapping[str, Any] | None
    """What was recorded: ``path``, ``steps``, ``dropped``, ``episodes``; None if nothing was asked for."""
    policy: Mapping[str, Any] | None
    """What the policy side did: ``chunks``, ``skipped``, ``inference`` (durations)."""
    final_stop_confirmed: bool | None
    """Whether the robot confirmed the stop at the end."""
    path: Path
    """Where this report is saved."""
    attempts: Sequence[Mapping[str, Any]] = ()
    """With a verifier: ``success``, ``steps`` and the largest ``probability`` of success of each attempt."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def summary(self) -> str:
        """Return one line for people."""
        interventions = ", ".join(f"{name} {count}" for name, count in self.safety.items()) or "none"
        return (
            f"{self.seconds:.0f} s over {self.transport}: {self.rate_hz:.1f} Hz, lateness p99 "
            f"{self.lateness['p99_ms']:.2f} ms, {self.missed_ticks} missed ticks, chunks after p99 "
            f"{self.latency['p99_ms']:.0f} ms, {sum(self.episodes)} of {len(self.episodes)} episodes succeeded; "
            f"safety: {interventions}"
        )


def _driver(mode: str) -> str:
    """Return the mode as drawn: while it is blended in, it is the policy that drives."""
    return "AUTO" if mode == Mode.ALIGN.value else mode.upper()


def make_report(
    executed: dict[str, Any], served: dict[str, Any] | None, transport: str, note: str, path: Path
) -> DeploymentReport:
    """Return the report of what the executor (``executed``) and the policy side (``served``) say they did."""
    changes = executed["mode_changes"]
    ends = [change["time"] for change in changes[1:]] + [executed["seconds"]]
    modes = [(change["time"], end, _driver(change["mode"])) for change, end in zip(changes, ends, strict=True)]
    steps = max(1, sum(executed["acted"].values()))
    return DeploymentReport(
        transport=transport,
        note=note,
        seconds=executed["seconds"],
        rate_hz=executed["measured_rate_hz"],
        lateness=executed["lateness"],
        latency=executed["observation_to_chunk"],
        command_latency=executed["observation_to_command"],
        missed_ticks=executed["missed_ticks"],
        safety=executed["safety"],
        chunks=executed["chunks"],
        modes=modes,
        mode_changes=changes,
        events=[(event["time"], event["event"].replace("_", " ")) for event in executed["events"]],
        acted={writer: count / steps for writer, count in executed["acted"].items()},
        episodes=executed.get("episode_success", []),
        recording=executed.get("recording"),
        policy=served,
        final_stop_confirmed=executed["final_stop_confirmed"],
        path=path,
        attempts=(served or {}).get("attempts", ()),
    )
