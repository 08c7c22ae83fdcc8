"""Message conversion, without a node or a running graph."""

import numpy as np
import pytest

from hardware.transport import ExecutorStatus
from robot_rl.core.errors import DataError, SpecMismatchError
from robot_rl.core.policy import ActionChunk
from robot_rl.core.robot import StampedObservation
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.core.teleop import OperatorEvent, OperatorInput

pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")
from rclpy.serialization import deserialize_message, serialize_message

from hardware.ros import convert

SPEC = Spec(
    {
        "state": ArraySpec((3,), names=("x", "y", "yaw"), unit="m,m,rad", frame="world"),
        "grid": ArraySpec((2, 2), "int64"),
        "images.front": ArraySpec((4, 6, 3), "uint8", frame="camera"),
    },
    ArraySpec((2,), names=("vx", "wz")),
    50.0,
)
ACTIONS = convert.element_names("action", SPEC.action)


def over_the_wire(message):
    return deserialize_message(serialize_message(message), type(message))


def observation(seq=7, stamp=1234.567891234, image_stamp=1234.55):
    values = {
        "state": np.array([1.1, -2.2, 3.3], np.float32),
        "grid": np.arange(4).reshape(2, 2),
        "images.front": np.arange(72, dtype=np.uint8).reshape(4, 6, 3),
    }
    return StampedObservation(values, seq, stamp, {"images.front": image_stamp})


def image_message(one):
    return over_the_wire(convert.to_image(one.values["images.front"], one.stamps["images.front"], one.seq, "camera"))


def test_time_is_exact_to_a_nanosecond():
    for stamp in (0.0, 0.999999999, 12.000000001, 3.2e6 + 0.123456789):
        assert convert.from_time(convert.to_time(stamp)) == pytest.approx(stamp, abs=1e-9, rel=0)
    assert convert.to_time(0.9999999999).sec == 1, "rounding must carry into the seconds"


def test_header_carries_frame_and_sequence():
    header = convert.to_header(5.5, 42, "map#2")
    assert header.frame_id == "map#2#42"
    assert convert.from_header(header) == (5.5, 42)
    for frame in ("base_link", "world#--5", "world#²", "world#" + "9" * 5000, "world#1\n"):
        header.frame_id = frame
        with pytest.raises(DataError, match="no sequence number"):
            convert.from_header(header)


def test_observation_round_trip_keeps_values_shapes_and_types():
    sent = observation()
    assembler = convert.Assembler(SPEC)
    message = over_the_wire(convert.VectorLayout(SPEC).pack(sent))
    assert message.name[:3] == ["state/x", "state/y", "state/yaw"]
    assert message.header.frame_id == "world#7"
    assert assembler.add_vectors(message) is None, "the announced image is still under way"
    received = assembler.add_image("images.front", image_message(sent))
    assert received.seq == 7
    assert received.stamp == pytest.approx(sent.stamp, abs=1e-9, rel=0)
    assert received.stamps["images.front"] == pytest.approx(1234.55, abs=1e-9, rel=0)
    for key, value in sent.values.items():
        np.testing.assert_array_equal(received.values[key], value)
        assert received.values[key].dtype == SPEC.observation[key].dtype


def test_slow_camera_serves_several_steps_and_a_lost_image_delays_only_its_step():
    assembler = convert.Assembler(SPEC)
    first, second, third = observation(1), observation(2), observation(3, image_stamp=1235.0)
    layout = convert.VectorLayout(SPEC)
    assembler.add_image("images.front", image_message(first))
    assert assembler.add_vectors(layout.pack(first)).seq == 1
    assert assembler.add_vectors(layout.pack(second)).seq == 2, "the same exposure is still the newest"
    assert assembler.add_vectors(layout.pack(third)) is None
    newer = observation(4, image_stamp=1236.0)
    assert assembler.add_image("images.front", image_message(newer)).seq == 3
    assert assembler.add_vectors(layout.pack(newer)).seq == 4


def test_vectors_are_paired_with_the_image_they_name_also_when_newer_ones_have_come():
    assembler, layout = convert.Assembler(SPEC), convert.VectorLayout(SPEC)
    steps = [observation(seq, image_stamp=1235.0 + seq) for seq in range(4)]
    for one in steps:
        one.values["images.front"] = np.full((4, 6, 3), one.seq, np.uint8)
    for one in steps:
        if one.seq != 1:  # that one is lost
            assembler.add_image("images.front", image_message(one))
    received = [assembler.add_vectors(layout.pack(one)) for one in steps]
    assert [int(one.values["images.front"].mean()) for one in received] == [0, 2, 2, 3]
    assert [round(one.stamps["images.front"]) for one in received] == [1235, 1237, 1237, 1238]


