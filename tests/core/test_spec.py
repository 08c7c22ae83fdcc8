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


def test_a_mismatch_in_much_is_told_in_a_few_words():
    names = tuple(f"joint_{i}" for i in range(31))
    swapped = (*names[:4], names[5], names[4], *names[6:])
    mine = Spec({"state": ArraySpec((31,), names=names, unit="rad," * 31, frame="a")}, ArraySpec((2,)), 20.0)
    other = Spec({"state": ArraySpec((31,), names=swapped, unit="m," * 31, frame="b")}, ArraySpec((3,)), 10.0)
    with pytest.raises(SpecMismatchError) as error:
        mine.require(other, "the policy", "the robot")
    assert error.value.differences[0] == "observation 'state': names 'joint_4' against 'joint_5' at 4, 2 of 31 differ"
    assert len(error.value.differences) == 5
    assert str(error.value).endswith("frame 'a' against 'b'; … and 2 more.")
    assert len(str(error.value)) < 400


def test_long_lists_of_what_exists_are_cut():
    wide = Spec({f"sensor_{i}": ArraySpec((1,)) for i in range(9)}, ArraySpec((2,)))
    (difference,) = Spec({"state": ArraySpec((1,))}, ArraySpec((2,))).differences(wide)
    assert difference.endswith("sensor_4, sensor_5, … 9 in all)")
    longer = ArraySpec((9,), names=tuple("abcdefghi")).differences(ArraySpec((8,), names=tuple("abcdefgh")), "state")
    assert longer[-1] == "state: names (a, b, c, d, e, f, … 9 in all) against (a, b, c, d, e, f, … 8 in all)"
