"""The safety file: what stages 6 to 10 are told about a robot and its surroundings, as YAML.

    profile: manual_reduced           # tool and elbows at 250 mm/s at most; or normal
    jerk: 40.0                        # of every element of the command, per second cubed
    workspace: {low: [0.3, -0.3, 0.02], high: [0.7, 0.3, 0.5]}
    forces:
      - {key: state, names: [force_x, force_y, force_z], norm: true, limit: 40.0, dwell: 0.02}

`load_safety` reads it, `SafetySettings.protect` makes what the executor takes. Parts that need the joints (points,
singularity, clearance) need a ``model`` and a robot whose command is its joints' positions.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from hardware.safety.clearance import Clearance
from hardware.safety.forces import ForceLimit, ForceMonitor
from hardware.safety.model import RobotModel, build_model, geoms_of
from hardware.safety.protection import Protection
from hardware.safety.singularity import Singularity
from hardware.safety.speed import MANUAL_REDUCED, PointSpeed
from hardware.safety.surroundings import Guards
from hardware.safety.workspace import Workspace
from robot_rl.core.errors import ConfigError, UnknownNameError
from robot_rl.core.paths import data_file
from robot_rl.core.robot import Robot

logger = logging.getLogger(__name__)

PROFILES = ("normal", "manual_reduced")
"""``manual_reduced`` bounds the speed of tool and elbows to 250 mm/s; the elbows are the model's points."""
_ASSETS = "assets:"


@dataclass(frozen=True)
class WorkspaceSettings:
    """Stage 7: where the tool may be, in the model's world or, without a model, in the frame of the command."""

    low: tuple[float, ...] = ()
    """Lowest corner of the box, three numbers in metres; empty for no box."""
    high: tuple[float, ...] = ()
    """Highest corner of the box in metres."""
    planes: tuple[tuple[float, ...], ...] = ()
    """Planes (n_x, n_y, n_z, d): the tool stays where n · x >= d; n has length 1, d is in metres."""


@dataclass(frozen=True)
class ObstacleSettings:
    """Something fixed beside the robot; give one of box, sphere and cylinder, in metres."""

    at: tuple[float, ...]
    """Its middle, three numbers in metres."""
    yaw: float = 0.0
    """Rotation about the vertical in rad."""
    box: tuple[float, ...] = ()
    """Full lengths of the three sides."""
    sphere: float | None = None
    """Radius."""
    cylinder: tuple[float, ...] = ()
    """Radius and height."""


@dataclass(frozen=True)
class ModelSettings:
    """The robot's model, for commands that are the positions of its joints."""

    file: str
    """MJCF file, relative to the safety file; ``assets:`` before it looks among the models that come along."""
    joints: tuple[str, ...]
    """The joints in the order of the command's elements."""
    tool: str
    """Site or body at the tool."""
    points: tuple[str, ...] = ()
    """Further sites or bodies whose speed a profile bounds: the elbows. ``manual_reduced`` needs at least one."""
    obstacles: Mapping[str, ObstacleSettings] = field(default_factory=dict)
    """What stands beside the robot, by name."""


@dataclass(frozen=True)
class ClearanceSettings:
    """Stage 9: what must stay apart."""

    pairs: tuple[tuple[str, str], ...] = ()
    """Names of bodies, geoms or obstacles, two by two; empty for all that can collide."""
    margin: float = 0.02
    """Smallest distance in metres."""
    near: float = 0.1
    """Distance in metres below which a pair bends the motion."""


@dataclass(frozen=True)
class SingularitySettings:
    """Stage 8: condition numbers of the tool's Jacobian."""

    slow: float = 17.0
    """From here on, motions that raise it are slowed down."""
    stop: float = 30.0
    """No motion goes beyond."""


