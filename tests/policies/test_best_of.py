"""Choosing among a base's chunks: a known critic's best is taken, in the critic's own units."""

import numpy as np
import pytest
import torch
from torch import nn

from robot_rl.core.errors import CapabilityError, ConfigError, SpecMismatchError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.normalizer import Normalizer
from robot_rl.policies.best_of import BestOfConfig, BestOfPolicy, guide
from robot_rl.policies.checkpoint import load_policy, save_policy
from robot_rl.policies.chunk_critic import ChunkCritic, ChunkCriticConfig
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy

SPEC = Spec({"state": ArraySpec((3,))}, ArraySpec((2,), low=(-2.0, -4.0), high=(2.0, 4.0)), 10.0)
GOAL = torch.tensor([0.5, -1.0])


def normalizer(scale=1.0, center=0.0):
    made = Normalizer(SPEC)
    for name, buffer in made.named_buffers():
        buffer.fill_(scale if name.endswith("scale") else center)
    return made


class NoiseBase(nn.Module):
    """Chunks are its start noise, in the units of its own normaliser."""

    kind, closed_loop, base = "noise", False, None
    spec, obs_steps, horizon, execute_steps = SPEC, 2, 4, 2

    def __init__(self, scale=1.0):
        super().__init__()
        self.normalizer, self.calls = normalizer(scale), 0

    def seed(self, seed):
        pass

    def encode(self, history):
        assert history["state"].shape[1] == self.obs_steps
        return history["state"].flatten(1)

    def sample(self, cond, noise):
        self.calls += 1
        return noise

    def unnormalize_action(self, actions):
        return self.normalizer.unnormalize("action", actions)


class NearGoal(ChunkCritic):
    """Values chunks by how near their scored actions are to a goal, in the units of the spec."""

    def forward(self, state, actions, members=None):
        distance = (self.chunk(actions) - GOAL).square().sum((-1, -2)).sqrt()
        return -distance.expand(2, *distance.shape)


def history(count=300, steps=2):
    return {"state": np.random.default_rng(0).normal(size=(count, steps, 3)).astype(np.float32)}


def error(policy, steps=1):
    return float(np.linalg.norm(policy.plan(history())[:, :steps] - GOAL.numpy(), axis=(1, 2)).mean())


def known(candidates, temperature=0.0, steps=1, scale=3.0):
    critic = NearGoal(SPEC, ChunkCriticConfig(steps=steps), normalizer(scale, 0.25))
    policy = guide(NoiseBase(), critic, BestOfConfig(candidates=candidates, temperature=temperature))
    policy.seed(0)
    return policy


def test_a_known_critic_gets_its_best_chunk():
    policy = known(16)
    choice = policy.choose(history(50))
    values = policy.critic(choice.state, choice.candidates)[0]
    taken = policy.critic(choice.state, choice.action[:, None])[0, :, 0]
    torch.testing.assert_close(taken, values.amax(1))
    torch.testing.assert_close(policy.critic.action(choice.chunks), choice.action)


def test_error_falls_with_the_number_of_candidates():
    """For actions of two numbers about as N^(-1/2) (the sanity check of V-GPS)."""
    errors = {n: error(known(n)) for n in (1, 16, 256)}
    assert errors[16] / errors[256] == pytest.approx(4.0, rel=0.25)
    assert errors[1] > 2 * errors[16]


def test_high_temperature_is_the_base_and_a_low_one_the_best():
    base, best = error(known(1)), error(known(16))
    assert error(known(16, temperature=1e4)) == pytest.approx(base, rel=0.1)
    assert error(known(16, temperature=1e-3)) == pytest.approx(best, rel=0.1)
    assert best < error(known(16, temperature=0.5)) < base


def test_the_first_candidate_is_the_bases_own_plan():
    """A base that plans from the middle of the prior is offered as it is, beside candidates that differ."""
    base = NoiseBase()
    base.config = ChunkedConfig(start_scale=0.0)
    chunks = guide(base, NearGoal(SPEC, ChunkCriticConfig(steps=1, hidden=(8,))), BestOfConfig()).draw(history(5), 4)
    assert not chunks[:, 0].any()
    assert (chunks[:, 1:].flatten(1).std(1) > 0.5).all()


def test_other_statistics_than_the_bases_change_nothing():
    one, other = known(16, scale=3.0), known(16, scale=0.7)
    np.testing.assert_array_equal(one.plan(history(20)), other.plan(history(20)))
    chunks = torch.rand(50, 4, 2) * 2 - 1
    torch.testing.assert_close(other.critic.chunk(other.critic.action(chunks)), chunks[:, :1], atol=1e-6, rtol=0)


def test_a_base_that_only_plans_can_be_guided():
    class Planner(nn.Module):
        kind, closed_loop, base = "planner", False, None
        spec, obs_steps, horizon, execute_steps = SPEC, 1, 4, 2

        def seed(self, seed):
            self.generator = np.random.default_rng(seed)

        def plan(self, history):
            assert history["state"].shape[1] == 1
            return self.generator.normal(size=(len(history["state"]), 4, 2)).astype(np.float32)

    critic = NearGoal(SPEC, ChunkCriticConfig(steps=1, history=2), normalizer())
    policy = guide(Planner(), critic, BestOfConfig(candidates=16))
    policy.seed(0)
    assert policy.obs_steps == 2
    assert error(policy) == pytest.approx(error(known(16)), rel=0.15)


