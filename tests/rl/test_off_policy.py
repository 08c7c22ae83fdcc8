"""The off-policy core: what the cards say tells right from wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.policies.chain import ChainPolicy, ChainPolicyConfig
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
from robot_rl.policies.gaussian import SquashedGaussian
from robot_rl.policies.steered import SteeredPolicy, SteeredPolicyConfig
from robot_rl.rl.critics import EnsembleCritic
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.methods.dsrl import DSRLConfig, ExecutedChunk, NoiseBehaviour, finetune, make_core
from robot_rl.rl.off_policy.collector import Collector, make_replay
from robot_rl.rl.off_policy.core import OffPolicyConfig, OffPolicyCore
from robot_rl.rl.off_policy.learner import OffPolicyLearner
from robot_rl.rl.off_policy.proposals import AliasedNoiseProposal, GaussianProposal
from robot_rl.rl.session import SessionConfig
from robot_rl.rollout.evaluate import evaluate
from robot_rl.train.run import Run

SMALL = {"hidden": (32, 32), "batch_size": 64, "precision": "fp32"}


def rows(slices, size, state=3, action=2, seed=0, **fixed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(slices, size, *shape, generator=generator)

    batch = {"state": normal(state), "action": normal(action).tanh(), "reward": normal(), "next_state": normal(state)}
    batch |= {k: torch.full((slices, size), v) for k, v in (("terminated", 0.0), ("exponent", 1.0), ("weight", 1.0))}
    return batch | {k: torch.full((slices, size), v) for k, v in fixed.items()}


def make_gaussian_core(state=3, action=2, seed=0, **options):
    torch.manual_seed(seed)
    actor = SquashedGaussian(state, action, (32, 32))
    return OffPolicyCore(state, action, GaussianProposal(actor), OffPolicyConfig(**{**SMALL, **options}), seed)


def test_batched_critic_equals_members_one_by_one():
    torch.manual_seed(0)
    critic = EnsembleCritic(3, 2, members=5, hidden=(16, 8))
    state, action = torch.randn(7, 3), torch.randn(7, 2)
    together = critic(state, action)
    assert together.shape == (5, 7)
    for k in range(5):
        x = torch.cat([state, action], dim=-1)
        for weight, bias in zip(critic.net.weights[:-1], critic.net.biases[:-1], strict=True):
            x = torch.nn.functional.layer_norm(x @ weight[k] + bias[k], weight.shape[-1:]).relu()
        alone = (x @ critic.net.weights[-1][k] + critic.net.biases[-1][k]).squeeze(-1)
        torch.testing.assert_close(together[k], alone)
    torch.testing.assert_close(critic(state, action, torch.tensor([3, 1])), together[[3, 1]])


def test_target_matches_hand_computation():
    core = make_gaussian_core(critics=3, subset=2, discount=0.9, entropy_backup=True, initial_temperature=0.5)
    batch = {k: v[0] for k, v in rows(1, 6).items()}
    batch["exponent"], batch["weight"] = torch.tensor([1.0, 2, 3, 1, 1, 8]), torch.tensor([1.0, 0, 2, 1, 1, 1])
    batch["terminated"] = torch.tensor([0.0, 0, 0, 1, 0, 0])
    eps, members = torch.randn(6, 2), torch.tensor([2, 0])
    with torch.no_grad():
        action, log_prob = core.proposal.actor(batch["next_state"], eps)
        value = core.target(batch["next_state"], action)[[2, 0]].min(0).values - 0.5 * log_prob
        target = batch["reward"] + 0.9 ** batch["exponent"] * (1 - batch["terminated"]) * value
        error = core.critic(batch["state"], batch["action"]) - target
        expected = 0.5 * (batch["weight"] * error**2).mean(1).sum()
    torch.testing.assert_close(core.critic_loss(batch, eps, members), expected)


def test_squashed_density_integrates_to_one():
    actor = SquashedGaussian(1, 1, (8,))
    state = torch.zeros(1, 1)
    mean, log_std = actor.distribution(state)
    action = torch.linspace(-0.9999, 0.9999, 20001)
    pre = action.atanh()
    eps = (pre - mean[0]) / log_std[0].exp()
    got, log_prob = actor(state.expand(len(action), 1), eps[:, None])
    torch.testing.assert_close(got[:, 0], action, atol=1e-5, rtol=1e-4)
    assert torch.trapezoid(log_prob.exp(), action).item() == pytest.approx(1.0, abs=2e-3)


def test_constant_reward_values_the_geometric_series():
    core = make_gaussian_core(
        discount=0.8, entropy_backup=False, critic_learning_rate=5e-3, tau=0.1, critics=2, subset=2
    )
    for i in range(15):
        core.update(rows(20, 64, seed=i, reward=1.0))
    batch = rows(1, 64, seed=99)
    assert core.critic(batch["state"][0], batch["action"][0]).mean().item() == pytest.approx(5.0, rel=0.05)


def test_entropy_in_the_backup_is_worth_its_own_geometric_series():
    """Beside the rewards, every later step is worth the discounted entropy of what the actor does there."""
    discount, temperature = 0.8, 2.0
    fixed = {"actor_learning_rate": 0.0, "temperature_learning_rate": 0.0, "initial_temperature": temperature}
    core = make_gaussian_core(discount=discount, critic_learning_rate=5e-3, tau=0.1, reduce="mean", **fixed)
    for i in range(15):
        core.update(rows(20, 64, seed=i, reward=1.0))
    batch = rows(1, 4000, seed=99)
    with torch.no_grad():
        entropy = -core.proposal.actor(batch["next_state"][0], torch.randn(4000, 2))[1].mean().item()
        value = core.critic(batch["state"][0], batch["action"][0]).mean().item()
    assert entropy > 0.5
    assert value == pytest.approx((1 + discount * temperature * entropy) / (1 - discount), rel=0.04)


class PlainSAC:
    """SAC (arXiv 1801.01290, with two critics 1812.05905) in PyTorch's own layers, from the weights of a core."""

    def __init__(self, core):
        members = range(core.config.critics)
        self.critics = [plain_network(core.critic.net, k) for k in members]
        self.targets = [plain_network(core.critic.net, k) for k in members]
        self.actor = plain_network(core.proposal.actor.net, 0)
        self.log_temperature = core.log_temperature.detach().clone().requires_grad_()
        self.config, self.target_entropy = core.config, -0.5 * core.action_size
        trained = [self.actor, *self.critics]
        parameters = [self.log_temperature, *(p for network in trained for p in network.parameters())]
        self.optimizer = torch.optim.Adam(parameters, 3e-3)

    def sample(self, state, eps):
        mean, log_std = self.actor(state).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.exp())
        pre = mean + log_std.exp() * eps
        return pre.tanh(), (normal.log_prob(pre) - (1 - pre.tanh() ** 2).log()).sum(-1)

    def least(self, critics, state, action):
        return torch.cat([critic(torch.cat([state, action], -1)) for critic in critics], -1).amin(-1)

    def update(self, batch, eps):
        temperature, done = self.log_temperature.exp().detach(), batch["terminated"]
        with torch.no_grad():
            action, log_prob = self.sample(batch["next_state"], eps[0])
            following = self.least(self.targets, batch["next_state"], action) - temperature * log_prob
            wanted = batch["reward"] + self.config.discount * (1 - done) * following
        taken = torch.cat([batch["state"], batch["action"]], -1)
        critic_loss = sum(0.5 * (critic(taken).squeeze(-1) - wanted).square().mean() for critic in self.critics)
        action, log_prob = self.sample(batch["state"], eps[1])
        for network in self.critics:
            network.requires_grad_(False)
        actor_loss = (temperature * log_prob - self.least(self.critics, batch["state"], action)).mean()
        for network in self.critics:
            network.requires_grad_(True)
        entropy = -log_prob.detach().mean()
        self.optimizer.zero_grad()
        (critic_loss + actor_loss + self.log_temperature.exp() * (entropy - self.target_entropy)).backward()
        self.optimizer.step()
        for target, critic in zip(self.targets, self.critics, strict=True):
            for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                slow.data.lerp_(fast.data, self.config.tau)
        temperature = self.log_temperature.exp().item()
        losses = {"critic_loss": critic_loss.item(), "actor_loss": actor_loss.item()}
        return losses | {"temperature": temperature, "entropy": entropy.item()}


