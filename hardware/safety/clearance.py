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

import numpy as np

from hardware.safety.arithmetic import braking_step
from hardware.safety.model import block, joint_numbers, number
from robot_rl.core.errors import ConfigError

if TYPE_CHECKING:
    import mujoco

logger = logging.getLogger(__name__)
_SOLVED = 1
_SLIDE, _HINGE = 2, 3
"""Types of joints in MuJoCo (``mjtJoint``)."""
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
        self._places, self._rates = block(model.jnt_qposadr[numbers]), block(model.jnt_dofadr[numbers])
        if pairs is None:
            self.pairs = _pairs(model, set(numbers))
        else:
            names = [tuple(number(model, mujoco.mjtObj.mjOBJ_GEOM, one, "geom") for one in pair) for pair in pairs]
            self.pairs = [(first, second) for first, second in names]
        if not self.pairs:
            raise ConfigError("no pair of geoms can touch: name the pairs, or give the geoms contype and conaffinity")
        self._reach = np.array([[_reach(model, joint, *pair) for joint in numbers] for pair in self.pairs])
        self._measured: tuple[np.ndarray, np.ndarray] | None = None
        self._ends, self._jacobian = np.zeros(6), np.zeros((2, 3, model.nv))
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
        if not np.isfinite(commands).all():
            raise ValueError("a command on the path is not finite")
        moved = np.abs(commands[1:] - commands[:-1])
        chosen = self._near(commands[0], moved.sum(axis=0), 0.0)
        if not len(chosen):
            return 0.0
        near = [self.pairs[k] for k in chosen]
        travelled = np.concatenate([[0.0], np.cumsum(moved @ self._reach[chosen].max(axis=0))])
        last = len(commands) - 1
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

    def _near(self, command: np.ndarray, moved: np.ndarray, room: float) -> np.ndarray:
        """Return the numbers of the pairs that may be within margin and ``room`` ``moved`` (A,) from ``command``."""
        for _ in range(2):
            if self._measured is not None:
                place, rooms = self._measured
                gone = np.abs(command - place)
                near = (rooms <= self._reach @ (gone + moved) + room).nonzero()[0]
                if len(near) <= _FEW or not gone.any():
                    return near
            self._place(command)
            self._measured = (command.copy(), np.array(self._distances(self.pairs)) - self.margin)
        raise AssertionError("unreachable: a fresh measurement is always good enough")

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
        pairs = [self.pairs[k] for k in self._near(command, np.zeros(len(command)), self.near)]
        self._place(command)
        self._mujoco.mj_comPos(self.model, self.data)
        rows, rooms = [], []
        for first, second in pairs:
            distance = self._mujoco.mj_geomDistance(self.model, self.data, first, second, self.near, self._ends)
            if distance >= self.near or abs(distance) < _TOUCHING:
                continue
            normal = (self._ends[3:] - self._ends[:3]) / distance
            for side, geom, point in ((0, first, self._ends[:3]), (1, second, self._ends[3:])):
                body = int(self.model.geom_bodyid[geom])
                self._mujoco.mj_jac(self.model, self.data, self._jacobian[side], None, point, body)
            rows.append(normal @ (self._jacobian[1] - self._jacobian[0])[:, self._rates])
            rooms.append(distance - self.margin - _SPARE)
        if not rows:
            return np.zeros((0, len(command))), np.zeros(0)
        found, room = np.array(rows), np.array(rooms)
        brakes = np.maximum(0.5 * np.abs(found) @ brake, 1e-12)
        return found, np.where(room > 0.0, braking_step(np.maximum(room, 0.0), brakes), _RETURN * room)

    def _place(self, command: np.ndarray) -> None:
        self.data.qpos[self._places] = command
        self._mujoco.mj_kinematics(self.model, self.data)


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
    return 1.0 if int(model.jnt_type[joint]) == _SLIDE else found[0]


def _slack(model: mujoco.MjModel, body: int) -> float:
    """Return by how many metres the joints of ``body`` shift its origin against its parent at most."""
    slack = 0.0
    for joint in range(model.body_jntadr[body], model.body_jntadr[body] + model.body_jntnum[body]):
        slack += 2 * float(np.linalg.norm(model.jnt_pos[joint]))
        if int(model.jnt_type[joint]) != _HINGE:
            slack += float(np.abs(model.jnt_range[joint]).max()) if model.jnt_limited[joint] else _ENDLESS
    return slack
