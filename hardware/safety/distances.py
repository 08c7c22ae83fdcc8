"""Distances between geoms of a MuJoCo model along a path of commands, compiled around MuJoCo's own functions.

MuJoCo places the geoms and measures; what is compiled here decides what need not be measured. Its functions are called
by their addresses, so that the interpreter does not stand between two distances of a path.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from robot_rl.core.compiled import (
    INTEGER_MATRIX,
    INTEGERS,
    MATRIX,
    NEW_INTEGER_MATRIX,
    NEW_MATRIX,
    NEW_VECTOR,
    NUMBER,
    VECTOR,
    compiled,
    part_of_compiled,
)
from robot_rl.core.errors import ConfigError

if TYPE_CHECKING:
    import mujoco

_FAR = 10.0
"""Metres beyond which MuJoCo need not measure."""
_FEW = 4
"""Pairs that are measured again for every command rather than all anew for a tighter selection."""
_TOUCHING = 1e-6
"""Metres of distance below which the places of two geoms that are nearest to each other say nothing."""
_STACK = 64
"""Halves of a path that are open at once, at most: twice as many as a path can be halved, and more."""
_KINEMATICS, _DISTANCE, _MODEL, _DATA = range(4)


class Scene(NamedTuple):
    """What compiled functions take: a model with its data, the pairs, and what was measured last."""

    pairs: np.ndarray
    """(P, 2) numbers of the geoms that must stay apart."""
    reach: np.ndarray
    """(P, A) by how many metres a unit of each joint changes each pair's distance at most."""
    places: np.ndarray
    """(A,) where each element of a command belongs in ``qpos``."""
    qpos: np.ndarray
    """(nq,) positions in the data, written by every measurement."""
    addresses: np.ndarray
    """(4,) of ``mj_kinematics`` and ``mj_geomDistance``, of the model and of the data, which their owner keeps."""
    known: np.ndarray
    """(A,) command at which all pairs were measured last; not numbers where they never were. Written."""
    apart: np.ndarray
    """(P,) distance in metres of each pair there. Written."""


def addresses(model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
    """Return `Scene.addresses` (4,); raises `ConfigError` where MuJoCo's library is not in its package."""
    import mujoco

    folder = Path(mujoco.__file__).parent
    found = [one for one in sorted(folder.iterdir()) if one.name.startswith(("libmujoco", "mujoco.dll"))]
    if not found:
        raise ConfigError(f"distances need MuJoCo's library, and it is not in {folder}")
    library = ctypes.CDLL(str(found[0]))  # the file that the package has loaded: the system does not load it twice
    functions = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in _FUNCTIONS]
    return np.array([*functions, model._address, data._address], np.int64)


_FUNCTIONS = ("mj_kinematics", "mj_geomDistance")
_SCENE = (INTEGER_MATRIX, MATRIX, INTEGERS, NEW_VECTOR, INTEGERS, NEW_VECTOR, NEW_VECTOR)
_ENDS = types.Tuple((NEW_INTEGER_MATRIX, NEW_MATRIX))


