"""Where parts of a robot are and how its joints move them, compiled: a braking path is placed in microseconds.

`Tree` is what of a MuJoCo model decides on that; places agree with ``mj_kinematics`` and Jacobians with ``mj_jac``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np

from hardware.safety.compiled import (
    INTEGERS,
    MATRIX,
    NEW_BLOCK,
    NEW_INTEGERS,
    NEW_MATRIX,
    NEW_VECTOR,
    NUMBER,
    VECTOR,
    compiled,
    part_of_compiled,
)

if TYPE_CHECKING:
    import mujoco

_SLIDE = 2
"""Type of a sliding joint in MuJoCo (``mjtJoint``)."""
_SWEEPS, _ORTHOGONAL = 30, 1e-13
"""Most sweeps over all pairs of rows, and the cosine at which two of them count as orthogonal."""


class Tree(NamedTuple):
    """Bodies (B) that lead to points (P), parents first, with the commanded joints (J) on the way.

    Joints that are not commanded stay at ``qpos0``, as if they were not there.
    """

    parents: np.ndarray
    """(B,) parent of each body, -1 for the world."""
    owners: np.ndarray
    """(J,) body that each joint moves, in order."""
    elements: np.ndarray
    """(J,) element of the command that each joint follows."""
    slides: np.ndarray
    """(J,) 1 where the joint slides, 0 where it turns."""
    holders: np.ndarray
    """(P,) body of each point, -1 for the world."""
    places: np.ndarray
    """(B, 3) of each body in its parent, in metres."""
    turns: np.ndarray
    """(B, 4) of each body in its parent, quaternions with w first."""
    anchors: np.ndarray
    """(J, 3) a point of each joint's axis in its body."""
    axes: np.ndarray
    """(J, 3) direction of each joint's axis in its body."""
    points: np.ndarray
    """(P, 3) of each point in its body."""
    zeros: np.ndarray
    """(J,) command at which the joint leaves its body where the model places it."""


_Tree = numba.types.NamedTuple([*[NEW_INTEGERS] * 5, *[NEW_MATRIX] * 5, NEW_VECTOR], Tree)
_Pair, _Frames = numba.types.UniTuple(NUMBER, 2), numba.types.UniTuple(NEW_MATRIX, 4)
Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]
"""With w first."""


def tree_of(model: mujoco.MjModel, joints: Sequence[int], points: Sequence[tuple[int, np.ndarray]]) -> Tree:
    """Return the part of ``model`` that leads to ``points``.

    Args:
        model: the robot.
        joints: (A,) numbers of its hinge and slide joints, in the order of the command's elements.
        points: for each the number of its body, and its place (3,) in that.
    """
    needed = set()
    for body, _ in points:
        while body:
            needed.add(int(body))
            body = int(model.body_parentid[body])
    bodies = sorted(needed)  # MuJoCo numbers parents before their children
    place = {body: k for k, body in enumerate(bodies)} | {0: -1}
    moving = [joint for joint in range(model.njnt) if joint in joints and int(model.jnt_bodyid[joint]) in needed]

    def integers(values: Iterable[int]) -> np.ndarray:
        return np.array([int(value) for value in values], np.int64)

    def rows(values: Any, width: int = 3) -> np.ndarray:
        return np.array(values, float).reshape(-1, width)

    return Tree(
        parents=integers(place[int(model.body_parentid[body])] for body in bodies),
        owners=integers(place[int(model.jnt_bodyid[joint])] for joint in moving),
        elements=integers(list(joints).index(joint) for joint in moving),
        slides=integers(model.jnt_type[joint] == _SLIDE for joint in moving),
        holders=integers(place[int(body)] for body, _ in points),
        places=rows(model.body_pos[bodies]),
        turns=rows(model.body_quat[bodies], 4),
        anchors=rows(model.jnt_pos[moving]),
        axes=rows(model.jnt_axis[moving]),
        points=rows([at for _, at in points]),
        zeros=np.array([model.qpos0[model.jnt_qposadr[joint]] for joint in moving], float),
    )


@part_of_compiled
def _vector(rows: np.ndarray, k: int) -> Vector:
    return rows[k, 0], rows[k, 1], rows[k, 2]


@part_of_compiled
def _quaternion(rows: np.ndarray, k: int) -> Quaternion:
    return rows[k, 0], rows[k, 1], rows[k, 2], rows[k, 3]


