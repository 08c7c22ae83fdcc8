"""Films of several lanes: the grid, its size, its rate, and the frames that say how each lane ended."""

import numpy as np
import pytest

from robot_rl.core.env import Step
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.video import VideoReader
from robot_rl.rollout.video import record_video

GREEN, RED, WHITE, BLACK = (60, 170, 90), (200, 70, 60), (255, 255, 255), (0, 0, 0)
HEIGHT, WIDTH, BORDER = 41, 61, 4


class Lamps:
    """Lane i is a plain colour that brightens with time; it ends at step ``ENDS[i]``, and the next episode is white."""

    ENDS, SUCCEEDS = np.array([2, 5, 6]), np.array([True, False, True])
    spec = Spec({"state": ArraySpec((1,))}, ArraySpec((1,)), 10.0)
    max_episode_steps = 6

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def reset(self, seed=0):
        self.time, self.over = 0, np.zeros(self.num_envs, bool)
        return {"state": np.zeros((self.num_envs, 1), np.float32)}

    def step(self, actions):
        self.time += 1
        done = self.time == self.ENDS[: self.num_envs]
        success = done & self.SUCCEEDS[: self.num_envs]
        self.over |= done
        observation = {"state": np.zeros((self.num_envs, 1), np.float32)}
        reward = np.zeros(self.num_envs, np.float32)
        return Step(observation, reward, success, done & ~success, observation, {"success": success})

    def render(self, lane):
        colour = WHITE if self.over[lane] else self.colour(lane, self.time)
        return np.full((HEIGHT, WIDTH, 3), colour, np.uint8)

    @staticmethod
    def colour(lane, time):
        return (40 + 15 * time, 40 + 15 * time, 80 + 40 * lane)


class Still:
    spec, obs_steps, horizon, execute_steps, closed_loop = Lamps.spec, 1, 4, 2, False

    def seed(self, seed):
        pass

    def plan(self, history):
        return np.zeros((len(history["state"]), 4, 1), np.float32)

    def refine(self, history, actions):
        return actions


def film(path, lanes, **options):
    reader = VideoReader(record_video(Still(), Lamps(lanes), path / "film.mp4", border=BORDER, **options))
    frames = reader.frames(0, reader.num_frames).astype(int)
    fps = reader.fps
    reader.close()
    return frames, fps


def looks(image, colour):
    """Whether ``image`` is ``colour`` all over, but for what the video codec changes at its edges."""
    return np.abs(image.reshape(-1, 3).mean(axis=0) - colour).max() < 16


def border_of(tile):
    ring = np.ones(tile.shape[:2], bool)
    ring[BORDER - 1 : 1 - BORDER, BORDER - 1 : 1 - BORDER] = False
    return tile[ring]


def inside_of(tile):
    return tile[BORDER + 2 : -BORDER - 2, BORDER + 2 : -BORDER - 2]


def test_lanes_side_by_side_are_framed_as_they_end(tmp_path):
    frames, fps = film(tmp_path, 3)
    # Two columns of two rows, every second of six steps and the start, and a second of the end.
    assert frames.shape == (1 + 3 + 5, 2 * HEIGHT, 2 * WIDTH, 3)
    assert fps == pytest.approx(5.0)
    # Per frame and lane: the time that is shown, and the colour of the frame once there is one.
    expected = [
        [(0, None), (0, None), (0, None)],
        [(0, GREEN), (2, None), (2, None)],
        [(0, GREEN), (4, None), (4, None)],
        *[[(0, GREEN), (4, RED), (4, GREEN)]] * 6,
    ]
    for frame, lanes in zip(frames, expected, strict=True):
        tiles = [frame[r : r + HEIGHT, c : c + WIDTH] for r in (0, HEIGHT) for c in (0, WIDTH)]
        for lane, (tile, (time, ended)) in enumerate(zip(tiles, lanes, strict=False)):
            assert looks(inside_of(tile), Lamps.colour(lane, time))
            assert looks(border_of(tile), Lamps.colour(lane, time) if ended is None else ended)
        assert looks(inside_of(tiles[3]), BLACK)
        assert looks(border_of(tiles[3]), BLACK)


def test_a_single_lane_fills_a_picture_of_even_size(tmp_path):
    frames, fps = film(tmp_path, 1, every=1)
    assert frames.shape == (1 + 2 + 10, HEIGHT - 1, WIDTH - 1, 3)
    assert fps == pytest.approx(10.0)
    assert looks(frames[1], Lamps.colour(0, 1))
    assert looks(frames[-1][:BORDER], GREEN)
    assert looks(inside_of(frames[-1]), Lamps.colour(0, 1)), "its last picture, not the next episode's"
