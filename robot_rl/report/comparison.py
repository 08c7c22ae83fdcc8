"""The page of a comparison: which method is better, how sure that is, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from robot_rl.report import charts
from robot_rl.report.page import document, grid, repeat

BANDS = 4
"""With more methods than this only the best are drawn with their bands."""


def render_comparison(
    results: Mapping[str, Any], *, title: str, commands: Sequence[str] = (), facts: Mapping[str, Any] | None = None
) -> str:
    """Return the page as HTML that needs no other file and no network.

    Args:
        results: content of ``compare.json``.
        title: what was compared, in a line.
        commands: how to do it again.
        facts: heading to nested settings, such as versions.
    """
    rows = [row for row in results["methods"] if row["seeds"]]
    body = "".join(
        (
            f'<div class="eyebrow">{escape(title)}</div><h1>{_headline(rows)}</h1>',
            f'<p class="lead">{escape(_what(results))}</p>',
            f'<div class="card advice">{"".join(f"<p>{escape(line)}</p>" for line in results["recommendation"])}</div>',
            f'<div class="card"><h3>Success on the test episodes, with 95 % interval</h3>{_intervals(results)}</div>',
            f'<div class="card scroll">{table(results)}</div>',
            "<h2>How they learned</h2>" + grid(_curves(results, rows), "wide") if rows else "",
            repeat(commands, facts or {}, "The same comparison"),
        )
    )
    footer = (
        "Written by <code>robot-rl compare</code>. One test for all: the same fresh episodes, which no training "
        "has seen. With one seed an interval is Wilson's, 95 %; with several the wider one of that and Student's over "
        "seeds."
    )
    return document(title, body, footer)


def table(results: Mapping[str, Any]) -> str:
    """Return the figures of all methods as an HTML table."""
    heads = (
        "method",
        "seeds",
        "success",
        "Wilson 95 %",
        "over seeds",
        "gain over base",
        "env steps",
        "minutes",
        "steps/s",
    )
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for row in results["methods"]:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in cells_of(row))
        lines.append(f"<tr>{cells}</tr>")
    return f'<table class="figures"><tbody>{"".join(lines)}</tbody></table>'


def cells_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the figures of one method as texts, in the order of `table`."""
    if not row["seeds"]:
        return (row["method"], "0", "failed", "", "", "", "", "", "")
    low, high = row["wilson"]
    by_seed = row["success_by_seed"]
    spread = f"{100 * min(by_seed):.1f} to {100 * max(by_seed):.1f} %" if len(by_seed) > 1 else "one seed"
    gain = row["gain_interval"]
    return (
        row["method"],
        str(len(row["seeds"])),
        f"{100 * row['success']:.1f} %",
        f"{100 * low:.1f} to {100 * high:.1f} %",
        spread,
        f"{100 * row['gain']:+.1f} [{100 * gain[0]:+.1f}, {100 * gain[1]:+.1f}]",
        charts.number(row["steps"]),
        f"{row['minutes']:.1f}",
        charts.number(row["steps_per_second"]),
    )


def _headline(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Nothing was measured"
    best = rows[0]
    before = best["success"] - best["gain"]
    level = sum(row["interval"][1] >= best["interval"][0] for row in rows[1:])
    others = f", {level} other{'s' * (level > 1)} level with it" if level else ""
    figures = f"<s>{100 * before:.3g} %</s> → <em>{100 * best['success']:.3g} %</em>"
    return f"{figures} with {escape(best['method'])}{others}"


def _what(results: Mapping[str, Any]) -> str:
    budget, test, settings = results["budget"], results["test"], results["settings"]
    limits = [f"{budget['minutes']:g} minutes"] if budget["minutes"] else []
    limits += [f"{budget['steps']:,} environment steps"] if budget["steps"] else []
    last = test["first_seed"] + test["episodes"] - 1
    return (
        f"{len(results['methods'])} methods improved the same policy in {settings['task']} "
        f"({settings['reward']} reward), each run for {' or '.join(limits)}. Success over {test['episodes']} test "
        f"episodes per seed, the same for all (seeds {test['first_seed']:,} to {last:,})."
    )


def _intervals(results: Mapping[str, Any]) -> str:
    rows = [
        (name.replace("_", " ", 1), base["interval"][0], base["success"], base["interval"][1], "before")
        for name, base in results["bases"].items()
    ]
    for index, row in enumerate(row for row in results["methods"] if row["seeds"]):
        rows.append((row["method"], row["interval"][0], row["success"], row["interval"][1], charts.many(index)))
    return charts.intervals(rows, wide=True)


def _curves(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    several = any(len(row["seeds"]) > 1 for row in rows)
    note = "Mean over seeds of the success in validation" + ("; band: range of the seeds." if several else ".")
    if several and len(rows) > BANDS:
        note = note[:-1] + f", drawn for the best {BANDS}."
    cells = []
    for key, label in (("curve_steps", "environment steps"), ("curve_minutes", "minutes")):
        drawn = []
        end = max(row[key]["x"][-1] for row in rows)
        base = results["bases"]["base"]["success"]
        drawn.append(charts.Curve("base (test)", [0, end], [base, base], style="faint"))
        for index, row in enumerate(rows):
            curve = row[key]
            band = (curve["low"], curve["high"]) if len(row["seeds"]) > 1 and index < BANDS else None
            drawn.append(charts.Curve(row["method"], curve["x"], curve["mean"], charts.many(index), band))
        chart = charts.line_chart(drawn, x_label=label, y_label="success", percent=True, y_range=(0, 1))
        cells.append(f"<h3>Success over {label}</h3>{chart}<figcaption>{escape(note)}</figcaption>")
    return cells
