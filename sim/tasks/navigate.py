"""Point-goal navigation: a differential-drive base with a lidar finds its way through furnished rooms.

Every episode has a world (see `sim.worlds`), a start and a goal. It succeeds within 0.25 m of the goal (the tolerance
of Nav2's goal checker) and fails when the base touches a wall or a piece of furniture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import mujoco
import numpy as np

from robot_rl.core.env import Observation
from robot_rl.core.paths import data_file
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames
from sim.engine import ALL, BatchEnv, Lanes
from sim.lidar import PlanarLidar
from sim.navigation_expert import PlannerExpert
from sim.planner import (
    SHORTEST,
    CostToGo,
    PlannerParameters,
    path_length,
    plan,
    shortest_path,
)
from sim.worlds import RoomParameters, World, generate, world_seed

RATE_HZ = 10.0
SUBSTEPS = 4
BEAMS = 36
LIDAR_RANGE = 10.0
"""Metres; a beam that hits nothing nearer reads this."""
LIDAR_HEIGHT = 0.2
"""Metres above the floor."""
GOAL_TOLERANCE = 0.25
"""Metres from the goal that count as arrived."""
WHEEL_BASE = 0.3
"""Metres between the wheels, as in the model."""
ROBOT_RADIUS = 0.2
"""Radius of the footprint in metres, as in the model."""
SPEED = (-0.3, 0.6)
"""Slowest and fastest commanded speed in m/s."""
TURN_RATE = 1.8
"""Fastest commanded turn rate in rad/s."""
MINIMUM_LENGTH = 3.0
"""Shortest way from a start to its goal, in metres."""
STARTS_PER_WORLD = 16
"""Starts that training episodes in one world draw from; their path lengths are computed once."""

SPEC = Spec(
    observation={
        "lidar": ArraySpec((BEAMS,), unit="m", frame="base_link", low=(0.0,) * BEAMS, high=(LIDAR_RANGE,) * BEAMS),
        "nearness": ArraySpec(
            (BEAMS,),
            unit="1/m",
            frame="base_link",
            low=(1.0 / LIDAR_RANGE,) * BEAMS,
            high=(1.0 / ROBOT_RADIUS,) * BEAMS,
        ),
        "goal": ArraySpec(
            (7,),
            names=("distance", "cosine_bearing", "sine_bearing", "x", "y", "speed", "turn_rate"),
            unit="m,,,m,m,m/s,rad/s",
            frame="base_link",
        ),
    },
    action=ArraySpec(
        (2,),
        names=("speed", "turn_rate"),
        unit="m/s,rad/s",
        frame="base_link",
        low=(SPEED[0], -TURN_RATE),
        high=(SPEED[1], TURN_RATE),
    ),
    rate_hz=RATE_HZ,
)
"""``lidar``: beam k points at -180° + k · 10° from the base's heading, anticlockwise, as in a ROS LaserScan.
``nearness``: the same scan as reciprocal ranges, in which what is near counts most; networks learn clearances better
from it. ``goal``: where the goal is in the robot's frame, polar and Cartesian, and the base's own odometry."""


@dataclass
class Scene:
    """A world with one goal, and what is computed once for all episodes in it."""

    world: World
    goal: np.ndarray
    """(2,) m."""
    shortest: CostToGo
    """Path length to the goal from everywhere."""
    starts: np.ndarray
    """(S, 2) m: points at least `MINIMUM_LENGTH` of way from the goal."""
    geoms: dict[str, np.ndarray]
    """Fields of the model's boxes (``pos``, ``quat``, ``size``, ``rbound``), a row per box."""
    _lengths: dict[int, float] = field(default_factory=dict)
    _reference: CostToGo | None = None

    def shortest_length(self, start: int) -> float:
        """Return the length in metres of the shortest way from ``starts[start]`` until the goal is in tolerance."""
        if start not in self._lengths:
            way = path_length(shortest_path(self.shortest, self.starts[start]))
            self._lengths[start] = max(way - GOAL_TOLERANCE, 0.0)
        return self._lengths[start]

    def comfortable(self) -> CostToGo:
        """Return the cost to go that keeps away from obstacles, for the expert."""
        if self._reference is None:
            self._reference = plan(self.world, self.goal, PlannerParameters())
        return self._reference


