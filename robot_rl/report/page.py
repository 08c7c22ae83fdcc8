"""The page: what was reached first, then how, then what is needed to repeat it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import yaml

from robot_rl.report import charts


@dataclass(frozen=True)
class Share:
    """A success rate with its 95 % interval."""

    rate: float
    low: float
    high: float
    episodes: int
    first_seed: int


@dataclass(frozen=True)
class Video:
    """A film and what it shows."""

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class Deployment:
    """What happened on the (simulated) robot, as far as the page shows it."""

    seconds: float
    rate_hz: float
    transport: str
    """``"ROS 2"`` or the reason why it was not."""
    modes: Sequence[tuple[float, float, str]]
    """(start, end, mode) in seconds."""
    events: Sequence[tuple[float, str]]
    """(time in seconds, what happened)."""
    lateness: Mapping[str, Any]
    """Lateness of the control ticks: ``p50_ms``, ``p99_ms``, ``max_ms``, and the occupied bins as ``bins_ms`` (upper
    edges) and ``bin_counts``."""
    latency: Mapping[str, Any]
    """From an observation's stamp to the arrival of the chunk planned from it, inference included, likewise."""
    missed_ticks: int
    safety: Mapping[str, int]
    """How often each safety stage intervened, by name."""
    acted: Mapping[str, float]
    """Share of the executed steps by actor."""
    episodes: Sequence[bool] = ()
    """Whether each finished episode succeeded, whoever acted in it."""
    notes: Sequence[str] = ()
    """What a reader must know, for example that ROS 2 was absent."""


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    title: str
    subject: str
    """What was done, in a sentence or two."""
    before: Share
    after: Share
    charts: Sequence[tuple[str, str, str]] = ()
    """(heading, chart as HTML, caption)."""
    videos: Sequence[Video] = ()
    deployment: Deployment | None = None
    timings: Sequence[tuple[str, float]] = ()
    """(stage, seconds)."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Heading to nested settings: configuration, versions, seeds."""
    commands: Sequence[str] = ()
    """The same road by hand."""


def render(report: Report) -> str:
    """Return the page as HTML that needs no other file and no network."""
    body = "".join(
        (
            _headline(report),
            _videos(report.videos),
            _learning(report.charts),
            _deployment(report.deployment) if report.deployment is not None else "",
            _time(report.timings),
            repeat(report.commands, report.facts, "The same road by hand"),
        )
    )
    footer = (
        "Written by <code>robot-rl demo</code>. One seed of training, fresh seeds of evaluation; intervals are "
        "Wilson's, 95 %. The robot is simulated."
    )
    return document(report.title, body, footer)


def document(title: str, body: str, footer: str) -> str:
    """Return a whole page of ``body``, with the style sheet inside; ``title`` is text, the others are HTML."""
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{body}"
        f"<footer>{footer}</footer></main></body></html>\n"
    )


def _headline(report: Report) -> str:
    before, after = report.before, report.after
    rows = [
        ("Imitation", before.low, before.rate, before.high, "before"),
        ("Fine-tuned", after.low, after.rate, after.high, "after"),
    ]
    last = after.first_seed + after.episodes - 1
    return (
        f'<div class="eyebrow">{escape(report.title)}</div>'
        f"<h1>Success <s>{100 * before.rate:.3g} %</s> → <em>{100 * after.rate:.3g} %</em></h1>"
        f'<p class="lead">{escape(report.subject)}</p>'
        f'<div class="card"><h3>Success over {after.episodes} fresh episodes, with 95 % interval</h3>'
        f'{charts.intervals(rows)}<p class="note"><small>Both policies met the same episodes, seeds '
        f"{after.first_seed:,} to {last:,}, which no training has seen.</small></p></div>"
    )


def _videos(videos: Sequence[Video]) -> str:
    shown = [video for video in videos if video.path.exists()]
    if not shown:
        return ""
    return "<h2>See it</h2>" + grid(map(_film, shown))


def _film(video: Video) -> str:
    source = "data:video/mp4;base64," + base64.b64encode(video.path.read_bytes()).decode()
    return (
        f"<figure><h3>{escape(video.title)}</h3>"
        f'<video autoplay muted loop playsinline controls src="{source}"></video>'
        f"<figcaption>{escape(video.caption)}</figcaption></figure>"
    )


