"""PPO and the options of the on-policy core, on problems whose answers are known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from robot_rl.core.env import Step
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.policies.checkpoint import load_policy
from robot_rl.policies.diagonal import DiagonalConfig, DiagonalPolicy
from robot_rl.policies.frozen import frozen
from robot_rl.rl.methods.ppo import GaussianActor, ObservationMoments, PPOConfig, finetune, make_learner, make_policy
from robot_rl.rl.on_policy.anchor import Anchor, AnchorConfig
from robot_rl.rl.on_policy.flat_adam import FlatAdam
from robot_rl.rl.on_policy.learner import OnPolicyConfig, OnPolicyLearner
from robot_rl.rl.on_policy.ratios import (
    OnPolicyActor,
    asymmetric_surrogate,
    bounded_ratio_loss,
    clipped_surrogate,
    gaussian_log_prob,
)
from robot_rl.rl.session import SessionConfig, resumed_seed
from robot_rl.train.run import Run, read_metrics


class Line:
    """One number per lane; subclasses say what is paid and how it moves. Episodes end by the clock alone."""

    limit, bound = 20, 1.0

    def __init__(self, num_envs=1):
        self.num_envs, self.max_episode_steps = num_envs, self.limit
        bounds = {"low": (-self.bound,), "high": (self.bound,)}
        self.spec = Spec({"state": ArraySpec((1,))}, ArraySpec((1,), **bounds), 10.0)

    def reset(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.x, self.age = self.start(), np.zeros(self.num_envs, int)
        self.seeds = seed + np.arange(self.num_envs)
        return self.observe()

    def start(self):
        return np.zeros(self.num_envs)

    def observe(self):
        return {"state": self.x[:, None].astype(np.float32)}

    def step(self, actions):
        reward = self.pay(actions[:, 0]).astype(np.float32)
        self.age += 1
        ended = self.age >= self.limit
        final = self.observe()
        self.x, self.age = np.where(ended, self.start(), self.x), np.where(ended, 0, self.age)
        info = {"success": np.zeros(len(ended), bool), "episode_seed": self.seeds}
        self.seeds = self.seeds + ended * self.num_envs
        return Step(self.observe(), reward, *self.ends(ended), final, info)

    def ends(self, ended):
        return np.zeros_like(ended), ended

    def close(self):
        pass


class Ageing(Line):
    """Pays 1 per step; the state is the age, if it is to be seen."""

    limit, blind = 10, False

    def pay(self, action):
        return np.ones(self.num_envs)

    def observe(self):
        return {"state": (0 if self.blind else 0.1) * self.age[:, None].astype(np.float32)}


class Bandit(Line):
    """Every step is an episode that ends by termination."""

    limit = 1

    def ends(self, ended):
        return ended, np.zeros_like(ended)


class Parabola(Bandit):
    bound = 2.0

    def pay(self, action):
        return -((action - 1) ** 2)


class Arms(Bandit):
    """Two arms, the action's number is the reward."""

    def pay(self, action):
        return action


class Regulator(Line):
    """x += a, paid -(x^2 + a^2)."""

    def start(self):
        return self.rng.uniform(-1, 1, self.num_envs)

    def pay(self, action):
        reward = -(self.x**2) - action**2
        self.x = self.x + action
        return reward


CORE = OnPolicyConfig(
    rollout_steps=8, epochs=4, minibatches=2, target_kl=0, schedule="constant", warmup_iterations=0, value_hidden=(16,)
)


def ppo(env, core=CORE, hidden=(16,), log_std=-1.0, seed=0):
    return make_learner(env, PPOConfig(policy=DiagonalConfig(hidden=hidden, log_std=log_std), core=core), seed)


@pytest.mark.parametrize(("timeout", "last"), [("final", 10), ("current", 10), ("mask", 10), ("terminal", 1)])
def test_value_at_a_time_limit(timeout, last):
    core = replace(
        CORE,
        discount=0.9,
        timeout=timeout,
        scale_rewards=False,
        critic_learning_rate=1e-2,
        value_hidden=(32,),
        epochs=6,
    )
    env = Ageing(32)
    env.blind = timeout == "mask"  # it teaches nothing of the last state, and only serves where others look the same
    learner = ppo(env, replace(core, rollout_steps=20, schedule="linear"))
    for i in range(40):
        learner.iterate(i / 40)
    ages = {"state": (np.arange(10)[:, None, None] * (0 if env.blind else 0.1)).astype(np.float32)}
    with torch.no_grad():
        values = learner.critics.value(learner.policy.features(ages))
    assert values[9].item() == pytest.approx(last, rel=0.1)
    expected = 10 if timeout != "terminal" else (1 - 0.9**10) / 0.1
    assert values[0].item() == pytest.approx(expected, rel=0.1)


