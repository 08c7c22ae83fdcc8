"""Charts as inline SVG and HTML, coloured by the page's style sheet so that they follow light and dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 36


@dataclass(frozen=True)
class Curve:
    """One line of a line chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "first"
    """Style class: ``first``, ``second``, ``faint``, or one of many: ``c0`` to ``c9``, and ``dashed`` after it."""
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper limits per point, drawn as a band."""


def line_chart(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
    percent: bool = False,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Return an SVG line chart; values that are not finite (or not positive, if ``logarithmic``) are left out."""
    curves = [curve for curve in (_clean(curve, logarithmic) for curve in curves) if len(curve.x)]
    if not curves:
        return _empty("nothing was logged")
    xs = np.concatenate([np.asarray(curve.x, float) for curve in curves])
    ys = np.concatenate([np.asarray(curve.y, float) for curve in curves])
    x_ticks = ticks(0.0 if xs.min() >= 0 else float(xs.min()), float(xs.max()))
    if logarithmic:
        y_ticks = log_ticks(float(ys.min()), float(ys.max()))
    else:
        low, high = y_range or (float(ys.min()), float(ys.max()))
        y_ticks = ticks(low, high)
    plot = _Plot(x_ticks, y_ticks, logarithmic)
    parts = [plot.axes(x_label, y_label, percent)]
    for curve in curves:
        points = [(plot.x(a), plot.y(b)) for a, b in zip(curve.x, curve.y, strict=True)]
        if curve.band is not None:
            upper = [(plot.x(a), plot.y(b)) for a, b in zip(curve.x, curve.band[1], strict=True)]
            lower = [(plot.x(a), plot.y(b)) for a, b in zip(curve.x, curve.band[0], strict=True)]
            parts.append(f'<polygon class="band {curve.style}" points="{_points(upper + lower[::-1])}"/>')
        parts.append(f'<polyline class="line {curve.style}" points="{_points(points)}"/>')
        if len(points) <= 40:
            for (px, py), a, b in zip(points, curve.x, curve.y, strict=True):
                title = f"{curve.label}: {number(b, percent)} at {number(a)} {x_label}"
                parts.append(
                    f'<circle class="dot {curve.style}" cx="{px:.1f}" cy="{py:.1f}" r="3.2">{_title(title)}</circle>'
                )
    legend = "" if len(curves) < 2 else _legend([(curve.label, curve.style) for curve in curves])
    return f'<figure class="chart">{legend}{plot.svg(parts, f"{y_label} over {x_label}")}</figure>'


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    unit: str,
    marks: Sequence[tuple[str, float]] = (),
    what: str = "samples",
) -> str:
    """Return an SVG histogram over a logarithmic axis.

    Args:
        edges: Upper edge of each occupied bin, positive and ascending; bins are as wide as the closest two.
        counts: Samples in each bin.
        unit: Unit of the edges.
        marks: Vertical lines (label, value), for example percentiles.
        what: What is counted.
    """
    data = [(float(edge), int(count)) for edge, count in zip(edges, counts, strict=True) if edge > 0 and count]
    if not data:
        return _empty("nothing was measured")
    upper = [edge for edge, _ in data]
    ratio = min((b / a for a, b in itertools.pairwise(upper)), default=1.1)
    plot = _Plot(
        log_ticks(upper[0] / ratio, max([upper[-1], *(value for _, value in marks)])),
        ticks(0, 1.15 * max(count for _, count in data)),
        x_logarithmic=True,
    )
    parts = [plot.axes(f"{unit}, logarithmic", what, False)]
    for edge, count in data:
        x, y = plot.x(edge / ratio), plot.y(count)
        width, height = max(plot.x(edge) - x - 0.6, 0.8), max(plot.y(0) - y, 0.8)
        title = _title(f"{number(edge / ratio)} to {number(edge)} {unit}: {count}")
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">{title}</rect>'
        )
    for row, (label, value) in enumerate(marks):
        x = plot.x(max(value, upper[0] / ratio))
        anchor, shift = ("end", -5) if x > WIDTH - 110 else ("start", 5)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        place = f'x="{x + shift:.1f}" y="{_TOP + 10 + 14 * row}" text-anchor="{anchor}"'
        parts.append(f'<text class="mark" {place}>{label} {number(value)} {unit}</text>')
    return f'<figure class="chart">{plot.svg(parts, f"Histogram of {what} in {unit}")}</figure>'


def many(index: int) -> str:
    """Return the style class of the ``index``-th of many things: ten colours, then the same ones dashed."""
    return f"c{index % 10}" + (" dashed" if index % 20 >= 10 else "")


def intervals(rows: Sequence[tuple[str, float, float, float, str]], *, wide: bool = False) -> str:
    """Return rows (label, low, value, high, style) of shares with their intervals on one axis from 0 to 100 %.

    ``wide`` leaves more room for the labels.
    """
    lines = []
    for label, low, value, high, style in rows:
        span = f'<i class="span {style}" style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></i>'
        point = f'<i class="point {style}" style="left:{100 * value:.2f}%"></i>'
        text = f"<b>{100 * value:.1f} %</b> <small>{100 * low:.0f} to {100 * high:.0f} %</small>"
        track = f'<div class="track">{span}{point}</div>'
        lines.append(f'<div class="interval"><span>{escape(label)}</span>{track}<span>{text}</span></div>')
    marks = "".join(f'<span style="left:{tick}%">{tick}</span>' for tick in (0, 25, 50, 75, 100))
    lines.append(f'<div class="interval axis"><span></span><div>{marks}</div><span></span></div>')
    return f'<div class="intervals{" wide" if wide else ""}">{"".join(lines)}</div>'


