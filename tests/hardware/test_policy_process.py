"""The policy's side: it steps as evaluation does, keeps pace with lost observations, and starts anew when asked."""

import threading

import numpy as np
import pytest
from deployment_rig import WanderingPolicy

from hardware.policy_process import PolicyServer, serve, trace_network, warm_up
from hardware.robots.fake import FakeRobot
from hardware.transport import ExecutorLink, InProcessTransport, PolicyLink
from robot_rl.core.robot import StampedObservation
from robot_rl.rollout.player import PolicyRunner


def observation(seq, value=0.0):
    return StampedObservation({"state": np.full(3, value, np.float32)}, seq, 0.05 * seq)


def server(**options):
    policy = WanderingPolicy(FakeRobot().spec, **options)
    transport = InProcessTransport(quiet=True)
    return PolicyServer(policy, transport.policy), transport


def answer(serving, transport, *observations):
    for one in observations:
        transport.executor.send_observation(one)
    serving.serve_once()
    chunks = []
    while (chunk := transport.executor.poll_chunk()) is not None:
        chunks.append(chunk)
    return chunks


def test_links_keep_the_contract():
    transport = InProcessTransport(quiet=True)
    assert isinstance(transport.executor, ExecutorLink)
    assert isinstance(transport.policy, PolicyLink)
    assert transport.policy.receive_observation(0.0) is None
    for seq in range(12):
        transport.executor.send_observation(observation(seq))
    assert transport.dropped == 4
    assert transport.policy.receive_observation(0.0).seq == 4


def test_a_chunk_is_sent_when_planned_and_at_every_step_in_closed_loop():
    serving, transport = server(execute_steps=4)
    sent = [len(answer(serving, transport, observation(k))) for k in range(9)]
    assert sent == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    serving, transport = server(execute_steps=4, closed_loop=True)
    chunks = [answer(serving, transport, observation(k, 0.1 * k)) for k in range(5)]
    assert [len(c) for c in chunks] == [1] * 5
    assert [c[0].observation_seq for c in chunks] == list(range(5))
    first = chunks[1][0]
    assert (first.actions[0] != first.policy_actions[0]).any()


def test_lost_observations_do_not_shift_the_plan():
    serving, transport = server(execute_steps=4)
    assert answer(serving, transport, observation(0))
    assert not answer(serving, transport, observation(1))
    chunks = answer(serving, transport, observation(4))  # 2 and 3 never came
    assert [c.observation_seq for c in chunks] == [4]


def test_a_jump_of_the_count_makes_it_plan_anew():
    serving, transport = server(execute_steps=4)
    answer(serving, transport, observation(0))
    assert [c.observation_seq for c in answer(serving, transport, observation(1001))] == [1001]
    assert serving.report.episodes == 1


def test_a_count_that_does_not_grow_starts_a_new_episode():
    serving, transport = server(execute_steps=4)
    answer(serving, transport, observation(0, 1.0), observation(1, 2.0))
    serving.policy.seed(3)
    chunk = answer(serving, transport, observation(0, 5.0))[0]
    fresh = PolicyRunner(serving.policy, 1)
    serving.policy.seed(3)
    np.testing.assert_array_equal(chunk.actions[0], fresh.step({"state": np.full((1, 3), 5.0, np.float32)})[0])
    assert serving.report.episodes == 2


def test_a_policy_that_lags_answers_the_newest_question_only():
    serving, transport = server(closed_loop=True)
    chunks = answer(serving, transport, *(observation(k) for k in range(7)))
    assert [c.observation_seq for c in chunks] == [6]
    assert serving.report.skipped == 6


def test_warming_up_changes_no_action_and_is_not_counted():
    serving, transport = server()
    serving.policy.seed(5)
    cold = answer(serving, transport, observation(0))[0].actions
    serving, transport = server()
    assert warm_up(serving.policy, seed=5) > 0
    np.testing.assert_array_equal(answer(serving, transport, observation(0))[0].actions, cold)
    assert serving.report.inference.count == 1


def test_serving_ends_when_asked_and_reports():
    transport, stop = InProcessTransport(quiet=True), threading.Event()
    found = []
    policy = WanderingPolicy(FakeRobot().spec)
    thread = threading.Thread(target=lambda: found.append(serve(policy, transport.policy, stop)))
    thread.start()
    transport.executor.send_observation(observation(0))
    for _ in range(100):
        if transport.executor.poll_chunk() is not None:
            break
        thread.join(0.02)
    stop.set()
    thread.join(2.0)
    assert found[0].to_json()["chunks"] == 1


def test_the_in_process_transport_says_loudly_that_ros_is_absent(caplog):
    InProcessTransport()
    assert "IN-PROCESS TRANSPORT" in caplog.text


def test_a_traced_network_plans_the_same_bit_for_bit():
    torch = pytest.importorskip("torch")
    from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy

    torch.manual_seed(0)
    policy = ChunkedPolicy(FakeRobot().spec, ChunkedConfig(width=32, depth=1, sample_steps=3)).eval()
    torch.nn.init.normal_(policy.head.backbone.leave.weight)
    history = {"state": np.random.default_rng(0).normal(size=(1, 2, 3)).astype(np.float32)}
    policy.seed(1)
    eager = [policy.plan(history) for _ in range(3)]
    assert trace_network(policy)
    policy.seed(1)
    for expected in eager:
        np.testing.assert_array_equal(policy.plan(history), expected)
    assert not trace_network(WanderingPolicy(FakeRobot().spec))


def test_the_one_action_of_a_policy_without_chunks_is_held_while_the_next_is_on_its_way():
    from hardware.policy_process import held
    from robot_rl.core.policy import ActionChunk

    one = held(ActionChunk(np.array([[1.0, 2.0]]), 7, 3.0, np.array([[4.0, 5.0]])))
    assert len(one.actions) == len(one.policy_actions) > 2
    assert (one.actions == [1.0, 2.0]).all()
    assert (one.policy_actions == [4.0, 5.0]).all()
    assert (one.observation_seq, one.observation_stamp) == (7, 3.0)
    several = ActionChunk(np.zeros((2, 2)))
    assert held(several) is several