def test_lanes_are_put_out_of_step_at_the_start_and_after_a_resume():
    env = Ageing(4)
    with pytest.raises(CapabilityError, match="stagger must be no"):
        ppo(env, replace(CORE, stagger=True))
    seeds = []
    env.stagger = seeds.append
    learner = ppo(env, replace(CORE, stagger=True), seed=3)
    learner.restore(*learner.state())
    assert seeds == [learner._seed, resumed_seed(learner._seed, 0)]
    ppo(env)
    assert len(seeds) == 2


class MeanActor(GaussianActor):
    """Learns the mean alone."""

    def parameters(self):
        return list(self.policy.mean.parameters())


def test_regulator_finds_the_riccati_gain():
    cost = 1.0
    for _ in range(100):
        cost = 1 + 0.9 * cost - (0.9 * cost) ** 2 / (1 + 0.9 * cost)
    gain = 0.9 * cost / (1 + 0.9 * cost)
    rates = {"actor_learning_rate": 1e-2, "critic_learning_rate": 5e-3}
    core = replace(CORE, rollout_steps=16, discount=0.9, schedule="linear", value_hidden=(32,), **rates)
    env = Regulator(64)
    torch.manual_seed(0)
    policy = make_policy(env.spec, DiagonalConfig(hidden=(), log_std=-2.0, low=(-2.0,), high=(2.0,)))
    learner = OnPolicyLearner(MeanActor(policy, 64, 0), env, core)
    for i in range(40):
        learner.iterate(i / 40)
    low, high = (learner.policy.plan({"state": np.full((1, 1, 1), x, np.float32)})[0, 0, 0] for x in (-0.5, 0.5))
    assert high - low == pytest.approx(-gain, rel=0.08)


def test_adaptive_rate_undoes_a_halving():
    learner = ppo(Parabola(4), replace(CORE, schedule="adaptive"))
    for _ in range(30):
        learner._adapt_learning_rate(0.01 * learner._rate_factor**2)  # the divergence goes with the squared step
    steady = learner._rate_factor
    learner._rate_factor /= 4
    for _ in range(4):
        learner._adapt_learning_rate(0.01 * learner._rate_factor**2)
    assert steady / 1.5 <= learner._rate_factor <= steady * 1.5
    learner._adapt_learning_rate(0.0)
    before = learner._rate_factor
    learner._adapt_learning_rate(0.0)
    assert learner._rate_factor == before  # rsl_rl's rule: no divergence is no reason


@pytest.mark.parametrize("rate", [1e-5, 1e-2])
def test_adaptive_rate_in_a_run(rate):
    learner = ppo(Regulator(32), replace(CORE, schedule="adaptive", actor_learning_rate=rate, epochs=8))
    rates = [learner.iterate(0.0)["learning_rate"] for _ in range(3)]
    assert (rates[-1] > 2e-5) if rate < 1e-3 else (rates[0] < 8e-3)


def test_closed_form_divergence_is_the_expectation_of_the_estimate():
    learner = ppo(Regulator(256))
    rollout = learner.collect()
    trace = rollout.rows(rollout.valid)
    actor = learner.actor
    with torch.no_grad():
        snapshot, old = actor.snapshot(trace), actor.score(trace)
        actor.policy.log_std += 0.05
        actor.policy.mean[-1].bias += 0.1
        log_ratio = actor.score(trace) - old
        exact = actor.divergence_from(snapshot, trace).mean()
    assert exact.item() == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item(), rel=0.15)


