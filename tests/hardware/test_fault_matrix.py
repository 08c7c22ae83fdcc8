"""A few cells of the fault matrix, with generous ages: the benchmark runs all of them with tight ones."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.fault_matrix import FAULTS, NO_SENSE, OUTCOMES, PLACES, SETTINGS, drivers, figures, run_cell, told

# A machine that is busy with other things may stall any process for a moment.
PATIENT = replace(
    SETTINGS, max_command_age=0.3, max_state_age=0.3, max_camera_age=0.4, operator_timeout=0.4, late_steps=4
)


@pytest.mark.parametrize(
    ("driver", "place", "fault"),
    [
        ("fake", "policy", "kill"),
        ("fake", "policy", "nan"),
        ("fake", "policy", "jump"),
        ("fake", "camera", "stop"),
        ("fake", "operator", "hang"),
        ("fake", "state", "jump"),
        ("so101", "far_end", "disconnect"),
    ],
)
def test_a_part_that_fails_is_named_and_the_robot_ends_at_rest(driver, place, fault):
    outcome = run_cell(driver, place, fault, PATIENT)
    assert outcome.safe, told(outcome)
    assert outcome.named, told(outcome)
    assert outcome.excursion == 0.0
    assert outcome.reason
    if outcome.ticks is None:
        assert outcome.reaction_ms < 700.0
    else:
        assert outcome.ticks == 1, "a bad command is answered in the tick in which it comes"


def test_every_combination_is_tried_or_has_a_reason_why_it_makes_no_sense():
    ridden_out = {(place, "drop") for place in PLACES} | {("operator", "jump")}
    for place in PLACES:
        for fault in FAULTS:
            assert ((place, fault) in OUTCOMES) + ((place, fault) in NO_SENSE) + ((place, fault) in ridden_out) == 1
    skipped = run_cell("fake", "camera", "nan")
    assert skipped.skipped == "images are integers"
    assert run_cell("fake", "far_end", "kill").skipped == "the robot has no far end"


def test_drivers_without_a_bench_are_named():
    known, missing = drivers()
    assert {"sim", "fake", "so101"} <= set(known)
    assert "sim" not in missing


def test_an_outcome_that_is_not_safe_lowers_the_figures():
    good = run_cell("fake", "state", "disconnect", PATIENT)
    assert figures([good])["share_safe"] == figures([good])["share_named"] == 1.0
    assert figures([good, replace(good, safe=False, excursion=0.1)])["share_safe"] == 0.5
    assert "UNSAFE" in told(replace(good, safe=False))
