import json

import numpy as np
import pytest

from robot_rl.core.errors import DataError, SpecMismatchError
from robot_rl.core.spec import ArraySpec, Spec

ARM = Spec(
    {
        "state": ArraySpec((2,), names=("x", "y"), unit="m", frame="world"),
        "images.front": ArraySpec((4, 6, 3), "uint8"),
    },
    ArraySpec((2,), low=(-1, -np.inf), high=(1, np.inf), unit="m"),
    20.0,
)


def test_json_round_trip_keeps_everything_including_infinite_bounds():
    assert Spec.from_json(json.loads(json.dumps(ARM.to_json()))) == ARM


def test_bounds_are_infinite_where_unstated():
    low, high = ArraySpec((3,)).bounds()
    assert np.isneginf(low).all()
    assert np.isposinf(high).all()


def test_a_mismatch_lists_every_difference():
    other = Spec({"state": ArraySpec((2,), unit="mm", frame="world")}, ArraySpec((3,)), 10.0)
    with pytest.raises(SpecMismatchError) as error:
        ARM.require(other, "the policy", "the robot")
    assert error.value.differences == [
        "observation 'state': unit 'm' against 'mm'",
        "observation 'images.front' is missing (available: state)",
        "action: shape (2,) against (3,)",
        "rate 20 Hz against 10 Hz",
    ]
    assert str(error.value).startswith("the policy does not fit the robot: ")
    assert "\n" not in str(error.value)


def test_extra_observations_and_unstated_meanings_are_no_mismatch():
    bare = Spec({**ARM.observation, "extra": ArraySpec((9,)), "state": ArraySpec((2,))}, ArraySpec((2,)), 0.0)
    ARM.require(bare, "policy", "robot")


def test_select_names_what_exists():
    assert list(ARM.select(("state",)).observation) == ["state"]
    with pytest.raises(DataError, match=r"no observation 'stat'; available: images\.front, state"):
        ARM.select(("stat",))


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.zeros((5, 3)), r"shape \(3,\), expected \(2,\)"), (np.full((5, 2), np.nan), "not finite")],
)
def test_validate_says_what_is_wrong(value, message):
    with pytest.raises(DataError, match=message):
        ARM.observation["state"].validate(value, "state", batch_dims=1)
    ARM.observation["state"].validate(np.zeros((5, 2)), "state", batch_dims=1)


def test_impossible_specs_are_refused():
    with pytest.raises(DataError, match="3 entries, expected 2"):
        ArraySpec((2,), low=(0, 0, 0))
    with pytest.raises(DataError, match="1 names, expected 2"):
        ArraySpec((2,), names=("x",))