def test_all_lanes_and_candidates_are_drawn_in_one_call():
    policy = known(16)
    policy.plan(history(20))
    assert policy.base.calls == 1


def with_edits(scale=0.2, steps=2, **options):
    torch.manual_seed(0)
    critic = ChunkCritic(SPEC, ChunkCriticConfig(steps=steps, members=4, hidden=(16, 16)), normalizer(2.0))
    config = BestOfConfig(candidates=6, edits=3, edit_scale=scale, edit_hidden=(16,), **options)
    return BestOfPolicy(NoiseBase(), critic, config)


def test_edits_never_make_the_choice_worse_in_the_critics_eyes():
    policy = with_edits()
    choice = policy.choose(history(200))
    values = policy.critic(choice.state, choice.candidates).mean(0)
    taken = policy.critic(choice.state, choice.action[:, None]).mean(0)[:, 0]
    assert (taken >= values.amax(1) - 1e-5).all()
    assert 0 < choice.edited.float().mean() < 1
    changed = choice.chunks[choice.edited]
    torch.testing.assert_close(policy.critic.action(changed), choice.action[choice.edited])


def test_edits_are_small_and_stay_inside_the_bounds():
    policy = with_edits(scale=0.3)
    low, high = policy.critic.bounds()
    state, action = torch.randn(500, 3), torch.rand(500, 4) * (high - low) + low
    edited, _ = policy.editor(state, action, 10 * torch.randn(500, 4))
    assert ((edited - action).abs() <= 0.3 + 1e-6).all()
    assert ((edited >= low) & (edited <= high)).all()
    assert (edited == high).any()


def test_edits_can_be_held_over_steps():
    policy = with_edits(scale=0.3, edit_steps=1)
    assert policy.editor.noise_size == 2
    edited, _ = policy.editor(torch.randn(5, 3), torch.zeros(5, 4), torch.randn(5, 2))
    torch.testing.assert_close(edited[:, :2], edited[:, 2:])
    uneven = with_edits(scale=0.3, steps=3, edit_steps=2)
    edited, _ = uneven.editor(torch.randn(5, 3), torch.zeros(5, 6), torch.randn(5, 4))
    torch.testing.assert_close(edited[:, :2], edited[:, 2:4])
    assert not torch.allclose(edited[:, 2:4], edited[:, 4:])
    assert with_edits(edit_steps=9).editor.noise_size == 4
    with pytest.raises(ConfigError, match="negative"):
        with_edits(edit_steps=-1)


def test_without_scale_an_edit_changes_nothing_and_the_choice_is_best_of_n():
    policy, plain = with_edits(scale=0.0), with_edits()
    plain.config, plain.editor = BestOfConfig(candidates=6), None
    plain.critic.load_state_dict(policy.critic.state_dict())
    for one in (policy, plain):
        one.seed(3)
    action = torch.randn(7, 4).clamp(-1, 1)
    assert torch.equal(policy.editor(torch.randn(7, 3), action, torch.randn(7, 4))[0], action)
    np.testing.assert_array_equal(policy.plan(history(40)), plain.plan(history(40)))


def test_checkpoint_holds_base_critic_and_editor(tmp_path):
    torch.manual_seed(1)
    base = ChunkedPolicy(SPEC, ChunkedConfig(horizon=4, execute_steps=2, width=16, depth=1), normalizer(1.5))
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    critic = ChunkCritic(SPEC, ChunkCriticConfig(steps=3, history=2, members=3, hidden=(8,)), normalizer(2.0, 0.1))
    config = BestOfConfig(candidates=4, edits=2, edit_steps=3, execute_steps=3, sample_steps=3, choose_members=2)
    policy = BestOfPolicy(base, critic, config).eval()
    save_policy(policy, tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    assert (loaded.config, loaded.critic.config) == (policy.config, policy.critic.config)
    for one in (policy, loaded):
        one.seed(5)
    assert loaded.execute_steps == 3
    np.testing.assert_array_equal(loaded.plan(history(9)), policy.plan(history(9)))


def test_what_cannot_be_guided_is_refused():
    critic = ChunkCritic(SPEC, ChunkCriticConfig(steps=2))
    closed = NoiseBase()
    closed.closed_loop = True
    with pytest.raises(CapabilityError, match="closed-loop"):
        guide(closed, critic)
    other = Spec(SPEC.observation, ArraySpec((2,), unit="rad"), 10.0)
    with pytest.raises(SpecMismatchError):
        guide(NoiseBase(), ChunkCritic(Spec({"pose": ArraySpec((3,))}, other.action), ChunkCriticConfig()))
    with pytest.raises(ConfigError, match="only 4 actions"):
        guide(NoiseBase(), ChunkCritic(SPEC, ChunkCriticConfig(steps=5)))
    with pytest.raises(CapabilityError, match="generative head"):
        guide(NoiseBase(), critic, BestOfConfig(sample_steps=3))
