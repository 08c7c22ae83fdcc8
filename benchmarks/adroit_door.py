"""25 human demonstrations of opening a door with the Adroit hand → flow policy → reinforcement learning, sparse reward.

The demonstrations last 223 to 300 steps, the environment's episodes 200, and they start in another pose. So they are
first replayed from the environment's own start, 1.2 to 1.5 times as fast and smoothed; the replays that open the door
are what is cloned. The policy commands joint targets at 20 Hz, between which the hand moves on a line at the
environment's 100 Hz. Strict success: the door is open by at least 1.35 rad within the environment's 200 steps.

Interrupted runs continue: every stage is kept in ``runs/bench/adroit_door``; ``--fresh`` starts again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import report
from benchmarks.pusht_human import stage
from robot_rl.core.registry import load, make_env
from robot_rl.data.adroit import AdroitDataset
from robot_rl.data.frames import Frames
from robot_rl.data.windows import WindowSampler
from robot_rl.policies.checkpoint import load_policy
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
from robot_rl.rl.options import config_class, override
from robot_rl.rl.session import SessionConfig
from robot_rl.rollout.evaluate import TEST_SEED, evaluate, wilson
from robot_rl.train.progress import progress
from robot_rl.train.run import Run
from robot_rl.train.trainer import TrainConfig, train

TASK, STEPS, OPEN = "gym:AdroitHandDoor-v1", 200, 1.35
HOLD = 5
"""Environment steps per command."""
EPISODES = 200
SPEEDS = (1.2, 1.25, 1.3, 1.35, 1.4, 1.45, 1.5)
NOISES = (0.0, 0.03, 0.06)
"""Standard deviations of the smooth disturbance of a replay's actions, which are in [-1, 1]."""
DOOR_ANGLE = 28
"""Place of the door's angle in the observation."""
POLICY = ChunkedConfig(
    backbone="plain",
    obs_steps=1,
    horizon=4,
    execute_steps=4,
    sample_steps=5,
    width=256,
    depth=2,
    observation_noise=0.02,
    start_scale=0.0,
    head_options={"times": "uniform"},
)
"""Plans from the middle of the prior: the start noise of a clone of so little data costs more than it tells."""
TRAIN = TrainConfig(steps=4_000, batch_size=128, precision="auto")
SETTINGS: dict[str, tuple[str, ...]] = {
    "residual_offpolicy": (
        "n_steps=4",
        "critic_updates=3000",
        "core.start_steps=5000",
        "core.discount=0.98",
    ),
}
"""Settings of methods where they differ from the defaults; a control step is one of 20 Hz."""
DATA = Path(os.environ.get("ROBOT_RL_DATA", Path(__file__).resolve().parents[2] / "shared/data"))


@dataclass
class Replay:
    """What the environment made of a demonstration's actions: T steps at 100 Hz."""

    observation: np.ndarray
    """(T + 1, 39)."""
    action: np.ndarray
    """(T, 28), without the disturbance: joint targets correct themselves."""
    noise: float
    """Standard deviation of the disturbance."""

    @property
    def opened(self) -> int | None:
        """The first frame with an open door."""
        return int(np.argmax(self._open)) if self._open.any() else None

    @property
    def _open(self) -> np.ndarray:
        return self.observation[:, DOOR_ANGLE] >= OPEN


def retimed(actions: np.ndarray, speed: float, width: int = 7) -> np.ndarray:
    """Return ``actions`` (T, A) ``speed`` times as fast, smoothed, and cut or continued to the environment's limit."""
    place = np.minimum(np.arange(STEPS) * speed, len(actions) - 1)
    faster = np.stack([np.interp(place, np.arange(len(actions)), column) for column in actions.T], axis=1)
    return smoothed(np.clip(faster, -1, 1), width)