class BanditActor(OnPolicyActor):
    """Chooses one of two arms; knows its divergence from (.9, .1)."""

    policy = None

    def __init__(self, lanes):
        self.logits = nn.Parameter(torch.tensor([0.9, 0.1]).log())
        self.base = self.logits.detach().clone()
        self.decided = np.ones(lanes, bool)
        self.generator = torch.Generator().manual_seed(0)

    def act(self, observation):
        arms = torch.multinomial(self.logits.detach().softmax(-1), len(self.decided), True, generator=self.generator)
        self.trace = {"arm": arms, "x": torch.ones(len(arms), 1)}
        return arms[:, None].numpy().astype(np.float32)

    def reset(self, lanes):
        pass

    def look_ahead(self, observation):
        return torch.ones(len(self.decided), 1)

    def critic_input(self, trace):
        return trace["x"]

    def score(self, trace):
        return self.logits.log_softmax(-1)[trace["arm"]][:, None]

    def divergence_to_base(self, trace):
        log_p = self.logits.log_softmax(-1)
        return (log_p.exp() * (log_p - self.base)).sum().expand(len(trace["arm"]))

    def parameters(self):
        return [self.logits]


ANCHORED = replace(
    CORE, normalize="none", scale_rewards=False, clip=1e3, epochs=1, minibatches=1, schedule="linear", discount=0.5,
    critic_learning_rate=1e-2,
)  # fmt: skip


def test_anchor_on_a_bandit_has_the_mode_seeking_optimum():
    core = replace(ANCHORED, anchor=AnchorConfig(weight=0.5), actor_learning_rate=3e-2)
    learner = OnPolicyLearner(BanditActor(256), Arms(256), core)
    for i in range(250):
        metrics = learner.iterate(i / 250)
    p = learner.actor.logits.softmax(-1)[1].item()
    optimum = 0.1 * math.e**2 / (0.9 + 0.1 * math.e**2)
    assert optimum == pytest.approx(0.451, abs=1e-3)
    assert p == pytest.approx(optimum, abs=0.03)  # cross-entropy on the base's choices would end at .585
    expected = p * math.log(p / 0.1) + (1 - p) * math.log((1 - p) / 0.9)
    assert metrics["anchor_kl"] == pytest.approx(expected, abs=0.02)


def parabola(weight, iterations=150):
    env = Parabola(256)
    torch.manual_seed(0)
    policy = make_policy(env.spec, DiagonalConfig(hidden=(), log_std=math.log(0.05), low=(-2.0,), high=(2.0,)))
    nn.init.zeros_(policy.mean[-1].weight)
    # An action is twice u, so that u ~ N(0, .05^2) is N(0, .1^2) in actions, with the same divergences.
    actor = MeanActor(policy, 256, 0, running=False, base=frozen(policy))
    core = replace(ANCHORED, anchor=AnchorConfig(weight=weight), actor_learning_rate=1e-2)
    learner = OnPolicyLearner(actor, env, core)
    for i in range(iterations):
        learner.iterate(i / iterations)
    return 2 * policy.mean[-1].bias.item()


def test_anchor_on_a_parabola_has_the_known_optimum():
    assert parabola(0.01) == pytest.approx(2 / (2 + 0.01 / 0.01), abs=0.05)
    assert parabola(100.0, 20) == pytest.approx(0, abs=0.02)


