"""The page and the picture of a comparison: complete, self-contained, escaped."""

from html.parser import HTMLParser

import cv2
import pytest

from robot_rl.report.comparison import cells_of, render_comparison
from robot_rl.report.comparison_picture import write_comparison_picture


class Page(HTMLParser):
    """Collects what the page would fetch and its text, and checks that elements close."""

    VOID = frozenset({"meta", "circle", "line", "rect", "polyline", "polygon"})

    def __init__(self):
        super().__init__()
        self.fetched, self.open, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def row(method, success, seeds=(0, 1), error=""):
    x = [0, 1000, 2000]
    curve = {"x": x, "mean": [0.5, 0.6, success], "low": [0.5, 0.5, 0.6], "high": [0.5, 0.7, 0.9]}
    return {
        "method": method,
        "base": "base",
        "error": error,
        "seeds": list(seeds),
        "success_by_seed": [success - 0.01, success + 0.01][: len(seeds)],
        "episodes": 200 * len(seeds),
        "success": success,
        "wilson": (success - 0.05, success + 0.04),
        "interval": (success - 0.06, success + 0.05),
        "gain": success - 0.5,
        "gain_interval": (success - 0.6, success - 0.4),
        "steps": 123_456.0,
        "minutes": 7.96,
        "steps_per_second": 258.0,
        "curve_steps": curve,
        "curve_minutes": curve | {"x": [0.5, 3, 8]},
    }


@pytest.fixture
def results():
    methods = [row("good", 0.9), row("fair <b>", 0.7, seeds=(0,))]
    methods.append({"method": "broken", "base": "base", "error": "no such head & more", "seeds": []})
    return {
        "settings": {"task": "peg_insert", "reward": "sparse"},
        "budget": {"minutes": 8.0, "steps": 0},
        "test": {"first_seed": 1_000_000, "episodes": 200},
        "bases": {"base": {"success": 0.5, "episodes": 200, "interval": (0.43, 0.57)}},
        "methods": methods,
        "recommendation": ["Use good.", "broken failed: no such head & more"],
    }


def test_the_page_is_complete_and_needs_nothing_else(results):
    html = render_comparison(
        results, title="Peg <compared>", commands=["robot-rl compare"], facts={"Versions": {"a": 1}}
    )
    page = Page()
    page.feed(html)
    assert not page.open
    assert not page.fetched
    for text in ("Peg <compared>", "Use good.", "fair <b>", "no such head & more", "200 test episodes", "1,000,199"):
        assert text in page.text
    for text in (
        "90.0 %",
        "85.0 to 94.0 %",
        "89.0 to 91.0 %",
        "+40.0 [+30.0, +50.0]",
        "123.5k",
        "8.0",
        "one seed",
        "failed",
    ):
        assert text in page.text
    assert "50 % → 90 % with good" in page.text
    assert html.count("<svg") == 2
    assert html.count("<polygon") == 2, "a band for the method with two seeds, over steps and over minutes"


def test_twelve_methods_are_told_apart(results):
    results["methods"] = [row(f"method_{k}", 0.9 - 0.01 * k) for k in range(12)]
    html = render_comparison(results, title="many")
    assert "with method_0, 11 others level with it" in html
    assert 'class="line c9"' in html
    assert 'class="line c1 dashed"' in html
    assert html.count("<polygon") == 8, "bands of the best four only"


def test_a_comparison_without_results_says_so(results):
    results["methods"] = results["methods"][2:]
    assert "Nothing was measured" in render_comparison(results, title="empty")


def test_figures_as_text(results):
    assert cells_of(results["methods"][2])[:3] == ("broken", "0", "failed")
    assert cells_of(results["methods"][1])[4] == "one seed"


def test_the_picture_shows_every_method(results, tmp_path):
    few = cv2.imread(str(write_comparison_picture(results, tmp_path / "few.png", "title")))
    results["methods"] = [row(f"method_{k}", 0.9 - 0.01 * k) for k in range(12)]
    many = cv2.imread(str(write_comparison_picture(results, tmp_path / "many.png")))
    assert few.shape[1] == many.shape[1]
    assert many.shape[0] > few.shape[0], "a row for each"
    for image in (few, many):
        assert (image.reshape(-1, 3).min(1) < 200).mean() > 0.005, "something is drawn"
