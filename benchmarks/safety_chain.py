"""What one pass of the safety chain costs, with 7 joints: limits alone, and with each of the other stages.

The commands are smooth motions with a jump every other second, which the limits have to shape. ``near``: the arm is
sent into a post again and again, so that distances, the braking path and the quadratic program are at work. ``jerk``,
``forces``, ``singularity`` and ``speed`` add one stage each to the limits. Peer: the same pass with cold caches, after
10 ms of sleep, as in a control loop that shares its processor.

Run: ``make bench NAME=safety_chain`` or ``python benchmarks/safety_chain.py [--passes 20000]``.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import replace
from pathlib import Path

import mujoco
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import report
from hardware.safety.chain import SafetyChain, Situation
from hardware.safety.clearance import Clearance
from hardware.safety.forces import ForceLimit, ForceMonitor
from hardware.safety.model import RobotModel
from hardware.safety.singularity import Singularity
from hardware.safety.speed import MANUAL_REDUCED, PointSpeed
from hardware.safety.surroundings import Guards
from robot_rl.core.robot import Limits, StampedObservation
from robot_rl.core.spec import ArraySpec, Spec

JOINTS, DT, SLEEP = 7, 0.01, 0.01
TARGETS = {
    "limits_p50_us": ["<=", 30.0],
    "limits_p99_us": ["<=", 80.0],
    "near_p50_us": ["<=", 80.0],
    "near_p99_us": ["<=", 200.0],
    "all_without_distances_p50_us": ["<=", 30.0],
    "all_without_distances_p99_us": ["<=", 80.0],
}
LIMITS = Limits(
    *(s * np.array([2.8, 1.7, 2.8, 2.8, 2.8, 2.8, 2.8]) for s in (-1, 1)), np.full(7, 2.0), np.full(7, 15.0)
)


def arm() -> mujoco.MjModel:
    """Return a 7-joint arm of capsules with three obstacles beside it."""
    lengths, inner = (0.2, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1), ""
    for k in reversed(range(JOINTS)):
        below = lengths[k - 1] if k else 0.1
        axis = "0 0 1" if k % 2 == 0 else "0 1 0"
        inner = (
            f'<body name="b{k}" pos="0 0 {below}"><joint name="j{k}" axis="{axis}"/>'
            f'<geom type="capsule" size="0.04" fromto="0 0 0.05 0 0 {lengths[k]}"/>{inner}</body>'
        )
    posts = '<geom name="post" type="capsule" size="0.05" fromto="0.5 0 0 0.5 0 1.2"/>'
    posts += (
        '<geom type="box" size="0.4 0.4 0.02" pos="0 0.9 0.3"/><geom type="sphere" size="0.1" pos="-0.5 -0.5 0.9"/>'
    )
    return mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{posts}{inner}</worldbody></mujoco>")


def costs(chain: SafetyChain, targets: np.ndarray, sleep: float = 0.0) -> np.ndarray:
    """Return the duration of each pass over ``targets`` (T, A) in seconds."""
    situation = Situation(0.0, StampedObservation({"state": np.zeros(JOINTS, np.float32)}, 0, 0.0), "policy")
    found = np.zeros(len(targets))
    for k, target in enumerate(targets):
        if sleep:
            time.sleep(sleep)
        situation.measured = chain.command
        start = time.perf_counter()
        chain.filter(target, situation)
        found[k] = time.perf_counter() - start
    return found


def figures(values: np.ndarray, name: str) -> dict[str, float]:
    """Return p50 and p99 in microseconds."""
    p50, p99 = 1e6 * np.percentile(values, [50, 99])
    return {f"{name}_p50_us": p50, f"{name}_p99_us": p99}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passes", type=int, default=20_000)
    passes = parser.parse_args().passes
    rng, model = np.random.default_rng(0), arm()
    names = [f"j{k}" for k in range(JOINTS)]
    time_now = np.arange(passes)[:, None] * DT
    walk = 0.3 * np.sin(time_now * rng.uniform(0.5, 1.5, JOINTS)) + np.where(time_now % 2.0 < 1.0, 0.0, 0.2)
    walk[:, 0] += 2.3
    bent = walk + np.array([0.0, 0.6, 0.0, 1.2, 0.0, 0.8, 0.0])  # not stretched, where it would be singular
    # Every second the wish changes between two places with the post between them.
    side = np.where(np.arange(passes) // 100 % 2, 0.9, -0.9)
    through = np.column_stack([side, np.full(passes, 0.9), *np.zeros((1, passes)), np.full(passes, 0.5)])
    through = np.hstack([through, np.zeros((passes, JOINTS - through.shape[1]))])
    through[:, 2] = 0.3 * np.sin(np.arange(passes) * DT)
    gc.freeze()

    robot = RobotModel(model, names, f"b{JOINTS - 1}", ("b3", "b5"))
    readings = Spec({"state": ArraySpec((JOINTS,))}, ArraySpec((JOINTS,)))

    def chain(start: np.ndarray, *parts: str) -> SafetyChain:
        """Return a chain with the named stages, at ``start`` and warm."""
        clearance = Clearance(model, names) if "distances" in parts else None
        if clearance is not None:
            clearance.solver &= "solver" in parts
        guards = Guards(
            speed=PointSpeed(MANUAL_REDUCED, DT, robot.positions) if "speed" in parts else None,
            singularity=Singularity(robot) if "singularity" in parts else None,
            clearance=clearance,
        )
        limits = replace(LIMITS, jerk=np.full(JOINTS, 600.0)) if "jerk" in parts else LIMITS
        forces = ForceMonitor([ForceLimit("state", 50.0, norm=True)], readings, DT) if "forces" in parts else None
        found = SafetyChain(limits, DT, guards=guards, forces=forces)
        found.anchor(start)
        costs(found, np.repeat(start[None], 50, axis=0))
        return found

    metrics: dict[str, float] = {}
    runs = {
        "limits": (chain(walk[0]), walk),
        "jerk": (chain(walk[0], "jerk"), walk),
        "forces": (chain(walk[0], "forces"), walk),
        "singularity": (chain(bent[0], "singularity"), bent),
        "speed": (chain(bent[0], "speed"), bent),
        "all_without_distances": (chain(bent[0], "jerk", "forces", "singularity"), bent),
        "open": (chain(walk[0], "distances", "solver"), walk),
        "near": (chain(through[0], "distances", "solver"), through),
        "near_without_solver": (chain(through[0], "distances"), through),
    }
    for name, (one, targets) in runs.items():
        metrics |= figures(costs(one, targets), name)
    # Afterwards: what has slept may be slower for a while.
    peers: dict[str, float] = {}
    slept = min(300, passes // 10)
    for name, (one, targets) in runs.items():
        peers |= figures(costs(one, targets[:slept], SLEEP), name)
        metrics[f"{name}_limited_share"] = max(one.counts.values(), default=0) / (passes + slept)
    clearance = runs["near"][0].guards.clearance
    assert clearance is not None
    report(
        "safety_chain",
        seeds=[0],
        budget={
            "passes": passes,
            "joints": JOINTS,
            "pairs": len(clearance.pairs),
            "quadratic_program": clearance.solver,
        },
        metrics=metrics,
        peers={"cold": peers},
        targets=TARGETS,
        notes="limits: stages 1-6 and 11. jerk, forces, singularity, speed: each of these added alone; "
        "all_without_distances: the first three together. open: limits and distances, nothing near. near: the arm is "
        "sent into a post again and again; the quadratic program proposes motions beside it. cold: after 10 ms of "
        "sleep before each pass.",
    )


if __name__ == "__main__":
    main()
