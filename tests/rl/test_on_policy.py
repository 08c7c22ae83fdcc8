"""The on-policy core and the residual: what the cards say tells right from wrong."""

import math

import numpy as np
import pytest
import torch

from robot_rl.policies.residual import ResidualPolicy, ResidualPolicyConfig
from robot_rl.rl.on_policy import OnPolicyConfig, OnPolicyLearner, RewardScale, advantages
from robot_rl.rl.ratios import clipped_surrogate, divergence
from robot_rl.rl.residual import ResidualActor
from robot_rl.rollout.player import PolicyRunner

CONFIG = OnPolicyConfig(rollout_steps=16, epochs=5, minibatches=4, value_hidden=(64, 64))


def make_learner(env, base, lanes=16, config=CONFIG, **residual):
    torch.manual_seed(0)
    policy = ResidualPolicy(base, ResidualPolicyConfig(hidden=(64, 64), **residual))
    policy.actor.requires_grad_(True)
    policy.log_std.requires_grad_(True)
    return OnPolicyLearner(ResidualActor(policy, lanes, seed=0), env, config, seed=0)


def test_new_residual_equals_base_bit_for_bit(reach_env, fake_base):
    env, other = reach_env(5), reach_env(5)
    base = fake_base(env.spec, offset=0.123, noise_gain=0.7)
    wrapped = PolicyRunner(ResidualPolicy(base, ResidualPolicyConfig()), 5)
    plain = PolicyRunner(base, 5)
    base.seed(3)
    expected, observation = [], env.reset(7)
    for _ in range(30):
        expected.append(plain.step(observation))
        step = env.step(expected[-1])
        plain.reset(step.done)
        observation = step.observation
    base.seed(3)
    observation = other.reset(7)
    for action in expected:
        got = wrapped.step(observation)
        np.testing.assert_array_equal(got, action)
        step = other.step(got)
        wrapped.reset(step.done)
        observation = step.observation


def test_exploration_has_the_stated_deviation(reach_env, fake_base):
    env = reach_env(500, hold=True)  # the base aims at the goal, which is 0.2 or more inside the bounds
    policy = ResidualPolicy(fake_base(env.spec, hold=True), ResidualPolicyConfig(scale=0.1, log_std=-1.0))
    actor = ResidualActor(policy, 500, seed=1)
    observation = env.reset(0)
    noise = np.concatenate([actor.act(observation) - actor._runner.base_action for _ in range(8)])
    assert noise.std() == pytest.approx(0.1 * math.exp(-1), rel=0.03)
    assert abs(noise.mean()) < 0.002


@pytest.mark.parametrize("limit", [7, 8, 20])
def test_base_is_asked_once_per_chunk(reach_env, fake_base, limit):
    env = reach_env(3, limit=limit, radius=0.0)  # the goal is never reached, so that every episode lasts to the limit
    learner = make_learner(env, fake_base(env.spec, execute_steps=8), lanes=3)
    actor, observation = learner.actor, env.reset(0)
    for _ in range(limit):
        step = env.step(actor.act(observation))
        actor.reset(step.done)
        observation = step.observation
    assert actor.plans == 3 * math.ceil(limit / 8)


def test_lanes_keep_their_own_place_in_the_chunk(reach_env, fake_base):
    env = reach_env(2)
    actor = make_learner(env, fake_base(env.spec, execute_steps=4), lanes=2).actor
    observation = env.reset(0)
    actor.act(observation)
    actor.reset(np.array([True, False]))
    actor.act(observation)
    assert actor._runner.planned.tolist() == [True, False]


def test_advantages_against_hand_computation():
    reward = torch.tensor([[1.0], [0.0], [2.0]])
    value = torch.tensor([[0.5], [1.0], [0.25]])
    following = torch.tensor([[1.0], [4.0], [3.0]])  # after the time limit at step 1 stands the final state's value
    terminated, truncated = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[0.0], [1.0], [0.0]])
    got = advantages(reward, value, following, terminated, truncated, 0.9, 0.5)
    last = 2 - 0.25
    middle = 0 + 0.9 * 4 - 1
    first = (1 + 0.9 * 1 - 0.5) + 0.45 * middle
    np.testing.assert_allclose(got[:, 0], [first, middle, last], rtol=1e-6)