def test_anchor_without_weight_changes_no_bit():
    found = []
    for base in (False, True):
        env = Regulator(16)
        torch.manual_seed(0)
        policy = make_policy(env.spec, DiagonalConfig(hidden=(8,)))
        core = replace(CORE, anchor=AnchorConfig(weight=0.0, decay=0.5)) if base else CORE
        actor = GaussianActor(policy, 16, 0, running=False, base=frozen(policy) if base else None)
        learner = OnPolicyLearner(actor, env, core)
        for _ in range(3):
            learner.iterate(0.0)
        found.append([p.detach().clone() for p in actor.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_anchor_controller_holds_a_target():
    anchor = Anchor(AnchorConfig(weight=1.0, target=0.1))
    for _ in range(100):
        anchor.update(0.2 / anchor.weight)  # a divergence that falls with the weight
    assert anchor.weight == pytest.approx(2.0, rel=0.01)
    decaying = Anchor(AnchorConfig(weight=1.0, decay=0.5))
    decaying.update(3.0)
    assert decaying.weight == 0.5
    with pytest.raises(ConfigError, match="weight above 0"):
        AnchorConfig(target=0.1)


def test_anchor_is_refused_where_there_is_no_base():
    learner = ppo(Regulator(8), replace(CORE, anchor=AnchorConfig(weight=1.0)))
    with pytest.raises(CapabilityError, match="methods that have: residual"):
        learner.iterate(0.0)


def test_bounded_ratio_has_the_slope_of_ppo_inside_and_pulls_back_from_outside():
    weight, clip = torch.ones(1), torch.tensor([0.2])
    advantage = torch.tensor([1.0, -1.0, 0.5, -2.0])

    def slopes(loss, ratios, *more):
        log_ratio = torch.tensor(ratios).log()[:, None].requires_grad_(True)
        loss(log_ratio, advantage, *more, weight, clip).backward()
        return log_ratio.grad[:, 0]

    inside = [1.0, 1.1, 0.9, 1.0]
    torch.testing.assert_close(
        slopes(bounded_ratio_loss, inside, advantage.sign()), slopes(clipped_surrogate, inside), rtol=1e-6, atol=1e-7
    )
    outside = [1.4, 0.6, 1.4, 0.6]
    assert torch.all(slopes(clipped_surrogate, outside) == 0)
    pull = slopes(bounded_ratio_loss, outside, advantage.sign())
    assert torch.equal(pull.sign(), advantage.sign())  # descent lowers the log-ratio where the advantage is positive
    ties = slopes(bounded_ratio_loss, [1.1, 0.9, 1.1, 0.9], torch.zeros(4))
    assert torch.equal(ties.sign(), torch.tensor([1.0, -1.0, 1.0, -1.0]))  # actions at the median go back to 1


def test_asymmetric_surrogate_clips_good_decisions_and_holds_bad_ones():
    advantage, weight, clip = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0]), torch.ones(1), torch.tensor([0.2])

    def slopes(loss, ratios):
        ratio = torch.tensor(ratios)[:, None].requires_grad_(True)
        loss(ratio.log(), advantage, weight, clip).backward()
        return ratio.grad[:, 0]

    start = [1.0] * 5
    torch.testing.assert_close(slopes(asymmetric_surrogate, start), slopes(clipped_surrogate, start))
    pull = slopes(asymmetric_surrogate, [1.1, 1.3, 0.9, 0.8, 0.6])
    assert pull[0] < 0 == pull[1], "a good decision is pushed up to the clip, and no further"
    assert pull[2] > 0, "a bad one is pushed down"
    assert pull[3].abs() < 1e-6, "to where the trust region has its best"
    assert pull[4] < 0, "and pulled back from beyond"


@pytest.mark.parametrize(("size", "share"), [(1.0, 0.242), (10.0, 0.07)])
def test_median_critic_minimises_a_smooth_magnitude(size, share):
    learner = ppo(Arms(4), replace(CORE, loss="bpo", value_hidden=(), critic_learning_rate=0.1))
    learner.critics.make(1)
    part = learner._prepare(learner.collect())[0]
    rows = {"critic_input": torch.ones(4, 1), "target": size * torch.tensor([0.0, 0, 0, 1])}
    part = replace(part, **rows)
    for i in range(400):
        learner._rate_factor = 1 - i / 400
        _, loss = learner.critics.loss(part)
        learner._descend(loss, False, 4)
    assert learner.critics.value(torch.ones(1, 1)).item() == pytest.approx(size / 4, abs=0.02 * size)
    assert learner.critics.median(torch.ones(1, 1)).item() == pytest.approx(size * share, abs=0.02 * size)


@pytest.mark.parametrize("loss", ["aspo", "bpo"])
def test_a_policy_learns_by_the_other_losses(loss):
    core = replace(CORE, loss=loss, actor_learning_rate=1e-2, discount=0.5, schedule="linear")
    learner = ppo(Parabola(64), core, log_std=-1.0)
    for i in range(40):
        learner.iterate(i / 40)
    action = learner.policy.plan({"state": np.zeros((1, 1, 1), np.float32)}).item()
    assert action == pytest.approx(1, abs=0.1)