def plain_network(network, member):
    """Return a copy of one member of an ensemble, made of PyTorch's own layers."""
    layers = []
    for i, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        layers.append(torch.nn.Linear(*weight.shape[1:]))
        layers[-1].weight.data, layers[-1].bias.data = weight.data[member].T.clone(), bias.data[member, 0].clone()
        if i < len(network.weights) - 1:
            layers += [torch.nn.LayerNorm(weight.shape[-1])] if network.layer_norm else []
            layers.append(torch.nn.ReLU())
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("critics", [1, 2])
def test_as_many_members_as_the_backup_asks_is_plain_sac(critics):
    """One critic is SAC with a single one; two are SAC with clipped double Q: the same losses, update for update."""
    rates = dict.fromkeys(["critic_learning_rate", "actor_learning_rate", "temperature_learning_rate"], 3e-3)
    core = make_gaussian_core(critics=critics, subset=critics, actor_reduce="min", tau=0.05, discount=0.9, **rates)
    plain, generator = PlainSAC(core), torch.Generator().manual_seed(0)
    for i in range(10):
        batches = rows(1, 64, seed=i)
        batches["terminated"] = (batches["reward"] > 1).float()
        batch = {name: values[0] for name, values in batches.items()}
        eps = torch.randn(1, 2, 64, 2, generator=generator)[0]
        torch.rand(1, critics, generator=generator)  # the core's draw of members
        actor_loss = core.actor_loss(batch, eps[1])[0].item()  # an update reports it at the temperature that follows
        got, expected = core.update(batches) | {"actor_loss": actor_loss}, plain.update(batch, eps)
        assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_layer_norm_bounds_values_of_any_action():
    torch.manual_seed(0)
    state, action = torch.randn(50, 3), torch.randn(50, 2)
    for layer_norm in (True, False):
        critic = EnsembleCritic(3, 2, layer_norm=layer_norm)
        change = critic(state, 1e3 * action).abs().max() / critic(state, action).abs().max()
        assert (change.item() < 10) == layer_norm