def _foreign(returned: Any, *taken: Any) -> Callable[[int, tuple[Any, ...]], Any]:
    """Return what calls a C function by its address, with the types that it has in C, from compiled code."""

    @intrinsic
    def call(_context: Any, address: Any, arguments: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            nothing = returned is types.void
            result = ir.VoidType() if nothing else context.get_value_type(returned)
            kind = ir.FunctionType(result, [context.get_value_type(one) for one in taken])
            function = builder.inttoptr(values[0], kind.as_pointer())
            answer = builder.call(function, cgutils.unpack_tuple(builder, values[1]))
            return context.get_dummy_value() if nothing else answer

        return returned(types.int64, types.Tuple(taken)), generate

    return cast(Callable[[int, tuple[Any, ...]], Any], call)


_POINTER = types.int64  # passed as an integer of its size is
_place_geoms = _foreign(types.void, _POINTER, _POINTER)
_geom_distance = _foreign(types.float64, _POINTER, _POINTER, types.int32, types.int32, types.float64, _POINTER)


@part_of_compiled
def _place(command: np.ndarray, scene: Scene) -> None:
    for k in range(len(command)):
        scene.qpos[scene.places[k]] = command[k]
    addresses = scene.addresses
    _place_geoms(addresses[_KINEMATICS], (addresses[_MODEL], addresses[_DATA]))


@part_of_compiled
def _distance(pair: np.ndarray, scene: Scene, most: float, ends: int) -> float:
    """Return the distance of a pair where they are placed, ``most`` if it is larger; ``ends`` is C's ``fromto``."""
    first, second, addresses = np.int32(pair[0]), np.int32(pair[1]), scene.addresses
    arguments = (addresses[_MODEL], addresses[_DATA], first, second, most, ends)
    distance: float = _geom_distance(addresses[_DISTANCE], arguments)
    return distance


@part_of_compiled
def _too_near(command: np.ndarray, chosen: np.ndarray, margin: float, scene: Scene) -> float:
    """Return by how many metres the nearest of the ``chosen`` pairs is nearer than ``margin`` at ``command``."""
    _place(command, scene)
    nearest = _FAR
    for pair in chosen:
        nearest = min(nearest, _distance(scene.pairs[pair], scene, _FAR, 0))
    return margin - nearest


@part_of_compiled
def _select(commands: np.ndarray, room: float, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Return which pairs may come within ``room`` on a path, and how far the quickest of them may have come (T,)."""
    reach, known, apart = scene.reach, scene.known, scene.apart
    moved, found, quickest = np.zeros(len(known)), np.empty(len(apart), np.int64), np.zeros(len(known))
    for k in range(len(known)):
        moved[k] = abs(commands[0, k] - known[k])
        for tick in range(1, len(commands)):
            moved[k] += abs(commands[tick, k] - commands[tick - 1, k])
    count = 0
    for pair in range(len(apart)):
        way = room
        for k in range(len(known)):
            way += reach[pair, k] * moved[k]
        if apart[pair] <= way:
            found[count] = pair
            count += 1
            for k in range(len(known)):
                quickest[k] = max(quickest[k], reach[pair, k])
    travelled = np.zeros(len(commands))
    for tick in range(1, len(commands)):
        travelled[tick] = travelled[tick - 1]
        for k in range(len(known)):
            travelled[tick] += quickest[k] * abs(commands[tick, k] - commands[tick - 1, k])
    return found[:count], travelled


@part_of_compiled
def _near(commands: np.ndarray, room: float, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """As `_select`, from a measurement of all pairs that is new where the last one would select too many."""
    fresh = True
    for k in range(len(scene.known)):
        for tick in range(len(commands)):
            if not np.isfinite(commands[tick, k]):
                raise ValueError("a command on the path is not finite")
        fresh &= commands[0, k] == scene.known[k]
    if not np.isnan(scene.known[0]):
        found, travelled = _select(commands, room, scene)
        if len(found) <= _FEW or fresh:
            return found, travelled
    _place(commands[0], scene)
    for pair in range(len(scene.pairs)):
        scene.apart[pair] = _distance(scene.pairs[pair], scene, _FAR, 0)
    scene.known[:] = commands[0]
    return _select(commands, room, scene)


@compiled(NUMBER(VECTOR, *_SCENE))
def smallest_distance(
    command: np.ndarray,
    pairs: np.ndarray,
    reach: np.ndarray,
    places: np.ndarray,
    qpos: np.ndarray,
    addresses: np.ndarray,
    known: np.ndarray,
    apart: np.ndarray,
) -> float:
    """Return the smallest distance in metres of any pair at ``command`` (A,)."""
    return -_too_near(command, np.arange(len(pairs)), 0.0, Scene(pairs, reach, places, qpos, addresses, known, apart))


@compiled(NUMBER(MATRIX, NUMBER, NUMBER, *_SCENE))
def path_excess(
    commands: np.ndarray,
    margin: float,
    permitted: float,
    pairs: np.ndarray,
    reach: np.ndarray,
    places: np.ndarray,
    qpos: np.ndarray,
    addresses: np.ndarray,
    known: np.ndarray,
    apart: np.ndarray,
) -> float:
    """Return by how many metres the worst of a path is nearer than ``margin``; see `Clearance.excess`.

    Args:
        commands: (T, A) the path.
        margin: metres.
        permitted: metres at which to end.
        pairs: of the `Scene`, like all that follow.
        reach: of the scene.
        places: of the scene.
        qpos: of the scene.
        addresses: of the scene.
        known: of the scene.
        apart: of the scene.

    Raises:
        ValueError: a command is not finite.
    """
    scene = Scene(pairs, reach, places, qpos, addresses, known, apart)
    chosen, travelled = _near(commands, margin, scene)
    last = len(commands) - 1
    if not len(chosen):
        return 0.0
    found = np.empty(last + 1)
    # A path that is refused is so for its end, mostly.
    found[last] = _too_near(commands[last], chosen, margin, scene)
    if found[last] > permitted or not last:
        return found[last]
    found[0] = _too_near(commands[0], chosen, margin, scene)
    worst = max(found[0], found[last])
    starts, ends, count = np.empty(_STACK, np.int64), np.empty(_STACK, np.int64), 1
    starts[0], ends[0] = 0, last
    while worst <= permitted and count:
        count -= 1
        start, end = starts[count], ends[count]
        if end - start < 2 or found[start] + found[end] + travelled[end] - travelled[start] <= 0.0:
            continue  # nothing lies between, or no command between can be too near
        middle = (start + end) // 2
        found[middle] = _too_near(commands[middle], chosen, margin, scene)
        worst = max(worst, found[middle])
        starts[count], ends[count], starts[count + 1], ends[count + 1] = start, middle, middle, end
        count += 2
    return worst


@compiled(_ENDS(MATRIX, NUMBER, *_SCENE))
def near_ends(
    commands: np.ndarray,
    near: float,
    pairs: np.ndarray,
    reach: np.ndarray,
    places: np.ndarray,
    qpos: np.ndarray,
    addresses: np.ndarray,
    known: np.ndarray,
    apart: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs nearer than ``near`` at one command (1, A), as (N, 2), and what is nearest of each (N, 7).

    It is the place of the first geom, in metres in the model's world, that of the second, and their distance, which is
    negative where they overlap. Pairs whose places say nothing, because they touch, are left out.
    """
    scene = Scene(pairs, reach, places, qpos, addresses, known, apart)
    chosen, _ = _near(commands, near, scene)
    _place(commands[0], scene)
    names, found, count = np.empty((len(chosen), 2), np.int64), np.empty((len(chosen), 7)), 0
    for pair in chosen:
        distance = _distance(pairs[pair], scene, near, found[count].ctypes.data)
        if distance < near and abs(distance) >= _TOUCHING:
            found[count, 6] = distance
            names[count] = pairs[pair]
            count += 1
    return names[:count].copy(), found[:count].copy()
