"""What the page says, as HTML of text and bars: nothing in here knows of a browser or a server."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

from hardware.safety.flags import SafetyFlag, flag_names
from hardware.transport import ExecutorStatus
from robot_rl.core.spec import ArraySpec

SILENCE = 1.0
"""Seconds without a status after which the page says so instead of showing the last one as if it were now."""
STALE_IMAGE = 0.25
"""Age in seconds from which a camera's picture is marked."""
COLOURS = {
    "auto": "#0f8a6d",
    "align": "#0f8a6d",
    "human": "#b8750a",
    "stopped": "#c23b31",
    "hold": "#5b6675",
    "idle": "#5b6675",
}
"""Background of the banner by mode."""
_NEXT = {
    "idle": "Nothing moves. Enable lets the policy begin.",
    "hold": "The robot holds. Hand back to the policy, or hold to drive.",
    "align": "The policy is being blended in.",
    "auto": "The policy drives. Hold to take over.",
    "human": "An operator drives while the dead-man is held.",
    "stopped": "Latched. Reset moves nothing; then Enable lets the policy begin.",
}
_SAFETY = tuple(flag_names(sum(SafetyFlag)))
_STYLE = "font-family:system-ui,sans-serif;font-variant-numeric:tabular-nums;font-size:13px;margin:0 0.75em 0.5em"


def banner(status: ExecutorStatus | None, age: float, holder: int | None = None) -> str:
    """Return who drives and why, or that nothing is known.

    Args:
        status: the executor's newest status.
        age: seconds since it arrived.
        holder: the tab that has control.
    """
    if status is None:
        return _block("#5b6675", "NO EXECUTOR", "Waiting for a first word from it.")
    if age > SILENCE:
        return _block("#c23b31", f"SILENT FOR {age:.0f} s", "The executor says nothing: the robot's state is unknown.")
    writer = {"human": "operator", "none": "nobody"}.get(status.writer, status.writer)
    control = "" if holder is None else f" · tab {holder} has control"
    reason = status.reason.replace("_", " ")
    return _block(
        COLOURS.get(status.mode, "#5b6675"),
        f"{status.mode.upper()}{' (latched)' if status.estop_latched else ''} · {reason}",
        f"{writer} writes{control}",
        _NEXT.get(status.mode, ""),
    )


def elements(action: ArraySpec, status: ExecutorStatus | None) -> str:
    """Return each element of the action within its range: bar of the measurement, mark of the command."""
    low, high = (bound.ravel() for bound in action.bounds())
    rows = []
    for index in range(action.size):
        command = _at(status.command if status else [], index)
        measured = _at(status.measured if status else [], index)
        shown = command if measured is None else measured
        text = "unknown" if shown is None else f"{shown:+.3f}"
        rows.append(
            f"<tr><td>{escape(element_name(action, index))}</td>"
            f"<td style='width:55%'>{_bar(measured, command, low[index], high[index])}</td>"
            f"<td style='text-align:right'>{text} {escape(element_unit(action, index))}</td></tr>"
        )
    return f"<table style='{_STYLE};width:95%'>{''.join(rows)}</table>"


def counters(status: ExecutorStatus | None) -> str:
    """Return how often each safety stage intervened and the robot failed, the most frequent first."""
    counts = {} if status is None else status.counters
    shown = {name: count for name, count in counts.items() if count and (name in _SAFETY or name.endswith("failures"))}
    if not shown:
        return f"<div style='{_STYLE}'>No intervention so far.</div>"
    order = sorted(shown, key=lambda name: -shown[name])
    return _table({name.replace("_", " "): f"{shown[name]}" for name in order})


def loop(status: ExecutorStatus | None) -> str:
    """Return rate and lateness of the control loop, and how the policy's chunks came."""
    if status is None:
        return ""
    known, counts = status.loop, status.counters
    return _table(
        {
            "rate": f"{known.get('rate_hz', 0.0):.1f} Hz",
            "lateness p99": f"{known.get('lateness_p99_ms', 0.0):.2f} ms",
            "missed ticks": f"{known.get('missed_ticks', 0.0):.0f}",
            "observation to chunk p99": f"{known.get('round_trip_p99_ms', 0.0):.0f} ms",
            "chunks": f"{counts.get('chunks_accepted', 0)} of {counts.get('chunks_received', 0)} used",
        }
    )


def recording(status: ExecutorStatus | None) -> str:
    """Return what is being recorded and how much room is left."""
    known = {} if status is None else status.recording
    if not known:
        return f"<div style='{_STYLE}'>Nothing is recorded in this deployment.</div>"
    state = "recording" if known.get("active") else "paused"
    if known.get("failure"):
        state = f"ENDED: {known['failure']}"
    return _table(
        {
            "state": state,
            "episodes saved": f"{known.get('episodes', 0)}",
            "steps": f"{known.get('steps', 0)} ({known.get('dropped', 0)} dropped)",
            "disk left": size_text(float(known.get("free_bytes", 0))),
        }
    )


def camera_label(name: str, age: float) -> str:
    """Return the caption of a camera: its name and the age of its picture in seconds."""
    stale = " · STALE" if age > STALE_IMAGE else ""
    return f"{name.removeprefix('images.')} · {1e3 * min(age, 9999.0):.0f} ms{stale}"


def size_text(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def element_name(action: ArraySpec, index: int) -> str:
    """Return the name of an action's element."""
    return action.names[index] if index < len(action.names) else f"action {index}"


def element_unit(action: ArraySpec, index: int) -> str:
    """Return the unit of an action's element, empty where it has none."""
    units = [unit.strip() for unit in action.unit.split(",")]
    return units[0] if len(units) == 1 else units[index] if index < len(units) else ""


def _at(values: list[float], index: int) -> float | None:
    return float(values[index]) if index < len(values) and np.isfinite(values[index]) else None


def _bar(measured: float | None, command: float | None, low: float, high: float) -> str:
    """Return a bar over [low, high], filled up to the measurement, with a mark at the command; red near an end."""
    if not (np.isfinite(low) and np.isfinite(high) and high > low):
        return "unbounded"
    inner = ""
    if measured is not None:
        share = float(np.clip((measured - low) / (high - low), 0, 1))
        colour = "#c23b31" if min(share, 1 - share) < 0.02 else "#3d7ea6"
        inner += f"<div style='width:{100 * share:.1f}%;height:100%;background:{colour}'></div>"
    if command is not None:
        share = float(np.clip((command - low) / (high - low), 0, 1))
        mark = "position:absolute;top:0;width:3px;height:100%;background:#111"
        inner += f"<div style='{mark};left:{98.5 * share:.1f}%'></div>"
    style = "position:relative;height:12px;background:#d5dae1;border-radius:2px;overflow:hidden"
    return f"<div style='{style}' title='{low:.4g} to {high:.4g}'>{inner}</div>"


def _block(colour: str, title: str, *lines: str) -> str:
    rest = "".join(f"<div>{escape(line)}</div>" for line in lines if line)
    return (
        f"<div role='status' style='{_STYLE};padding:0.6em 0.8em;border-radius:6px;color:#fff;background:{colour}'>"
        f"<div style='font-size:1.35em;font-weight:700'>{escape(title)}</div>{rest}</div>"
    )


def _table(rows: Mapping[str, str]) -> str:
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td style='text-align:right'>{escape(value)}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table style='{_STYLE};width:95%'>{cells}</table>"