@dataclass(frozen=True)
class SafetySettings:
    """A safety file. Whatever is left out is not checked."""

    profile: str = "normal"
    """normal, or manual_reduced: 250 mm/s at most for the tool and the model's points; without a model for the tool
    alone, which is said when it starts."""
    speed: float | None = None
    """Largest speed of the tool and the model's points in m/s; the smaller of this and the profile's counts."""
    velocity: tuple[float, ...] = ()
    """Largest change of the command per second, where less than the robot's own: one number, or one per element."""
    acceleration: tuple[float, ...] = ()
    """Largest change of that velocity per second, likewise."""
    jerk: tuple[float, ...] = ()
    """Largest change of that acceleration per second, likewise; empty for no limit."""
    model: ModelSettings | None = None
    """The robot's model."""
    workspace: WorkspaceSettings | None = None
    """Stage 7."""
    singularity: SingularitySettings | None = None
    """Stage 8."""
    clearance: ClearanceSettings | None = None
    """Stage 9."""
    forces: tuple[ForceLimit, ...] = ()
    """Stage 10: limits of observed forces, torques and currents."""

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise UnknownNameError("safety profile", self.profile, PROFILES)
        for name in ("singularity", "clearance"):
            if getattr(self, name) is not None and self.model is None:
                raise ConfigError(f"'{name}' needs a 'model' of the robot")
        if self.profile == "manual_reduced" and self.model is not None and not self.model.points:
            raise ConfigError(
                "the profile 'manual_reduced' bounds the speed of the elbows too, and the model names none: give them "
                "as 'points' (the tool once more for a robot without elbows)"
            )

    def protect(self, robot: Robot, dt: float, directory: Path | None = None) -> Protection:
        """Return what an executor that ticks every ``dt`` seconds needs to keep ``robot`` to these settings.

        Args:
            robot: the robot; its spec says what its command is and what it measures.
            dt: seconds per tick.
            directory: where the model's file is looked for.

        Raises:
            UnknownNameError: no such joint, site, body or observation; the nearest is suggested.
            ConfigError: the settings do not fit the robot.
        """
        size = robot.spec.action.size
        limits = robot.limits
        for name in ("velocity", "acceleration", "jerk"):
            given, own = getattr(self, name), getattr(limits, name)
            if given:
                wanted = _per_element(given, size, name)
                limits = dataclasses.replace(limits, **{name: wanted if own is None else np.minimum(wanted, own)})
        model, compiled = None, None
        if self.model is not None:
            if len(self.model.joints) != size:
                raise ConfigError(f"the model has {len(self.model.joints)} joints, and the robot's command {size}")
            obstacles = {name: dataclasses.asdict(one) for name, one in self.model.obstacles.items()}
            compiled = build_model(_model_file(self.model.file, directory), obstacles)
            model = RobotModel(compiled, self.model.joints, self.model.tool, self.model.points)
        elif self._speed() is not None or self.workspace is not None:
            _require_positions(robot)
            if self.profile == "manual_reduced":
                logger.warning(
                    "'manual_reduced' WITHOUT A MODEL bounds the tool's speed alone: where the elbows are is not "
                    "known, and they may be faster than 250 mm/s"
                )
        guards = Guards(self._point_speed(dt, model), self._workspace(model), self._singularity(model), None)
        if self.clearance is not None and self.model is not None and compiled is not None:
            pairs = [
                (one, other)
                for first, second in self.clearance.pairs
                for one in geoms_of(compiled, first)
                for other in geoms_of(compiled, second)
            ]
            margin, near = self.clearance.margin, self.clearance.near
            clearance = Clearance(compiled, self.model.joints, pairs or None, margin, near)
            guards = dataclasses.replace(guards, clearance=clearance)
        return Protection(limits, guards, ForceMonitor(self.forces, robot.spec, dt) if self.forces else None)

    def _speed(self) -> float | None:
        limits = [self.speed] if self.speed is not None else []
        limits += [MANUAL_REDUCED] if self.profile == "manual_reduced" else []
        return min(limits) if limits else None

    def _point_speed(self, dt: float, model: RobotModel | None) -> PointSpeed | None:
        speed = self._speed()
        return None if speed is None else PointSpeed(speed, dt, None if model is None else model.positions)

    def _workspace(self, model: RobotModel | None) -> Workspace | None:
        given = self.workspace
        if given is None:
            return None
        low, high = (np.array(corner, float) if corner else None for corner in (given.low, given.high))
        for corner in (low, high):
            if corner is not None and corner.shape != (3,):
                raise ConfigError(f"a corner of the workspace has three numbers, got {corner.tolist()}")
        planes = np.array(given.planes, float) if given.planes else None
        return Workspace(low, high, planes, None if model is None else model.tool)

    def _singularity(self, model: RobotModel | None) -> Singularity | None:
        if self.singularity is None or model is None:
            return None
        return Singularity(model, self.singularity.slow, self.singularity.stop)


