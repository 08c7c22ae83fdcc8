"""Stage 9: distances of a robot to itself and to obstacles, by a MuJoCo model of both.

`Clearance.excess` judges a path of commands and gives the same guarantee as the workspace: what is passed on can still
be stopped without coming nearer than the margin. `Clearance.slide` proposes a motion along the obstacle instead of a
stop before it: the nearest permitted displacement by a quadratic program whose rows bound the approach of every near
pair (a discrete control barrier function, arXiv 1903.11199). A proposal is judged like any other command.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numba
import numpy as np

from hardware.safety.arithmetic import braking_step
from hardware.safety.compiled import MATRIX, NEW_INTEGERS, NEW_VECTOR, NUMBER, VECTOR, compiled
from hardware.safety.kinematics import HINGE, SLIDE, approaches, tree_of
from hardware.safety.model import block, joint_numbers, number
from robot_rl.core.errors import ConfigError

if TYPE_CHECKING:
    import mujoco

logger = logging.getLogger(__name__)
_SOLVED = 1
_TOUCHING = 1e-6
_SPARE, _RETURN = 5e-4, 0.1
"""Metres beyond the margin at which `slide` stays, for the curvature that its rows leave out, and by which share of
what is missing there a displacement must lead away."""
_FAR, _ENDLESS = 10.0, 1e6
_FEW = 4
"""Pairs that are measured again for every command rather than all anew for a tighter selection."""


class Clearance:
    """Keeps pairs of geoms of a model apart. Commands are positions of hinge and slide joints."""

    def __init__(
        self,
        model: mujoco.MjModel,
        joints: Sequence[str],
        pairs: Sequence[tuple[str, str]] | None = None,
        margin: float = 0.02,
        near: float = 0.1,
    ) -> None:
        """Prepare the pairs; joints that are not commanded stay at the model's ``qpos0``.

        Args:
            model: robot and obstacles.
            joints: (A,) names of the joints, in the order of the command's elements.
            pairs: names of the geoms that must stay apart; None for all that can collide and move against each other,
                except within one body and between a body and its parent.
            margin: smallest distance in metres.
            near: distance in metres below which a pair bounds the motion in `slide`.

        Raises:
            UnknownNameError: no such joint or geom.
            ConfigError: a joint is neither hinge nor slide, or there is no pair.
        """
        import mujoco  # only here: whoever needs no distances needs no simulator

        self._mujoco = mujoco
        self.model, self.data, self.margin, self.near = model, mujoco.MjData(model), margin, near
        numbers = joint_numbers(model, joints)
        self._places = block(model.jnt_qposadr[numbers])
        self._tree = tree_of(model, numbers, [(int(body), np.zeros(3)) for body in model.geom_bodyid])
        if pairs is None:
            self.pairs = _pairs(model, set(numbers))
        else:
            names = [tuple(number(model, mujoco.mjtObj.mjOBJ_GEOM, one, "geom") for one in pair) for pair in pairs]
            self.pairs = [(first, second) for first, second in names]
        if not self.pairs:
            raise ConfigError("no pair of geoms can touch: name the pairs, or give the geoms contype and conaffinity")
        self._reach = np.array([[_reach(model, joint, *pair) for joint in numbers] for pair in self.pairs])
        self._measured: tuple[np.ndarray, np.ndarray] | None = None
        self._ends = np.zeros(6)
        self.solver = importlib.util.find_spec("daqp") is not None
        """Whether `slide` can propose anything: the package ``daqp`` (extra ``safety``) is there."""

    def distance(self, command: np.ndarray) -> float:
        """Return the smallest distance in metres of any pair at ``command`` (A,); negative where they overlap."""
        self._place(command)
        return min(self._distances(self.pairs))

    def excess(self, commands: np.ndarray, permitted: float = 0.0) -> float:
        """Return by how many metres the worst of a path of ``commands`` (T, A) is too near; not positive if none is.

        It ends with the first that is too near by more than ``permitted``. What cannot matter is left out: a pair comes
        no nearer than by the motions of the joints between its geoms times their reaches, so that one that was farther
        apart than that when it was last measured is safe, and so are commands between two that leave more room.
        """
        chosen, travelled = self._near(commands, 0.0)
        if not len(chosen):
            return 0.0
        near, last = [self.pairs[k] for k in chosen], len(commands) - 1
        found = {last: self._too_near(commands[last], near)}  # a path that is refused is so for its end, mostly
        if found[last] > permitted or not last:
            return found[last]
        found[0] = self._too_near(commands[0], near)
        worst, open_ends = max(found.values()), [(0, last)]
        while worst <= permitted and open_ends:
            start, end = open_ends.pop()
            if end - start < 2 or found[start] + found[end] + travelled[end] - travelled[start] <= 0.0:
                continue  # nothing lies between, or no command between can be too near
            middle = (start + end) // 2
            found[middle] = self._too_near(commands[middle], near)
            worst = max(worst, found[middle])
            open_ends += [(start, middle), (middle, end)]
        return worst

    def forget(self) -> None:
        """Measure all pairs anew; call it when something in the model has moved that is not commanded."""
        self._measured = None

    def _near(self, commands: np.ndarray, room: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs that may be within margin and ``room`` on a path, and how far they may have come (T,).

        The pairs are numbers. Raises `ValueError` if a command (T, A) is not finite.
        """
        place, rooms = self._measured or self._measure(commands[0])
        near, travelled = near_pairs(commands, place, rooms, self._reach, room)
        if len(near) <= _FEW or np.array_equal(commands[0], place):
            return near, travelled
        return near_pairs(commands, *self._measure(commands[0]), self._reach, room)

    def _measure(self, command: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Measure all pairs at ``command`` (A,); return and remember both, the distances (P,) less the margin."""
        if not np.isfinite(command).all():
            raise ValueError("a command on the path is not finite")
        self._place(command)
        self._measured = (command.copy(), np.array(self._distances(self.pairs)) - self.margin)
        return self._measured

    def _too_near(self, command: np.ndarray, pairs: list[tuple[int, int]]) -> float:
        self._place(command)
        return self.margin - min(self._distances(pairs))

    def _distances(self, pairs: list[tuple[int, int]]) -> list[float]:
        model, data, measure = self.model, self.data, self._mujoco.mj_geomDistance
        return [measure(model, data, first, second, _FAR, None) for first, second in pairs]

    def slide(
        self, command: np.ndarray, wanted: np.ndarray, low: np.ndarray, high: np.ndarray, brake: np.ndarray
    ) -> np.ndarray | None:
        """Return the displacement (A,) nearest to ``wanted`` that approaches nothing faster than can be braked.

        Args:
            command: (A,) the last command.
            wanted: (A,) displacement asked for.
            low: (A,) smallest displacement within the motion's limits.
            high: (A,) largest one.
            brake: (A,) by how much a displacement may shrink per tick.

        Returns:
            None without a solver or a solution.
        """
        if not self.solver:
            return None
        rows, bounds = self._rows(command, brake)
        if not len(rows):
            return None
        import daqp

        size = len(command)
        upper, lower = np.concatenate([high, np.full(len(rows), 1e30)]), np.concatenate([low, -bounds])
        sense = np.zeros(size + len(rows), np.int32)
        found, _, state, _ = daqp.solve(np.eye(size), -wanted, rows, upper, lower, sense)
        return np.clip(found, low, high) if state == _SOLVED else None

    def _rows(self, command: np.ndarray, brake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how the distance of each near pair changes (P, A) per displacement, and by how much it may shrink."""
        pairs = [self.pairs[k] for k in self._near(command[None], self.near)[0]]
        self._place(command)
        kept, ends = [], []
        for first, second in pairs:
            distance = self._mujoco.mj_geomDistance(self.model, self.data, first, second, self.near, self._ends)
            if distance < self.near and abs(distance) >= _TOUCHING:
                kept.append((first, second))
                ends.append((*self._ends, distance))
        if not kept:
            return np.zeros((0, len(command))), np.zeros(0)
        measured = np.array(ends)
        rows = approaches(np.asarray(command, float), np.array(kept), measured, *self._tree)
        room, brakes = measured[:, 6] - self.margin - _SPARE, np.maximum(0.5 * np.abs(rows) @ brake, 1e-12)
        return rows, np.where(room > 0.0, braking_step(np.maximum(room, 0.0), brakes), _RETURN * room)

    def _place(self, command: np.ndarray) -> None:
        self.data.qpos[self._places] = command
        self._mujoco.mj_kinematics(self.model, self.data)


@compiled(numba.types.Tuple((NEW_INTEGERS, NEW_VECTOR))(MATRIX, VECTOR, VECTOR, MATRIX, NUMBER))
def near_pairs(
    commands: np.ndarray, place: np.ndarray, rooms: np.ndarray, reach: np.ndarray, room: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return which pairs may come within ``room`` on a path, and how far the quickest of them may have come (T,).

    Args:
        commands: (T, A) the path.
        place: (A,) command at which the pairs were measured.
        rooms: (P,) what each pair was apart there, less the margin.
        reach: (P, A) by how many metres a unit of each joint changes each pair's distance at most.
        room: metres.

    Raises:
        ValueError: a command is not finite.
    """
    moved, found, quickest = np.zeros(len(place)), np.empty(len(rooms), np.int64), np.zeros(len(place))
    for k in range(len(place)):
        moved[k] = abs(commands[0, k] - place[k])
        for tick in range(1, len(commands)):
            moved[k] += abs(commands[tick, k] - commands[tick - 1, k])
        if not np.isfinite(moved[k]):
            raise ValueError("a command on the path is not finite")
    count = 0
    for pair in range(len(rooms)):
        way = room
        for k in range(len(place)):
            way += reach[pair, k] * moved[k]
        if rooms[pair] <= way:
            found[count] = pair
            count += 1
            for k in range(len(place)):
                quickest[k] = max(quickest[k], reach[pair, k])
    travelled = np.zeros(len(commands))
    for tick in range(1, len(commands)):
        travelled[tick] = travelled[tick - 1]
        for k in range(len(place)):
            travelled[tick] += quickest[k] * abs(commands[tick, k] - commands[tick - 1, k])
    return found[:count].copy(), travelled


def _pairs(model: mujoco.MjModel, joints: set[int]) -> list[tuple[int, int]]:
    """Return the pairs of geoms that can collide and are moved against each other by ``joints``."""
    chains = []
    for geom in range(model.ngeom):
        body, chain = int(model.geom_bodyid[geom]), set()
        while body:
            chain |= set(range(model.body_jntadr[body], model.body_jntadr[body] + model.body_jntnum[body])) & joints
            body = int(model.body_parentid[body])
        chains.append(chain)
    found = []
    for first in range(model.ngeom):
        for second in range(first + 1, model.ngeom):
            one, other = int(model.geom_bodyid[first]), int(model.geom_bodyid[second])
            collide = model.geom_contype[first] & model.geom_conaffinity[second]
            collide |= model.geom_contype[second] & model.geom_conaffinity[first]
            parents = one and other and (model.body_parentid[other] == one or model.body_parentid[one] == other)
            attached = one == other or parents
            if collide and chains[first] != chains[second] and not attached:
                found.append((first, second))
    return found


def _reach(model: mujoco.MjModel, joint: int, first: int, second: int) -> float:
    """Return by how many metres a unit of ``joint`` changes the distance of two geoms at most."""
    holder, found = int(model.jnt_bodyid[joint]), []
    for geom in (first, second):
        reach = float(np.linalg.norm(model.geom_pos[geom]) + model.geom_rbound[geom])
        body = int(model.geom_bodyid[geom])
        while body and body != holder:
            reach += float(np.linalg.norm(model.body_pos[body])) + _slack(model, body)
            body = int(model.body_parentid[body])
        if body == holder:
            others = _slack(model, body) if model.body_jntnum[body] > 1 else 0.0
            found.append(reach + others + float(np.linalg.norm(model.jnt_pos[joint])))
    if len(found) != 1:
        return 0.0  # it moves neither of them, or both alike
    return 1.0 if int(model.jnt_type[joint]) == SLIDE else found[0]


def _slack(model: mujoco.MjModel, body: int) -> float:
    """Return by how many metres the joints of ``body`` shift its origin against its parent at most."""
    slack = 0.0
    for joint in range(model.body_jntadr[body], model.body_jntadr[body] + model.body_jntnum[body]):
        slack += 2 * float(np.linalg.norm(model.jnt_pos[joint]))
        if int(model.jnt_type[joint]) != HINGE:
            slack += float(np.abs(model.jnt_range[joint]).max()) if model.jnt_limited[joint] else _ENDLESS
    return slack
