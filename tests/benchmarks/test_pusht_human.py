"""Push-T's mirror image: the physics itself must agree, to the last digits."""

import gymnasium
import numpy as np
import pytest

from benchmarks.pusht_human import mirrored
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames

pytest.importorskip("gym_pusht", reason="the extra 'gym' is not installed")
START = np.array([222.0, 97.0, 223.0, 382.0, 3.0])
"""Pusher, T and the T's angle."""
ACTIONS = np.stack([np.linspace(222, 250, 40), np.linspace(97, 420, 40)], axis=1).astype(np.float32)


def played(start, actions):
    """Return the frames and coverages of ``actions`` from ``start``, exactly: the reset itself would shift the T."""
    env = gymnasium.make("gym_pusht/PushT-v0", obs_type="environment_state_agent_pos").unwrapped
    env.reset(seed=0)
    env.agent.position, env.block.angle, env.block.position = tuple(start[:2]), start[4], tuple(start[2:4])
    steps = [env.step(action) for action in actions]
    observation = {key: np.stack([step[0][key] for step in steps]) for key in ("environment_state", "agent_pos")}
    spec = Spec({key: ArraySpec(value.shape[1:]) for key, value in observation.items()}, ArraySpec((2,)), 10.0)
    env.close()
    return Frames(observation, actions, np.array([len(steps)]), spec), np.array([step[4]["coverage"] for step in steps])


def test_the_mirror_image_of_an_episode_is_what_the_simulator_makes_of_mirrored_actions():
    frames, coverage = played(START, ACTIONS)
    image = mirrored(frames)
    x, y, block_x, block_y, angle = START
    reflected = np.array([512 - y, 512 - x, 512 - block_y, 512 - block_x, np.pi / 2 - angle])
    expected, same_coverage = played(reflected, image.action)

    assert np.ptp(frames.observation["environment_state"], axis=0).max() > 10, "the pusher never met the T"
    for key, value in expected.observation.items():
        np.testing.assert_allclose(image.observation[key], value, atol=1e-6)
    np.testing.assert_allclose(same_coverage, coverage, atol=1e-6)


def test_a_mirror_image_of_a_mirror_image_is_the_original():
    frames, _ = played(START, ACTIONS)
    again = mirrored(mirrored(frames))
    for key, value in frames.observation.items():
        np.testing.assert_allclose(again.observation[key], value, atol=1e-6)
    np.testing.assert_allclose(again.action, frames.action, atol=1e-4)
