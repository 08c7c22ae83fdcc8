"""A MuJoCo model of the robot for the stages that must know where its parts are; commands are joint positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware.safety import kinematics
from robot_rl.core.errors import ConfigError, DataError, UnknownNameError

if TYPE_CHECKING:
    import mujoco


class RobotModel:
    """Places points of the robot and their Jacobian for commands (A,); joints not commanded stay at ``qpos0``."""

    def __init__(self, model: mujoco.MjModel, joints: Sequence[str], tool: str, points: Sequence[str] = ()) -> None:
        """Find the parts.

        Args:
            model: the robot, with or without its surroundings.
            joints: (A,) names of the joints, in the order of the command's elements.
            tool: site or body at the tool.
            points: further sites or bodies, such as elbows.

        Raises:
            UnknownNameError: no such joint, site or body.
            ConfigError: a joint is neither hinge nor slide.
        """
        numbers = joint_numbers(model, joints)
        self.names = (tool, *points)
        """The tool and the further points."""
        self.tree = kinematics.tree_of(model, numbers, [_point(model, name) for name in self.names])
        """Where they are attached."""

    def positions(self, commands: np.ndarray) -> np.ndarray:
        """Return where tool and points are, (T, P, 3) in metres in the model's world, at ``commands`` (T, A)."""
        return kinematics.positions(np.asarray(commands, float), *self.tree)

    def tool(self, commands: np.ndarray) -> np.ndarray:
        """Return where the tool is, (T, 3) in metres, at ``commands`` (T, A): the kinematics of a `Workspace`."""
        return self.positions(commands)[:, 0]

    def tool_gains(self, command: np.ndarray) -> tuple[float, float]:
        """Return how much the tool moves at ``command`` (A,) per unit of the joints, in its best and worst direction.

        They are the largest and smallest singular value of its Jacobian, in m and rad per unit of the joints.
        """
        return kinematics.tool_gains(np.asarray(command, float), *self.tree)

    def surely_even(self, command: np.ndarray, ratio: float) -> bool:
        """Return True only if the two `tool_gains` at ``command`` (A,) are at most ``ratio`` apart; it is quicker."""
        return kinematics.tool_surely_even(np.asarray(command, float), ratio, *self.tree)


def number(model: mujoco.MjModel, kind: Any, name: str, what: str) -> int:
    """Return the number of a named part of the model; raises `UnknownNameError` with the names that exist."""
    import mujoco

    found = int(mujoco.mj_name2id(model, kind, name))
    if found < 0:
        counts = {"joint": model.njnt, "geom": model.ngeom, "body": model.nbody, "site": model.nsite}
        names = [mujoco.mj_id2name(model, kind, k) or f"#{k}" for k in range(counts[what])]
        raise UnknownNameError(what, name, names)
    return found


def block(numbers: np.ndarray) -> np.ndarray | slice:
    """Return ``numbers`` as a slice where they follow on each other: indexing by one is many times quicker."""
    first, last = int(numbers[0]), int(numbers[-1])
    follow = np.array_equal(numbers, np.arange(first, last + 1))
    return slice(first, last + 1) if follow else numbers


def joint_numbers(model: mujoco.MjModel, joints: Sequence[str]) -> list[int]:
    """Return the numbers of ``joints``, each of which must have one position that a command can set."""
    import mujoco

    numbers = [number(model, mujoco.mjtObj.mjOBJ_JOINT, name, "joint") for name in joints]
    for name, one in zip(joints, numbers, strict=True):
        if int(model.jnt_type[one]) not in (kinematics.SLIDE, kinematics.HINGE):
            raise ConfigError(f"joint '{name}' is neither hinge nor slide, so no command sets its position")
    return numbers


def _point(model: mujoco.MjModel, name: str) -> tuple[int, np.ndarray]:
    """Return the body that the site (else body) ``name`` belongs to, and its place (3,) there."""
    import mujoco

    site = int(mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, name))
    if site >= 0:
        return int(model.site_bodyid[site]), model.site_pos[site]
    body = int(mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, name))
    if body >= 0:
        return body, np.zeros(3)
    sites = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_SITE, k) for k in range(model.nsite)]
    bodies = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_BODY, k) for k in range(model.nbody)]
    raise UnknownNameError("site or body", name, [one for one in (*sites, *bodies) if one])


def build_model(file: Path, obstacles: Mapping[str, Mapping[str, Any]]) -> mujoco.MjModel:
    """Compile the MJCF ``file`` with ``obstacles`` fixed in its world, and a name for every geom.

    Args:
        file: the robot's model.
        obstacles: by name: ``at`` (3,) in metres, optionally ``yaw`` in rad, and one of ``box`` (3,) full sides,
            ``sphere`` radius, ``cylinder`` (2,) radius and height, all in metres.

    Returns:
        The model. Geoms without a name are called ``<body>#0``, ``<body>#1``, …

    Raises:
        DataError: the file cannot be read as MJCF.
        ConfigError: an obstacle's shape cannot be understood.
    """
    import mujoco

    try:
        spec = mujoco.MjSpec.from_file(str(file))
    except (ValueError, OSError) as error:
        raise DataError(f"model {file} cannot be read: {error}") from error
    for name, obstacle in obstacles.items():
        kind, size = _shape(name, obstacle)
        half = 0.5 * float(obstacle.get("yaw", 0.0))
        spec.worldbody.add_geom(
            name=name,
            type=getattr(mujoco.mjtGeom, f"mjGEOM_{kind.upper()}"),
            size=size,
            pos=list(obstacle["at"]),
            quat=[np.cos(half), 0.0, 0.0, np.sin(half)],
        )
    for body in spec.bodies:
        for k, geom in enumerate(body.geoms):
            geom.name = geom.name or f"{body.name or 'body'}#{k}"
    return spec.compile()


def _shape(name: str, obstacle: Mapping[str, Any]) -> tuple[str, list[float]]:
    """Return the type of an obstacle's geom and MuJoCo's three sizes of it."""
    given = [kind for kind in ("box", "sphere", "cylinder") if obstacle.get(kind) not in (None, ())]
    if len(given) != 1:
        raise ConfigError(f"obstacle '{name}' needs exactly one of box, sphere, cylinder; it has {given or 'none'}")
    kind, numbers = given[0], np.atleast_1d(np.asarray(obstacle[given[0]], float))
    wanted = {"box": 3, "sphere": 1, "cylinder": 2}[kind]
    if numbers.shape != (wanted,) or not (numbers > 0).all():
        raise ConfigError(f"obstacle '{name}': {kind} takes {wanted} positive numbers, got {obstacle[kind]}")
    if kind == "box":
        return kind, [float(x) / 2 for x in numbers]
    if kind == "sphere":
        return kind, [float(numbers[0]), 0.0, 0.0]
    return kind, [float(numbers[0]), float(numbers[1]) / 2, 0.0]


def geoms_of(model: mujoco.MjModel, name: str) -> list[str]:
    """Return the names of the geoms that ``name`` stands for: one geom, or all of a body.

    Raises:
        UnknownNameError: neither; the message lists bodies and obstacles.
    """
    import mujoco

    if mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, name) >= 0:
        return [name]
    body = int(mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, name))
    if body < 0:
        names = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_BODY, k) for k in range(model.nbody)]
        names += [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_GEOM, k) for k in range(model.ngeom)]
        raise UnknownNameError("body or obstacle", name, [one for one in names if "#" not in one])
    first = int(model.body_geomadr[body])
    return [
        mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_GEOM, k)
        for k in range(first, first + int(model.body_geomnum[body]))
    ]
