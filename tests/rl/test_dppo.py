"""DPPO: what its card says tells a right implementation from a wrong one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from chain_bandit import BEST, BanditEnv, history, scrambled, small_policy

from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.policies.chain import ChainPolicy, ChainPolicyConfig
from robot_rl.policies.checkpoint import load_policy, save_policy
from robot_rl.rl.methods.dppo import DPPOActor, DPPOConfig, finetune
from robot_rl.rl.on_policy.learner import OnPolicyConfig, OnPolicyLearner
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run, read_metrics

CORE = OnPolicyConfig(
    rollout_steps=4, epochs=4, minibatches=2, value_hidden=(16,), clip=0.05, actor_learning_rate=3e-3, target_kl=0.0
)


@pytest.fixture(scope="module")
def clone():
    return small_policy("diffusion")


def make_actor(base, lanes=8, policy=None, **options):
    options = {"first_clip": 0.05, "sample_std": 0.1, "score_std": 0.1, **options}
    config = DPPOConfig(policy=policy or ChainPolicyConfig(tuned_steps=2), core=CORE, **options)
    chain = ChainPolicy(base, config.policy)
    chain.tuned.requires_grad_(True)
    return DPPOActor(chain, lanes, config)


def trace_of(actor, lanes=8):
    actor.plan(history(lanes))
    return actor.trace


def test_new_policy_is_the_base_bit_for_bit(clone):
    policy = ChainPolicy(clone, ChainPolicyConfig(tuned_steps=3))
    clone.seed(5)
    policy.seed(5)
    np.testing.assert_array_equal(policy.plan(history(6)), clone.plan(history(6)))


def test_iterates_before_the_tuned_steps_do_not_depend_on_the_tuned_network(clone):
    policy = ChainPolicy(clone, ChainPolicyConfig(steps=8, tuned_steps=3))
    cond, noise = torch.zeros(5, 1), torch.randn(5, 3, 1)
    before = policy.walk(cond, noise, 1.0, 0.1, torch.Generator().manual_seed(0))
    scrambled(policy.tuned)
    after = policy.walk(cond, noise, 1.0, 0.1, torch.Generator().manual_seed(0))
    assert before.shape == (5, 4, 3, 1)
    assert torch.equal(before[:, 0], after[:, 0])
    assert (before[:, 1:] - after[:, 1:]).abs().flatten(2).amax(-1).min() > 1e-4


def test_weights_and_clips_run_from_the_noisiest_step_to_the_last(clone):
    policy = ChainPolicy(clone, ChainPolicyConfig(steps=20, tuned_steps=10))
    actor = DPPOActor(policy, 2, DPPOConfig(policy=policy.config))
    weight, clip = actor.inner_weight(), actor.inner_clip(0.01)
    assert weight[0].item() == pytest.approx(0.9135, abs=1e-4)
    assert weight[-2:].tolist() == pytest.approx([0.99, 1.0])
    assert clip[[0, -1]].tolist() == pytest.approx([0.001, 0.01])
    assert (clip.diff() > 0).all()
    assert clip[5].item() == pytest.approx(0.001 + 0.009 * np.expm1(3 * 5 / 9) / np.expm1(3))
    linear = DPPOActor(policy, 2, DPPOConfig(policy=policy.config, clip_growth=0.0)).inner_clip(0.01)
    torch.testing.assert_close(linear, torch.linspace(0.001, 0.01, 10))


def test_deviations_are_those_of_the_schedules():
    ddpm = small_policy("diffusion", steps=20, train_steps=0, levels=20).head
    std = ddpm.chain_step(torch.zeros(20, 3, 1), torch.arange(20), torch.zeros(20, 1), eta=1.0)[1].flatten()
    assert std[-1] == 0
    assert std[-2].item() == pytest.approx(0.076, abs=5e-4)
    ddim = small_policy("diffusion", steps=5, train_steps=0).head
    std = ddim.chain_step(torch.zeros(5, 3, 1), torch.arange(5), torch.zeros(5, 1), eta=1.0)[1].flatten()
    assert std[-1] == 0
    assert std[-2].item() == pytest.approx(0.025, abs=5e-4)


def test_steps_densities_sum_to_the_joint_density_of_the_chain(clone):
    actor = make_actor(clone, policy=ChainPolicyConfig(steps=5, tuned_steps=3), score_std=0.05)
    scrambled(actor.policy.tuned, 0.02)
    trace = trace_of(actor)
    joint = torch.zeros(8)
    for k in range(3):  # one step at a time, from the definition
        index = torch.full((8,), 2 + k)
        chain = trace["chain"]
        mean, std = actor.policy.tuned.chain_step(chain[:, k], index, trace["cond"], 5, eta=1.0)
        distribution = torch.distributions.Normal(mean, std.clamp_min(0.05).expand_as(mean))
        joint += distribution.log_prob(chain[:, k + 1]).sum((1, 2))
    torch.testing.assert_close(actor.log_prob(trace).sum((1, 2, 3)), joint, atol=1e-4, rtol=1e-4)
    executed = actor.log_prob(trace)[:, :, :2].sum((2, 3)) / 2
    torch.testing.assert_close(actor.score(trace), executed)


def test_sampling_and_scoring_have_floors_of_their_own(clone):
    actor = make_actor(clone, 4000, ChainPolicyConfig(tuned_steps=1), sample_std=0.04, score_std=0.1)
    trace = trace_of(actor, 4000)
    mean, std = actor.moments(trace)
    noise = trace["chain"][:, 1:] - mean
    assert noise.std().item() == pytest.approx(0.04, rel=0.03)
    assert std.unique().tolist() == pytest.approx([0.1])
    with pytest.raises(ConfigError, match="score_std"):
        DPPOConfig(score_std=0.0)


@pytest.mark.parametrize("tuned_steps", [1, 2, 4])
def test_ratio_is_one_and_a_single_step_works(clone, tuned_steps):
    actor = make_actor(clone, policy=ChainPolicyConfig(tuned_steps=tuned_steps))
    trace = trace_of(actor)
    with torch.no_grad():
        assert torch.equal(actor.score(trace), actor.score(trace))
    assert actor.score(trace).shape == (8, tuned_steps)
    assert torch.isfinite(actor.inner_clip(0.01)).all()
    learner = OnPolicyLearner(actor, BanditEnv(8), replace(CORE, warmup_iterations=0, epochs=1, minibatches=1))
    metrics = learner.iterate(0.0)  # the core asserts the ratio
    assert metrics["kl"] == 0
    assert metrics["clipped"] == 0
    assert all(np.isfinite(value) for value in metrics.values())


def test_bandit_moves_only_the_tuned_network(clone):
    actor = make_actor(clone, 32)
    frozen = {name: value.clone() for name, value in actor.policy.base.state_dict().items()}
    learner = OnPolicyLearner(actor, BanditEnv(32), CORE)
    for i in range(30):
        learner.iterate(i / 30)
    assert all(torch.equal(value, frozen[name]) for name, value in actor.policy.base.state_dict().items())
    executed = actor.policy.plan({"state": np.zeros((200, 1, 1), np.float32)})[:, :2]
    assert abs(executed.mean() - 0.3) > 0.2
    assert abs(executed.mean() - BEST) < 0.08


def test_ddpm_is_tuned_and_evaluated_with_its_own_noise():
    base = small_policy("diffusion", steps=10, levels=10)
    actor = make_actor(base, 32, ChainPolicyConfig(tuned_steps=3, eta=1.0))
    learner = OnPolicyLearner(actor, BanditEnv(32), CORE)
    rewards = [learner.iterate(i / 20)["reward"] for i in range(20)]
    assert np.mean(rewards[-3:]) > 0.7 * np.mean(rewards[:3])  # the rewards are negative
    policy, cond, noise = actor.policy, torch.zeros(4, 1), torch.zeros(4, 3, 1)
    assert not torch.equal(policy.sample(cond, noise), policy.sample(cond, noise))


def test_divergence_to_the_base_is_the_mean_log_ratio_of_the_chains(clone):
    actor = make_actor(clone, 20_000)
    actor.plan({"state": np.zeros((100, 1, 1), np.float32)})
    assert actor.divergence_to_base(actor.trace).abs().max() == 0
    base = make_actor(clone, 1)
    scrambled(actor.policy.tuned, 0.03)
    actor.plan({"state": np.zeros((20_000, 1, 1), np.float32)})
    with torch.no_grad():
        ratio = (actor.log_prob(actor.trace) - base.log_prob(actor.trace)).sum((1, 2, 3))
        divergence = actor.divergence_to_base(actor.trace)
    assert divergence.mean() > 0.05
    assert divergence.mean().item() == pytest.approx(ratio.mean().item(), abs=4 * ratio.std().item() / 20_000**0.5)


def test_divergence_from_a_snapshot_is_the_mean_log_ratio_of_its_chains(clone):
    old, new = make_actor(clone), make_actor(clone)
    scrambled(new.policy.tuned, 0.03)
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


def test_composite_survives_saving(clone, tmp_path):
    policy = ChainPolicy(clone, ChainPolicyConfig(steps=6, tuned_steps=2))
    scrambled(policy.tuned)
    loaded = load_policy(save_policy(policy, tmp_path / "policy"))
    assert isinstance(loaded, ChainPolicy)
    for each in (policy, loaded, clone):
        each.seed(3)
    plans = [each.plan(history(5)) for each in (policy, loaded, clone)]
    np.testing.assert_array_equal(plans[0], plans[1])
    assert np.abs(plans[0] - plans[2]).max() > 1e-3


def test_other_heads_are_refused_with_those_that_can():
    with pytest.raises(CapabilityError, match="one of these heads: diffusion; this is a FlowHead"):
        ChainPolicy(small_policy("flow", train_steps=0), ChainPolicyConfig())
    with pytest.raises(ConfigError, match=r"tuned_steps=5 is outside 1\.\.4"):
        ChainPolicy(small_policy("diffusion", train_steps=0), ChainPolicyConfig(tuned_steps=5))


def test_run_continues_and_its_best_policy_loads(clone, tmp_path):
    config = DPPOConfig(lanes=16, policy=ChainPolicyConfig(tuned_steps=2), core=CORE, first_clip=0.05)
    for steps, resume in ((1500, False), (3000, True)):
        session = SessionConfig(steps=steps, evaluations=2, eval_episodes=20)
        with Run.create(tmp_path / "run", {"method": "dppo"}, spec=clone.spec, resume=resume) as run:
            policy = finetune(clone, BanditEnv, config, run, session=session)
    rows = read_metrics(tmp_path / "run", "eval")
    assert max(row["return"] for row in rows) > rows[0]["return"] + 0.02
    loaded = load_policy(tmp_path / "run" / "checkpoints" / "best")
    for each in (policy, loaded):
        each.seed(1)
    np.testing.assert_array_equal(loaded.plan(history(4)), policy.plan(history(4)))
