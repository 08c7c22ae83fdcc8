"""Films: the replay of a trace is the run itself."""

import time

import numpy as np
import pytest

from hardware.deployment.film import film
from hardware.robots.sim import SimRobot
from robot_rl.core.errors import DataError


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Let a robot run for half a second in real time, and return its trace, its last state and its episodes."""
    path = tmp_path_factory.mktemp("film") / "trace.npz"
    robot = SimRobot("push_t", seed=3, tick_rate_hz=50, trace=path)
    robot.connect()
    low, high = (np.nan_to_num(bound, posinf=1.0, neginf=-1.0) for bound in robot.spec.action.bounds())
    rng = np.random.default_rng(0)
    for _ in range(25):
        robot.command(rng.uniform(low, high))
        time.sleep(0.02)
    robot._finished.set()
    robot._thread.join()
    state = robot.env.batch.bind("qpos").copy()
    robot.disconnect()
    return path, state


def test_a_replayed_trace_ends_in_the_same_state_to_the_bit(trace):
    path, state = trace
    robot, stamps, commands = SimRobot.from_trace(path)
    assert len(stamps) == len(commands) >= 10
    assert (np.diff(stamps) > 0).all()
    robot.connect()
    for _ in robot.replay(commands):
        pass
    np.testing.assert_array_equal(robot.env.batch.bind("qpos"), state)
    robot.disconnect()


def test_a_trace_becomes_a_video_of_its_length(trace, tmp_path):
    av = pytest.importorskip("av")
    path, _ = trace
    stamps = np.load(path)["stamps"]
    film(path, tmp_path / "film.mp4", frame_rate=12.5)
    with av.open(str(tmp_path / "film.mp4")) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == pytest.approx(len(stamps) * 12.5 / 50, abs=1)


def test_a_damaged_trace_is_one_line(tmp_path):
    (tmp_path / "trace.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match="cannot be read"):
        film(tmp_path / "trace.npz", tmp_path / "film.mp4")
