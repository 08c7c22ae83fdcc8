"""Our types as standard ROS 2 messages and back: pure functions that need no node and no running graph.

=================== ====================================  ====================================================
ours                message                               where things go
=================== ====================================  ====================================================
observation vectors ``sensor_msgs/JointState``            ``name`` = ``key/element``, ``position`` = value
observation image   ``sensor_msgs/Image`` (rgb8)          one message per key, stamp of the exposure
`ActionChunk`       ``trajectory_msgs/JointTrajectory``   ``points[j].positions`` = action j
`OperatorInput`     ``sensor_msgs/Joy``                   ``axes`` = motion, then target if it has one; ``buttons`` =
                                                          enabled, events, whether there is a target
e-stop              ``std_msgs/Bool``                     true = pressed; latched by its topic
`ExecutedStep`      ``sensor_msgs/JointState``            ``name`` of `executed_names`, ``position`` = value
`ExecutorStatus`    ``diagnostic_msgs/DiagnosticArray``   one status, its fields as key and value
`Spec`              ``std_msgs/String``                   JSON; latched by its topic
=================== ====================================  ====================================================

**Time.** Our stamps are seconds of the machine's monotonic clock. They travel in ``header.stamp`` as seconds and
nanoseconds of that same clock: exact to 1 ns and comparable between processes of one host, and not a date. Between
hosts the clocks differ, so there a receiver may judge age only by its own receive time (`hardware.ros.link` keeps it).

**Sequence numbers.** ROS 2 headers have none, so ``header.frame_id`` is ``frame#seq``, for example ``world#1042``.
"""

from __future__ import annotations

import array
import dataclasses
import json
import re
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware.recording.recorder import ACTOR_CODES, MODE_CODES, REASON_CODES, ExecutedStep
from hardware.transport import ExecutorStatus
from robot_rl.core.errors import DataError, SpecMismatchError
from robot_rl.core.policy import ActionChunk
from robot_rl.core.robot import StampedObservation
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.core.teleop import OperatorEvent, OperatorInput

if TYPE_CHECKING:
    from builtin_interfaces.msg import Time
    from diagnostic_msgs.msg import DiagnosticArray
    from sensor_msgs.msg import Image, JointState, Joy
    from std_msgs.msg import Bool, Header, String
    from trajectory_msgs.msg import JointTrajectory

STATUS_NAME = "robot_rl executor"
"""Name of the executor's diagnostic."""
_LEVELS = {"auto": b"\x00", "align": b"\x00", "human": b"\x00", "idle": b"\x01", "hold": b"\x01", "stopped": b"\x02"}
EXECUTED_ACTIONS = ("action", "policy_action", "human_action")
"""Actions of an executed step; each has the elements of the robot's."""
EXECUTED_FACTS = ("actor", "intervention", "safety_flags", "policy_planned", "mode", "reason", "episode")
"""What else an executed step says, a number each."""
_STAMP_PREFIX = "stamp:"
_POLICY_PREFIX = "policy/"
_EVENTS = tuple(OperatorEvent)
_NUMBER = re.compile(r"-?[0-9]{1,18}")
_SAME_TIME = 1e-6
"""Two stamps nearer than this (s) are one measurement; float64 seconds lose the nanosecond after months of uptime."""


def to_time(stamp: float) -> Time:
    """Return the monotonic ``stamp`` in seconds as a ROS time of the same clock, rounded to 1 ns."""
    from builtin_interfaces.msg import Time

    seconds, nanoseconds = divmod(round(stamp * 1e9), 1_000_000_000)
    return Time(sec=seconds, nanosec=nanoseconds)


def from_time(time: Time) -> float:
    """Return a ROS time as seconds; the inverse of `to_time`."""
    return time.sec + time.nanosec * 1e-9


def to_header(stamp: float, seq: int, frame: str = "") -> Header:
    """Return a header with the time ``stamp`` (s) and the frame ``frame#seq``."""
    from std_msgs.msg import Header

    return Header(stamp=to_time(stamp), frame_id=f"{frame}#{seq}")


def from_header(header: Header) -> tuple[float, int]:
    """Return (stamp in seconds, sequence number) of a header written by `to_header`.

    Raises:
        DataError: the frame does not end in ``#`` and a number, so the message is not ours.
    """
    _, mark, text = header.frame_id.rpartition("#")
    if not mark or not _NUMBER.fullmatch(text):
        raise DataError(f"message with the frame '{header.frame_id}' carries no sequence number ('frame#seq' expected)")
    return from_time(header.stamp), int(text)


