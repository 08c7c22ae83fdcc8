"""The door benchmark's demonstrations: faster, smoother, and at the rate of commands."""

import numpy as np
import pytest

from benchmarks.adroit_door import DOOR_ANGLE, HOLD, OPEN, STEPS, Replay, commanded, retimed, smoothed


def test_retimed_actions_come_sooner_and_then_hold():
    ramp = np.linspace(-1.5, 1.5, 301)[:, None]
    actions = retimed(ramp, 2.0)
    assert actions.shape == (STEPS, 1)
    assert np.abs(actions).max() <= 1
    assert actions[60:90, 0] == pytest.approx(ramp[120:180:2, 0], abs=1e-9)
    assert (actions[155:] == actions[-1]).all()


def test_smoothing_keeps_lines_and_quiets_noise():
    line = np.linspace(0, 1, 50)[:, None]
    assert smoothed(line, 7)[3:-3] == pytest.approx(line[3:-3])
    noise = np.random.default_rng(0).standard_normal((2000, 1))
    assert smoothed(noise, 7).std() < 0.6 * noise.std()


@pytest.mark.parametrize("opened", [7, 151, 153, STEPS])
def test_every_phase_of_a_replay_ends_with_the_command_that_opens_the_door(opened):
    observation = np.zeros((STEPS + 1, 39))
    observation[:, 0] = np.arange(STEPS + 1)
    observation[opened:, DOOR_ANGLE] = OPEN
    replay = Replay(observation, np.arange(STEPS, dtype=float)[:, None], 0.0)
    episodes = commanded(replay)
    assert [state[0, 0] for state, _ in episodes] == list(range(HOLD))
    for state, action in episodes:
        assert (np.diff(state[:, 0]) == HOLD).all()
        assert state[-1, 0] < opened <= state[-1, 0] + HOLD
        assert (action[:-1, 0] == state[:-1, 0] + HOLD - 1).all(), "a command is its last step's target"
        assert action[-1, 0] == min(state[-1, 0] + HOLD, STEPS) - 1
