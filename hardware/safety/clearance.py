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

from hardware.safety.arithmetic import slide_bounds
from hardware.safety.distances import Scene, addresses, near_ends, path_excess, smallest_distance
from hardware.safety.kinematics import HINGE, SLIDE, approaches, tree_of
from hardware.safety.model import joint_numbers, number
from robot_rl.core.errors import ConfigError

if TYPE_CHECKING:
    import mujoco

logger = logging.getLogger(__name__)
_SOLVED = 1
_SPARE, _RETURN = 5e-4, 0.1
"""Metres beyond the margin at which `slide` stays, for the curvature that its rows leave out, and by which share of
what is missing there a displacement must lead away."""
_ENDLESS = 1e6


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

        self.model, self.data, self.margin, self.near = model, mujoco.MjData(model), margin, near
        numbers = joint_numbers(model, joints)
        self._tree = tree_of(model, numbers, [(int(body), np.zeros(3)) for body in model.geom_bodyid])
        if pairs is None:
            self.pairs = _pairs(model, set(numbers))
        else:
            names = [tuple(number(model, mujoco.mjtObj.mjOBJ_GEOM, one, "geom") for one in pair) for pair in pairs]
            self.pairs = [(first, second) for first, second in names]
        if not self.pairs:
            raise ConfigError("no pair of geoms can touch: name the pairs, or give the geoms contype and conaffinity")
        self._scene = Scene(
            pairs=np.array(self.pairs, np.int64),
            reach=np.array([[_reach(model, joint, *pair) for joint in numbers] for pair in self.pairs]),
            places=np.asarray(model.jnt_qposadr[numbers], np.int64),
            qpos=self.data.qpos,
            addresses=addresses(model, self.data),
            known=np.full(len(numbers), np.nan),
            apart=np.zeros(len(self.pairs)),
        )
        self._square = np.eye(len(numbers))
        self._check()
        self.solver = importlib.util.find_spec("daqp") is not None
        """Whether `slide` can propose anything: the package ``daqp`` (extra ``safety``) is there."""

    def distance(self, command: np.ndarray) -> float:
        """Return the smallest distance in metres of any pair at ``command`` (A,); negative where they overlap."""
        return float(smallest_distance(command, *self._scene))

    def excess(self, commands: np.ndarray, permitted: float = 0.0) -> float:
        """Return by how many metres the worst of a path of ``commands`` (T, A) is too near; not positive if none is.

        It ends with the first that is too near by more than ``permitted``. What cannot matter is left out: a pair comes
        no nearer than by the motions of the joints between its geoms times their reaches, so that one that was farther
        apart than that when it was last measured is safe, and so are commands between two that leave more room.

        Raises:
            ValueError: a command is not finite.
        """
        return float(path_excess(commands, self.margin, permitted, *self._scene))

    def forget(self) -> None:
        """Measure all pairs anew; call it when something in the model has moved that is not commanded."""
        self._scene.known[:] = np.nan

    def _check(self) -> None:
        """Measure every pair from Python, where an error of MuJoCo is an exception; in compiled code it is the end.

        The geoms lie in each other, which is what takes the most of the model's memory.
        """
        import mujoco

        mujoco.mj_kinematics(self.model, self.data)
        pair, places = self.pairs[0], self.data.geom_xpos.copy()
        try:
            for pair in self.pairs:
                self.data.geom_xpos[pair[0]] = places[pair[1]]
                mujoco.mj_geomDistance(self.model, self.data, *pair, self.near, None)
                self.data.geom_xpos[:] = places
        except mujoco.FatalError as error:
            first, second = (mujoco.mj_id2name(self.model, mujoco.mjtObj.mjOBJ_GEOM, geom) for geom in pair)
            raise ConfigError(f"the distance of {first} and {second} cannot be measured: {error}") from error

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
        command = np.asarray(command, float)
        pairs, ends = near_ends(command[None], self.near, *self._scene)
        if not len(pairs):
            return None
        import daqp

        rows = approaches(command, pairs, ends, *self._tree)
        upper, lower = slide_bounds(rows, ends, low, high, brake, self.margin + _SPARE, _RETURN)
        found, _, state, _ = daqp.solve(self._square, -wanted, rows, upper, lower, np.zeros(len(upper), np.int32))
        return np.minimum(np.maximum(found, low), high) if state == _SOLVED else None


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
