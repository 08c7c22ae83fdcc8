"""The page: self-contained, complete, escaped."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from robot_rl.report.charts import Curve, line_chart
from robot_rl.report.page import Deployment, Report, Share, Video, render

DURATIONS = {"p50_ms": 0.1, "p99_ms": 0.2, "max_ms": 0.2, "bins_ms": [0.1, 0.2], "bin_counts": [9, 1]}


class Links(HTMLParser):
    """Collects what the page would fetch, and checks that elements close."""

    VOID = frozenset({"meta", "circle", "line", "rect", "polyline", "polygon"})

    def __init__(self):
        super().__init__()
        self.fetched, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture
def report(tmp_path):
    film = tmp_path / "film.mp4"
    film.write_bytes(b"0123456789")
    chart = line_chart([Curve("loss", [1, 2], [1.0, 0.5])], x_label="steps", y_label="loss")
    deployment = Deployment(
        seconds=20,
        rate_hz=20,
        transport="ROS 2",
        modes=[(0, 10, "AUTO"), (10, 20, "STOPPED")],
        events=[(10, "emergency stop")],
        lateness=DURATIONS,
        latency=DURATIONS,
        missed_ticks=0,
        safety={"velocity": 3},
        acted={"policy": 0.5},
        notes=["ROS 2 is absent."],
    )
    return Report(
        title="robot_rl demo <1>",
        subject="50 demonstrations & a policy.",
        before=Share(0.43, 0.36, 0.5, 200, 1_000_000),
        after=Share(0.955, 0.917, 0.976, 200, 1_000_000),
        charts=[("Loss", chart, "caption")],
        videos=[Video(film, "Before", "caption"), Video(tmp_path / "absent.mp4", "Absent", "")],
        deployment=deployment,
        timings=[("Train", 60.0), ("Deploy", 30.0)],
        facts={"Versions": {"torch": "2.13.0"}},
        commands=["robot-rl collect"],
    )


def test_the_page_needs_no_other_file(report):
    page = render(report)
    links = Links()
    links.feed(page)
    assert links.open == []
    assert len(links.fetched) == 1
    assert links.fetched[0].startswith("data:video/mp4;base64,")
    assert "@import" not in page
    assert not re.search(r"url\((?!data:)", page)


def test_the_page_says_what_was_reached_and_how_sure_that_is(report):
    page = render(report)
    for part in ("43 %", "95.5 %", "36 to 50 %", "1,000,000", "1,000,199", "1.5 minutes in all", "emergency stop"):
        assert part in page
    assert "ROS 2 is absent." in page
    assert "not a certified safety function" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_the_page_holds_the_histograms_of_the_durations_and_the_counters_of_safety(report):
    longer = {"p50_ms": 12.0, "p99_ms": 31.0, "max_ms": 40.0, "bins_ms": [10.0, 20.0, 40.0], "bin_counts": [70, 25, 5]}
    counts = {"velocity limited": 3, "emergency stop": 1}
    page = render(replace(report, deployment=replace(report.deployment, latency=longer, safety=counts)))
    cells = [cell.split("</div>")[0] for cell in page.split('<div class="card"><h3>')]
    named = {cell.split("</h3>")[0]: cell for cell in cells}
    lateness, latency = named["Lateness of control ticks"], named["Observation to the plan made from it"]
    assert lateness.count('<rect class="bar"') == 2
    assert latency.count('<rect class="bar"') == 3
    for text in ("10 to 20 ms: 25", "20 to 40 ms: 5", "p50 12 ms", "p99 31 ms"):
        assert text in latency
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", named["Safety chain: ticks by stage"])
    assert rows == [("velocity limited", "3"), ("emergency stop", "1")]
    assert "<b>31 ms</b><span>observation to plan, p99</span>" in page
    assert "<b>4</b><span>limits applied by the safety chain</span>" in page


def test_a_deployment_in_which_nothing_happened_says_so(report):
    nothing = {"p50_ms": 0.0, "p99_ms": 0.0, "max_ms": 0.0, "bins_ms": [], "bin_counts": []}
    page = render(replace(report, deployment=replace(report.deployment, latency=nothing, safety={})))
    assert "No stage had to intervene." in page
    assert "nothing was measured" in page
    assert "<b>none</b><span>observation to plan, p99</span>" in page


def test_text_is_escaped_and_missing_videos_are_left_out(report):
    page = render(report)
    assert "robot_rl demo &lt;1&gt;" in page
    assert "Absent" not in page