def load_safety(path: str | Path) -> SafetySettings:
    """Read a safety file.

    Raises:
        ConfigError: it cannot be read, or a value has the wrong type; the message says where.
        UnknownNameError: a key that does not exist; the nearest is suggested.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"safety file {path} cannot be read: {' '.join(str(error).split())}") from error
    return _read(SafetySettings, found if found is not None else {}, str(path))


def protection_from(path: str | Path, robot: Robot, dt: float) -> Protection:
    """Return the protection of ``robot`` by the safety file at ``path``, at ticks of ``dt`` seconds."""
    return load_safety(path).protect(robot, dt, Path(path).parent)


def _read(kind: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the dataclass ``kind``; ``where`` names the place in the file."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {value!r}")
    hints, fields = get_type_hints(kind), {one.name: one for one in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise UnknownNameError(f"key in {where}", str(name), fields)
    needed = dataclasses.MISSING
    for name, one in fields.items():
        if name not in value and one.default is needed and one.default_factory is needed:
            raise ConfigError(f"{where}: '{name}' is missing")
    return kind(**{name: _convert(hints[name], one, f"{where}: {name}") for name, one in value.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the annotated type ``kind``: a dataclass, tuple, mapping, number, text or truth value."""
    options = [one for one in get_args(kind) if one is not type(None)]
    if type(None) in get_args(kind):
        return None if value is None else _convert(options[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _read(kind, value, where)
    if get_origin(kind) is tuple:
        if len(options) == 2 and options[1] is not Ellipsis:
            if not isinstance(value, list) or len(value) != 2:
                raise ConfigError(f"{where}: expected two names, got {value!r}")
            return tuple(_convert(options[0], one, where) for one in value)
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(options[0], one, where) for one in items)
    if get_origin(kind) is not None:  # a mapping of names
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        return {str(name): _convert(options[1], one, f"{where}: {name}") for name, one in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _per_element(given: tuple[float, ...], size: int, name: str) -> np.ndarray:
    if len(given) not in (1, size):
        raise ConfigError(f"safety setting '{name}' has {len(given)} numbers; the command has {size} elements")
    return np.broadcast_to(np.array(given, float), (size,)).copy()


def _require_positions(robot: Robot) -> None:
    """Raise `ConfigError` unless the command's first three elements are a position in metres."""
    units = [unit.strip() for unit in robot.spec.action.unit.split(",")]
    units = units * robot.spec.action.size if len(units) == 1 else units
    if len(units) < 3 or units[:3] != ["m"] * 3:
        raise ConfigError(
            "without a 'model', speed and workspace need a command that begins with the tool's position in metres; "
            f"this robot's command is in '{robot.spec.action.unit}'"
        )


def _model_file(name: str, directory: Path | None) -> Path:
    if name.startswith(_ASSETS):
        return data_file("assets", *Path(name.removeprefix(_ASSETS)).parts)
    path = (directory or Path()) / name
    if not path.exists():
        raise ConfigError(f"the safety file's model '{path}' does not exist")
    return path