def element_names(key: str, spec: ArraySpec) -> list[str]:
    """Return one name per element of an array: ``key/name`` where the spec names them, else ``key/index``."""
    if spec.names and len(spec.names) == spec.size:
        return [f"{key}/{name}" for name in spec.names]
    return [f"{key}/{index}" for index in range(spec.size)]


class VectorLayout:
    """Packs every observation of a spec that is not an image into one ``JointState``, and unpacks it.

    One message keeps the vectors of one control step together. Values travel as float64, which is exact for float32
    and for integers up to 2^53; unpacking restores each key's shape and dtype. The measurement times of single keys,
    images among them, follow as elements named ``stamp:key``.
    """

    def __init__(self, spec: Spec) -> None:
        self.keys = [key for key, array_spec in spec.observation.items() if not array_spec.is_image]
        self._specs = [spec.observation[key] for key in self.keys]
        self.names = [name for key, one in zip(self.keys, self._specs, strict=True) for name in element_names(key, one)]
        self._ends = np.cumsum([one.size for one in self._specs]).tolist()
        frames = {one.frame for one in self._specs if one.frame}
        self._frame = frames.pop() if len(frames) == 1 else ""

    def pack(self, observation: StampedObservation) -> JointState:
        """Return the message for ``observation``; `DataError` where a key is missing or of another size."""
        from sensor_msgs.msg import JointState

        values: list[float] = []
        for key, spec in zip(self.keys, self._specs, strict=True):
            if key not in observation.values:
                raise DataError(f"observation '{key}' is missing; there is: {', '.join(sorted(observation.values))}")
            value = np.asarray(observation.values[key], np.float64).ravel()
            if len(value) != spec.size:
                raise DataError(f"observation '{key}' has {len(value)} elements, expected {spec.size}")
            values += value.tolist()
        names = self.names
        if observation.stamps:
            names = names + [_STAMP_PREFIX + key for key in observation.stamps]
            values += observation.stamps.values()
        header = to_header(observation.stamp, observation.seq, self._frame)
        return JointState(header=header, name=names, position=array.array("d", values))

    def unpack(self, message: JointState) -> StampedObservation:
        """Return the observation of a message that `pack` wrote; images are added by `Assembler`.

        Raises:
            SpecMismatchError: the elements are not those of this spec; the message lists which.
        """
        count = len(self.names)
        if message.name[:count] != self.names or len(message.name) != len(message.position):
            raise SpecMismatchError("The received observation", "this spec", self._differences(message.name))
        stamp, seq = from_header(message.header)
        flat = np.frombuffer(message.position, np.float64)
        values, start = {}, 0
        for key, spec, end in zip(self.keys, self._specs, self._ends, strict=True):
            values[key] = flat[start:end].astype(spec.dtype).reshape(spec.shape)
            start = end
        stamps = {
            name[len(_STAMP_PREFIX) :]: float(x) for name, x in zip(message.name[count:], flat[count:], strict=True)
        }
        return StampedObservation(values, seq, stamp, stamps)

    def _differences(self, names: Iterable[str]) -> list[str]:
        received = [name for name in names if not name.startswith(_STAMP_PREFIX)]
        missing = [name for name in self.names if name not in received]
        unknown = [name for name in received if name not in self.names]
        found = [f"'{name}' is missing" for name in missing[:5]] + [f"'{name}' is not expected" for name in unknown[:5]]
        return found or ["the order of the elements differs"]


class Assembler:
    """Joins the vectors of a control step with the images that it names by their time.

    Images travel on topics of their own: before the vectors, after them, or not at all. An observation is complete once
    every image that its ``stamp:`` elements announce is there, or, where one was lost, the first that came after it;
    newer vectors replace those that wait.
    """

    _KEPT = 8
    """Images of one camera that are remembered: vectors may be handled when newer images have come already."""

    def __init__(self, spec: Spec) -> None:
        self.layout = VectorLayout(spec)
        self._specs = {key: one for key, one in spec.observation.items() if one.is_image}
        self._images: dict[str, deque[tuple[float, np.ndarray]]] = {
            key: deque(maxlen=self._KEPT) for key in self._specs
        }
        self._waiting: StampedObservation | None = None

    def add_vectors(self, message: JointState) -> StampedObservation | None:
        """Take the vectors of a step; return the observation if it is complete, else None."""
        self._waiting = self.layout.unpack(message)
        return self._complete()

    def add_image(self, key: str, message: Image) -> StampedObservation | None:
        """Take one image; return the observation that it completes, if any."""
        image = from_image(message)
        self._specs[key].validate(image, f"image '{key}'")
        self._images[key].append((from_time(message.header.stamp), image))
        return self._complete()

    def _complete(self) -> StampedObservation | None:
        waiting = self._waiting
        if waiting is None:
            return None
        found = {}
        for key, images in self._images.items():
            announced = waiting.stamps.get(key, waiting.stamp) - _SAME_TIME
            image = next((one for one in images if one[0] >= announced), None)
            if image is None:
                return None
            found[key] = image
        for key, image in found.items():
            waiting.stamps[key], waiting.values[key] = image
        self._waiting = None
        return waiting


