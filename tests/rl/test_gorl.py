"""Generative online RL: identity decoder is PPO, decoders stand still within a stage, refits keep what was learned."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.policies.checkpoint import load_policy
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
from robot_rl.policies.diagonal import DiagonalConfig
from robot_rl.policies.scratch import ScratchConfig, flow_from_scratch
from robot_rl.policies.steered import SteeredPolicy, SteeredPolicyConfig
from robot_rl.rl.methods import gorl
from robot_rl.rl.methods.gorl import GoRLConfig, RefitConfig, refit_decoder
from robot_rl.rl.methods.ppo import GaussianActor, make_policy
from robot_rl.rl.on_policy.learner import OnPolicyConfig, OnPolicyLearner
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run, read_metrics
from robot_rl.train.trainer import TrainConfig

CORE = OnPolicyConfig(
    rollout_steps=8, epochs=4, minibatches=4, target_kl=0.0, actor_learning_rate=2e-3, value_hidden=(16,),
    warmup_iterations=0, schedule="constant",
)  # fmt: skip
LATENT = SteeredPolicyConfig(bound=1.0, squashed=False, hidden=(32, 32))
REFIT = RefitConfig(
    decisions=2000, train=TrainConfig(steps=1200, batch_size=256, learning_rate=5e-3, precision="fp32", warmup_steps=20)
)


def clone(spec, head="flow", width=16):
    torch.manual_seed(0)
    config = ChunkedConfig(head, "plain", obs_steps=1, horizon=4, execute_steps=2, sample_steps=4, width=width)
    policy = ChunkedPolicy(spec, config)
    with torch.no_grad():
        policy.head.backbone.net[-1].weight.normal_(0, 0.3)
    return policy


def steered(base, lanes=8, config=None, directory=None, seed=0):
    torch.manual_seed(seed)
    config = config or GoRLConfig(lanes=lanes, steering=LATENT, core=CORE)
    return gorl.make_actor(base, config, seed, directory)


def fingerprint(module):
    parts = (value.detach().numpy().tobytes() for value in module.state_dict().values())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_identity_decoder_is_gaussian_ppo(reach_env):
    def make():
        return reach_env(8, radius=0.3, limit=9)

    config = GoRLConfig(scratch=True, lanes=8, steering=LATENT, core=CORE)
    ours = gorl.make_actor(make(), config, 5)
    policy = make_policy(make().spec, DiagonalConfig(hidden=(32, 32)))
    policy.mean.load_state_dict(ours.policy.actor.mean.state_dict())
    theirs = GaussianActor(policy, 8, seed=5)
    learners = [OnPolicyLearner(actor, make(), CORE, seed=5) for actor in (ours, theirs)]
    for i in range(4):
        rollouts = [learner.collect() for learner in learners]
        torch.testing.assert_close(rollouts[0].trace["noise"], rollouts[1].trace["u"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rollouts[0].reward, rollouts[1].reward)
        losses = [learner.update(rollout, i / 4) for learner, rollout in zip(learners, rollouts, strict=True)]
        for name in ("policy_loss", "value_loss", "kl", "clipped", "entropy"):
            assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-3, abs=1e-6), name
    assert losses[0]["kl"] > 1e-4
    # What is saved is the same policy as well: its mean, through a decoder of zero velocity.
    ours.policy.config = replace(LATENT, deterministic=True)
    history = {"state": np.random.default_rng(0).uniform(-1, 1, (6, 1, 4)).astype(np.float32)}
    np.testing.assert_allclose(ours.policy.plan(history), policy.plan(history), atol=1e-4)


def test_decoder_is_a_constant_of_the_stage(reach_env):
    env = reach_env(8, hold=True, radius=0.3, limit=8)
    base = clone(env.spec)
    before = fingerprint(base)
    actor = steered(base)
    noise_policy = fingerprint(actor.policy.actor)
    learner = OnPolicyLearner(actor, env, CORE)
    for i in range(3):
        learner.iterate(i / 3)
    assert fingerprint(actor.policy.base) == before
    assert fingerprint(base) == before
    assert fingerprint(actor.policy.actor) != noise_policy
    assert all(p.grad is None for p in actor.policy.base.parameters())


def test_new_noise_policy_is_the_base(reach_env):
    base = clone(reach_env(1).spec)
    policy = SteeredPolicy(base, LATENT)
    history = {"state": np.random.default_rng(0).uniform(-1, 1, (6, 1, 4)).astype(np.float32)}
    policy.seed(3)
    steered_chunks = policy.plan(history)
    noise = torch.randn(6, 8, generator=torch.Generator().manual_seed(3)).view(6, 4, 2)
    np.testing.assert_array_equal(steered_chunks, base.plan(history, noise))


def test_density_and_distance_to_the_prior(reach_env):
    actor = steered(clone(reach_env(1).spec))
    latent = actor.policy.actor
    with torch.no_grad():
        latent.mean[-1].weight.normal_(0, 0.3)
        latent.log_std.uniform_(-0.5, 0.5)
    state = torch.rand(5, actor.policy.state_size)
    normal = torch.distributions.Normal(latent.mode(state), latent.log_std.exp())
    noise, density = latent(state, torch.randn(5, 8))
    torch.testing.assert_close(density, normal.log_prob(noise).sum(-1))
    torch.testing.assert_close(latent.log_prob(state, noise), density, rtol=1e-4, atol=1e-5)
    distance = actor.divergence_to_base({"cond": state})
    prior = torch.distributions.Normal(torch.zeros(8), torch.ones(8))
    torch.testing.assert_close(distance, torch.distributions.kl_divergence(normal, prior).sum(-1))
    distance.sum().backward()  # through mean and deviation, for a sampled noise would carry no gradient
    assert latent.mean[-1].weight.grad.abs().max() > 0
    assert latent.log_std.grad.abs().max() > 0
    torch.testing.assert_close(actor.entropy({}), normal.entropy().sum(-1)[0])


def test_anchor_keeps_the_noise_near_the_prior(reach_env):
    env = reach_env(16, hold=True, radius=0.4, limit=8)
    norms = {}
    for weight in (0.0, 10.0):
        core = replace(CORE, anchor=replace(CORE.anchor, weight=weight))
        actor = steered(clone(env.spec), 16, GoRLConfig(lanes=16, steering=LATENT, core=core))
        learner = OnPolicyLearner(actor, env, core)
        for i in range(6):
            learner.iterate(i / 6)
        cond = torch.rand(100, actor.policy.state_size)
        norms[weight] = actor.divergence_to_base({"cond": cond}).mean().item()
    assert norms[10.0] < 0.2 * norms[0.0]


def two_modes(count, generator):
    side = (torch.rand(count, 1, 1, generator=generator) < 0.5).float() * 2 - 1
    return 0.6 * side + 0.05 * torch.randn(count, 1, 1, generator=generator)


def payoff(actions):
    return (-((actions.abs() - 0.6) ** 2) / 0.08).exp()


def test_refit_covers_both_modes_and_keeps_the_return(tmp_path, reach_env):
    spec = reach_env(1, size=1).spec
    torch.manual_seed(0)
    decoder = flow_from_scratch(spec, ScratchConfig(width=48, start_scale=1.0))
    generator = torch.Generator().manual_seed(0)
    cond, chunk = torch.rand(3000, 2, generator=generator), two_modes(3000, generator)
    noise = torch.randn(2000, 1, 1, generator=generator)
    untrained = decoder.sample(cond[:2000], noise).detach()
    assert torch.equal(untrained, noise)
    refit_decoder(decoder, {"cond": cond, "chunk": chunk}, REFIT, tmp_path / "first")
    actions = decoder.sample(cond[:2000], noise).detach()
    near = (actions.abs() - 0.6).abs() < 0.2
    assert near.float().mean() > 0.85
    assert 0.4 < (actions[near] > 0).float().mean() < 0.6
    assert payoff(untrained).mean() < 0.5
    assert payoff(actions).mean() > payoff(chunk).mean() - 0.12
    first = fingerprint(decoder)
    refit_decoder(decoder, {"cond": cond, "chunk": chunk}, replace(REFIT, fresh=True), tmp_path / "first")
    assert fingerprint(decoder) != first


def test_stage_ends_with_the_decoder_holding_what_was_learned(tmp_path, reach_env):
    env = reach_env(64, hold=True, radius=0.35, limit=4)
    config = GoRLConfig(scratch=True, stages=2, lanes=64, steering=LATENT, refit=REFIT, core=CORE)
    torch.manual_seed(0)
    actor = gorl.make_actor(env, config, 0, tmp_path)
    learner = OnPolicyLearner(actor, env, CORE)
    start = learner.iterate(0.0)["reward"]
    decoder, iterations = fingerprint(actor.policy.base.head), 24
    for i in range(1, iterations):
        last = learner.iterate(0.49 * i / iterations)
        assert last["refits"] == 0
    assert fingerprint(actor.policy.base.head) == decoder
    assert learner.iterate(0.5)["refits"] == 1
    assert fingerprint(actor.policy.base.head) != decoder
    assert actor.policy.actor.log_std.abs().max() == 0
    normalizer = fingerprint(actor.policy.base.normalizer)
    again = learner.iterate(0.6)  # with noise from the prior
    assert np.isfinite(again["policy_loss"])
    assert last["reward"] > 2 * start
    assert again["reward"] > 0.75 * last["reward"]
    assert fingerprint(actor.policy.base.normalizer) == normalizer
    tensors, numbers = learner.state()
    other = OnPolicyLearner(gorl.make_actor(env, config, 1, tmp_path), env, CORE)
    other.restore({k: v.clone() for k, v in tensors.items()}, numbers)
    assert other.actor.stage == 1
    assert fingerprint(other.policy) == fingerprint(actor.policy)


def test_decisions_of_an_earlier_stage_do_not_outweigh_all_others(reach_env):
    env = reach_env(8)
    actor = steered(clone(env.spec))
    learner = OnPolicyLearner(actor, env, replace(CORE, epochs=2, minibatches=1))
    rollout, score, loss, scored, seen = learner.collect(), actor.score, learner._policy_loss, [], []

    def foreign(trace):
        scored.append(0)
        return score(trace) + (50.0 if len(scored) > 2 else 0.0)  # as if another Gaussian had drawn the noise

    def watched(part, log_ratio, *more):
        seen.append(log_ratio.abs().max().item())
        return loss(part, log_ratio, *more)

    actor.score, learner._policy_loss = foreign, watched
    learner.update(rollout, 0.0)
    assert seen == [pytest.approx(0, abs=1e-5), 3.0]


def test_what_cannot_be_steered_is_refused(reach_env):
    spec = reach_env(1).spec
    policy = make_policy(spec, DiagonalConfig())
    with pytest.raises(CapabilityError, match=r"steering needs a chunked policy with one of these heads: .*flow"):
        gorl.make_actor(policy, GoRLConfig(), 0)
    with pytest.raises(CapabilityError, match=r"gorl needs a chunked policy with one of these heads: .*flow"):
        gorl.make_actor(policy, GoRLConfig(stages=2), 0)
    gorl.make_actor(clone(spec, "diffusion"), GoRLConfig(), 0)
    with pytest.raises(ConfigError, match="squashed"):
        GoRLConfig(steering=SteeredPolicyConfig())
    with pytest.raises(ConfigError, match="stages"):
        GoRLConfig(stages=0)
    with pytest.raises(ConfigError, match="directory"):
        gorl.make_actor(clone(spec), GoRLConfig(stages=2), 0)


def test_base_is_improved_and_is_a_policy_again(tmp_path, reach_env, fake_base):
    def make(num_envs=1):
        return reach_env(num_envs, hold=True, radius=0.12, limit=6)

    base = fake_base(make().spec, offset=0.11, noise_gain=0.1, hold=True)
    config = GoRLConfig(lanes=32, steering=replace(LATENT, noise_steps=1), core=CORE)
    for steps in (6000, 12_000):
        with Run.create(tmp_path / "run", {}, spec=base.spec, resume=True) as run:
            session = SessionConfig(steps=steps, evaluations=2, eval_episodes=100)
            policy = gorl.finetune(base, make, config, run, session=session)
    rows = read_metrics(tmp_path / "run", "eval")
    assert max(row["success"] for row in rows[1:]) > rows[0]["success"] + 0.15
    steps = [row["step"] for row in read_metrics(tmp_path / "run", "finetune")]
    assert steps == sorted(set(steps))
    assert steps[-1] >= 12_000
    loaded = load_policy(tmp_path / "run" / "checkpoints" / "best")
    assert loaded.kind == "steered"
    history = {"state": np.random.default_rng(0).uniform(-0.5, 0.5, (5, 2, 4)).astype(np.float32)}
    policy.seed(1)
    expected = policy.plan(history)
    loaded.seed(1)
    np.testing.assert_array_equal(loaded.plan(history), expected)
