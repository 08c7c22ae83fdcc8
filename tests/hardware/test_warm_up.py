"""AUTO is entered only by a plan that came in time: never before the policy is warm."""

import threading
import time

import numpy as np
import pytest
from deployment_rig import Rig, WanderingPolicy

from hardware.policy_process import PolicyServer, load_and_warm, serve
from hardware.robots.fake import FakeRobot
from hardware.transport import InProcessTransport
from robot_rl.core.errors import ConfigError, HardwareError
from robot_rl.core.realtime import RealTimeConfig
from robot_rl.core.robot import StampedObservation
from robot_rl.core.teleop import OperatorEvent


class ColdPolicy(WanderingPolicy):
    """Its first plan takes longer than the robot can play on; the others take no time."""

    rig, seconds = None, 1.0

    def plan(self, history):
        if self.planned == 0 and self.rig is not None:
            self.rig.tick(count=round(self.seconds / self.rig.executor.dt))
        return super().plan(history)


def beside(policy, **options):
    """A rig whose policy runs beside the executor, not within its tick."""
    rig = Rig(policy, **options)
    rig.transport.on_observation = None
    policy.rig = rig
    return rig


def test_enabling_a_policy_that_does_not_answer_yet_never_leads_to_auto():
    rig = beside(ColdPolicy(FakeRobot().spec))
    place = rig.executor.safety.command.copy()
    rig.tick(OperatorEvent.ENABLE)
    modes = {rig.mode for _ in range(300) if rig.tick() is not None}
    assert modes == {"hold"}
    assert rig.reason == "no_plan"
    assert (rig.executor.safety.command == place).all()


def test_the_plan_of_a_cold_policy_is_too_late_to_be_let_in():
    policy = ColdPolicy(FakeRobot().spec)
    rig = beside(policy)
    rig.tick(OperatorEvent.ENABLE)
    rig.server.serve_once()
    assert policy.planned == 1
    rig.tick()
    assert rig.mode == "hold"
    assert rig.executor.counters["chunks_late"] == 1
    rig.server.serve_once()  # the next one takes no time
    rig.tick()
    assert rig.mode == "auto"
    assert rig.executor.counters["chunks_late"] == 1


def test_nothing_is_answered_before_the_policy_is_warm():
    transport, stop, answered = InProcessTransport(quiet=True), threading.Event(), []
    policy = WanderingPolicy(FakeRobot().spec)
    plan = policy.plan
    policy.plan = lambda history: (time.sleep(0.05), answered.append(transport.executor.poll_chunk()), plan(history))[2]
    transport.executor.send_observation(StampedObservation({"state": np.zeros(3, np.float32)}, 0, 0.0))
    thread = threading.Thread(target=lambda: serve(policy, transport.policy, stop))
    thread.start()
    assert transport.executor.wait_chunk(5.0)
    stop.set()
    thread.join(2.0)
    assert answered == [None] * 4  # three to warm up, then the one that is answered
    assert policy.planned == 4


class Continuing(WanderingPolicy):
    """Notes the ways in which it was asked to plan."""

    real_time = ("guided_full", "guided_identity", "prefix")
    prefix_steps = 4

    def __init__(self, spec):
        super().__init__(spec)
        self.ways = []

    def plan(self, history, commitment=None):
        chunk = super().plan(history)
        if commitment is None:
            self.ways.append("off")
        else:
            assert commitment.actions.shape == chunk.shape
            assert commitment.actions.dtype == np.float32
            assert commitment.remaining.tolist() == [self.horizon - self.execute_steps]
            assert commitment.known.sum() == commitment.delay == commitment.how.max_delay
            self.ways.append(commitment.how.way)
        return chunk


@pytest.mark.parametrize("way", ["off", "guided_full", "guided_identity", "prefix"])
def test_every_way_in_which_chunks_will_be_planned_is_warm_before_the_first_answer(way):
    transport, stop = InProcessTransport(quiet=True), threading.Event()
    policy = Continuing(FakeRobot().spec)
    transport.executor.send_observation(StampedObservation({"state": np.zeros(3, np.float32)}, 0, 0.0))
    receive, warm = transport.policy.receive_observation, []

    def received(timeout):
        warm.append(set(policy.ways))
        return receive(timeout)

    transport.policy.receive_observation = received
    real_time = RealTimeConfig.of(way, max_delay=3, max_weight=5.0)
    thread = threading.Thread(target=lambda: serve(policy, transport.policy, stop, real_time=real_time))
    thread.start()
    assert transport.executor.wait_chunk(5.0)
    stop.set()
    thread.join(2.0)
    assert warm[0] == {"off", way}


