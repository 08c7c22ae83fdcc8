"""Environment steps per second of processor time, with observations, rewards and resets, against physics and peers.

Every peer is measured in the same run, in turn with ours, round by round; a ratio is the median over rounds. Raw
physics is `mujoco.rollout` on the same model, substeps, initial states and controls. The lidar of `navigate` is part of
our step but not of raw physics; it is also measured alone, against the same rays cast by MuJoCo.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mujoco
import numpy as np
from mujoco import rollout

from benchmarks.common import report
from robot_rl.core.registry import make_env
from robot_rl.core.testing import random_actions
from sim.engine import BatchEnv
from sim.tasks.navigate import Navigate

STEPS = {"push_t": 300, "half_cheetah": 500, "navigate": 200}
"""Control steps per round."""
CHUNK = 100
"""Control steps per call of `mujoco.rollout`, which bounds its output arrays."""
GYMNASIUM_LANES = 16
SEED = 0


class Task:
    """Our environment of one task, and the raw work inside its steps."""

    def __init__(self, name: str, lanes: int) -> None:
        self.env: BatchEnv = make_env(name, lanes, threads=1)
        self.steps, self.lanes = STEPS[name], lanes
        rng = np.random.default_rng(SEED)
        self.actions = [random_actions(self.env.spec.action, lanes, rng) for _ in range(self.steps)]
        self._record()

    def _record(self) -> None:
        """Keep the initial states, per-lane models and controls that these actions lead to without resets."""
        env = self.env
        env.reset(SEED)
        spec = int(mujoco.mjtState.mjSTATE_FULLPHYSICS)
        self.initial = np.zeros((self.lanes, mujoco.mj_stateSize(env.model, spec)))
        for lane in range(self.lanes):
            mujoco.mj_getState(env.model, env.batch.get_data(lane), self.initial[lane], spec)
        self.models = [env.batch.get_model(lane) for lane in range(self.lanes)]
        self.data = mujoco.MjData(env.model)
        live = env.batch.bind("ctrl")
        controls = np.zeros((self.lanes, self.steps, env.model.nu))
        for t, actions in enumerate(self.actions):
            env.set_action(actions)
            controls[:, t] = live
            env.advance(env.substeps)
        self.controls = np.repeat(controls, env.substeps, axis=1)
        width = CHUNK * env.substeps
        self.states = np.zeros((self.lanes, width, self.initial.shape[1]))
        self.sensors = np.zeros((self.lanes, width, env.model.nsensordata))

    def ours(self) -> None:
        """Step through all actions, from the same seeds each time."""
        self.env.reset(SEED)
        for actions in self.actions:
            self.env.step(actions)

    def raw(self) -> None:
        """Run the same physics with `mujoco.rollout`, in chunks."""
        width = CHUNK * self.env.substeps
        state = self.initial
        for start in range(0, self.controls.shape[1], width):
            controls = self.controls[:, start : start + width]
            rollout.rollout(
                self.models, self.data, state, controls, state=self.states, sensordata=self.sensors, chunk_size=None
            )
            state = self.states[:, -1].copy()

    def lidar(self) -> None:
        """Scan from where the lanes stand, as often as in `ours`."""
        env = self.env
        assert isinstance(env, Navigate)
        for _ in range(self.steps):
            env.scan()

    def rays(self) -> None:
        """Cast the same rays by MuJoCo; boxes that are not in use are transparent, so that rays pass them untested."""
        env = self.env
        env.batch.expand("geom_rgba")[..., 3] = env.batch.expand("geom_pos")[..., 2] > -1.0
        angle = np.linspace(-np.pi, np.pi, env.spec.observation["lidar"].size, endpoint=False)
        vector = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=-1)
        origin = np.concatenate([env.batch.bind("qpos")[:, None, :2], np.full((self.lanes, 1, 1), 0.2)], axis=2)
        group, body = np.array([1, 0, 0, 0, 0, 0], np.uint8), env.model.body("base_link").id
        for _ in range(self.steps):
            env.batch.ray(origin, vector, geomgroup=group, bodyexclude=body)


def cpu(function: Callable[[], None]) -> float:
    """Return the processor time of this process for a call, in seconds."""
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(name: str, lanes: int, rounds: int) -> dict[str, float]:
    """Return rates in env steps per CPU-second, and ratios, of one task; medians over rounds."""
    task = Task(name, lanes)
    task.ours()
    lidar = "lidar" in task.env.spec.observation
    columns: dict[str, list[float]] = {}
    for _ in range(rounds):
        ours, raw = cpu(task.ours), cpu(task.raw)
        found = {"ours": ours, "raw": raw, "ratio": raw / ours}
        if lidar:
            rays, scans = cpu(task.rays), cpu(task.lidar)
            found |= {"rays": rays, "lidar_ratio": rays / scans}
        for key, value in found.items():
            columns.setdefault(key, []).append(value)
    medians = {key: statistics.median(values) for key, values in columns.items()}
    steps = task.steps * lanes
    result = {f"{name}_steps_per_cpu_second": steps / medians["ours"], f"{name}_vs_rollout": medians["ratio"]}
    result[f"{name}_rollout"] = steps / medians["raw"]
    if lidar:
        result[f"{name}_lidar_vs_mujoco_rays"] = medians["lidar_ratio"]
        result[f"{name}_mujoco_rays"] = steps / medians["rays"]
    return result


def measure_envpool(lanes: int) -> Callable[[], float]:
    """Return a function that measures envpool's HalfCheetah once, in env steps per CPU-second."""
    import envpool

    env = envpool.make("HalfCheetah-v5", env_type="gymnasium", num_envs=lanes, num_threads=1, seed=SEED)
    actions = np.random.default_rng(SEED).uniform(-1, 1, (STEPS["half_cheetah"], lanes, 6))
    env.reset()

    def once() -> float:
        def steps() -> None:
            for action in actions:
                env.step(action)

        return actions.shape[0] * lanes / cpu(steps)

    return once