def to_image(image: np.ndarray, stamp: float, seq: int, frame: str = "") -> Image:
    """Return an RGB image (height, width, 3) uint8 as an ``rgb8`` message."""
    from sensor_msgs.msg import Image

    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(f"image of shape {image.shape} and type {image.dtype}, expected (height, width, 3) uint8")
    height, width, channels = image.shape
    # Assigning an ndarray would be converted element by element (72 ms for 640x480); a byte array is one copy.
    data = array.array("B")
    data.frombytes(np.ascontiguousarray(image).data.cast("B"))
    header = to_header(stamp, seq, frame)
    return Image(header=header, height=height, width=width, encoding="rgb8", step=width * channels, data=data)


def from_image(message: Image) -> np.ndarray:
    """Return an ``rgb8`` message as an array (height, width, 3) uint8 that shares its memory."""
    if message.encoding != "rgb8":
        raise DataError(f"image of encoding '{message.encoding}', expected 'rgb8'")
    if message.step != 3 * message.width or len(message.data) != message.height * message.step:
        raise DataError(f"image of {len(message.data)} bytes, expected {message.height} rows of {3 * message.width}")
    return np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)


def to_trajectory(chunk: ActionChunk, names: list[str], rate_hz: float) -> JointTrajectory:
    """Return a chunk (H, A) as a trajectory of H points.

    The header carries the stamp and the sequence number of the observation that it was planned from. Where the chunk
    has ``policy_actions``, the joints ``policy/<name>`` follow the A action names and hold them.

    Args:
        chunk: what the policy planned.
        names: (A,) names of the action's elements.
        rate_hz: control steps per second, for ``time_from_start``.
    """
    from builtin_interfaces.msg import Duration
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    rows = np.asarray(chunk.actions, np.float64)
    if rows.ndim != 2 or rows.shape[1] != len(names):
        raise DataError(f"chunk of shape {rows.shape}, expected (H, {len(names)})")
    joints = list(names)
    if chunk.policy_actions is not None:
        rows = np.concatenate([rows, np.asarray(chunk.policy_actions, np.float64)], axis=1)
        joints += [_POLICY_PREFIX + name for name in names]
    step = round(1e9 / rate_hz) if rate_hz else 0
    points = []
    for j, row in enumerate(rows):
        seconds, nanoseconds = divmod(j * step, 1_000_000_000)
        offset = Duration(sec=seconds, nanosec=nanoseconds)
        points.append(JointTrajectoryPoint(positions=array.array("d", row.tobytes()), time_from_start=offset))
    header = to_header(chunk.observation_stamp, chunk.observation_seq)
    return JointTrajectory(header=header, joint_names=joints, points=points)


def from_trajectory(message: JointTrajectory, names: list[str]) -> ActionChunk:
    """Return the chunk of a trajectory, float32; the inverse of `to_trajectory`.

    Raises:
        SpecMismatchError: the joints are not ``names``, alone or followed by their ``policy/`` twins.
    """
    count = len(names)
    twins = [_POLICY_PREFIX + name for name in names]
    if message.joint_names[:count] != names or message.joint_names[count:] not in ([], twins):
        found = f"joints {', '.join(message.joint_names) or 'none'} against {', '.join(names)}"
        raise SpecMismatchError("The received chunk", "the robot's action", [found])
    width = len(message.joint_names)
    if not message.points or any(len(point.positions) != width for point in message.points):
        raise DataError(f"chunk without points, or with a point that has not {width} positions")
    rows = np.array([point.positions for point in message.points], np.float32)
    stamp, seq = from_header(message.header)
    return ActionChunk(rows[:, :count], seq, stamp, rows[:, count:] if width > count else None)


