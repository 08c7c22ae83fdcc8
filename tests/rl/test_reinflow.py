"""ReinFlow: what its card says tells a right implementation from a wrong one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from chain_bandit import BEST, BanditEnv, history, scrambled, small_policy

from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.policies.checkpoint import load_policy
from robot_rl.policies.chunked import ChunkedPolicy
from robot_rl.rl.methods.reinflow import NoiseConfig, ReinFlowActor, ReinFlowConfig, finetune, trainable_flow
from robot_rl.rl.on_policy.anchor import AnchorConfig
from robot_rl.rl.on_policy.learner import OnPolicyConfig, OnPolicyLearner
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run, read_metrics

CORE = OnPolicyConfig(
    rollout_steps=4, epochs=4, minibatches=2, value_hidden=(16,), clip=0.05, actor_learning_rate=3e-3, target_kl=0.0
)


@pytest.fixture(scope="module")
def clone():
    return small_policy("flow")


def make_actor(base, lanes=8, steps=4, **options):
    config = ReinFlowConfig(steps=steps, **{"core": CORE, **options})
    return ReinFlowActor(trainable_flow(base, steps), lanes, config)


def trace_of(actor, lanes=8, still=False):
    actor.plan({"state": np.zeros((lanes, 1, 1), np.float32)} if still else history(lanes))
    return actor.trace


@pytest.mark.parametrize("steps", [1, 4])
def test_new_policy_is_the_base_at_its_number_of_steps(clone, steps):
    policy = trainable_flow(clone, steps)
    assert policy.config.sample_steps == steps
    cond, noise = torch.randn(5, 1), torch.randn(5, 3, 1)
    with torch.no_grad():
        assert torch.equal(policy.sample(cond, noise), clone.head.sample(cond, noise, steps).actions)
    midpoint = small_policy("flow", train_steps=0, solver="midpoint")
    assert trainable_flow(midpoint, 0).head.solver == "euler"


def test_without_noise_exploration_gives_the_bases_euler_samples(clone):
    actor = make_actor(clone, noise=NoiseConfig(std_min=1e-7, std_max=1e-7))
    trace = trace_of(actor)
    with torch.no_grad():
        expected = clone.head.sample(trace["cond"], trace["chain"][:, 0], 4).actions
    torch.testing.assert_close(trace["chain"][:, -1], expected, atol=1e-5, rtol=1e-5)


def test_noise_stays_inside_its_bounds_whatever_the_weights(clone):
    actor = make_actor(clone, noise=NoiseConfig(std_min=0.05, std_max=0.2))
    assert actor.noise(torch.zeros(2, 1)).unique().tolist() == pytest.approx([0.1])
    scrambled(actor.noise, 5.0)
    std = actor.noise(100 * torch.randn(500, 1))
    assert std.min().item() == pytest.approx(0.05, rel=1e-3)
    assert std.max().item() == pytest.approx(0.2, rel=1e-3)
    assert std.min() > 0.05 - 1e-6
    assert std.max() < 0.2 + 1e-6
    with pytest.raises(ConfigError, match="std_min <= std_max"):
        NoiseConfig(std_min=0.2, std_max=0.1)


def test_upper_bound_is_held_and_then_falls_along_a_cosine(clone):
    config = NoiseConfig(std_min=0.1, std_max=0.2, hold=0.35, keep=0.7)
    assert config.upper(0.0) == config.upper(0.35) == pytest.approx(0.2)
    assert config.upper(1.0) == pytest.approx(0.17)
    assert config.upper(0.675) == pytest.approx(0.185)
    actor = make_actor(clone, noise=config)
    assert actor.end_iteration(trace_of(actor), 0.675)["noise_std"] == pytest.approx(math.sqrt(0.02))
    resumed = make_actor(clone, noise=config)
    resumed.restore(actor.state())
    assert resumed.noise.high == pytest.approx(0.185)


def test_density_is_exactly_that_of_the_chain(clone):
    actor = make_actor(clone)
    scrambled(actor.noise)
    scrambled(actor.head, 0.02)
    trace = trace_of(actor)
    chain, std = trace["chain"], actor.noise(trace["cond"])
    joint = torch.zeros(8)
    for k in range(4):  # step by step, with time written out: t = 1, 3/4, 1/2, 1/4
        velocity = actor.head.backbone(chain[:, k], torch.full((8,), 1 - k / 4), trace["cond"])
        distribution = torch.distributions.Normal(chain[:, k] - velocity / 4, std[:, k])
        joint += distribution.log_prob(chain[:, k + 1]).sum((1, 2))
    density = actor.log_prob(trace)
    torch.testing.assert_close(density.sum((1, 2, 3)), joint, atol=1e-4, rtol=1e-4)
    counted = (density.sum((1, 2, 3)) - density[:, -1, 2].sum(-1)) / (4 * 3 - 1)  # all but what is never executed
    torch.testing.assert_close(actor.score(trace)[:, 0], counted)


@pytest.mark.parametrize("steps", [1, 4])
def test_ratio_is_one_on_the_one_time_grid(clone, steps):
    actor = make_actor(clone, steps=steps)
    learner = OnPolicyLearner(actor, BanditEnv(8), replace(CORE, warmup_iterations=0, epochs=1, minibatches=1))
    metrics = learner.iterate(0.0)  # the core asserts the ratio
    assert metrics["kl"] == 0
    assert actor.score(trace_of(actor)).shape == (8, 1)
    noise = (actor.trace["chain"][:, 1:] - actor.moments(actor.trace)[0]) / actor.noise(actor.trace["cond"])
    assert 0.5 < noise.std() < 1.5  # with another grid than that of sampling the residual is the drift instead


def test_bandit_is_learned_and_the_base_stays(clone):
    actor = make_actor(clone, 32, noise=NoiseConfig(std_min=0.08, std_max=0.16))
    frozen = {name: value.clone() for name, value in clone.state_dict().items()}
    learner = OnPolicyLearner(actor, BanditEnv(32), CORE)
    for i in range(30):
        metrics = learner.iterate(i / 30)
    assert all(torch.equal(value, frozen[name]) for name, value in clone.state_dict().items())
    executed = actor.policy.plan({"state": np.zeros((200, 1, 1), np.float32)})[:, :2]
    assert abs(executed.mean() - BEST) < 0.08
    assert 0.08 <= metrics["noise_std"] <= 0.16


def test_divergence_to_the_base_is_the_mean_log_ratio_of_the_chains(clone):
    actor, base = make_actor(clone), make_actor(clone)
    assert actor.divergence_to_base(trace_of(actor)).abs().max() < 1e-5
    scrambled(actor.head, 0.02)
    scrambled(actor.noise, 0.3)
    trace = trace_of(actor, 20_000, still=True)
    with torch.no_grad():
        ratio = (actor.log_prob(trace) - base.log_prob(trace)).sum((1, 2, 3))
        divergence = actor.divergence_to_base(trace)
    assert divergence.mean() > 0.05
    assert divergence.mean().item() == pytest.approx(ratio.mean().item(), abs=4 * ratio.std().item() / 20_000**0.5)


def test_divergence_from_a_snapshot_is_the_mean_log_ratio_of_its_chains(clone):
    old, new = make_actor(clone), make_actor(clone)
    scrambled(new.head, 0.02)
    scrambled(new.noise, 0.3)
    old.plan({"state": np.zeros((20_000, 1, 1), np.float32)})
    with torch.no_grad():
        snapshot = old.snapshot(old.trace)
        assert old.divergence_from(snapshot, old.trace).abs().max() == 0
        ratio = (old.log_prob(old.trace) - new.log_prob(old.trace)).sum((1, 2, 3))
        divergence = new.divergence_from(snapshot, old.trace)
    assert divergence.mean() > 0.05
    assert divergence.mean().item() == pytest.approx(ratio.mean().item(), abs=4 * ratio.std().item() / 20_000**0.5)


def test_adaptive_step_sizes_keep_the_divergence_near_its_target(clone):
    core = replace(CORE, schedule="adaptive", schedule_kl=0.05, actor_learning_rate=3e-3)
    learner = OnPolicyLearner(make_actor(clone, 16), BanditEnv(16), core)
    metrics = [learner.iterate(0.0) for _ in range(8)]
    assert min(row["learning_rate"] for row in metrics) < 1e-3
    assert 0.005 < np.mean([row["kl"] for row in metrics[-3:]]) < 0.5


def test_same_noise_distance_compares_noiseless_chunks():
    still = small_policy("flow", train_steps=0)  # its velocity is zero everywhere
    actor = make_actor(still, anchor_form="same_noise")
    trace = trace_of(actor)
    assert actor.divergence_to_base(trace).abs().max() == 0
    scrambled(actor.noise)
    assert actor.divergence_to_base(trace).abs().max() == 0
    with torch.no_grad():
        actor.head.backbone.leave.bias += 0.2  # a constant velocity moves every chunk by as much
    distance = actor.divergence_to_base(trace)
    assert distance.detach().tolist() == pytest.approx([0.04] * 8, rel=1e-4)
    distance.mean().backward()
    assert actor.head.backbone.leave.bias.grad.abs().min() > 0


def test_a_strong_anchor_keeps_the_policy_at_the_base(clone):
    moved = {}
    for weight in (0.0, 10.0):
        actor = make_actor(clone, 16, core=replace(CORE, anchor=AnchorConfig(weight=weight)))
        learner = OnPolicyLearner(actor, BanditEnv(16), actor.config.core)
        for i in range(8):
            learner.iterate(i / 8)
        cond, noise = torch.zeros(50, 1), torch.randn(50, 3, 1, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            difference = actor.policy.sample(cond, noise) - clone.head.sample(cond, noise, 4).actions
        moved[weight] = difference.mean().item()
    assert moved[0.0] > 0.05
    assert abs(moved[10.0]) < moved[0.0] / 4


def test_other_heads_are_refused_with_those_that_can():
    with pytest.raises(CapabilityError, match="one of these heads: flow; this is a DiffusionHead"):
        trainable_flow(small_policy("diffusion", train_steps=0), 4)


def test_run_continues_and_its_best_policy_is_a_chunked_one(clone, tmp_path):
    config = ReinFlowConfig(lanes=16, core=CORE)
    for steps, resume in ((1500, False), (3000, True)):
        session = SessionConfig(steps=steps, evaluations=2, eval_episodes=20)
        with Run.create(tmp_path / "run", {"method": "reinflow"}, spec=clone.spec, resume=resume) as run:
            policy = finetune(clone, BanditEnv, config, run, session=session)
    rows = read_metrics(tmp_path / "run", "eval")
    assert max(row["return"] for row in rows) > rows[0]["return"] + 0.02
    loaded = load_policy(tmp_path / "run" / "checkpoints" / "best")
    assert type(loaded) is ChunkedPolicy
    for each in (policy, loaded):
        each.seed(1)
    np.testing.assert_array_equal(loaded.plan(history(4)), policy.plan(history(4)))