def test_update_counts():
    core = make_gaussian_core(critics=10, subset=2, actor_every=20)
    before = [p.clone() for p in core.proposal.actor_parameters()]
    first = {k: v[:, :] for k, v in rows(19, 64).items()}
    core.update(first)
    assert all(torch.equal(a, b) for a, b in zip(before, core.proposal.actor_parameters(), strict=False))
    core.update(rows(1, 64, seed=1))
    assert core.updates == 20
    assert any(not torch.equal(a, b) for a, b in zip(before, core.proposal.actor_parameters(), strict=False))


def test_actor_update_leaves_the_critic_alone():
    core = make_gaussian_core()
    loss, _ = core.actor_loss({"state": torch.randn(8, 3)}, torch.randn(8, 2))
    loss.backward()
    assert all(p.grad is None for p in core.critic.parameters())
    assert all(p.grad is not None for p in core.proposal.actor_parameters())


def test_unreachable_entropy_is_refused():
    with pytest.raises(ConfigError, match="cannot be reached"):
        make_gaussian_core(target_entropy=1.4)  # 2 log 2 = 1.386


@pytest.mark.parametrize("reduce", ["min", "mean"])
def test_an_update_descends_by_the_gradient_of_its_losses(reduce):
    """The gradients at values and log-densities are written out; autograd's of the losses are what they must be."""
    options = {"critics": 3, "subset": 2, "actor_reduce": reduce, "initial_temperature": 0.3}
    core, twin = make_gaussian_core(**options), make_gaussian_core(**options)
    batches = rows(1, 16)
    batches["weight"] = torch.rand(1, 16)
    core.update(batches)
    eps = torch.randn(1, 2, 16, 2, generator=twin._generator)
    members = torch.rand(1, 3, generator=twin._generator).argsort(-1)[0, :2]
    batch = {name: values[0] for name, values in batches.items()}
    actor_loss, log_prob = twin.actor_loss(batch, eps[0, 1])
    (twin.critic_loss(batch, eps[0, 0], members) + actor_loss).backward()
    twin.log_temperature.grad = (-twin.log_temperature.exp() * (log_prob + twin.target_entropy)).detach()
    for one, two in zip(core._trained, twin._trained, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


def test_bf16_learns_the_same():
    values = []
    for precision in ("fp32", "bf16"):
        core = make_gaussian_core(
            discount=0.9, entropy_backup=False, critic_learning_rate=3e-3, tau=0.05, precision=precision
        )
        for i in range(8):
            core.update(rows(20, 64, seed=i, reward=1.0))
        batch = rows(1, 64, seed=99)
        values.append(core.critic(batch["state"][0], batch["action"][0]).mean().item())
    assert values[0] == pytest.approx(values[1], rel=0.05)


# ---- latent steering ------------------------------------------------------------------------------------------------


def steered(env, fake_base, bound=1.5, **options):
    torch.manual_seed(0)
    base = fake_base(env.spec, horizon=1, execute_steps=1, **options)
    policy = SteeredPolicy(base, SteeredPolicyConfig(bound=bound, hidden=(32, 32), deterministic=True))
    policy.actor.requires_grad_(True)
    return policy


def losses(behaviour, env, core, scale):
    """Collect and learn for a while; returns the losses. ``scale`` maps the stored action to the environment's."""
    collector = Collector(env, behaviour, DecisionConfig(), seed=5)
    replay = make_replay(4, 2, {"online": 1000}, seed=0)
    found = []
    for _ in range(3):
        behaviour.learning = True
        collector.collect(replay, 20)
        found.append(core.update(replay.sample(5, 64, {"online": 1.0})))
    return found, replay


def test_dsrl_with_an_identity_denoiser_is_sac_with_scaled_actions(reach_env, fake_base):
    bound = 0.5
    policy = steered(reach_env(1), fake_base, bound, fold="identity")
    config = OffPolicyConfig(**SMALL, target_entropy=0.0)
    core = make_core(policy, DSRLConfig(variant="plain", core=config), seed=1)
    behaviour = NoiseBehaviour(policy, "plain")
    policy.seed(2)
    got, replay = losses(behaviour, reach_env(8), core, bound)

    torch.manual_seed(0)
    actor = SquashedGaussian(4, 2, (32, 32), layer_norm=True)
    core_sac = OffPolicyCore(4, 2, GaussianProposal(actor), config, 1)
    core_sac.critic.load_state_dict(dict(core_sac.critic.state_dict().items()))
    generator = torch.Generator().manual_seed(2)

    class ScaledSAC(NoiseBehaviour):
        @torch.no_grad()
        def plan(self, history):
            state = torch.from_numpy(history["state"][:, -1].copy())
            action = actor(state, torch.randn(len(state), 2, generator=generator))[0]
            self.record = {"state": state, "action": action}
            return (bound * action)[:, None].numpy()

    expected, other = losses(ScaledSAC(policy, "plain"), reach_env(8), core_sac, bound)
    torch.testing.assert_close(replay.rows, other.rows)
    for one, two in zip(got, expected, strict=False):
        assert one == pytest.approx(two, rel=1e-5)


def test_aliased_noise_gets_equal_values_from_one_sided_data(reach_env, fake_base):
    """The denoiser is |w|: Q^A learned from executed actions gives Q^W(-w) = Q^W(w)."""
    torch.manual_seed(0)
    actor = SquashedGaussian(4, 2, (32, 32), layer_norm=True)
    noise_critic = EnsembleCritic(4, 2, 2, (64, 64))
    proposal = AliasedNoiseProposal(actor, noise_critic, lambda cond, noise: noise.abs(), bound=1.5)
    config = OffPolicyConfig(
        batch_size=256, hidden=(64, 64), critic_learning_rate=3e-3, discount=0.0, target_entropy=0.0
    )
    core = OffPolicyCore(4, 2, proposal, config, 0)
    for i in range(25):
        batch = rows(10, 256, state=4, seed=i, terminated=1.0)
        batch["action"] = batch["action"].atanh().clamp(-3, 3).abs()
        batch["reward"] = batch["action"].sum(-1)
        core.update(batch)
    state, noise = torch.randn(200, 4), torch.randn(200, 2).clamp(-1.5, 1.5) / 1.5
    with torch.no_grad():
        plus, minus = noise_critic(state, noise), noise_critic(state, -noise)
    assert (plus - minus).abs().mean() < 0.25 * plus.std()
    truth = 1.5 * noise.abs().sum(-1)
    assert np.corrcoef(plus.mean(0), truth)[0, 1] > 0.9


def test_plain_steering_learns_nothing_of_noises_that_give_the_same_action():
    """As above without the second critic: what Q(w) learns from noises above 0 it does not know below."""
    torch.manual_seed(0)
    actor = SquashedGaussian(4, 2, (32, 32), layer_norm=True)
    config = OffPolicyConfig(
        batch_size=256, hidden=(64, 64), critic_learning_rate=3e-3, discount=0.0, target_entropy=0.0, precision="fp32"
    )
    core = OffPolicyCore(4, 2, GaussianProposal(actor), config, 0)
    for i in range(25):
        batch = rows(10, 256, state=4, seed=i, terminated=1.0)
        executed = batch["action"].atanh().clamp(-1.5, 1.5).abs()
        core.update(batch | {"action": executed / 1.5, "reward": executed.sum(-1)})
    state, noise = torch.randn(200, 4), torch.randn(200, 2).clamp(-1.5, 1.5).abs() / 1.5
    with torch.no_grad():
        plus, minus = (core.critic(state, sign * noise).mean(0) for sign in (1, -1))
    truth = 1.5 * noise.sum(-1)
    assert np.corrcoef(plus, truth)[0, 1] > 0.9
    assert np.corrcoef(minus, truth)[0, 1] < 0.5
    assert (plus - minus).abs().mean() > plus.std()


def test_same_state_and_noise_give_the_same_actions(reach_env, fake_base):
    policy = steered(reach_env(1), fake_base, noise_gain=0.5)
    history = {"state": np.random.default_rng(0).normal(size=(4, 2, 4)).astype(np.float32)}
    np.testing.assert_array_equal(policy.plan(history), policy.plan(history))


def test_noise_stays_within_the_bound_except_in_distillation(reach_env, fake_base):
    policy = steered(reach_env(1), fake_base, bound=1.5)
    seen = []
    decode = ExecutedChunk(policy)

    def watched(cond, noise):
        seen.append(noise.abs().max().item())
        return decode(cond, noise)

    proposal = AliasedNoiseProposal(policy.actor, EnsembleCritic(4, 2), watched, 1.5)
    batch, critic = {"state": torch.randn(500, 4), "next_state": torch.randn(500, 4)}, EnsembleCritic(4, 2)
    proposal.backup(batch, 50 * torch.randn(500, 2), critic, critic)
    assert seen[-1] <= 1.5
    proposal.auxiliary_loss(batch, torch.randn(500, 2), critic)
    assert seen[-1] > 1.5


def test_frozen_base_gets_no_gradients(reach_env, fake_base):
    policy = steered(reach_env(1), fake_base)
    assert not any(p.requires_grad for p in policy.base.parameters())


def test_prior_noise_is_the_base(reach_env, fake_base):
    env = reach_env(1)
    base = fake_base(env.spec, noise_gain=0.3)
    policy = SteeredPolicy(base, SteeredPolicyConfig(prior=True))
    history = {"state": np.zeros((2000, 2, 4), np.float32)}
    policy.seed(0)
    steered_chunks, own = policy.plan(history), base.plan(history)
    np.testing.assert_allclose(steered_chunks.mean((0, 1)), own.mean((0, 1)), atol=0.02)
    np.testing.assert_allclose(steered_chunks.std((0, 1)), own.std((0, 1)), rtol=0.05)


@pytest.mark.parametrize(
    ("options", "equal"),
    [({"prior": True}, True), ({"squashed": False, "bound": 1.0}, True), ({"squashed": False, "bound": 0.5}, False)],
)
def test_steering_by_the_bases_own_noise_succeeds_as_often_as_the_base(reach_env, fake_base, options, equal):
    """A new unsquashed actor draws N(0, 1) times its bound; with half of it success is another, so this can fail."""
    env = reach_env(100, hold=True, radius=0.12, limit=6)
    base = fake_base(env.spec, noise_gain=0.3, hold=True)
    policy = SteeredPolicy(base, SteeredPolicyConfig(hidden=(8,), **options))
    alone, steered = (evaluate(one, env, 600, seed) for one, seed in ((base, 1_000_000), (policy, 2_000_000)))
    assert 0.2 < alone.success_rate < 0.6
    (low, high), (other_low, other_high) = alone.success_interval, steered.success_interval
    assert (low <= other_high and other_low <= high) is equal


def test_plain_variant_refuses_demonstrations(reach_env, fake_base):
    policy = steered(reach_env(1), fake_base)
    with pytest.raises(CapabilityError, match="'na' can"):
        NoiseBehaviour(policy, "plain").action(np.zeros((1, 1, 2)))


def test_sampling_steps_of_a_base_that_has_none_are_refused(reach_env, fake_base, tmp_path):
    env = reach_env(1)
    with Run.create(tmp_path, {}, spec=env.spec) as run, pytest.raises(CapabilityError, match="sample_steps needs"):
        finetune(fake_base(env.spec), reach_env, DSRLConfig(sample_steps=2), run, session=SessionConfig(steps=10))


def test_squashed_gaussian_gradient_against_autograd():
    actor = SquashedGaussian(3, 2, (16,))
    state, eps = torch.randn(20, 3), torch.randn(20, 2)
    mean, log_std = actor.distribution(state)
    pre = mean + log_std.exp() * eps
    gaussian = torch.distributions.Normal(mean, log_std.exp()).log_prob(pre)
    expected = (gaussian - (1 - pre.tanh() ** 2).log()).sum(-1)
    action, log_prob = actor(state, eps)
    torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn(20)
    ours = torch.autograd.grad((action.sum(-1) * weight + log_prob * weight**2).sum(), list(actor.parameters()))
    theirs = torch.autograd.grad((pre.tanh().sum(-1) * weight + expected * weight**2).sum(), list(actor.parameters()))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_truncation_and_exponent_reach_the_target():
    """A time limit does not end the return, and a chunk of k steps discounts by gamma to the k."""
    core = make_gaussian_core(discount=0.5, entropy_backup=False)
    batch = {k: v[0] for k, v in rows(1, 4, reward=0.0).items()}
    batch |= {"exponent": torch.tensor([1.0, 2.0, 3.0, 1.0]), "terminated": torch.tensor([0.0, 0.0, 0.0, 1.0])}
    for parameter in core.target.parameters():
        parameter.data.zero_()
    core.target.net.biases[-1].data.fill_(8.0)
    for parameter in core.critic.parameters():
        parameter.data.zero_()
    loss = core.critic_loss(batch, torch.randn(4, 2), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(2 * 0.5 * np.mean(np.square([4.0, 2.0, 1.0, 0.0])))


def test_first_updates_train_the_critic_alone():
    core = make_gaussian_core(critic_updates=5, initial_temperature=0.5, actor_learning_rate=1e-3)
    actor = core.proposal.actor_parameters()
    before, critic = [p.detach().clone() for p in actor], core.critic.net.biases[-1].detach().clone()
    metrics = core.update(rows(5, 64))
    assert not torch.equal(core.critic.net.biases[-1], critic)
    assert all(torch.equal(a, b) for a, b in zip(before, actor, strict=True))
    assert metrics["temperature"] == pytest.approx(0.5)
    assert "actor_loss" not in metrics
    core.update(rows(1, 64, seed=1))
    steps = torch.cat([(a - b).abs().flatten() for a, b in zip(before, actor, strict=True)])
    # The first step of Adam has the size of its rate: the updates before it left no trace in the actor's moments.
    assert steps.max().item() == pytest.approx(1e-3, rel=0.01)
    assert core.log_temperature.item() != pytest.approx(np.log(0.5), abs=1e-6)


def test_updates_leave_no_graph_behind():
    """A target that remembers how it was averaged would grow with every update."""
    core = make_gaussian_core(actor_average=0.9)
    core.update(rows(3, 32))
    assert not any(tensor.requires_grad for tensor in [*core.target.parameters(), *core.average])


def test_metrics_hold_the_mean_value_of_the_batch():
    core = make_gaussian_core()
    batch = rows(1, 64)
    with torch.no_grad():
        expected = core.critic(batch["state"][0], batch["action"][0]).mean().item()
    assert core.update(batch)["value"] == pytest.approx(expected, abs=1e-5)


def test_the_critics_own_updates_come_before_the_behaviour_changes(reach_env, fake_base):
    policy = steered(reach_env(1), fake_base, noise_gain=0.3)
    config = OffPolicyConfig(
        **SMALL, target_entropy=0.0, start_steps=128, critic_updates=40, updates_per_step=0.02, initial_temperature=0.1
    )
    core, behaviour = make_core(policy, DSRLConfig(core=config), seed=1), NoiseBehaviour(policy, "plain")
    before = [p.detach().clone() for p in policy.actor.parameters()]
    replay = make_replay(4, 2, {"online": 1000}, seed=0)
    collector = Collector(reach_env(8), behaviour, DecisionConfig(), seed=5)
    learner = OffPolicyLearner(policy, collector, core, replay, {"online": 1.0})
    while not core.updates:
        assert policy.config.prior  # what is evaluated till then is the base
        learner.iterate(0.0)
    assert core.updates == 40
    assert behaviour.learning
    assert not policy.config.prior
    assert all(torch.equal(a, b) for a, b in zip(before, policy.actor.parameters(), strict=True))
    learner.iterate(0.0)
    assert core.updates == 41
    assert not all(torch.equal(a, b) for a, b in zip(before, policy.actor.parameters(), strict=True))


def test_the_actors_average_is_evaluated_and_saved_and_the_actor_itself_acts(reach_env, fake_base):
    policy = steered(reach_env(1), fake_base, noise_gain=0.3)
    config = OffPolicyConfig(**SMALL, target_entropy=0.0, start_steps=128, updates_per_step=0.1, actor_average=0.75)
    core, behaviour = make_core(policy, DSRLConfig(core=config), seed=1), NoiseBehaviour(policy, "plain")
    replay = make_replay(4, 2, {"online": 1000}, seed=0)
    learner = OffPolicyLearner(
        policy, Collector(reach_env(8), behaviour, DecisionConfig(), 5), core, replay, {"online": 1.0}
    )
    while core.updates < 20:
        learner.iterate(0.0)
    averaged = learner.policy
    assert averaged is not policy
    assert averaged.config == policy.config
    assert all(torch.equal(a, b) for a, b in zip(averaged.actor.parameters(), core.average, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(policy.actor.parameters(), core.average, strict=True))
    tensors, numbers = learner.state()
    other = make_core(steered(reach_env(1), fake_base, noise_gain=0.3), DSRLConfig(core=config), seed=2)
    other.restore(tensors, numbers)
    assert all(torch.equal(a, b) for a, b in zip(core.average, other.average, strict=True))


def test_the_average_moves_by_its_decay_with_every_update_of_the_actor():
    core = make_gaussian_core(actor_average=0.9, critic_updates=2)
    actor = core.proposal.actor_parameters()
    expected = [p.detach().clone() for p in actor]
    for k in range(6):
        core.update(rows(1, 32, seed=k))
        if k >= 2:
            expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, actor, strict=True)]
    for mine, wanted in zip(core.average, expected, strict=True):
        torch.testing.assert_close(mine, wanted)
    with pytest.raises(ConfigError, match="actor_average"):
        make_gaussian_core(actor_average=1.0)


def test_policies_that_draw_noise_in_every_step_cannot_be_steered(reach_env):
    spec = reach_env(1).spec
    shape = ChunkedConfig("diffusion", "plain", obs_steps=1, horizon=4, execute_steps=2, sample_steps=4, width=16)
    base = ChunkedPolicy(spec, shape)
    SteeredPolicy(base, SteeredPolicyConfig())
    SteeredPolicy(ChainPolicy(base, ChainPolicyConfig(tuned_steps=2)), SteeredPolicyConfig())
    noisy = ChunkedPolicy(spec, replace(shape, head_options={"eta": 0.5}))
    with pytest.raises(CapabilityError, match=r"this is a DiffusionHead with eta=0\.5"):
        SteeredPolicy(noisy, SteeredPolicyConfig())
    chain = ChainPolicy(base, ChainPolicyConfig(tuned_steps=2, eta=1.0))
    with pytest.raises(CapabilityError, match="this is a ChainPolicy with eta=1"):
        SteeredPolicy(chain, SteeredPolicyConfig())