def to_joy(reading: OperatorInput) -> Joy:
    """Return an operator's reading as a joystick message."""
    from sensor_msgs.msg import Joy

    shown = reading.target is not None
    buttons = [int(reading.enabled)] + [int(event in reading.events) for event in _EVENTS] + [int(shown)]
    axes = array.array("f", np.asarray(reading.motion, np.float32).tobytes())
    if shown:
        axes.frombytes(np.asarray(reading.target, np.float32).tobytes())
    header = to_header(reading.stamp, reading.seq, reading.source)
    return Joy(header=header, axes=axes, buttons=array.array("i", buttons))


def from_joy(message: Joy) -> OperatorInput:
    """Return the operator's reading of a joystick message; the inverse of `to_joy`."""
    expected = 2 + len(_EVENTS)
    if len(message.buttons) != expected:
        raise DataError(f"operator message with {len(message.buttons)} buttons, expected {expected}")
    stamp, seq = from_header(message.header)
    events = tuple(event for event, pressed in zip(_EVENTS, message.buttons[1:-1], strict=True) if pressed)
    axes = np.frombuffer(message.axes, np.float32).copy()
    shown = bool(message.buttons[-1])
    if shown and len(axes) % 2:
        raise DataError(f"operator message with {len(axes)} axes, expected as many of a target as of a motion")
    motion, target = (axes[: len(axes) // 2], axes[len(axes) // 2 :]) if shown else (axes, None)
    source, _, _ = message.header.frame_id.rpartition("#")
    return OperatorInput(stamp, seq, bool(message.buttons[0]), motion, events, source, target)


def executed_names(spec: Spec) -> list[str]:
    """Return the elements of an executed step: the executed, the planned and the operator's action, and its facts."""
    actions = [name for key in EXECUTED_ACTIONS for name in element_names(key, spec.action)]
    return actions + list(EXECUTED_FACTS)


def to_executed(step: ExecutedStep, names: list[str], seq: int, episode: int) -> JointState:
    """Return an executed step as numbers with names; its time is that of the observation it was decided upon from.

    Codes are those of `hardware.recording.recorder`.

    Args:
        step: what happened.
        names: of `executed_names`.
        seq: number of the message.
        episode: number of the episode, from 1.
    """
    from sensor_msgs.msg import JointState

    values = np.concatenate([step.action, step.policy_action, step.human_action]).tolist()
    values += [ACTOR_CODES[step.writer], step.writer == "human", step.safety_flags, step.planned]
    values += [MODE_CODES[step.mode], REASON_CODES[step.reason], episode]
    return JointState(header=to_header(step.stamp, seq), name=names, position=array.array("d", values))


def to_bool(pressed: bool) -> Bool:
    """Return the state of an e-stop as a message."""
    from std_msgs.msg import Bool

    return Bool(data=bool(pressed))


def to_diagnostics(status: ExecutorStatus) -> DiagnosticArray:
    """Return the executor's status as one diagnostic: OK in auto and human, WARN in idle and hold, ERROR if stopped.

    Every field is one entry, its value as JSON, so that any diagnostics viewer shows them.
    """
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

    fields = dataclasses.asdict(status)
    level = _LEVELS.get(status.mode, b"\x02")
    message = f"{status.mode}: {status.reason}" if status.reason else status.mode
    values = [KeyValue(key=key, value=json.dumps(value)) for key, value in fields.items()]
    entry = DiagnosticStatus(level=level, name=STATUS_NAME, message=message, values=values)
    return DiagnosticArray(header=to_header(status.stamp, status.seq), status=[entry])


def from_diagnostics(message: DiagnosticArray) -> ExecutorStatus:
    """Return the executor's status of a message that `to_diagnostics` wrote."""
    for entry in message.status:
        if entry.name == STATUS_NAME:
            fields = {pair.key: json.loads(pair.value) for pair in entry.values}
            known = {field.name for field in dataclasses.fields(ExecutorStatus)}
            return ExecutorStatus(**{key: value for key, value in fields.items() if key in known})
    raise DataError(f"diagnostics without an entry '{STATUS_NAME}'")


def to_json_string(mapping: Mapping[str, Any]) -> String:
    """Return a JSON-ready mapping (a spec, a policy's description) as a string message."""
    from std_msgs.msg import String

    return String(data=json.dumps(mapping))


def from_json_string(message: String) -> dict[str, Any]:
    """Return the mapping of a string message; `DataError` where it is not a JSON object."""
    try:
        mapping = json.loads(message.data)
    except json.JSONDecodeError as error:
        raise DataError(f"message that is not JSON: {error}") from error
    if not isinstance(mapping, dict):
        raise DataError(f"JSON message holds a {type(mapping).__name__}, expected an object")
    return mapping
