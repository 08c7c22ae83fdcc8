"""Videos of policies: several lanes side by side, success marked."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from robot_rl.core.env import VecEnv
from robot_rl.core.policy import Policy
from robot_rl.rollout.evaluate import TEST_SEED
from robot_rl.rollout.player import PolicyRunner

_GREEN, _RED = (60, 170, 90), (200, 70, 60)


def record_video(
    policy: Policy, env: VecEnv, path: str | Path, *, seed: int = TEST_SEED, every: int = 2, border: int = 4
) -> Path:
    """Roll out one episode in every lane of ``env`` and write a grid of them as H.264 video.

    A lane that has ended stays on its last frame, framed green for success and red for failure. Rendering costs far
    more than stepping, so use an environment of few lanes.

    Args:
        policy: what to film.
        env: its lanes become the tiles.
        path: the ``.mp4`` file to write.
        seed: seed of the first lane's episode.
        every: control steps per video frame.
        border: width of the frame in pixels.
    """
    from robot_rl.data.video import VideoWriter

    policy.seed(seed)
    runner = PolicyRunner(policy, env.num_envs)
    observation = env.reset(seed)
    tiles = [env.render(lane) for lane in range(env.num_envs)]
    ended = np.zeros(env.num_envs, bool)
    frames = [_grid(tiles)]
    for count in range(1, env.max_episode_steps + 1):
        step = env.step(runner.step(observation))
        for lane in np.flatnonzero(step.done & ~ended):
            tiles[lane] = _framed(tiles[lane], _GREEN if step.info["success"][lane] else _RED, border)
        ended |= step.done
        if step.done.any():
            runner.reset(step.done)
        observation = step.observation
        if count % every == 0 or ended.all():
            for lane in np.flatnonzero(~ended):
                tiles[lane] = env.render(lane)
            frames.append(_grid(tiles))
        if ended.all():
            break
    rate = max(1, round((env.spec.rate_hz or 20) / every))
    with VideoWriter(Path(path), rate, *frames[0].shape[:2], keyframe_interval=30) as video:
        for frame in frames + [frames[-1]] * rate:
            video.add(frame)
    return Path(path)


def _framed(tile: np.ndarray, colour: tuple[int, int, int], width: int) -> np.ndarray:
    framed = tile.copy()
    framed[:width] = framed[-width:] = colour
    framed[:, :width] = framed[:, -width:] = colour
    return framed


def _grid(tiles: list[np.ndarray]) -> np.ndarray:
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    blank = [np.zeros_like(tiles[0])] * (rows * columns - len(tiles))
    lines = [np.concatenate((tiles + blank)[r * columns : (r + 1) * columns], axis=1) for r in range(rows)]
    grid = np.concatenate(lines)
    return grid[: grid.shape[0] // 2 * 2, : grid.shape[1] // 2 * 2]
