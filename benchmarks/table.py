"""Writes the table of docs/benchmarks.md from the kept results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def main() -> None:
    """Replace what stands between the two markers."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}{END}{after}", encoding="utf-8")
    print(f"{PAGE.name}: {len(list(RESULTS.glob('*.json')))} results")


def table() -> str:
    """Return the table in Markdown: one row per metric with a target; all other metrics are behind the link."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    if not results:
        return ""
    lines = ["", "| benchmark | metric | measured | target | met | date |", "|---|---|---|---|---|---|"]
    for result in results:
        lines += _rows(result)
    processors = sorted({f"{r['machine']['cores']} cores of {r['machine']['processor']}" for r in results})
    lines += ["", f"Measured on {'; '.join(processors)}.", ""]
    for result in results:
        if result.get("notes"):
            lines += [f"**{result['name']}.** {result['notes']}", ""]
    return "\n".join(lines)


def _rows(result: dict[str, Any]) -> list[str]:
    link = f"[{result['name']}](../benchmarks/results/{result['name']}.json)"
    rows = []
    for metric, (comparison, bound) in result["targets"].items():
        value = result["metrics"].get(metric)
        measured = "not measured" if value is None else _short(value)
        met = "yes" if result["met"][metric] else "**no**"
        rows.append(f"| {link} | {metric} | {measured} | {comparison} {bound:g} | {met} | {result['date'][:10]} |")
    return rows


def _short(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, (int, float)) and abs(value) < 1e4 else str(value)


if __name__ == "__main__":
    main()
