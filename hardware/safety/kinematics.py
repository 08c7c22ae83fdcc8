"""Where parts of a robot are and how its joints move them, compiled: a braking path is placed in microseconds.

`Tree` is what of a MuJoCo model decides on that; places agree with ``mj_kinematics`` and Jacobians with ``mj_jac``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np

from robot_rl.core.compiled import (
    INTEGER_MATRIX,
    MATRIX,
    NEW_BLOCK,
    NEW_MATRIX,
    NUMBER,
    TRUTH,
    VECTOR,
    compiled,
    part_of_compiled,
)

if TYPE_CHECKING:
    import mujoco

SLIDE, HINGE = 2, 3
"""Types of joints in MuJoCo (``mjtJoint``)."""
_SWEEPS, _ORTHOGONAL = 30, 1e-13
"""Most sweeps over all pairs of rows, and the cosine at which two of them count as orthogonal."""
BODY = np.dtype(
    [
        ("parent", np.int64),  # number of its parent, -1 for the world
        ("place", np.float64, 3),  # in its parent, in metres
        ("turn", np.float64, 4),  # in its parent, a quaternion with w first
    ]
)
JOINT = np.dtype(
    [
        ("owner", np.int64),  # number of the body that it moves
        ("element", np.int64),  # of the command, which it follows
        ("slides", np.int64),  # 1 where it slides, 0 where it turns
        ("anchor", np.float64, 3),  # a point of its axis in the body
        ("axis", np.float64, 3),  # direction in the body
        ("zero", np.float64),  # command at which it leaves its body where the model places it
    ]
)
POINT = np.dtype(
    [
        ("holder", np.int64),  # number of its body, -1 for the world
        ("place", np.float64, 3),  # in the body, in metres
    ]
)


class Tree(NamedTuple):
    """Bodies that lead to points, with the commanded joints on the way; compiled functions take its tables.

    Joints that are not commanded stay at ``qpos0``, as if they were not there.
    """

    bodies: np.ndarray
    """(B,) `BODY`, parents first."""
    joints: np.ndarray
    """(J,) `JOINT`, in the order of their bodies."""
    points: np.ndarray
    """(P,) `POINT`."""


_TREE = [numba.types.Array(numba.from_dtype(kind), 1, "C") for kind in (BODY, JOINT, POINT)]
_Pair = numba.types.UniTuple(NUMBER, 2)
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

    tree = Tree(np.zeros(len(bodies), BODY), np.zeros(len(moving), JOINT), np.zeros(len(points), POINT))
    tree.bodies["parent"] = [place[int(model.body_parentid[body])] for body in bodies]
    tree.bodies["place"], tree.bodies["turn"] = model.body_pos[bodies], model.body_quat[bodies]
    tree.joints["owner"] = [place[int(model.jnt_bodyid[joint])] for joint in moving]
    tree.joints["element"] = [list(joints).index(joint) for joint in moving]
    tree.joints["slides"] = model.jnt_type[moving] == SLIDE
    tree.joints["anchor"], tree.joints["axis"] = model.jnt_pos[moving], model.jnt_axis[moving]
    tree.joints["zero"] = model.qpos0[model.jnt_qposadr[moving]]
    tree.points["holder"] = [place[int(body)] for body, _ in points]
    tree.points["place"] = [at for _, at in points]
    return tree


@part_of_compiled
def _vector(row: np.ndarray) -> Vector:
    return row[0], row[1], row[2]


@part_of_compiled
def _quaternion(row: np.ndarray) -> Quaternion:
    return row[0], row[1], row[2], row[3]


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


@part_of_compiled
def _frames(
    command: np.ndarray, bodies: np.ndarray, joints: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return places (B, 3) and turns (B, 4) of bodies, and pivots and axes (J, 3) of joints, all in the world."""
    places, turns = np.empty((len(bodies), 3)), np.empty((len(bodies), 4))
    pivots, axes, number = np.empty((len(joints), 3)), np.empty((len(joints), 3)), 0
    for body in range(len(bodies)):
        place, turn = _vector(bodies[body].place), _quaternion(bodies[body].turn)
        parent = bodies[body].parent
        if parent >= 0:
            place = _sum(_vector(places[parent]), _rotated(_quaternion(turns[parent]), place), 1.0)
            turn = _after(_quaternion(turns[parent]), turn)
        while number < len(joints) and joints[number].owner == body:
            joint = joints[number]
            moved = command[joint.element] - joint.zero
            anchor, axis = _vector(joint.anchor), _vector(joint.axis)
            pivot, direction = _sum(place, _rotated(turn, anchor), 1.0), _rotated(turn, axis)
            if joint.slides:
                place = _sum(place, direction, moved)
            else:
                sine = math.sin(0.5 * moved)
                turn = _after(turn, (math.cos(0.5 * moved), sine * axis[0], sine * axis[1], sine * axis[2]))
                place = _sum(pivot, _rotated(turn, anchor), -1.0)
            _put(pivots, number, pivot)
            _put(axes, number, direction)
            number += 1
        _put(places, body, place)
        _put(turns, body, turn)
    return places, turns, pivots, axes


@part_of_compiled
def _placed(point: Any, places: np.ndarray, turns: np.ndarray) -> Vector:
    """Return where a `POINT` is in the world."""
    place, body = _vector(point.place), point.holder
    if body < 0:
        return place
    return _sum(_vector(places[body]), _rotated(_quaternion(turns[body]), place), 1.0)