@part_of_compiled
def _put(rows: np.ndarray, k: int, values: tuple[float, ...]) -> None:
    for column in range(len(values)):
        rows[k, column] = values[column]


@part_of_compiled
def _sum(one: Vector, other: Vector, share: float) -> Vector:
    return one[0] + share * other[0], one[1] + share * other[1], one[2] + share * other[2]


@part_of_compiled
def _cross(one: Vector, other: Vector) -> Vector:
    (a, b, c), (x, y, z) = one, other
    return b * z - c * y, c * x - a * z, a * y - b * x


@part_of_compiled
def _dot(one: Vector, other: Vector) -> float:
    return one[0] * other[0] + one[1] * other[1] + one[2] * other[2]


@part_of_compiled
def _rotated(turn: Quaternion, vector: Vector) -> Vector:
    """Return v + 2 u x (u x v + w v) for the unit quaternion (w, u)."""
    axis = (turn[1], turn[2], turn[3])
    return _sum(vector, _cross(axis, _sum(_cross(axis, vector), vector, turn[0])), 2.0)


@part_of_compiled
def _after(one: Quaternion, other: Quaternion) -> Quaternion:
    """Return the rotation that is ``other`` first and then ``one``."""
    (w, x, y, z), (a, b, c, d) = one, other
    real = w * a - x * b - y * c - z * d
    return real, w * b + x * a + y * d - z * c, w * c - x * d + y * a + z * b, w * d + x * c - y * b + z * a


@compiled(_Frames(VECTOR, _Tree))
def frames(command: np.ndarray, tree: Tree) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return places (B, 3) and turns (B, 4) of bodies, and pivots and axes (J, 3) of joints, all in the world."""
    places, turns = np.empty((len(tree.parents), 3)), np.empty((len(tree.parents), 4))
    pivots, axes, joint = np.empty((len(tree.owners), 3)), np.empty((len(tree.owners), 3)), 0
    for body in range(len(tree.parents)):
        place, turn, parent = _vector(tree.places, body), _quaternion(tree.turns, body), tree.parents[body]
        if parent >= 0:
            place = _sum(_vector(places, parent), _rotated(_quaternion(turns, parent), place), 1.0)
            turn = _after(_quaternion(turns, parent), turn)
        while joint < len(tree.owners) and tree.owners[joint] == body:
            moved = command[tree.elements[joint]] - tree.zeros[joint]
            anchor, axis = _vector(tree.anchors, joint), _vector(tree.axes, joint)
            pivot, direction = _sum(place, _rotated(turn, anchor), 1.0), _rotated(turn, axis)
            if tree.slides[joint]:
                place = _sum(place, direction, moved)
            else:
                sine = math.sin(0.5 * moved)
                turn = _after(turn, (math.cos(0.5 * moved), sine * axis[0], sine * axis[1], sine * axis[2]))
                place = _sum(pivot, _rotated(turn, anchor), -1.0)
            _put(pivots, joint, pivot)
            _put(axes, joint, direction)
            joint += 1
        _put(places, body, place)
        _put(turns, body, turn)
    return places, turns, pivots, axes


@part_of_compiled
def _point(tree: Tree, k: int, places: np.ndarray, turns: np.ndarray) -> Vector:
    """Return where the point ``k`` is in the world."""
    point, body = _vector(tree.points, k), tree.holders[k]
    if body < 0:
        return point
    return _sum(_vector(places, body), _rotated(_quaternion(turns, body), point), 1.0)


@part_of_compiled
def _moved(place: Vector, tree: Tree, joint: int, pivots: np.ndarray, axes: np.ndarray) -> Vector:
    """Return how ``place``, fixed to what the joint moves, moves per unit of the joint."""
    axis = _vector(axes, joint)
    return axis if tree.slides[joint] else _cross(axis, _sum(place, _vector(pivots, joint), -1.0))


@compiled(NEW_BLOCK(MATRIX, _Tree))
def positions(commands: np.ndarray, tree: Tree) -> np.ndarray:
    """Return where the points are, (T, P, 3) in metres in the model's world, at ``commands`` (T, A)."""
    found = np.empty((len(commands), len(tree.holders), 3))
    for tick in range(len(commands)):
        places, turns, _, _ = frames(commands[tick], tree)
        for k in range(len(tree.holders)):
            found[tick, k, 0], found[tick, k, 1], found[tick, k, 2] = _point(tree, k, places, turns)
    return found