def test_wrong_elements_are_named():
    other = Spec({"state": ArraySpec((3,), names=("x", "z", "yaw"))}, SPEC.action)
    message = convert.VectorLayout(other).pack(observation())
    with pytest.raises(SpecMismatchError, match=r"'state/y' is missing") as refusal:
        convert.VectorLayout(SPEC).unpack(message)
    assert "'state/z' is not expected" in refusal.value.differences
    with pytest.raises(DataError, match="'state' is missing"):
        convert.VectorLayout(other).pack(StampedObservation({}, 0, 0.0))


def test_image_of_another_encoding_or_length_is_refused():
    message = image_message(observation())
    message.encoding = "bgr8"
    with pytest.raises(DataError, match="bgr8"):
        convert.from_image(message)
    message.encoding, message.height = "rgb8", 5
    with pytest.raises(DataError, match="72 bytes"):
        convert.from_image(message)
    with pytest.raises(DataError, match="uint8"):
        convert.to_image(np.zeros((4, 6, 3)), 0.0, 0)


@pytest.mark.parametrize("with_policy_actions", [False, True])
def test_chunk_round_trip(with_policy_actions):
    generator = np.random.default_rng(0)
    actions = generator.normal(size=(16, 2)).astype(np.float32)
    chunk = ActionChunk(actions, 99, 12.25, actions * 2 if with_policy_actions else None)
    message = over_the_wire(convert.to_trajectory(chunk, ACTIONS, 50.0))
    assert message.points[3].time_from_start.nanosec == 60_000_000
    received = convert.from_trajectory(message, ACTIONS)
    assert (received.observation_seq, received.observation_stamp) == (99, 12.25)
    np.testing.assert_array_equal(received.actions, actions)
    assert received.actions.dtype == np.float32
    if with_policy_actions:
        np.testing.assert_array_equal(received.policy_actions, actions * 2)
    else:
        assert received.policy_actions is None


def test_chunk_with_not_a_number_arrives_as_it_is():
    """The safety chain decides about it; the transport must not hide it."""
    chunk = ActionChunk(np.array([[np.nan, np.inf]], np.float32), 1, 1.0)
    received = convert.from_trajectory(over_the_wire(convert.to_trajectory(chunk, ACTIONS, 50.0)), ACTIONS)
    assert np.isnan(received.actions[0, 0])
    assert np.isinf(received.actions[0, 1])


def test_chunk_for_another_robot_is_refused():
    message = convert.to_trajectory(ActionChunk(np.zeros((2, 2)), 1, 1.0), ["action/a", "action/b"], 50.0)
    with pytest.raises(SpecMismatchError, match="action/vx"):
        convert.from_trajectory(message, ACTIONS)
    message = convert.to_trajectory(ActionChunk(np.zeros((2, 2)), 1, 1.0), ACTIONS, 50.0)
    message.points[1].positions = [0.0]
    with pytest.raises(DataError, match="2 positions"):
        convert.from_trajectory(message, ACTIONS)


def test_operator_round_trip():
    events = (OperatorEvent.TAKE_OVER, OperatorEvent.EMERGENCY_STOP)
    sent = OperatorInput(3.5, 11, True, np.array([0.5, -1.0], np.float32), events)
    received = convert.from_joy(over_the_wire(convert.to_joy(sent)))
    assert (received.stamp, received.seq, received.enabled, received.events) == (3.5, 11, True, events)
    np.testing.assert_array_equal(received.motion, sent.motion)
    assert received.target is None
    sent.target = np.array([0.25, 3.0])
    received = convert.from_joy(over_the_wire(convert.to_joy(sent)))
    np.testing.assert_array_equal(received.motion, sent.motion)
    np.testing.assert_array_equal(received.target, sent.target)
    message = convert.to_joy(sent)
    message.axes = [0.0] * 3
    with pytest.raises(DataError, match="3 axes"):
        convert.from_joy(message)
    message.buttons = [1, 0]
    with pytest.raises(DataError, match="2 buttons"):
        convert.from_joy(message)


def test_status_round_trip_and_level():
    sent = ExecutorStatus("stopped", "none", "stale_policy", 5, 2.5, True, {"clamp": 3}, {"rate_hz": 99.9})
    message = over_the_wire(convert.to_diagnostics(sent))
    assert message.status[0].level == b"\x02"
    assert message.status[0].message == "stopped: stale_policy"
    assert convert.from_diagnostics(message) == sent
    message.status[0].name = "something else"
    with pytest.raises(DataError, match="robot_rl executor"):
        convert.from_diagnostics(message)


def test_json_strings():
    assert Spec.from_json(convert.from_json_string(over_the_wire(convert.to_json_string(SPEC.to_json())))) == SPEC
    broken = convert.to_json_string({})
    for text in ("{", "[1]"):
        broken.data = text
        with pytest.raises(DataError, match="JSON"):
            convert.from_json_string(broken)