def measure_gymnasium() -> Callable[[], float]:
    """Return a function that measures Gymnasium's AsyncVectorEnv with its HalfCheetah once, its processes included."""
    import gymnasium

    env = gymnasium.make_vec("HalfCheetah-v5", num_envs=GYMNASIUM_LANES, vectorization_mode="async")
    actions = np.random.default_rng(SEED).uniform(-1, 1, (200, GYMNASIUM_LANES, 6)).astype(np.float32)
    env.reset(seed=SEED)
    children = [process.pid for process in env.unwrapped.processes]

    def once() -> float:
        start = time.process_time() + sum(map(_process_seconds, children))
        for action in actions:
            env.step(action)
        spent = time.process_time() + sum(map(_process_seconds, children)) - start
        return actions.shape[0] * GYMNASIUM_LANES / spent

    return once


def _process_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(lanes: int, rounds: int) -> None:
    """Measure everything and report."""
    metrics: dict[str, float] = {}
    for name in STEPS:
        metrics |= measure(name, lanes, rounds)
    peers = {
        key: value for key, value in metrics.items() if key.endswith(("_rollout", "_mujoco_rays")) and "_vs_" not in key
    }
    metrics = {key: value for key, value in metrics.items() if key not in peers}
    cheetah = Task("half_cheetah", lanes)
    pairs: dict[str, list[tuple[float, float]]] = {"envpool": [], "gymnasium_async": []}
    measured = {"envpool": measure_envpool(lanes), "gymnasium_async": measure_gymnasium()}
    for _ in range(rounds):
        for name, peer in measured.items():
            pairs[name].append((cheetah.steps * lanes / cpu(cheetah.ours), peer()))
    for name, values in pairs.items():
        metrics[f"half_cheetah_vs_{name}"] = statistics.median(ours / theirs for ours, theirs in values)
        peers[f"half_cheetah_{name}"] = statistics.median(theirs for _, theirs in values)
    report(
        name="sim_throughput",
        seeds=[SEED],
        budget={"lanes": lanes, "threads": 1, "rounds": rounds, "steps_per_round": STEPS},
        metrics=metrics,
        peers=peers,
        targets={
            "push_t_vs_rollout": [">=", 0.9],
            "half_cheetah_vs_rollout": [">=", 0.9],
            "navigate_vs_rollout": [">=", 0.9],
            "half_cheetah_vs_envpool": [">=", 1.0],
            "half_cheetah_vs_gymnasium_async": [">=", 4.0],
        },
        notes="Rates are control steps of one lane per second of processor time. navigate_vs_rollout compares a step "
        "with 36 lidar rays to physics without any; navigate_lidar_vs_mujoco_rays compares the scans alone.",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lanes", type=int, default=128, help="lanes per environment")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of alternating measurements")
    arguments = parser.parse_args()
    main(arguments.lanes, arguments.rounds)