@pytest.mark.parametrize("way", ["guided_full", "prefix"])
def test_a_checkpoint_is_warmed_up_in_the_way_it_will_plan_and_plans_the_same_afterwards(way, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from robot_rl.policies.checkpoint import save_policy
    from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy

    torch.manual_seed(0)
    config = ChunkedConfig(horizon=8, execute_steps=4, width=32, depth=1, sample_steps=2, prefix_steps=4)
    save_policy(ChunkedPolicy(FakeRobot().spec, config).eval(), tmp_path)
    ways, plan = [], ChunkedPolicy.plan

    def noted(self, history, noise=None, commitment=None):
        ways.append("off" if commitment is None else commitment.how.way)
        return plan(self, history, noise, commitment)

    monkeypatch.setattr(ChunkedPolicy, "plan", noted)
    history = {"state": np.zeros((1, config.obs_steps, 3), np.float32)}
    real_time = RealTimeConfig.of(way, max_delay=3, max_weight=5.0)
    policy = load_and_warm(tmp_path, seed=3, real_time=real_time)
    assert ways.count(way) == ways.count("off") == 3
    cold = load_and_warm(tmp_path, seed=3)
    assert ways.count("off") == 6
    np.testing.assert_array_equal(policy.plan(history), cold.plan(history))
    with pytest.raises(ConfigError, match=r"max_delay in 1\.\.4"):
        load_and_warm(tmp_path, real_time=RealTimeConfig.of(way, max_delay=5, max_weight=5.0))


def test_a_policy_on_another_computer_that_is_gone_is_survived():
    class Gone(WanderingPolicy):
        there = True

        def plan(self, history):
            if not self.there:
                raise HardwareError("the policy server is gone")
            return super().plan(history)

    policy = Gone(FakeRobot().spec)
    rig = beside(policy)
    rig.server = PolicyServer(policy, rig.transport.policy)

    def run(count):
        for _ in range(count):
            rig.tick()
            rig.server.serve_in_spite(0.0)

    rig.tick(OperatorEvent.ENABLE)
    run(30)
    assert rig.mode == "auto"
    policy.there = False
    run(60)
    assert (rig.mode, rig.reason) == ("hold", "policy_starved")
    assert rig.server.report.failures > 0
    policy.there = True
    rig.tick(OperatorEvent.HAND_BACK)
    run(10)
    assert rig.mode == "auto"


@pytest.fixture
def served(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("msgpack")
    pytest.importorskip("websockets")
    from robot_rl.core.registry import make_env
    from robot_rl.data.normalizer import Normalizer
    from robot_rl.policies.checkpoint import save_policy
    from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
    from robot_rl.serving.server import PolicyWebServer, ServerConfig

    torch.manual_seed(0)
    env = make_env("navigate", 1, threads=1)
    policy = ChunkedPolicy(env.spec, ChunkedConfig(width=32, depth=1, sample_steps=2), Normalizer(env.spec))
    env.close()
    save_policy(policy.eval(), tmp_path / "best")
    with PolicyWebServer(tmp_path, ServerConfig(port=0, token_file=tmp_path / "token")) as server:
        yield f"{server.address}/best?token_file={tmp_path / 'token'}&timeout=10"


def test_a_served_policy_is_deployed_with_real_time_chunking(served, tmp_path):
    from hardware.control.executor import ExecutorConfig
    from hardware.deployment.config import DeploymentConfig
    from hardware.deployment.run import deploy

    report = deploy(
        DeploymentConfig(
            policy=served,
            task="navigate",
            transport="inprocess",
            duration=2.5,
            operator="none",
            out=tmp_path / "out",
            real_time=RealTimeConfig("guided", "identity", max_delay=4),
            executor=ExecutorConfig(realtime_priority=0, max_state_age=2.0),
        )
    )
    assert report.chunks["chunks_accepted"] > 2
    assert report.policy["largest_delay"] >= 1  # chunks did go on from each other
    assert report.policy["failures"] == 0
    assert report.final_stop_confirmed