def timeline(
    segments: Sequence[tuple[float, float, str]],
    events: Sequence[tuple[float, str]],
    duration: float,
    order: Sequence[str],
) -> str:
    """Return a strip of modes: ``segments`` (start, end, mode) and ``events`` (time, text), all in seconds.

    ``order`` lists every mode that can occur; the legend shows those that did, in this order.
    """
    duration = max(duration, 1e-9)
    bars = "".join(
        f'<i class="mode {mode.lower()}" style="{_span(start, end, duration)}"'
        f' title="{escape(mode)}: {start:.2f} to {end:.2f} s"></i>'
        for start, end, mode in segments
    )
    pins = "".join(
        f'<i class="pin" style="left:{100 * time / duration:.3f}%">{n}</i>' for n, (time, _) in enumerate(events, 1)
    )
    seen = [mode for mode in order if any(mode == segment[2] for segment in segments)]
    totals = {mode: sum(end - start for start, end, m in segments if m == mode) for mode in seen}
    legend = "".join(f'<span><i class="mode {m.lower()}"></i>{escape(m)} {totals[m]:.1f} s</span>' for m in seen)
    step = next((s for s in (1, 2, 5, 10, 20, 60, 120) if duration / s <= 11), 300)
    marks = "".join(
        f'<span style="left:{100 * t / duration:.3f}%">{t} s</span>' for t in range(0, int(duration) + 1, step)
    )
    listing = "".join(f"<li><b>{time:.2f} s</b> {escape(text)}</li>" for time, text in events)
    return (
        f'<div class="timeline"><div class="legend">{legend}</div><div class="pins">{pins}</div>'
        f'<div class="strip">{bars}</div><div class="seconds">{marks}</div><ol>{listing}</ol></div>'
    )


def shares(parts: Sequence[tuple[str, float]]) -> str:
    """Return a bar divided by (label, seconds), with a table below it."""
    total = sum(seconds for _, seconds in parts) or 1.0
    cells, rows = [], []
    for n, (label, seconds) in enumerate(parts):
        name, percent = escape(label), 100 * seconds / total
        cells.append(f'<i class="share s{n % 8}" style="width:{percent:.3f}%" title="{name}: {seconds:.0f} s"></i>')
        key = f'<i class="key s{n % 8}"></i>'
        rows.append(f"<tr><td>{key}{name}</td><td>{seconds:.0f} s</td><td>{percent:.0f} %</td></tr>")
    table = f'<table class="figures"><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="shares">{"".join(cells)}</div>{table}'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round values that enclose ``low`` and ``high``."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return values that enclose ``low`` and ``high``: 1, 2 or 5 times a power of ten, or powers alone where many."""
    steps = (1, 2, 5) if high / low < 300 else (1,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    candidates = [m * 10.0**p for p in powers for m in steps]
    first = max(k for k, value in enumerate(candidates) if value <= low * 1.0001)
    last = min(k for k, value in enumerate(candidates) if value >= high * 0.9999)
    return candidates[first : max(last, first + 1) + 1]


def number(value: float, percent: bool = False) -> str:
    """Return ``value`` short: 12.5k, 0.031, 45 %."""
    if percent:
        return f"{100 * value:.0f} %"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    return f"{value / 1e3:.4g}k" if abs(value) >= 1e4 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


class _Plot:
    """Maps data to the drawing area between the first and last tick of each axis."""

    def __init__(
        self, x_ticks: list[float], y_ticks: list[float], y_logarithmic: bool = False, x_logarithmic: bool = False
    ) -> None:
        self._x_ticks, self._y_ticks = x_ticks, y_ticks
        self._x_logarithmic, self._y_logarithmic = x_logarithmic, y_logarithmic

    def x(self, value: float) -> float:
        return _LEFT + _share(value, self._x_ticks, self._x_logarithmic) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - _share(value, self._y_ticks, self._y_logarithmic) * (HEIGHT - _TOP - _BOTTOM)

    def axes(self, x_label: str, y_label: str, percent: bool) -> str:
        parts = []
        for tick in self._y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick, percent)}</text>')
        below = HEIGHT - _BOTTOM + 15
        parts += [
            f'<text x="{self.x(tick):.1f}" y="{below}" text-anchor="middle">{number(tick)}</text>'
            for tick in self._x_ticks
        ]
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(
            f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
        )
        return "".join(parts)

    def svg(self, parts: Sequence[str], title: str) -> str:
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _share(value: float, ticks: list[float], logarithmic: bool) -> float:
    """Place of ``value`` between the first tick (0) and the last (1)."""
    low, high = ticks[0], ticks[-1]
    if logarithmic:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _clean(curve: Curve, logarithmic: bool) -> Curve:
    y = np.asarray(curve.y, float)
    keep = np.isfinite(y) & ((y > 0) if logarithmic else True)
    band = None if curve.band is None else tuple(np.asarray(side, float)[keep] for side in curve.band)
    return Curve(curve.label, np.asarray(curve.x, float)[keep], y[keep], curve.style, band)  # type: ignore[arg-type]


def _span(start: float, end: float, duration: float) -> str:
    return f"left:{100 * start / duration:.3f}%;width:{100 * (end - start) / duration:.3f}%"


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    return (
        '<div class="legend">' + "".join(f'<span><i class="{s}"></i>{escape(t)}</span>' for t, s in entries) + "</div>"
    )


def _empty(why: str) -> str:
    return f'<figure class="chart empty">{escape(why)}</figure>'
