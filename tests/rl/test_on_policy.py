"""The on-policy core and the residual: what the cards say tells right from wrong."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from chain_bandit import BanditEnv, history, small_policy
from torch import nn

from robot_rl.core.env import Step
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.policies.chain import ChainPolicy, ChainPolicyConfig
from robot_rl.policies.residual import ResidualPolicy, ResidualPolicyConfig
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.guard import NonFiniteError
from robot_rl.rl.methods.dppo import DPPOActor, DPPOConfig
from robot_rl.rl.methods.residual import ResidualActor
from robot_rl.rl.on_policy.anchor import AnchorConfig
from robot_rl.rl.on_policy.chunk_actor import ChunkActor
from robot_rl.rl.on_policy.decisions import RewardScale, advantages
from robot_rl.rl.on_policy.learner import OnPolicyConfig, OnPolicyLearner
from robot_rl.rl.on_policy.ratios import OnPolicyActor, clipped_surrogate, divergence
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
    before, _ = learner.critics.advantages(rollout, critic_input, learner.decision)
    assert rollout.truncated.sum() == 4 * 3
    slots, lanes, final = rollout.final[0]
    assert slots.tolist() == [4] * 4
    # At the end of the episode the state has moved; the next episode's first state is at the origin.
    assert lanes.tolist() == [0, 1, 2, 3]
    assert final[:, :2].abs().max() > 0
    config = learner.config
    with torch.no_grad():
        delta = config.discount * learner.critics.value(final) - before[4]
    _, advantage = learner.critics.advantages(rollout, critic_input, learner.decision)
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
    second.critics.make(second.policy.state_size)
    again, repeated = second.state()
    assert repeated == numbers
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor), name


class ScriptedEnv:
    """Lane i is paid ``i + 0.1 t`` at its t-th step ever; its episodes end after the listed numbers of steps."""

    LENGTHS = ((5, 4, 30), (7, 1, 2, 30), (30,))

    def __init__(self):
        self.num_envs, self.max_episode_steps = 3, 30
        self.spec = Spec({"state": ArraySpec((2,))}, ArraySpec((1,), low=(-1.0,), high=(1.0,)), 10.0)

    def reset(self, seed=None):
        self.clock, self.age, self.episode = 0, np.zeros(3, int), np.zeros(3, int)
        return self.observe()

    def observe(self):
        return {"state": np.stack([np.arange(3), 0.1 * self.age], 1).astype(np.float32)}

    def step(self, actions):
        reward = (np.arange(3) + 0.1 * self.clock).astype(np.float32)
        self.clock += 1
        self.age += 1
        ended = self.age == [self.LENGTHS[i][k] for i, k in enumerate(self.episode)]
        truncated = ended & (self.episode % 2 == 0)
        final = self.observe()
        self.age[ended] = 0
        self.episode[ended] += 1
        info = {"success": np.zeros(3, bool), "episode_seed": np.zeros(3, int)}
        return Step(self.observe(), reward, ended & ~truncated, truncated, final, info)

    def close(self):
        pass


class ScriptedActor(OnPolicyActor):
    """Decides every three steps of a lane and after every episode's end; the score is ``theta * age``."""

    decision_steps = 3
    policy = None

    def __init__(self):
        self.left, self.decided = np.zeros(3, int), np.ones(3, bool)
        self.theta = nn.Parameter(torch.ones(1))

    @property
    def due(self):
        return self.left == 0

    def act(self, observation):
        self.decided = self.left == 0
        self.left[self.decided] = 3
        self.left -= 1
        self.trace = {"x": torch.from_numpy(observation["state"][self.decided])}
        return np.zeros((3, 1), np.float32)

    def reset(self, lanes):
        self.left[lanes] = 0

    def look_ahead(self, observation):
        return torch.from_numpy(observation["state"].copy())

    def critic_input(self, trace):
        return trace["x"]

    def score(self, trace):
        return self.theta * trace["x"][:, 1:]

    def parameters(self):
        return [self.theta]


def reference(value, steps, decision, discount, gae_lambda, before=0):
    """Return {(lane, step of decision): (reward, advantage)} of the decisions that are complete by ``steps``."""
    found = {}
    for lane in range(3):
        t, decisions = 0, []
        for k, length in enumerate(ScriptedEnv.LENGTHS[lane]):
            for start in range(0, length, 3):
                stop = min(start + 3, length)
                end = None if stop < length else "truncated" if k % 2 == 0 else "terminated"
                decisions.append((t + start, t + stop, start, stop, end))
            t += length
        complete = [d for d in decisions if before < d[1] <= steps]
        following = 0.0
        for begin, stop, age, last_age, end in reversed(complete):
            rewards = [lane + 0.1 * i for i in range(begin, stop)]
            if decision.reward == "discounted":
                per_step = discount if decision.clock == "step" else discount ** (1 / 3)
                rewards = [r * per_step**j for j, r in enumerate(rewards)]
            power = stop - begin if decision.clock == "step" else 1
            reward = sum(rewards) - decision.penalty
            ahead = 0.0 if end == "terminated" else value(lane, 0.1 * last_age)
            delta = reward + discount**power * ahead - value(lane, 0.1 * age)
            following = delta + (0.0 if end else discount**power * gae_lambda * following)
            found[lane, begin] = (sum(rewards), following)
    return found