def smoothed(series: np.ndarray, width: int) -> np.ndarray:
    """Return moving averages (T, A) with a Hann window of ``width`` (odd) steps; beyond the ends, the ends hold."""
    window = np.hanning(width + 2)[1:-1] / np.hanning(width + 2).sum()
    padded = np.pad(series, ((width // 2, width // 2), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, window, "valid") for column in padded.T], axis=1)


def replay_all(dataset: AdroitDataset) -> list[Replay]:
    """Replay every demonstration at all speeds with all disturbances, from the environment's own start."""
    from sim.gym_spaces import make_gymnasium

    env = make_gymnasium(TASK.removeprefix("gym:"), {})
    rng, made = np.random.default_rng(0), []
    frames, joints = dataset.load(), env.unwrapped.init_qpos
    with progress("replay", dataset.num_episodes * len(SPEEDS) * len(NOISES), unit="replay") as bar:
        for episode in range(dataset.num_episodes):
            door = np.asarray(dataset.initial_state(episode)["door_body_pos"], np.float64)
            start = {"qpos": joints.copy(), "qvel": np.zeros_like(joints), "door_body_pos": door}
            for speed in SPEEDS:
                actions = retimed(frames.action[frames.episode(episode)], speed)
                for noise in NOISES:
                    disturbance = smoothed(rng.standard_normal(actions.shape), 31)
                    disturbance *= noise / disturbance.std()
                    first, _ = env.reset(seed=0, options={"initial_state_dict": start})
                    played = np.clip(actions + disturbance, -1, 1).astype(np.float32)
                    observations = [first, *(env.step(action)[0] for action in played)]
                    made.append(Replay(np.stack(observations), actions, noise))
                    bar.advance(1, opened=np.mean([replay.opened is not None for replay in made]))
    env.close()
    return made


def commanded(replay: Replay) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return a successful replay as episodes at the rate of commands: observations and actions, once per phase.

    Each ends with the command under which the door opens. A command is the target that its last step reaches.
    """
    assert replay.opened is not None
    episodes = []
    for phase in range(HOLD):
        count = -(-(replay.opened - phase) // HOLD)
        frames = phase + HOLD * np.arange(count)
        episodes.append((replay.observation[frames], replay.action[np.minimum(frames + HOLD - 1, STEPS - 1)]))
    return episodes


def prepare(path: Path) -> dict[str, Any]:
    """Replay the demonstrations and keep the successful ones in ``path``; returns how many opened the door."""
    dataset = AdroitDataset(DATA / "adroit_door_human" / "door-v0_demos.pickle")
    replays = replay_all(dataset)
    episodes = [episode for replay in replays if replay.opened is not None for episode in commanded(replay)]
    observations, actions = zip(*episodes, strict=True)
    np.savez_compressed(
        path,
        state=np.concatenate(observations).astype(np.float32),
        action=np.concatenate(actions).astype(np.float32),
        ends=np.cumsum([len(part) for part in actions]),
    )
    recorded = dataset.load()
    angles = recorded.observation["state"][:, DOOR_ANGLE]
    return {
        "replays": len(replays),
        "opened": sum(replay.opened is not None for replay in replays),
        "undisturbed": float(np.mean([replay.opened is not None for replay in replays if replay.noise == 0])),
        "recorded": float(np.mean([angles[recorded.episode(i)].max() >= OPEN for i in range(recorded.num_episodes)])),
    }


def demonstrations(path: Path) -> Frames:
    """Load the successful replays."""
    env = environment(1)
    env.close()
    with np.load(path) as kept:
        return Frames({"state": kept["state"]}, kept["action"], kept["ends"], env.spec)


def environment(num_envs: int, workers: int = 0) -> Any:
    """Make lanes that take 20 commands a second; the reward is 1 when the door is open, which ends the episode."""
    return make_env(TASK, num_envs=num_envs, reward="sparse", hold=HOLD, workers=workers)


def clone(path: Path, replays: Path, seed: int) -> dict[str, Any]:
    """Train the flow policy."""
    frames = demonstrations(replays)
    torch.manual_seed(seed)
    policy = ChunkedPolicy.fit(frames, POLICY)
    with Run.create(path, {"policy": POLICY, "train": TRAIN}, spec=frames.spec, seed=seed, resume=True) as run:
        train(policy, WindowSampler(frames, POLICY.obs_steps, POLICY.horizon), TRAIN, run, seed)
    return {"parameters": sum(p.numel() for p in policy.parameters()), "frames": frames.num_frames}


def improve(
    path: Path, base: Path, replays: Path, seed: int, method: str, minutes: float, workers: int
) -> dict[str, Any]:
    """Fine-tune the base in the environment, with the replays as demonstrations; returns the steps it took."""
    finetune = load("finetuners", method)
    config = override(config_class(finetune)(), SETTINGS.get(method, ()))
    session = SessionConfig(minutes=minutes, evaluations=6, eval_episodes=200, eval_lanes=50, stop_at=1.0)
    record = {"method": method, "config": config, "session": session}
    with Run.create(path, record, seed=seed, resume=True, ignore=("session.minutes",)) as run:
        finetune(
            load_policy(base),
            lambda num_envs: environment(num_envs, workers),
            config,
            run,
            session=session,
            demonstrations=demonstrations(replays),
        )
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {"commands": lines[-1]["step"], "settings": SETTINGS.get(method, ())}


def score(checkpoint: Path, seed: int, workers: int) -> dict[str, Any]:
    """Evaluate a checkpoint on the test seeds that belong to the training seed."""
    env = environment(50, workers)
    try:
        with progress(f"evaluate {checkpoint.parents[1].name}", EPISODES, unit="episode") as bar:
            result = evaluate(load_policy(checkpoint), env, EPISODES, TEST_SEED + seed * EPISODES, bar)
    finally:
        env.close()
    return {"success": result.success_rate, "successes": int(result.success.sum())}


def run_seed(out: Path, replays: Path, seed: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Take one seed through all stages; returns their results by name."""
    best, method = Path("checkpoints/best"), options.method
    base, tuned = out / f"clone_{seed}", out / f"{method}_{seed}"
    return {
        "clone": stage(out, f"clone_{seed}", lambda: clone(base, replays, seed)),
        "before": stage(out, f"before_{seed}", lambda: score(base / best, seed, options.workers)),
        "finetune": stage(
            out,
            f"{method}_{seed}",
            lambda: improve(tuned, base / best, replays, seed, method, options.minutes, options.workers),
        ),
        "after": stage(out, f"after_{method}_{seed}", lambda: score(tuned / best, seed, options.workers)),
    }


def main() -> None:
    """Run what is missing and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/adroit_door"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--method", default="residual_offpolicy", help="fine-tuning method")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall-clock budget of fine-tuning a seed")
    parser.add_argument("--workers", type=int, default=2, help="processes that step the environment")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--trial", action="store_true", help="print the stages, but record no result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fresh:
        shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    replays = options.out / "replays.npz"
    prepared = stage(options.out, "replays", lambda: prepare(replays))
    seeds = {seed: run_seed(options.out, replays, seed, options) for seed in options.seeds}
    if options.trial:
        print(json.dumps({"replays": prepared, **{str(seed): stages for seed, stages in seeds.items()}}, indent=2))
        return
    tested = EPISODES * len(seeds)
    successes = {name: sum(stages[name]["successes"] for stages in seeds.values()) for name in ("before", "after")}
    low, high = wilson(successes["after"], tested)
    minutes = {
        clock: {s: prepared[clock] + stages["clone"][clock] + stages["finetune"][clock] for s, stages in seeds.items()}
        for clock in ("wall_minutes", "core_minutes")
    }
    steps = [HOLD * stages["finetune"]["commands"] for stages in seeds.values()]
    report(
        "adroit_door",
        seeds={"training": options.seeds, "test": {seed: TEST_SEED + seed * EPISODES for seed in options.seeds}},
        budget={
            "method": options.method,
            "settings": SETTINGS.get(options.method, ()),
            "clone_steps": TRAIN.steps,
            "finetune_minutes": options.minutes,
            "minutes": minutes["wall_minutes"],
            "core_minutes": minutes["core_minutes"],
            "environment_steps": {"replays": STEPS * prepared["replays"], "finetune": steps},
        },
        metrics={
            "success": successes["after"] / tested,
            "success_low": low,
            "success_high": high,
            **{f"success_{seed}": stages["after"]["success"] for seed, stages in seeds.items()},
            "clone": successes["before"] / tested,
            **{f"clone_{seed}": stages["before"]["success"] for seed, stages in seeds.items()},
            "replays_opened": prepared["undisturbed"],
            "minutes_per_seed": max(minutes["wall_minutes"].values()),
        },
        peers={"demonstrations, door open in the recording": prepared["recorded"]},
        targets={"success": (">=", 0.80), "minutes_per_seed": ("<=", 45.0)},
        notes="Strict success: the door is open by 1.35 rad within 200 steps of gym:AdroitHandDoor-v1, which the "
        "policy commands at 20 Hz. Minutes of a seed: replays (shared by the seeds), cloning and fine-tuning with its "
        "validations. Undisturbed replays are open loop at 1.2 to 1.5 times the recorded speed.",
    )


if __name__ == "__main__":
    main()