@compiled(NEW_MATRIX(VECTOR, _Tree))
def jacobian(command: np.ndarray, tree: Tree) -> np.ndarray:
    """Return the Jacobian (6, A) of the first point at ``command`` (A,): translation and rotation per unit."""
    places, turns, pivots, axes = frames(command, tree)
    found, point, body = np.zeros((6, len(command))), _point(tree, 0, places, turns), tree.holders[0]
    while body >= 0:
        for joint in range(len(tree.owners)):
            if tree.owners[joint] != body:
                continue
            column, moved = tree.elements[joint], _moved(point, tree, joint, pivots, axes)
            for k in range(3):
                found[k, column] = moved[k]
                found[3 + k, column] = 0.0 if tree.slides[joint] else axes[joint, k]
        body = tree.parents[body]
    return found


@compiled(_Pair(MATRIX))
def extreme_singular_values(matrix: np.ndarray) -> tuple[float, float]:
    """Return the largest and the smallest singular value of ``matrix`` (M, N), by one-sided Jacobi rotations.

    Its rows, or its columns where they are fewer, are turned against each other until all are orthogonal: their lengths
    are the singular values then. For matrices this small that takes a tenth of the time of LAPACK's call.
    """
    rows = matrix.copy() if matrix.shape[0] <= matrix.shape[1] else matrix.T.copy()
    count, width = rows.shape
    for _ in range(_SWEEPS):
        turned = False
        for first in range(count):
            for second in range(first + 1, count):
                one, other, both = 0.0, 0.0, 0.0
                for k in range(width):
                    one += rows[first, k] * rows[first, k]
                    other += rows[second, k] * rows[second, k]
                    both += rows[first, k] * rows[second, k]
                if abs(both) <= _ORTHOGONAL * math.sqrt(one * other):
                    continue
                turned = True
                ratio = (other - one) / (2.0 * both)
                tangent = (1.0 if ratio >= 0.0 else -1.0) / (abs(ratio) + math.sqrt(1.0 + ratio * ratio))
                cosine = 1.0 / math.sqrt(1.0 + tangent * tangent)
                sine = cosine * tangent
                for k in range(width):
                    left, right = rows[first, k], rows[second, k]
                    rows[first, k], rows[second, k] = cosine * left - sine * right, sine * left + cosine * right
        if not turned:
            break
    largest, smallest = 0.0, math.inf
    for first in range(count):
        square = 0.0
        for k in range(width):
            square += rows[first, k] * rows[first, k]
        if not square >= 0.0:
            return math.nan, math.nan
        largest, smallest = max(largest, math.sqrt(square)), min(smallest, math.sqrt(square))
    return largest, smallest


@compiled(_Pair(VECTOR, _Tree))
def tool_gains(command: np.ndarray, tree: Tree) -> tuple[float, float]:
    """Return the extreme singular values of the first point's Jacobian at ``command`` (A,)."""
    return extreme_singular_values(jacobian(command, tree))


@compiled(NEW_MATRIX(VECTOR, _Tree, INTEGERS, MATRIX))
def approaches(command: np.ndarray, tree: Tree, pairs: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return how the distance of each pair changes (N, A) per unit of the command at ``command`` (A,).

    Args:
        command: the commanded joints.
        tree: with one point per thing that has a distance.
        pairs: (N, 2) points of ``tree`` whose bodies the pairs' parts belong to.
        ends: (N, 7) the nearest place of the first and of the second part in the world, and their distance, which is
            negative where they overlap.
    """
    rows = np.zeros((len(pairs), len(command)))
    _, _, pivots, axes = frames(command, tree)
    for n in range(len(pairs)):
        between = _sum(_vector(ends[:, 3:], n), _vector(ends, n), -1.0)  # its length is the distance, but for the sign
        for side in range(2):
            place, share = _vector(ends[:, 3 * side :], n), (2.0 * side - 1.0) / ends[n, 6]
            body = tree.holders[pairs[n, side]]
            while body >= 0:
                for joint in range(len(tree.owners)):
                    if tree.owners[joint] == body:
                        moved = _moved(place, tree, joint, pivots, axes)
                        rows[n, tree.elements[joint]] += share * _dot(between, moved)
                body = tree.parents[body]
    return rows