@pytest.mark.parametrize(
    "decision",
    [
        DecisionConfig(),
        DecisionConfig(reward="discounted", clock="step"),
        DecisionConfig(reward="discounted"),
        DecisionConfig(penalty=1.0),
    ],
    ids=["sum", "discounted", "discounted per decision", "penalty"],
)
def test_ragged_decisions_equal_a_reference(decision):
    config = OnPolicyConfig(rollout_steps=4, discount=0.9, gae_lambda=0.8, scale_rewards=False)
    learner = OnPolicyLearner(ScriptedActor(), ScriptedEnv(), config, decision=decision)
    net = learner.critics.make(2)

    def value(lane, age):
        return net(torch.tensor([[lane, age]], dtype=torch.float32)).item()

    seen = set()
    for iteration in range(2):
        rollout = learner.collect()
        _, advantage = learner.critics.advantages(rollout, rollout.rows(rollout.filled)["x"], decision)
        expected = reference(value, 12 * (iteration + 1), decision, 0.9, 0.8, 12 * iteration)
        assert int(rollout.valid.sum()) == len(expected)
        for lane in range(3):
            due = [key for key in sorted(expected) if key[0] == lane]
            for slot, key in enumerate(due):
                reward, wanted = expected[key]
                assert rollout.reward[slot, lane].item() == pytest.approx(reward, rel=1e-5)
                assert advantage[slot, lane].item() == pytest.approx(wanted, rel=1e-4, abs=1e-5), key
                assert key not in seen
                seen.add(key)
        assert torch.all(advantage[~rollout.valid] == 0)
    assert {(0, 9), (1, 10), (2, 9)} <= seen  # lanes 0 and 2 decide at 9, lane 1 is inside a decision at 12
    assert rollout.carried.sum() == 1


def test_carried_decisions_keep_the_score_of_the_parameters_that_made_them():
    config = OnPolicyConfig(rollout_steps=4, warmup_iterations=0, target_kl=0, value_hidden=(8,), minibatches=1)
    learner = OnPolicyLearner(ScriptedActor(), ScriptedEnv(), config)
    learner.collect()
    learner.actor.theta.data[:] = 3.0  # as an update would
    rollout = learner.collect()
    batch, _ = learner._prepare(rollout)
    age = batch.trace["x"][:, 1:]
    assert (~batch.fresh).sum() == 1
    np.testing.assert_allclose(batch.old_score[batch.fresh], 3 * age[batch.fresh])
    np.testing.assert_allclose(batch.old_score[~batch.fresh], 1 * age[~batch.fresh])
    learner.update(rollout, 0.0)  # the ratio of the carried one is not 1, and need not be


def anchored(method, base, weight):
    core = OnPolicyConfig(
        rollout_steps=4, epochs=4, minibatches=2, value_hidden=(16,), actor_learning_rate=3e-3, target_kl=0.0,
        anchor=AnchorConfig(weight=weight),
    )  # fmt: skip
    torch.manual_seed(0)
    if method == "residual":
        actor = ResidualActor(ResidualPolicy(base, ResidualPolicyConfig(scale=0.5, hidden=(16,))), 16)
    else:
        policy = ChainPolicyConfig(tuned_steps=2)
        config = DPPOConfig(policy=policy, sample_std=0.1, score_std=0.1, first_clip=0.05)
        core = replace(core, clip=0.05)
        actor = DPPOActor(ChainPolicy(base, policy), 16, config)
    for parameter in actor.parameters():
        parameter.requires_grad_(True)
    return OnPolicyLearner(actor, BanditEnv(16), core)


@pytest.mark.parametrize("method", ["residual", "dppo"])
def test_a_huge_anchor_keeps_the_policy_at_the_base(method):
    base, moved = small_policy("diffusion"), {}
    for weight in (0.0, 1e3):
        learner = anchored(method, base, weight)
        for i in range(10):
            learner.iterate(i / 10)
        chunks = []
        for policy in (learner.policy, base):
            policy.seed(0)
            planned = policy.plan(history(50))
            chunks.append(policy.refine(history(50), planned[:, 0]))
        moved[weight] = (chunks[0] - chunks[1]).mean()
    assert moved[0.0] > 0.05  # towards what earns most
    assert abs(moved[1e3]) < moved[0.0] / 10


