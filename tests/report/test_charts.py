"""Charts: well-formed, round ticks, robust against what a run can log."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robot_rl.report.charts import Curve, histogram, intervals, line_chart, log_ticks, number, shares, ticks, timeline

numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(numbers, st.floats(1e-6, 1e6))
def test_ticks_enclose_the_values_and_are_few(low, extent):
    found = ticks(low, low + extent)
    slack = 1e-6 * (1 + abs(low) + extent)
    assert found[0] <= low + slack
    assert found[-1] >= low + extent - slack
    assert 2 <= len(found) <= 9


@given(st.floats(1e-6, 1e5), st.floats(1.0, 1e5))
def test_logarithmic_ticks_enclose_the_values(low, factor):
    found = log_ticks(low, low * factor)
    assert found[0] <= low * 1.001
    assert found[-1] >= low * factor * 0.999
    assert len(found) >= 2


def test_a_line_chart_is_well_formed_and_leaves_out_what_is_not_finite():
    curve = Curve("success <b>", [0, 1, 2, 3], [0.1, math.nan, 0.5, None], band=([0, 0, 0.4, 0], [1, 1, 0.6, 1]))
    figure = ElementTree.fromstring(line_chart([curve], x_label="steps", y_label="success", percent=True))
    assert len(figure.findall(".//circle")) == 2
    assert len(figure.find(".//polygon").get("points").split()) == 4
    assert next(text.text for text in figure.iter("text")).endswith("%")


@pytest.mark.parametrize("values", [[], [math.nan], [0.0, -1.0]])
def test_a_chart_without_usable_values_says_so(values):
    chart = line_chart([Curve("loss", range(len(values)), values)], x_label="x", y_label="y", logarithmic=True)
    assert "nothing was logged" in chart


def test_a_constant_curve_and_a_single_point_can_be_drawn():
    for values in ([2.0, 2.0], [2.0], [0.0]):
        ElementTree.fromstring(line_chart([Curve("a", range(len(values)), values)], x_label="x", y_label="y"))


def test_a_histogram_counts_every_sample():
    edges = 0.01 * 1.06 ** np.arange(50)
    counts = np.arange(50)
    figure = ElementTree.fromstring(histogram(edges, counts, unit="ms", marks=[("p99", 0.6)], what="ticks"))
    shown = [int(title.text.rpartition(": ")[2]) for title in figure.iter("title")]
    assert sum(shown) == counts.sum()
    assert len(shown) == 49, "an empty bin has no bar"
    assert "nothing was measured" in histogram([], [], unit="ms")
    ElementTree.fromstring(histogram([1.0], [3], unit="ms"))


def test_intervals_timeline_and_shares_are_well_formed():
    ElementTree.fromstring(intervals([("before", 0.3, 0.4, 0.5, "before")]))
    strip = ElementTree.fromstring(
        timeline([(0, 1, "AUTO"), (1, 2, "HUMAN")], [(1.0, "take over & go")], 2.0, ("AUTO", "HUMAN", "STOPPED"))
    )
    assert len(strip.findall("./div[@class='strip']/i")) == 2
    assert "STOPPED" not in ElementTree.tostring(strip, encoding="unicode")
    ElementTree.fromstring(f"<div>{shares([('train', 10.0), ('deploy', 0.0)])}</div>")


@pytest.mark.parametrize(("value", "text"), [(0.25, "0.25"), (12500, "12.5k"), (3e6, "3M"), (999.6, "1e+03")])
def test_numbers_are_short(value, text):
    assert number(value) == text or len(number(value)) <= 6