def _learning(drawn: Sequence[tuple[str, str, str]]) -> str:
    if not drawn:
        return ""
    return "<h2>How it learned</h2>" + grid(
        (
            f"<h3>{escape(heading)}</h3>{chart}<figcaption>{escape(caption)}</figcaption>"
            for heading, chart, caption in drawn
        ),
        "wide",
    )


def _deployment(d: Deployment) -> str:
    order = ("AUTO", "HUMAN", "HOLD", "STOPPED", "IDLE")
    tiles = [
        (f"{sum(d.episodes)} of {len(d.episodes)}", "episodes succeeded, person and stop included"),
        (f"{d.rate_hz:.0f} Hz", f"control rate over {d.transport}"),
        (_milliseconds(d.lateness, "p99_ms"), "lateness of a tick, p99"),
        (str(d.missed_ticks), "missed ticks"),
        (_milliseconds(d.latency, "p99_ms"), "observation to plan, p99"),
        (f"{sum(d.safety.values()):,}", "limits applied by the safety chain"),
    ]
    boxes = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    notes = "".join(f'<div class="card alert">{escape(note)}</div>' for note in d.notes)
    strip = charts.timeline(d.modes, d.events, d.seconds, order)
    return (
        f"<h2>On the robot</h2><p class='lead'>{d.seconds:.0f} s of real time on a simulated robot, with the safety "
        "chain on. It limits what a policy can do; it is not a certified safety function.</p>"
        f'{notes}<div class="tiles">{boxes}</div><div class="card"><h3>Who was in control</h3>{strip}</div>'
        + grid(
            (
                "<h3>Lateness of control ticks</h3>" + _durations(d.lateness, "ticks"),
                "<h3>Observation to the plan made from it</h3>" + _durations(d.latency, "plans"),
                "<h3>Safety chain: ticks by stage</h3>" + _table(d.safety, "No stage had to intervene."),
                "<h3>Executed steps by actor</h3>"
                + _table({k: f"{100 * v:.0f} %" for k, v in d.acted.items()}, "Nothing moved."),
            ),
            "wide",
        )
    )


def _time(timings: Sequence[tuple[str, float]]) -> str:
    if not timings:
        return ""
    minutes = sum(seconds for _, seconds in timings) / 60
    heading = f"<h2>Where the time went</h2><div class='card'><h3>{minutes:.1f} minutes in all</h3>"
    return f"{heading}{charts.shares(timings)}</div>"


def repeat(commands: Sequence[str], facts: Mapping[str, Any], title: str) -> str:
    """Return the section that says how to do it again: ``commands`` under ``title``, and settings by heading."""
    blocks = []
    if commands:
        lines = escape("\n".join(commands))
        blocks.append(f"<details open><summary>{escape(title)}</summary><pre>{lines}</pre></details>")
    for heading, values in facts.items():
        text = escape(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        blocks.append(f"<details><summary>{escape(heading)}</summary><pre>{text}</pre></details>")
    return f'<h2>Repeat it</h2><div class="card">{"".join(blocks)}</div>' if blocks else ""


def grid(cells: Iterable[str], kind: str = "") -> str:
    """Return ``cells`` of HTML as cards side by side."""
    return f'<div class="grid {kind}">' + "".join(f'<div class="card">{cell}</div>' for cell in cells) + "</div>"


def _table(rows: Mapping[str, Any], otherwise: str) -> str:
    if not rows:
        return f'<p class="note">{escape(otherwise)}</p>'
    lines = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in rows.items())
    return f'<table class="figures"><tbody>{lines}</tbody></table>'


def _milliseconds(durations: Mapping[str, Any], key: str) -> str:
    return f"{durations[key]:.2g} ms" if durations.get("bin_counts") else "none"


def _durations(durations: Mapping[str, Any], what: str) -> str:
    marks = [("p50", durations.get("p50_ms", 0.0)), ("p99", durations.get("p99_ms", 0.0))]
    return charts.histogram(
        durations.get("bins_ms", ()), durations.get("bin_counts", ()), unit="ms", marks=marks, what=what
    )