def test_the_residuals_divergence_to_the_base_is_that_of_its_distributions(reach_env, fake_base):
    env = reach_env(4)
    learner = make_learner(env, fake_base(env.spec), lanes=4, log_std=-1.0)
    features = learner.collect().trace["features"].flatten(0, 1)
    assert learner.actor.divergence_to_base({"features": features}).abs().max() == 0
    with torch.no_grad():
        learner.policy.actor[-1].bias.fill_(0.3)
        learner.policy.log_std.fill_(-1.4)
    u = torch.distributions.Normal(torch.full((2,), 0.3), math.exp(-1.4))
    expected = torch.distributions.kl_divergence(u, torch.distributions.Normal(torch.zeros(2), math.exp(-1.0))).sum()
    torch.testing.assert_close(learner.actor.divergence_to_base({"features": features}), expected.expand(len(features)))


class ChunkGaussian(ChunkActor):
    """Adds a learned offset with noise to the base's chunk: the smallest chunk method."""

    std = 0.1

    def __init__(self, base, lanes, seed=0):
        base.weight = nn.Parameter(torch.zeros(1))
        super().__init__(base, lanes, seed)
        self.offset = nn.Parameter(torch.zeros(base.spec.action.size))

    def decide(self, cond):
        eps = torch.randn(len(cond), self.offset.numel(), generator=self.generator)
        u = self.offset + self.std * eps
        return self.policy.sample(cond) + u[:, None], {"u": u}

    def score(self, trace):
        return -0.5 * ((trace["u"] - self.offset) / self.std).square().sum(-1, keepdim=True)

    def parameters(self):
        return [self.offset]


@pytest.mark.parametrize("limit", [8, 7])
def test_chunk_decisions_have_ratio_one_and_learn(reach_env, fake_base, limit):
    # With a limit of 7 and chunks of 4 the second chunk of every episode is cut short.
    env = reach_env(32, hold=True, radius=0.25, limit=limit)
    base = fake_base(env.spec, offset=0.2, hold=True)
    config = OnPolicyConfig(
        rollout_steps=8, epochs=8, minibatches=2, actor_learning_rate=0.02, value_hidden=(32,), target_kl=0
    )
    learner = OnPolicyLearner(ChunkGaussian(base, 32), env, config, seed=0)
    for i in range(25):
        metrics = learner.iterate(i / 25)  # asserts that ratios start at 1
    assert learner.steps == 25 * 8 * 4 * 32
    assert metrics["success"] > 0.9
    np.testing.assert_allclose(learner.actor.offset.detach(), -0.2, atol=0.1)


def test_chunk_look_ahead_is_what_a_decision_would_see(reach_env, fake_base):
    env = reach_env(3, radius=0.0)
    actor = ChunkGaussian(fake_base(env.spec, execute_steps=2), 3)
    observation = env.reset(0)
    for _ in range(2):
        ahead_of = env.step(actor.act(observation)).observation
        ahead = actor.look_ahead(ahead_of)
        observation = ahead_of
    actor.act(observation)
    assert actor.decided.all()
    np.testing.assert_array_equal(ahead, actor.critic_input(actor.trace))


def test_rewards_are_scaled_with_the_penalty_of_decisions(reach_env, fake_base):
    """Where nothing is ever earned, what varies is what decisions cost."""
    env = reach_env(4, radius=0.0)
    policy = ResidualPolicy(fake_base(env.spec), ResidualPolicyConfig(hidden=(8,)))
    actor = ResidualActor(policy, 4)
    learner = OnPolicyLearner(actor, env, CONFIG, decision=DecisionConfig(penalty=2.0))
    expected = RewardScale(4, CONFIG.discount)
    for t in range(CONFIG.rollout_steps):
        expected.add(np.full(4, -2.0), np.full(4, t % 20 == 19))
    learner.collect()
    assert learner.reward_scale.factor == pytest.approx(expected.factor)
    assert learner.reward_scale.factor < 0.5


def test_a_loss_that_is_not_finite_is_named_before_it_is_descended(reach_env, fake_base):
    env = reach_env(4)
    learner = make_learner(env, fake_base(env.spec), lanes=4)
    learner.iterations = 1  # the actor learns as well
    rollout = learner.collect()
    rollout.reward[0, 0] = np.inf
    with pytest.raises(NonFiniteError, match=r"^loss is not finite at environment step 64 "):
        learner.update(rollout, 0.0)
    assert all(torch.isfinite(parameter).all() for parameter in learner.policy.parameters())


def test_final_observations_are_guarded(reach_env, fake_base):
    env = reach_env(4, limit=5, radius=0.0)
    learner = make_learner(env, fake_base(env.spec), lanes=4)
    step = env.step

    def lost(actions):
        taken = step(actions)
        taken.final_observation["state"][taken.done] = np.nan
        return taken

    env.step = lost
    with pytest.raises(NonFiniteError, match="final observation 'state' is not finite"):
        learner.collect()