@part_of_compiled
def _moved(place: Vector, slides: int, pivot: Vector, axis: Vector) -> Vector:
    """Return how ``place``, fixed to what the joint moves, moves per unit of the joint."""
    return axis if slides else _cross(axis, _sum(place, pivot, -1.0))


@compiled(NEW_BLOCK(MATRIX, *_TREE))
def positions(commands: np.ndarray, bodies: np.ndarray, joints: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return where the points are, (T, P, 3) in metres in the model's world, at ``commands`` (T, A)."""
    found = np.empty((len(commands), len(points), 3))
    for tick in range(len(commands)):
        places, turns, _, _ = _frames(commands[tick], bodies, joints)
        for k in range(len(points)):
            _put(found[tick], k, _placed(points[k], places, turns))
    return found


@compiled(NEW_MATRIX(VECTOR, *_TREE))
def jacobian(command: np.ndarray, bodies: np.ndarray, joints: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the Jacobian (6, A) of the first point at ``command`` (A,): translation and rotation per unit."""
    places, turns, pivots, axes = _frames(command, bodies, joints)
    found, point, body = np.zeros((6, len(command))), _placed(points[0], places, turns), points[0].holder
    while body >= 0:
        for k in range(len(joints)):
            if joints[k].owner != body:
                continue
            column, axis = joints[k].element, _vector(axes[k])
            moved = _moved(point, joints[k].slides, _vector(pivots[k]), axis)
            for row in range(3):
                found[row, column] = moved[row]
                found[3 + row, column] = 0.0 if joints[k].slides else axis[row]
        body = bodies[body].parent
    return found


@compiled(TRUTH(MATRIX, NUMBER))
def surely_even(matrix: np.ndarray, ratio: float) -> bool:
    """Return True only if the largest singular value of ``matrix`` (M, N) is at most ``ratio`` times the smallest.

    G = J J^T, or J^T J where that is smaller, has the squares of the singular values as its eigenvalues, and their sum
    as its trace. If ``G - trace(G) / ratio^2 I`` is positive definite, which a Cholesky factorisation finds out in a
    fraction of the time that the values themselves take, all of them exceed ``trace(G) / ratio^2``, and so the square
    of the largest over ``ratio^2``. It says False of some even matrices, and of whatever is not finite.
    """
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    size = len(rows)
    factor, trace = np.zeros((size, size)), 0.0
    for i in range(size):
        for j in range(i + 1):
            for k in range(rows.shape[1]):
                factor[i, j] += rows[i, k] * rows[j, k]
        trace += factor[i, i]
    for i in range(size):
        factor[i, i] -= trace / (ratio * ratio)
        for j in range(i + 1):
            for k in range(j):
                factor[i, j] -= factor[i, k] * factor[j, k]
            if j < i:
                factor[i, j] /= factor[j, j]
        if not factor[i, i] > 0.0:
            return False
        factor[i, i] = math.sqrt(factor[i, i])
    return True


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


@compiled(_Pair(VECTOR, *_TREE))
def tool_gains(command: np.ndarray, bodies: np.ndarray, joints: np.ndarray, points: np.ndarray) -> tuple[float, float]:
    """Return the extreme singular values of the first point's Jacobian at ``command`` (A,)."""
    return extreme_singular_values(jacobian(command, bodies, joints, points))


@compiled(TRUTH(VECTOR, NUMBER, *_TREE))
def tool_surely_even(
    command: np.ndarray, ratio: float, bodies: np.ndarray, joints: np.ndarray, points: np.ndarray
) -> bool:
    """Return `surely_even` of the first point's Jacobian at ``command`` (A,)."""
    return surely_even(jacobian(command, bodies, joints, points), ratio)


@compiled(NEW_MATRIX(VECTOR, INTEGER_MATRIX, MATRIX, *_TREE))
def approaches(
    command: np.ndarray,
    pairs: np.ndarray,
    ends: np.ndarray,
    bodies: np.ndarray,
    joints: np.ndarray,
    points: np.ndarray,
) -> np.ndarray:
    """Return how the distance of each pair changes (N, A) per unit of the command at ``command`` (A,).

    Args:
        command: the commanded joints.
        pairs: (N, 2) points of the tree, which has one per thing that has a distance: those whose bodies the pairs'
            parts belong to.
        ends: (N, 7) the nearest place of the first and of the second part in the world, and their distance, which is
            negative where they overlap.
        bodies: of the tree.
        joints: of the tree.
        points: of the tree.
    """
    rows = np.zeros((len(pairs), len(command)))
    _, _, pivots, axes = _frames(command, bodies, joints)
    for n in range(len(pairs)):
        first, second = _vector(ends[n, :3]), _vector(ends[n, 3:6])
        between = _sum(second, first, -1.0)  # its length is the distance, but for the sign
        for side in range(2):
            place, share = second if side else first, (2.0 * side - 1.0) / ends[n, 6]
            body = points[pairs[n, side]].holder
            while body >= 0:
                for k in range(len(joints)):
                    if joints[k].owner == body:
                        moved = _moved(place, joints[k].slides, _vector(pivots[k]), _vector(axes[k]))
                        rows[n, joints[k].element] += share * _dot(between, moved)
                body = bodies[body].parent
    return rows