def test_gradients_of_the_written_out_nodes():
    torch.manual_seed(0)
    shapes = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    mean, log_std = (x.requires_grad_(True) for x in shapes)
    value = torch.randn(5, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m, s: gaussian_log_prob(m, s, value), (mean, log_std))
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(value).sum(-1)
    torch.testing.assert_close(gaussian_log_prob(mean, log_std, value), expected)
    log_ratio = (0.3 * torch.randn(6, 2, dtype=torch.float64)).requires_grad_(True)
    advantage, weight = torch.randn(6, dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    clip = torch.tensor([0.2, 0.1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r: clipped_surrogate(r, advantage, weight, clip), (log_ratio,))
    ratio = log_ratio.exp()
    plain = torch.minimum(advantage[:, None] * ratio, advantage[:, None] * ratio.clamp(1 - clip, 1 + clip))
    torch.testing.assert_close(clipped_surrogate(log_ratio, advantage, weight, clip), -(weight * plain).sum(-1).mean())


def test_flat_adam_is_adam_with_clipping():
    def networks():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    ours, theirs = networks(), networks()
    flat = FlatAdam(list(ours.parameters()), max_norm=0.5)
    plain = torch.optim.Adam(theirs.parameters(), eps=1e-5)
    for i in range(5):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(i))
        flat.zero()
        if i == 3:
            ours.zero_grad()  # as foreign code might; gradients then appear in tensors of their own
        ours(x).square().sum().backward()
        flat.step(1e-2)
        plain.zero_grad()
        theirs(x).square().sum().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        plain.param_groups[0]["lr"] = 1e-2
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    again = FlatAdam(list(networks().parameters()), max_norm=0.5)
    again.restore({k: v.clone() for k, v in flat.state().items()})
    assert all(torch.equal(v, flat.state()[k]) for k, v in again.state().items())


def test_moments_are_those_of_all_observations():
    moments = ObservationMoments(Regulator().spec)
    rng = np.random.default_rng(0)
    batches = [{"state": rng.normal(3, 2, (n, 1)).astype(np.float32)} for n in (5, 1, 20)]
    for batch in batches:
        moments.add(batch)
    policy = DiagonalPolicy(Regulator().spec, DiagonalConfig(low=(-1.0,), high=(1.0,)))
    moments.write(policy.normalizer)
    everything = np.concatenate([batch["state"] for batch in batches])
    features = policy.features({"state": everything[:, None]}).numpy()
    assert abs(features.mean()) < 1e-5
    assert features.std() == pytest.approx(1, abs=1e-4)


def test_finetune_gives_a_policy_that_loads_and_goes_on(tmp_path):
    base = make_policy(Regulator().spec, DiagonalConfig(hidden=(8,)))
    config = PPOConfig(lanes=16, normalizer="running", core=replace(CORE, actor_learning_rate=1e-2))
    session = SessionConfig(steps=3000, evaluations=2, eval_episodes=10, eval_lanes=10)
    with Run.create(tmp_path / "run", {}, spec=base.spec) as run:
        policy = finetune(base, Regulator, config, run, session=session)
    returns = [row["return"] for row in read_metrics(tmp_path / "run", "eval")]
    assert max(returns[1:]) > returns[0]
    loaded, history = load_policy(tmp_path / "run/checkpoints/best"), {"state": np.full((2, 1, 1), 0.3, np.float32)}
    np.testing.assert_array_equal(loaded.plan(history), policy.plan(history))
    with Run.create(tmp_path / "run", {}, spec=base.spec, resume=True) as run:
        finetune(base, Regulator, config, run, session=replace(session, steps=4000))
    assert read_metrics(tmp_path / "run", "finetune")[-1]["step"] >= 4000


def test_state_holds_statistics_and_rate():
    first = ppo(Regulator(8), replace(CORE, schedule="adaptive", loss="bpo"))
    for _ in range(3):
        first.iterate(0.0)
    tensors, numbers = first.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    second = ppo(Regulator(8), replace(CORE, schedule="adaptive", loss="bpo"), seed=1)
    second.restore(tensors, numbers)
    untouched, _ = second.state()  # a run that is stopped at once loses nothing
    assert set(tensors) == set(untouched)
    second.critics.make(1)
    again, repeated = second.state()
    assert repeated == numbers
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    state = {"state": np.full((1, 1, 1), 0.7, np.float32)}
    np.testing.assert_array_equal(first.policy.plan(state), second.policy.plan(state))