def test_time_limit_bootstraps_from_the_final_observation(reach_env, fake_base):
    env = reach_env(4, limit=5, radius=0.0)
    learner = make_learner(env, fake_base(env.spec), lanes=4)
    rollout = learner.collect()
    critic_input = learner.actor.critic_input({k: v.flatten(0, 1) for k, v in rollout.trace.items()})
    value, _ = learner._critic(critic_input.shape[-1])
    before, _ = learner._advantages(rollout, critic_input, value)
    assert rollout.truncated.sum() == 4 * 3
    lanes, final = rollout.next_input[4]
    # At the end of the episode the state has moved; the next episode's first state is at the origin.
    assert lanes.tolist() == [0, 1, 2, 3]
    assert final[:, :2].abs().max() > 0
    config = learner.config
    with torch.no_grad():
        delta = config.discount * value(final) - before[4]
    _, advantage = learner._advantages(rollout, critic_input, value)
    np.testing.assert_allclose(advantage[4], delta, rtol=1e-5, atol=1e-6)


def test_ratio_is_one_before_the_first_step_and_that_is_checked(reach_env, fake_base):
    env = reach_env(4)
    learner = make_learner(env, fake_base(env.spec), lanes=4)
    learner.iterations = 1
    rollout = learner.collect()
    trace = {k: v.flatten(0, 1) for k, v in rollout.trace.items()}
    with torch.no_grad():
        first, second = learner.actor.score(trace), learner.actor.score(trace)
    assert torch.equal((first - second).exp(), torch.ones(64, 1))
    calls = []

    def moving(trace):
        calls.append(0)
        return first.new_zeros(len(trace["u"]), 1) + 0.1 * len(calls)

    learner.actor.score = moving
    with pytest.raises(AssertionError, match="ratio is not 1"):
        learner.update(rollout, 0.0)


def test_surrogate_is_clipped_per_inner_index():
    log_ratio = torch.tensor([[0.5, 0.0]]).log1p().requires_grad_(True)
    clip, weight = torch.tensor([0.2, 0.1]), torch.tensor([1.0, 0.5])
    loss = clipped_surrogate(log_ratio, torch.tensor([2.0]), weight, clip)
    assert loss.item() == pytest.approx(-(1.2 * 2 + 0.5 * 1.0 * 2))
    loss.backward()
    assert log_ratio.grad[0, 0] == 0  # beyond the clip range
    assert log_ratio.grad[0, 1] != 0
    assert divergence(torch.zeros(3, 2)) == 0


def test_reward_scale_is_the_deviation_of_discounted_returns():
    scale = RewardScale(2, 0.5)
    returns, running = [], np.zeros(2)
    rng = np.random.default_rng(0)
    for t in range(50):
        reward, done = rng.normal(size=2), np.array([t % 7 == 6, False])
        running = 0.5 * running + reward
        returns += running.tolist()
        scale.add(reward, done)
        running[done] = 0
    assert scale.factor == pytest.approx(1 / np.std(returns), rel=1e-9)


def test_offset_of_the_base_is_unlearned(reach_env, fake_base):
    env = reach_env(32, hold=True, radius=0.06, limit=8)
    learner = make_learner(env, fake_base(env.spec, offset=0.05, hold=True), lanes=32, scale=0.1, log_std=-1.0)
    for i in range(14):
        metrics = learner.iterate(i / 14)
    assert metrics["success"] > 0.95
    policy = learner.policy
    state = torch.rand(200, 4) - 0.5
    features = torch.cat([state, state[:, 2:] + 0.05], dim=-1)
    correction = 0.1 * policy.actor(features).mean(0)
    np.testing.assert_allclose(correction.detach(), -0.05, atol=0.03)


def test_offset_beyond_exploration_is_never_found(reach_env, fake_base):
    env = reach_env(16, hold=True, radius=0.02, limit=8)
    learner = make_learner(env, fake_base(env.spec, offset=0.4, hold=True), scale=0.1)
    for i in range(4):
        metrics = learner.iterate(i / 4)
    assert metrics["success"] == 0


def test_state_continues_bit_exactly(reach_env, fake_base):
    first = make_learner(reach_env(8), fake_base(reach_env(1).spec), lanes=8)
    for i in range(3):
        first.iterate(i / 10)
    tensors, numbers = first.state()
    tensors = {k: v.clone() for k, v in tensors.items()}
    second = make_learner(reach_env(8), fake_base(reach_env(1).spec), lanes=8)
    second.restore(tensors, numbers)
    again, repeated = second.state()
    second._critic(second.policy.state_size)
    again, repeated = second.state()
    assert repeated == numbers
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor), name
