"""Flow-matching policy optimisation: what its card says tells a right ratio from a wrong one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from robot_rl.core.env import Step
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.policies.checkpoint import load_policy
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
from robot_rl.policies.scratch import ScratchConfig, flow_from_scratch
from robot_rl.rl.methods import fpo
from robot_rl.rl.methods.fpo import FPOActor, FPOConfig
from robot_rl.rl.methods.ppo import ObservationMoments
from robot_rl.rl.on_policy.learner import OnPolicyConfig, OnPolicyLearner
from robot_rl.rl.on_policy.ratios import clipped_surrogate
from robot_rl.rl.options import field_texts, override
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run, read_metrics

CORE = OnPolicyConfig(
    rollout_steps=8, epochs=4, minibatches=4, clip=0.05, target_kl=0.0, actor_learning_rate=3e-3, value_hidden=(16,),
    warmup_iterations=0, schedule="constant",
)  # fmt: skip


class TwoModes:
    """A bandit with two equally good actions, -0.6 and 0.6; episodes of four steps."""

    def __init__(self, num_envs=1):
        self.num_envs, self.max_episode_steps = num_envs, 4
        self.spec = Spec({"state": ArraySpec((1,))}, ArraySpec((1,), low=(-1.0,), high=(1.0,)), 10.0)
        self.reset()

    def reset(self, seed=None):
        self.time = 0
        return {"state": np.ones((self.num_envs, 1), np.float32)}

    def step(self, actions):
        self.time += 1
        reward = np.exp(-((np.abs(actions[:, 0]) - 0.6) ** 2) / 0.08).astype(np.float32)
        ended = np.full(self.num_envs, self.time % 4 == 0)
        observation = {"state": np.ones((self.num_envs, 1), np.float32)}
        return Step(observation, reward, np.zeros_like(ended), ended, observation, {"success": reward > 0.5})

    def close(self):
        pass


@pytest.fixture
def two_modes():
    return TwoModes


def chunked(spec, head="flow", horizon=4, execute_steps=2, seed=0, width=32, **options):
    torch.manual_seed(seed)
    config = ChunkedConfig(
        head, "plain", obs_steps=2, horizon=horizon, execute_steps=execute_steps, sample_steps=5, width=width, **options
    )
    policy = ChunkedPolicy(spec, config)
    with torch.no_grad():  # an untrained velocity is zero; a test needs one that is not
        policy.head.backbone.net[-1].weight.normal_(0, 0.3)
    return policy


def played(reach_env, lanes=6, config=None, steps=4, **options):
    """An actor that has acted, and the rows of its decisions."""
    env = reach_env(lanes, hold=True, limit=50)
    policy = chunked(env.spec, **options)
    actor = FPOActor(policy.requires_grad_(True), lanes, seed=3, config=config)
    learner = OnPolicyLearner(actor, env, replace(CORE, rollout_steps=steps))
    rollout = learner.collect()
    return actor, rollout.rows(rollout.valid)


def by_hand(actor, trace, loss):
    """Minus the loss of the first executed steps, one row and one pair at a time."""
    rows = []
    for i in range(len(trace["chunk"])):
        row = []
        for j in range(trace["time"].shape[1]):
            a, e, t = trace["chunk"][i], trace["eps"][i, j], trace["time"][i, j]
            x = t * e + (1 - t) * a
            v = actor.policy.head.backbone(x[None], t[None], trace["cond"][i][None])[0]
            estimate = x - t * v + v  # the noise: the denoised estimate plus the velocity
            error = (e - a - v) if loss == "velocity" else (e - estimate)
            row.append(-error[: actor.policy.execute_steps].square().mean())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("loss", ["velocity", "noise"])
def test_score_is_minus_the_loss_of_the_executed_steps(reach_env, loss):
    actor, trace = played(reach_env, config=FPOConfig(samples=3, loss=loss, average_first=False))
    expected = by_hand(actor, trace, loss)
    torch.testing.assert_close(actor.score(trace), expected, rtol=1e-4, atol=1e-5)
    averaging = FPOActor(actor.policy, 6, config=FPOConfig(samples=3, loss=loss))
    torch.testing.assert_close(averaging.score(trace), expected.mean(1, keepdim=True), rtol=1e-4, atol=1e-5)
    summing = FPOActor(actor.policy, 6, config=FPOConfig(samples=3, loss=loss, reduction="sum"))
    torch.testing.assert_close(summing.score(trace), 2 * averaging.score(trace))


def test_ratio_is_exactly_one_at_the_start_because_pairs_are_stored(reach_env):
    actor, trace = played(reach_env)
    first = actor.score(trace)
    assert torch.equal((actor.score(trace) - first).exp(), torch.ones_like(first))
    fresh = trace | {"eps": torch.randn_like(trace["eps"]), "time": torch.rand_like(trace["time"])}
    assert (actor.score(fresh) - first).exp().var() > 1e-3


def test_normaliser_moves_between_iterations_and_never_the_ratio(reach_env):
    env = reach_env(8)
    policy = flow_from_scratch(env.spec, ScratchConfig(width=16))
    actor = FPOActor(policy, 8, moments=ObservationMoments(env.spec))
    learner = OnPolicyLearner(actor, env, CORE)
    rollout = learner.collect()
    trace = {key: rows.clone() for key, rows in rollout.rows(rollout.valid).items()}
    observation = torch.rand(5, 1, 4)
    before = policy.encode({"state": observation})
    score = actor.score(trace)
    learner.update(rollout, 0.0)  # asserts that the ratio starts at 1
    moved = policy.encode({"state": observation})
    assert (moved - before).abs().max() > 0.1
    seen = np.concatenate([policy.normalizer.unnormalize("state", moved.view(5, 4)).numpy()])
    np.testing.assert_allclose(seen, observation[:, 0], atol=1e-5)
    assert not torch.equal(actor.score(trace), score)  # the weights moved as well
    learner.collect()
    conditions = learner._store.trace["cond"].flatten(0, 1)
    assert conditions.std(0).max() < 5


def test_good_action_becomes_likelier_and_bad_one_less(reach_env):
    for advantage in (1.0, -1.0):
        actor, trace = played(reach_env)
        one = {key: rows[:1] for key, rows in trace.items()}
        old = actor.score(one).detach()
        optimizer = torch.optim.SGD(actor.parameters(), lr=1e-3)
        loss = clipped_surrogate(actor.score(one) - old, torch.tensor([advantage]), *weights(actor))
        loss.backward()
        optimizer.step()
        ratio = (actor.score(one) - old).exp().item()
        assert (ratio - 1) * advantage > 1e-6
        assert (-actor.score(one) < -old) == (advantage > 0)


def weights(actor, clip=0.05):
    return actor.inner_weight(), actor.inner_clip(clip)


def test_one_ratio_per_pair_has_the_same_first_gradient(reach_env):
    gradients = {}
    for average in (True, False):
        actor, trace = played(reach_env, config=FPOConfig(samples=5, average_first=average))
        score = actor.score(trace)
        assert score.shape[1] == (1 if average else 5)
        advantage = torch.linspace(-1, 1, len(score))
        clipped_surrogate(score - score.detach(), advantage, *weights(actor)).backward()
        gradients[average] = torch.cat([p.grad.flatten() for p in actor.parameters()])
        assert actor.inner_weight().sum() == pytest.approx(1)
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-3, atol=1e-7)
    assert gradients[True].norm() > 1e-3


class GaussianFlow(torch.nn.Module):
    """The velocity whose samples are N(mean, spread^2), whatever the condition."""

    def __init__(self, spread):
        super().__init__()
        self.mean, self.spread = torch.nn.Parameter(torch.zeros(())), spread

    def forward(self, x, time, cond):
        t = time.view(-1, 1, 1)
        variance = t**2 + ((1 - t) * self.spread) ** 2
        return (t - (1 - t) * self.spread**2) / variance * (x - (1 - t) * self.mean) - self.mean


@pytest.mark.parametrize("spread", [1.0, 0.3, 0.1])
def test_relative_ratio_of_a_gaussian_flow_is_the_ratio_of_densities(two_modes, spread):
    policy = flow_from_scratch(two_modes().spec, ScratchConfig(sample_steps=200))
    policy.head.backbone = GaussianFlow(spread)
    actor = FPOActor(policy, 4000, config=FPOConfig(samples=50, relative=True))
    rows = {"cond": torch.zeros(4000, 1)}
    with torch.no_grad():
        chunk, trace = actor.decide(rows["cond"])
        assert chunk.std().item() == pytest.approx(spread, rel=0.05)
        before = actor.score(trace | rows)
        policy.head.backbone.mean += spread / 2
        gap = actor.score(trace | rows) - before
    # log N(a; m + d, s) - log N(a; m, s) = d (a - m) / s^2 - d^2 / (2 s^2): here of mean -1 / 8 and deviation 1 / 2.
    assert gap.mean().item() == pytest.approx(-1 / 8, abs=0.03)
    assert np.cov(gap.flatten(), chunk.flatten())[0, 1] / spread == pytest.approx(0.5, rel=0.1)


def test_mean_loss_that_others_are_relative_to_moves_between_iterations_only(tmp_path, reach_env):
    env = reach_env(8)
    policy = flow_from_scratch(env.spec, ScratchConfig(width=16))
    actor = FPOActor(policy, 8, config=FPOConfig(relative=True))
    learner = OnPolicyLearner(actor, env, CORE)
    rollout = learner.collect()
    first = rollout.rows(rollout.valid)["reference"].unique()
    assert len(first) == 1
    assert first.item() == pytest.approx(2, rel=0.3)  # of samples from N(0, 1), by no velocity
    metrics = learner.update(rollout, 0.0)  # asserts that the ratio starts at 1
    rollout = learner.collect()
    assert rollout.rows(rollout.valid)["reference"].unique().item() == pytest.approx(metrics["flow_loss"])
    resumed = FPOActor(policy, 8, config=FPOConfig(relative=True))
    resumed.restore(actor.state())
    assert resumed.state()["reference"] == actor.state()["reference"] != first


def test_what_is_not_executed_does_not_count(reach_env):
    actor, trace = played(reach_env)
    torch.nn.init.zeros_(actor.policy.head.backbone.net[-1].weight)  # so that outputs do not depend on the chunk
    changed = trace["chunk"].clone()
    changed[:, 2:] += 1
    assert torch.equal(actor.score(trace | {"chunk": changed}), actor.score(trace))
    changed[:, :2] += 1
    assert not torch.equal(actor.score(trace | {"chunk": changed}), actor.score(trace))


def test_chunks_are_stored_before_they_are_clipped(two_modes):
    env = two_modes(200)
    actor = FPOActor(flow_from_scratch(env.spec, ScratchConfig()), 200)
    actions = actor.act(env.reset())
    assert np.abs(actions).max() == 1
    assert actor.trace["chunk"].abs().max() > 2
    np.testing.assert_allclose(actions, actor.trace["chunk"][:, 0].clamp(-1, 1), atol=1e-6)


def test_both_good_actions_of_a_bandit_survive(two_modes):
    env = two_modes(256)
    policy = flow_from_scratch(env.spec, ScratchConfig(width=48, sample_steps=8))
    generator = torch.Generator().manual_seed(0)
    beside = {"observation": {"state": torch.ones(256, 1, 1)}}

    def actions():
        side = (torch.rand(256, 1, 1, generator=generator) < 0.5).float() * 2 - 1
        return 0.4 * side + 0.1 * torch.randn(256, 1, 1, generator=generator)

    fit(policy, lambda: beside | {"action": actions()}, generator)
    core = replace(CORE, actor_learning_rate=1e-3, schedule="cosine")
    learner = OnPolicyLearner(FPOActor(policy, 256, config=FPOConfig(samples=4)), env, core)
    first = learner.iterate(0.0)["reward"]
    for i in range(20):
        last = learner.iterate(i / 20)["reward"]
    with torch.no_grad():
        sampled = policy.sample(torch.ones(2000, 1), torch.randn(2000, 1, 1, generator=generator)).flatten()
    assert last > first + 0.12
    assert (sampled.abs() > 0.25).float().mean() > 0.85
    assert 0.35 < (sampled > 0).float().mean() < 0.65


def test_anchor_is_zero_at_the_base_and_holds_to_it(reach_env):
    env = reach_env(8, hold=True, radius=0.3, limit=8)
    gaps = {}
    for weight in (0.0, 300.0):
        base = chunked(env.spec)
        config = FPOConfig(lanes=8, samples=4)
        actor = fpo.make_actor(base, config, 0)
        core = replace(CORE, anchor=replace(CORE.anchor, weight=weight))
        learner = OnPolicyLearner(actor, env, core)
        rollout = learner.collect()
        trace = {key: rows.clone() for key, rows in rollout.rows(rollout.valid).items()}
        assert actor.divergence_to_base(trace).shape == (len(trace["chunk"]),)
        assert actor.divergence_to_base(trace).abs().max() == 0
        for i in range(3):
            learner.iterate(i / 3)
        distance = actor.divergence_to_base(trace)
        distance.mean().backward()
        assert all(p.grad is None for p in actor.base.parameters())
        assert any(p.grad.abs().max() > 0 for p in actor.parameters())
        gaps[weight] = distance.mean().item()
    assert 0 < gaps[300.0] < 0.2 * gaps[0.0]


def test_anchor_from_scratch_is_to_its_own_start(reach_env):
    env = reach_env(8)
    core = replace(CORE, anchor=replace(CORE.anchor, weight=0.01))
    actor = fpo.make_actor(env, FPOConfig(scratch=True, lanes=8, core=core), 0)
    learner = OnPolicyLearner(actor, env, core)
    rollout = learner.collect()
    trace = {key: rows.clone() for key, rows in rollout.rows(rollout.valid).items()}
    assert actor.divergence_to_base(trace).abs().max() == 0
    learner.update(rollout, 0.0)
    assert actor.divergence_to_base(trace).mean() > 0
    assert fpo.make_actor(env, FPOConfig(scratch=True, lanes=8, core=CORE), 0).base is None


def test_wrong_heads_and_settings_are_refused(reach_env):
    spec = reach_env(1).spec
    with pytest.raises(CapabilityError, match=r"fpo needs .*: flow; this is a DiffusionHead"):
        fpo.make_actor(chunked(spec, "diffusion"), FPOConfig(), 0)
    with pytest.raises(ConfigError, match="velocity or noise"):
        FPOConfig(loss="huber")
    with pytest.raises(ConfigError, match="samples"):
        FPOConfig(samples=0)
    assert fpo.make_actor(reach_env(1), FPOConfig(scratch=True), 0).policy.horizon == 1
    unbounded = Spec(spec.observation, ArraySpec((2,)), 10.0)
    with pytest.raises(ConfigError, match="finite action bounds"):
        flow_from_scratch(unbounded, ScratchConfig())


def fit(policy, batch, generator, steps=400):
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = policy.loss(batch(), generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def cloned(spec, goal_offset):
    """A flow policy that aims beside the goal, as if cloned from such demonstrations."""
    policy = chunked(spec, width=48)
    generator = torch.Generator().manual_seed(0)

    def batch():
        state = torch.rand(128, 2, 4, generator=generator) * 1.8 - 0.9
        action = state[:, -1:, 2:] + goal_offset + 0.08 * torch.randn(128, 4, 2, generator=generator)
        return {"observation": {"state": state}, "action": action}

    fit(policy, batch, generator)
    return policy


def test_clone_is_improved_and_is_a_policy_again(tmp_path, reach_env):
    def make(num_envs=1):
        return reach_env(num_envs, hold=True, radius=0.13, limit=2)

    base = cloned(make().spec, 0.1)
    weights_before = [p.clone() for p in base.parameters()]
    core = replace(CORE, actor_learning_rate=3e-4, schedule="cosine")
    config = FPOConfig(lanes=64, samples=4, core=core)
    session = SessionConfig(steps=6000, evaluations=3, eval_episodes=100)
    with Run.create(tmp_path / "run", {}, spec=base.spec) as run:
        policy = fpo.finetune(base, make, config, run, session=session)
    rows = read_metrics(tmp_path / "run", "eval")
    assert max(row["success"] for row in rows[1:]) > rows[0]["success"] + 0.15
    assert all(torch.equal(a, b) for a, b in zip(weights_before, base.parameters(), strict=True))
    loaded = load_policy(tmp_path / "run" / "checkpoints" / "best")
    assert loaded.kind == "chunked"
    history = {"state": np.random.default_rng(0).uniform(-0.5, 0.5, (5, 2, 4)).astype(np.float32)}
    policy.seed(1)
    expected = policy.plan(history)
    loaded.seed(1)
    np.testing.assert_array_equal(loaded.plan(history), expected)


def test_policy_from_scratch_continues_where_it_stopped(tmp_path, reach_env):
    def make(num_envs=1):
        return reach_env(num_envs, hold=True, radius=0.4, limit=6)

    base = chunked(make().spec)
    config = FPOConfig(scratch=True, lanes=16, samples=4, core=CORE, policy=ScratchConfig(width=32))
    for steps in (2000, 4000):
        with Run.create(tmp_path / "run", {}, spec=base.spec, resume=True) as run:
            session = SessionConfig(steps=steps, evaluations=1, eval_episodes=20)
            policy = fpo.finetune(base, make, config, run, session=session)
    assert (policy.horizon, policy.obs_steps) == (1, 1)
    steps = [row["step"] for row in read_metrics(tmp_path / "run", "finetune")]
    assert steps == sorted(set(steps))
    assert steps[-1] >= 4000
    first, second = (fpo.make_actor(base, config, seed) for seed in (0, 1))
    learners = [OnPolicyLearner(actor, make(16), CORE) for actor in (first, second)]
    learners[0].iterate(0.0)
    tensors, numbers = learners[0].state()
    learners[1].restore({k: v.clone() for k, v in tensors.items()}, numbers)
    observation = {"state": torch.rand(3, 1, 4)}
    assert torch.equal(second.policy.encode(observation), first.policy.encode(observation))
    history = {"state": observation["state"].numpy()}
    np.testing.assert_array_equal(second.policy.plan(history), first.policy.plan(history))


def test_an_adaptive_rate_follows_the_divergence_of_every_minibatch(reach_env):
    env = reach_env(8, hold=True)
    core = replace(CORE, schedule="adaptive", epochs=1)
    learner = OnPolicyLearner(FPOActor(chunked(env.spec).requires_grad_(True), 8), env, core)
    seen = []
    learner._adapt_learning_rate = seen.append
    learner.iterate(0.0)
    assert seen[0] == 0
    assert len(set(seen)) == CORE.minibatches


def test_no_pair_outweighs_all_others(reach_env):
    """A pair whose loss fell by 90 has a ratio that no float holds."""
    env = reach_env(8, hold=True)
    actor = FPOActor(chunked(env.spec).requires_grad_(True), 8, config=FPOConfig(samples=3, average_first=False))
    learner = OnPolicyLearner(actor, env, replace(CORE, epochs=2, minibatches=1))
    rollout, score, calls = learner.collect(), actor.score, []

    def outlying(trace):
        calls.append(0)
        return score(trace) + (90.0 if len(calls) > 2 else 0.0)

    actor.score = outlying
    metrics = learner.update(rollout, 0.0)
    assert len(calls) == 3
    assert np.isfinite(list(metrics.values())).all()


def test_settings_that_the_help_names_for_learning_from_nothing_exist():
    words = field_texts(FPOConfig)["scratch"].rstrip(".").split()
    config = override(FPOConfig(), ["scratch=yes", *(word for word in words if "=" in word)])
    assert (config.relative, config.lanes, config.policy.sample_steps) == (True, 32, 5)
    assert (config.core.stagger, config.core.actor_learning_rate, config.core.anchor.weight) == (True, 3e-4, 0.01)


def test_a_bonus_for_an_entropy_that_is_not_known_is_refused(reach_env):
    env = reach_env(2)
    with pytest.raises(CapabilityError, match="FPOActor has no entropy"):
        OnPolicyLearner(FPOActor(chunked(env.spec), 2), env, replace(CORE, entropy_weight=0.01))
