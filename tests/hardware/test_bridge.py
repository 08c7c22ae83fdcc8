"""A simulated lane as a robot, and a robot as an environment."""

import time

import numpy as np
import pytest
from deployment_rig import VirtualClock
from test_parity import STEPS, PointEnv

from hardware.robots.fake import FakeRobot, FaultyRobot
from hardware.robots.sim import SimRobot
from robot_rl.core.bridge import EnvRobot, RobotEnv, RobotTask
from robot_rl.core.errors import HardwareError, UnknownNameError
from robot_rl.core.robot import Robot, RobotState, StopKind


def lock_step(**options):
    robot = EnvRobot(PointEnv(), lock_step=True, seed=3, clock=VirtualClock(), **options)
    robot.connect()
    return robot


@pytest.mark.parametrize("robot", [FakeRobot(), FaultyRobot(FakeRobot()), EnvRobot(PointEnv())])
def test_robots_keep_the_contract(robot):
    assert isinstance(robot, Robot)
    assert robot.limits.low.shape == robot.spec.action.shape
    with pytest.raises(HardwareError, match="not connected"):
        robot.observe()


def test_the_simulated_robot_holds_until_commanded_and_keeps_the_last_command():
    robot = lock_step()
    start = robot.hold_command()
    robot.advance(10)
    np.testing.assert_allclose(robot.hold_command(), start)
    robot.observe()
    robot.command(start + 0.1)
    robot.advance(30)
    np.testing.assert_allclose(robot.hold_command(), start + 0.1, atol=1e-2)
    assert robot.stop(StopKind.HOLD)
    assert robot.observe().seq == 40


def test_lock_step_equals_stepping_the_environment():
    env, robot = PointEnv(), lock_step()
    env.reset(3)
    for k in range(STEPS - 1):
        action = 0.3 * np.sin(0.2 * k + np.arange(3))
        expected = env.step(action[None]).observation["state"][0]
        robot.observe()
        robot.command(action)
        robot.advance(5)
        np.testing.assert_array_equal(robot.observe().values["state"], expected)


def test_a_command_from_before_a_new_scene_is_not_obeyed():
    robot = lock_step()
    robot.observe()
    robot.advance(10 * STEPS)  # nobody has moved it yet, so that the time limit does not run
    assert not robot.outcomes
    robot.command(robot.hold_command() + 0.01)
    robot.advance(5 * STEPS)  # the episode ends and the scene is set up anew
    start = robot._latest[1].copy()
    robot.command(np.ones(3))
    robot.advance(5)
    np.testing.assert_allclose(robot._latest[1], start)
    assert robot.outcomes == [False]
    robot.observe()
    assert robot.epoch == 1
    robot.command(np.ones(3))
    robot.advance(5)
    assert (robot.hold_command() > start).all()


def test_without_restart_the_episode_goes_on():
    robot = lock_step(restart=False)
    robot.observe()
    robot.command(np.full(3, 0.2))
    robot.advance(6 * STEPS)
    robot.observe()
    assert robot.epoch == 0
    np.testing.assert_allclose(robot.hold_command(), 0.2, atol=1e-3)


def test_a_simulation_that_fails_is_a_fault_and_does_not_confirm_a_stop():
    class Broken(PointEnv):
        def advance(self, substeps):
            raise RuntimeError("unstable")

    robot = EnvRobot(Broken())
    robot.connect()
    time.sleep(0.1)
    assert robot.state() is RobotState.FAULT
    assert not robot.stop()
    with pytest.raises(HardwareError, match="unstable"):
        robot.observe()
    robot.disconnect()


def test_the_simulated_robot_runs_in_real_time():
    robot = SimRobot("navigate")
    robot.connect()
    try:
        first = robot.observe()
        time.sleep(0.5)
        last = robot.observe()
        rate = (last.seq - first.seq) / (last.stamp - first.stamp)
        assert rate == pytest.approx(robot.tick_rate_hz, rel=0.15)
        assert last.age(time.monotonic()) < 0.2
    finally:
        robot.disconnect()
    assert robot.state() is RobotState.DISCONNECTED


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'navigate'"):
        SimRobot("navigat")


def test_a_robot_is_an_environment_of_one_lane():
    class Reach(RobotTask):
        max_episode_steps = 5

        def start(self, robot, episode):
            robot.command(np.zeros(3))

        def success(self, observation):
            return bool(observation["state"][0, 0] > 0.25)

    clock = VirtualClock()

    def sleep(seconds):
        clock.now += seconds

    robot = FakeRobot(clock=clock)
    robot.connect()
    env = RobotEnv(robot, Reach(), clock=clock, sleep=sleep)
    np.testing.assert_array_equal(env.reset(7)["state"], np.zeros((1, 3)))
    started = clock.now
    steps = [env.step(np.full((1, 3), 0.1 * (k + 1))) for k in range(3)]
    assert clock.now - started == pytest.approx(3 / 20)
    assert [bool(s.terminated[0]) for s in steps] == [False, False, True]
    assert [float(s.reward[0]) for s in steps] == [0.0, 0.0, 1.0]
    assert steps[-1].final_observation["state"][0, 0] == pytest.approx(0.3)
    assert steps[-1].observation["state"][0, 0] == 0.0
    assert (steps[-1].info["episode_seed"], steps[-1].info["success"]) == ([7], [True])
    for _ in range(4):
        step = env.step(np.zeros((1, 3)))
        assert not step.done[0]
    assert env.step(np.zeros((1, 3))).truncated[0]
    env.close()
    assert robot.state() is RobotState.DISCONNECTED
