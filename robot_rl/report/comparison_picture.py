"""A comparison as a picture (PNG), for documents and slides; the page draws its own charts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

INK, SOFT, BASE = "#16191f", "#5d6673", "#8a94a3"
COLOURS = (
    "#0b7a61", "#c2661f", "#3f72c4", "#b5527a", "#8a6d00", "#8e63b8", "#1597a5", "#b3261e", "#5b8c2a", "#5d6673",
)  # fmt: skip
"""The page's colours, in its light style."""


def write_comparison_picture(results: Mapping[str, Any], path: Path, title: str = "") -> Path:
    """Draw test success with intervals, and validation success over steps and minutes.

    Args:
        results: content of ``compare.json``.
        path: the picture to write.
        title: drawn above everything.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = [row for row in results["methods"] if row["seeds"]]
    # Never pyplot: it would take over the caller's back end and keep the figure.
    with mpl.rc_context({"font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": SOFT, "font.size": 9}):
        figure = Figure(figsize=(13, 2.2 + 0.26 * max(6, len(rows))), dpi=120, facecolor="white", layout="constrained")
        panels = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
        _intervals(panels[0], results, rows)
        _curves(panels[1], results, rows, "curve_steps", "thousand environment steps", 1e-3)
        _curves(panels[2], results, rows, "curve_minutes", "minutes")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(path)
    return path


def _intervals(axes: Any, results: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> None:
    shown = [(name.replace("_", " ", 1), base, BASE) for name, base in results["bases"].items()]
    shown += [(row["method"], row, COLOURS[index % len(COLOURS)]) for index, row in enumerate(rows)]
    for place, (_, measured, colour) in enumerate(shown):
        low, high = measured["interval"]
        axes.plot([100 * low, 100 * high], [-place, -place], color=colour, lw=6, alpha=0.3, solid_capstyle="round")
        axes.plot(100 * measured["success"], -place, "o", color=colour, ms=6)
        axes.text(103, -place, f"{100 * measured['success']:.1f} %", color=colour, va="center", fontweight="bold")
    axes.set(xlim=(0, 100), ylim=(0.6 - len(shown), 0.6))
    axes.set_yticks([-place for place in range(len(shown))], [name for name, _, _ in shown])
    axes.set_title("Success on the test episodes, %, 95 % interval", loc="left", fontsize=9)
    _bare(axes)


def _curves(
    axes: Any, results: Mapping[str, Any], rows: list[Mapping[str, Any]], key: str, label: str, unit: float = 1.0
) -> None:
    axes.axhline(100 * results["bases"]["base"]["success"], color=BASE, lw=1.2, ls="--")
    for index, row in enumerate(rows):
        curve, colour = row[key], COLOURS[index % len(COLOURS)]
        low, high, mean = ([100 * value for value in curve[name]] for name in ("low", "high", "mean"))
        x = [unit * value for value in curve["x"]]
        if len(row["seeds"]) > 1:
            axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        axes.plot(x, mean, marker="o", color=colour, ms=2.5, lw=1.4, ls="-" if index < len(COLOURS) else "--")
    axes.set(ylim=(0, 101), xlabel=label)
    axes.set_xlim(left=0)
    axes.set_title(f"Validation, %, over {label}", loc="left", fontsize=9)
    _bare(axes)


def _bare(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9ced6")
    axes.tick_params(colors=SOFT, length=0)
    axes.grid(axis="both", color="#e9ecf0", lw=0.8)
    axes.set_axisbelow(True)