@lru_cache(maxsize=512)
def scene(family: str, parameters: RoomParameters, seed: int) -> Scene:
    """Return the scene of a world: its goal and starts are drawn from the world's seed too."""
    world = generate(family, seed, parameters)
    rng = np.random.default_rng([seed, 2])
    cells = np.argwhere(world.reachable)
    while True:
        goal = world.centre(*cells[rng.integers(len(cells))])
        shortest = plan(world, goal, SHORTEST)
        chosen = cells[rng.integers(len(cells), size=8 * STARTS_PER_WORLD)]
        points = world.centre(chosen[:, 0], chosen[:, 1])
        lengths = shortest.length(points)
        starts = points[np.isfinite(lengths) & (lengths >= MINIMUM_LENGTH)]
        if len(starts) >= STARTS_PER_WORLD:
            return Scene(world, goal, shortest, starts[:STARTS_PER_WORLD], _box_geoms(world.boxes))


def _box_geoms(boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Return `Scene.geoms` of a world's boxes (B, 5); those without extent lie below the floor."""
    used = boxes[:, 2] > 0.0
    height, zero = np.full(len(boxes), LIDAR_HEIGHT * 1.5), np.zeros(len(boxes))
    size = np.where(used[:, None], np.column_stack([boxes[:, 2:4], height]), 0.01)
    return {
        "pos": np.column_stack([boxes[:, :2], np.where(used, height, -5.0)]),
        "quat": np.column_stack([np.cos(boxes[:, 4] / 2), zero, zero, np.sin(boxes[:, 4] / 2)]),
        "size": size,
        "rbound": np.sqrt((size**2).sum(axis=1)),
    }


class Navigate(BatchEnv):
    """The task ``navigate``; see the module.

    Collisions are MuJoCo contacts between the base and the world's boxes, so the base also really stops at a wall.
    """

    name = "navigate"
    camera = "top"
    render_size = (256, 320)

    def __init__(
        self,
        num_envs: int,
        *,
        worlds: int = 256,
        family: str = "rooms",
        parameters: RoomParameters | None = None,
        **options: Any,
    ) -> None:
        """Build the lanes.

        Args:
            num_envs: number of lanes N.
            worlds: training episodes share this many worlds, 0 for a new world in every episode. Test episodes (seeds
                from `sim.worlds.TEST_SEED_START` on) have a world each. A new world costs about 9 ms once, and the
                latest 512 are kept (0.3 MB each); a reset into one that is kept costs less than 1 ms.
            family: world generator.
            parameters: its parameters.
            options: of `sim.engine.BatchEnv`.
        """
        self.family, self.parameters, self.worlds = family, parameters or RoomParameters(), worlds
        super().__init__(
            _model(self.parameters), num_envs, spec=SPEC, substeps=SUBSTEPS, max_episode_steps=500, **options
        )
        batch, model = self.batch, self.model
        self.qpos, self.qvel, self.ctrl = batch.bind("qpos"), batch.bind("qvel"), batch.bind("ctrl")
        self._contacts, self._goal_body = batch.bind("ncon"), batch.bind("mocap_pos")
        first = model.geom("box_0").id
        self._boxes = slice(first, first + self.parameters.boxes)
        self._box_fields = {key: batch.expand(f"geom_{key}") for key in ("pos", "quat", "size", "rbound")}
        beams = -np.pi + np.arange(BEAMS) * (2 * np.pi / BEAMS)
        self._lane_numbers = np.arange(num_envs)
        self._lidar = PlanarLidar(num_envs, self.parameters.boxes, beams, LIDAR_RANGE)
        # The base's own servos bound its acceleration: a command may cross its range within one control step.
        self.command_velocity = np.array([SPEED[1] - SPEED[0], 2 * TURN_RATE]) * RATE_HZ
        self.command_acceleration = self.command_velocity * RATE_HZ

        self.scenes: list[Scene | None] = [None] * num_envs
        """Scene of each lane's episode."""
        self.goal = np.zeros((num_envs, 2))
        """(N, 2) m."""
        self.path_length = np.zeros(num_envs)
        """(N,) metres travelled in this episode."""
        self.shortest_length = np.zeros(num_envs)
        """(N,) metres of the shortest way from the start until the goal is in tolerance."""
        self.collided = np.zeros(num_envs, bool)
        """(N,) whether the base touches something."""
        self.goal_distance = np.zeros(num_envs)
        """(N,) metres as the crow flies."""
        self._previous = np.zeros((num_envs, 2))
        self._way = np.zeros(num_envs)

    @property
    def position(self) -> np.ndarray:
        """(N, 2) m: where the bases are."""
        return self.qpos[:, :2]

    @property
    def heading(self) -> np.ndarray:
        """(N,) rad: where they face, unbounded."""
        return self.qpos[:, 2]

    def hold_action(self) -> np.ndarray:
        """Return the actions (N, A) that keep the bases where they are."""
        return np.zeros((self.num_envs, 2))

    # ---- episode ------------------------------------------------------------------------------------------------

    def reset_lanes(self, lanes: np.ndarray, rngs: list[np.random.Generator]) -> None:
        """Put each lane into its episode's world; see `BatchEnv.reset_lanes`."""
        for lane, rng in zip(lanes, rngs, strict=True):
            found = scene(self.family, self.parameters, world_seed(self.episode_seed[lane], self.worlds))
            start = int(rng.integers(len(found.starts)))
            self.scenes[lane] = found
            for key, rows in found.geoms.items():
                self._box_fields[key][lane, self._boxes] = rows
            self._lidar.place(lane, found.world.boxes)
            self.qpos[lane] = (*found.starts[start], rng.uniform(-np.pi, np.pi))
            self.goal[lane] = found.goal
            self._goal_body[lane, 0] = (*found.goal, 0.0)
            self.shortest_length[lane] = found.shortest_length(start)
            if self.reward_kind == "shaped":
                self._way[lane] = found.shortest.length(found.starts[start])
        self.path_length[lanes] = 0.0
        self._previous[lanes] = self.qpos[lanes, :2]

    def apply(self, actions: np.ndarray) -> None:
        """Turn (speed, turn rate) into the speeds of the two wheels."""
        swing = actions[:, 1] * (WHEEL_BASE / 2)
        self.ctrl[:, 0] = actions[:, 0] - swing
        self.ctrl[:, 1] = actions[:, 0] + swing

    def observe(self, lanes: Lanes = ALL) -> Observation:
        """Return ``lidar`` (K, 36) in m, ``nearness`` (K, 36) in 1/m and ``goal`` (K, 7); see `SPEC`."""
        qpos, qvel = self.qpos[lanes], self.qvel[lanes]
        cosine, sine = np.cos(qpos[:, 2]), np.sin(qpos[:, 2])
        offset = self.goal[lanes] - qpos[:, :2]
        goal = np.empty((len(qpos), 7), np.float32)
        goal[:, 3] = ahead = cosine * offset[:, 0] + sine * offset[:, 1]
        goal[:, 4] = left = cosine * offset[:, 1] - sine * offset[:, 0]
        goal[:, 0] = distance = np.maximum(np.sqrt(ahead * ahead + left * left), 1e-6)
        goal[:, 1], goal[:, 2] = ahead / distance, left / distance
        goal[:, 5] = cosine * qvel[:, 0] + sine * qvel[:, 1]
        goal[:, 6] = qvel[:, 2]
        lidar = self.scan(lanes)
        return {"lidar": lidar, "nearness": 1.0 / np.maximum(lidar, np.float32(ROBOT_RADIUS)), "goal": goal}

    def scan(self, lanes: Lanes = ALL) -> np.ndarray:
        """Return the lidar's ranges (K, 36) float32 in metres."""
        return self._lidar.scan(self.qpos[lanes], self._lane_numbers[lanes])

    def measure(self) -> None:
        """Contacts, distances and path lengths after a control step."""
        self.collided = self._contacts.reshape(self.num_envs) > 0
        moved = self.position - self._previous
        self.path_length += np.hypot(moved[:, 0], moved[:, 1])
        self._previous[:] = self.position
        offset = self.goal - self.position
        self.goal_distance = np.hypot(offset[:, 0], offset[:, 1])

    def success(self) -> np.ndarray:
        """Return (N,) bool: within `GOAL_TOLERANCE` of the goal and touching nothing."""
        return (self.goal_distance <= GOAL_TOLERANCE) & ~self.collided

    def terminated(self) -> np.ndarray:
        """Return (N,) bool: arrived or collided."""
        return self.succeeded | self.collided

    def reward(self, first_success: np.ndarray) -> np.ndarray:
        """Return (N,): sparse 1 at the goal; shaped: metres of way gained, +5 at the goal, -5 for a collision."""
        if self.reward_kind == "sparse":
            return first_success.astype(np.float32)
        way = self._way_to_goal()
        gained = np.clip(self._way - way, -0.5, 0.5)
        self._way = way
        return gained - 0.01 + 5.0 * first_success - 5.0 * self.collided

    def _way_to_goal(self) -> np.ndarray:
        """Return the way to the goal (N,) in metres; where none is found (pushed into a corner) the last one."""
        way = np.array([found.shortest.length(point) for found, point in zip(self.scenes, self.position, strict=True)])
        return np.where(np.isfinite(way), way, self._way)

    def episode_info(self) -> dict[str, np.ndarray]:
        """Return ``collision`` (N,) bool, ``path_length``, ``shortest_length`` and ``goal_distance`` (N,) in m.

        With them SPL = mean(success · shortest_length / max(path_length, shortest_length)) (arXiv 1807.06757).
        """
        return {
            "collision": self.collided.copy(),
            "path_length": self.path_length.copy(),
            "shortest_length": self.shortest_length.copy(),
            "goal_distance": self.goal_distance.copy(),
        }

    def make_expert(self, noise: float = 1.0, seed: int = 0) -> PlannerExpert:
        """Return the planner with the full map; see `sim.navigation_expert.PlannerExpert`."""
        return PlannerExpert(self, noise, seed)


def _model(parameters: RoomParameters) -> mujoco.MjSpec:
    """Return the base with the world's boxes, whose poses and sizes each lane overwrites."""
    spec = mujoco.MjSpec.from_file(str(data_file("assets", "diff_drive_base", "base.xml")))
    for index in range(parameters.boxes):
        # An angle, so that the compiler does not take the box's frame for that of its body.
        spec.worldbody.add_geom(
            name=f"box_{index}",
            type=mujoco.mjtGeom.mjGEOM_BOX,
            size=[0.01, 0.01, 0.01],
            pos=[index * 0.1, 1.0, -5.0],
            quat=[np.cos(0.1), 0.0, 0.0, np.sin(0.1)],
            rgba=[0.35, 0.33, 0.32, 1.0],
        )
    camera = spec.camera("top")
    camera.pos = [parameters.width / 2, parameters.height / 2, 1.3 * max(parameters.height, parameters.width / 1.25)]
    return spec


def make(num_envs: int = 1, **options: Any) -> Navigate:
    """Build the task; options as `Navigate`."""
    return Navigate(num_envs, **options)


def mirrored(frames: Frames) -> Frames:
    """Return ``frames`` followed by their mirror images, left for right: as many episodes again for nothing.

    Base, lidar and rooms have no preferred side, so a mirrored demonstration is a demonstration in a mirrored room.
    """
    turned = -np.arange(BEAMS) % BEAMS
    swapped = {key: value[:, turned] for key, value in frames.observation.items() if key != "goal"}
    signs = np.array([1, 1, -1, 1, -1, 1, -1], np.float32)
    swapped["goal"] = frames.observation["goal"] * signs
    action = frames.action * np.array([1, -1], np.float32)
    return Frames(
        observation={key: np.concatenate([frames.observation[key], swapped[key]]) for key in swapped},
        action=np.concatenate([frames.action, action]),
        episode_ends=np.concatenate([frames.episode_ends, frames.episode_ends + frames.num_frames]),
        spec=frames.spec,
    )


def success_weighted_path_length(success: np.ndarray, shortest: np.ndarray, travelled: np.ndarray) -> float:
    """Return SPL in [0, 1] from (E,) success, shortest and travelled lengths (arXiv 1807.06757, equation 1)."""
    return float(np.mean(success * shortest / np.maximum(np.maximum(travelled, shortest), 1e-9)))
