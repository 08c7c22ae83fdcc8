"""The picture at the head of the README, made from a finished demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import matplotlib as mpl
import numpy as np

mpl.use("agg")

import matplotlib.pyplot as plt

from robot_rl.cli.demo import Paths
from robot_rl.train.run import read_metrics

BEFORE, AFTER, INK, SOFT = "#8a94a3", "#0f8a6d", "#16191f", "#5d6673"


def write_picture(run: Path, picture: Path) -> Path:
    """Draw the last frames of both films, the success with its interval, and the learning curve of ``run``."""
    paths = Paths(run)
    success = {when: json.loads(paths.evaluation(when).read_text()) for when in ("before", "after")}
    plt.rcParams |= {"font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": SOFT}
    figure = plt.figure(figsize=(12, 4.4), dpi=110, facecolor="white")
    grid = figure.add_gridspec(2, 4, width_ratios=(1, 1, 0.14, 1.0), height_ratios=(0.75, 1), wspace=0.05, hspace=0.55)
    titles = {"before": "Imitation of 50 demonstrations", "after": "After reinforcement learning"}
    for column, when in enumerate(("before", "after")):
        axes = figure.add_subplot(grid[:, column])
        axes.imshow(_last_frame(paths.video(when)))
        axes.set_title(titles[when], loc="left", fontsize=11, fontweight="bold")
        axes.set_axis_off()
    _intervals(figure.add_subplot(grid[0, 3]), success)
    _curve(figure.add_subplot(grid[1, 3]), paths)
    figure.subplots_adjust(left=0.01, right=0.985, top=0.90, bottom=0.13)
    figure.savefig(picture)
    plt.close(figure)
    return picture


def _last_frame(video: Path) -> np.ndarray:
    with av.open(str(video)) as container:
        return list(container.decode(video=0))[-1].to_ndarray(format="rgb24")


def _intervals(axes: Any, success: dict[str, Any]) -> None:
    for row, (when, colour) in enumerate((("before", BEFORE), ("after", AFTER))):
        rate, (low, high) = success[when]["success_rate"], success[when]["success_interval_95"]
        axes.plot([100 * low, 100 * high], [-row, -row], color=colour, lw=9, alpha=0.3, solid_capstyle="round")
        axes.plot(100 * rate, -row, "o", color=colour, ms=9)
        axes.text(
            -3, -row, f"{100 * rate:.0f} %", color=colour, ha="right", va="center", fontsize=15, fontweight="bold"
        )
    axes.set(xlim=(0, 100), ylim=(-1.6, 0.6), yticks=[])
    axes.set_title(
        f"Success over {success['after']['episodes']} fresh episodes, 95 % interval", loc="left", fontsize=10
    )
    _bare(axes)


def _curve(axes: Any, paths: Paths) -> None:
    rows = read_metrics(paths.tuned, "eval")
    steps = [row["step"] / 1000 for row in rows]
    low, high = ([100 * row[key] for row in rows] for key in ("success_low", "success_high"))
    axes.fill_between(steps, low, high, color=AFTER, alpha=0.15, lw=0)
    axes.plot(steps, [100 * row["success"] for row in rows], "o-", color=AFTER, ms=4)
    axes.set(ylim=(0, 100), xlabel="thousand environment steps")
    axes.set_title("Validation success while learning, %", loc="left", fontsize=10)
    _bare(axes)


def _bare(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9ced6")
    axes.tick_params(colors=SOFT, labelsize=9, length=0)
    axes.grid(axis="both", color="#e9ecf0", lw=0.8)
    axes.set_axisbelow(True)
