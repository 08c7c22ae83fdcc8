"""EXPO: edits of a frozen base's chunks, chosen on the fly; the sanity checks of its card."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from robot_rl.core.errors import ConfigError
from robot_rl.policies.best_of import BestOfConfig
from robot_rl.policies.checkpoint import load_policy
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.methods import expo
from robot_rl.rl.off_policy.best_of import make_best_of
from robot_rl.rl.off_policy.collector import Collector, make_replay
from robot_rl.rl.off_policy.core import OffPolicyConfig
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run, read_metrics

CORE = OffPolicyConfig(
    critics=4, subset=2, hidden=(32, 32), batch_size=64, precision="fp32", entropy_backup=False, initial_temperature=0.1
)
CHOICE = BestOfConfig(
    candidates=4, edits=4, edit_scale=0.3, edit_hidden=(32, 32), execute_steps=1, choose_by="min", choose_members=2
)


def made(reach_env, fake_base, choice=CHOICE, core=CORE, **base):
    torch.manual_seed(0)
    return make_best_of(fake_base(reach_env().spec, noise_gain=0.3, **base), choice, core, "target", 0)


def rows(size, slices=None, seed=0, kept=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"state": (8,), "action": (2,), "reward": (), "next_state": (8,), "next_candidates": (kept, 2)}
    lead = (size,) if slices is None else (slices, size)
    batch = {k: 0.5 * torch.randn(*lead, *shape, generator=generator) for k, shape in shapes.items()}
    batch |= {name: batch[name].clamp(-1, 1) for name in ("action", "next_candidates")}
    return batch | {k: torch.full(lead, v) for k, v in (("terminated", 0.0), ("exponent", 1.0), ("weight", 1.0))}


def randomised(core):
    """Give online critic and target opinions of their own."""
    for parameter in [*core.critic.parameters(), *core.target.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)


def test_without_scale_only_entropy_moves_the_edit(reach_env, fake_base):
    policy, _, core = made(reach_env, fake_base, replace(CHOICE, edit_scale=0.0))
    batch, eps = rows(64), torch.randn(64, core.proposal.noise_size)
    edited, _ = policy.editor(batch["state"], batch["action"], eps[:, 4:6])
    assert torch.equal(edited, batch["action"])
    parameters = core.proposal.actor_parameters()
    got = torch.autograd.grad(core.actor_loss(batch, eps)[0], parameters)
    _, log_prob = core.proposal.value(batch, eps, core.critic)
    for one, two in zip(got, torch.autograd.grad(0.1 * log_prob.mean(), parameters), strict=True):
        torch.testing.assert_close(one, two)


def test_without_scale_the_backup_is_that_of_best_of_n(reach_env, fake_base):
    """Members of the target choose, others value; edits of scale 0 add nothing."""
    _, _, core = made(reach_env, fake_base, replace(CHOICE, edit_scale=0.0))
    randomised(core)
    batch, eps = rows(64), torch.randn(64, core.proposal.noise_size)
    pair = eps[0, :4].argsort()[:2]
    each = [core.target(batch["next_state"], batch["next_candidates"][:, i], pair).amin(0) for i in range(4)]
    best = batch["next_candidates"][torch.arange(64), torch.stack(each).argmax(0)]
    action, log_prob = core.proposal.backup(batch, eps, core.critic, core.target)
    assert torch.equal(action, best)
    assert not log_prob.any()


def test_the_pair_that_chooses_is_drawn_anew_and_apart_from_the_pair_that_values(reach_env, fake_base):
    _, _, core = made(reach_env, fake_base)
    randomised(core)
    batch, asked = rows(8), []

    def watched(state, action, members=None):
        asked.append(members.tolist())
        return torch.zeros(len(members), len(state))

    for _ in range(300):
        core.proposal.backup(batch, torch.randn(8, core.proposal.noise_size), core.critic, watched)
    pairs = {tuple(sorted(pair)) for pair in asked}
    assert len(pairs) == 6
    assert all(len(set(pair)) == 2 for pair in asked)


def test_the_choice_is_never_worse_than_the_bases_best_on_the_pair_that_chose(reach_env, fake_base):
    _, _, core = made(reach_env, fake_base)
    randomised(core)
    batch, eps = rows(256), torch.randn(256, core.proposal.noise_size)
    pair = eps[0, :4].argsort()[:2]
    action, _ = core.proposal.backup(batch, eps, core.critic, core.target)
    value = core.target(batch["next_state"], action, pair).amin(0)
    each = [core.target(batch["next_state"], batch["next_candidates"][:, i], pair).amin(0) for i in range(4)]
    best = torch.stack(each).amax(0)
    assert (value >= best - 1e-5).all()
    assert (value > best + 1e-5).any()


def test_gradients_do_not_leak(reach_env, fake_base):
    policy, _, core = made(reach_env, fake_base)
    batch, eps = rows(64), torch.randn(64, core.proposal.noise_size)
    core.actor_loss(batch, eps)[0].backward()
    assert all(p.grad is None for p in core.critic.parameters())
    assert all(p.grad is not None for p in policy.editor.parameters())
    for parameter in policy.editor.parameters():
        parameter.grad = None
    core.critic_loss(batch, eps, torch.tensor([0, 1])).backward()
    assert all(p.grad is None for p in [*policy.editor.parameters(), *core.target.parameters()])
    assert not any(p.requires_grad for p in policy.base.parameters())


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_the_temperature_settles_for_every_scale(reach_env, fake_base, scale):
    """Its target is the entropy of edits of this scale; -d/2 itself is out of reach below 0.303."""
    core = replace(CORE, temperature_learning_rate=0.03, actor_learning_rate=3e-3)
    _, _, made_core = made(reach_env, fake_base, replace(CHOICE, edit_scale=scale), core)
    temperature = [made_core.update(rows(32, 25, seed=i))["temperature"] for i in range(10)]
    assert made_core.target_entropy == pytest.approx(2 * math.log(scale) - 1)
    assert max(temperature) < 0.3  # out of reach, it would have grown a thousandfold


def test_an_entropy_that_no_edit_of_this_scale_has_is_refused(reach_env, fake_base):
    with pytest.raises(ConfigError, match=r"2 numbers in \(-0.05, 0.05\) have an entropy of at most -4.6"):
        made(reach_env, fake_base, replace(CHOICE, edit_scale=0.05), replace(CORE, target_entropy=-1.0))
    made(reach_env, fake_base, replace(CHOICE, edit_scale=0.31), replace(CORE, target_entropy=-1.0))


def test_density_of_the_scaled_edit(reach_env, fake_base):
    """Over edits of one number, the density integrates to one in the edit's own units."""
    policy, _, _ = made(reach_env, fake_base, replace(CHOICE, edit_scale=0.2))
    state, action = torch.zeros(1, 8), torch.zeros(1, 2)
    actor = policy.editor.actor
    mean, log_std = actor.distribution(torch.cat([state, action], dim=-1))
    edit = torch.linspace(-0.19999, 0.19999, 20001)
    eps = torch.zeros(len(edit), 2)
    eps[:, 0] = ((edit / 0.2).atanh() - mean[0, 0]) / log_std[0, 0].exp()
    edited, log_prob = policy.editor(state.expand(len(edit), 8), action.expand(len(edit), 2), eps)
    torch.testing.assert_close(edited[:, 0], edit, atol=1e-5, rtol=1e-4)
    fixed = torch.distributions.Normal(mean[0, 1], log_std[0, 1].exp()).log_prob(mean[0, 1])
    other = fixed - (1 - mean[0, 1].tanh() ** 2).log() - math.log(0.2)  # density of the number that is held
    assert torch.trapezoid((log_prob - other).exp(), edit).item() == pytest.approx(1.0, abs=5e-3)


class TwoModes(torch.nn.Module):
    """Plans -0.5 or +0.5, each half of the time."""

    kind, closed_loop, base = "two_modes", False, None
    obs_steps, horizon, execute_steps = 1, 1, 1

    def __init__(self, spec, normalizer):
        super().__init__()
        self.spec, self.normalizer = spec, normalizer

    def seed(self, seed):
        pass

    def encode(self, history):
        return history["state"].flatten(1)

    def sample(self, cond, noise):
        return 0.5 * noise.sign()

    def unnormalize_action(self, actions):
        return actions


def test_two_modes_and_a_best_action_beside_one_of_them(reach_env, fake_base):
    """Best is 0.6, the base offers -0.5 and 0.5, edits reach 0.2 further: the mean goes to 0.6 and never between."""
    env = reach_env(1, size=1)
    torch.manual_seed(0)
    base = TwoModes(env.spec, fake_base(env.spec).normalizer)
    choice = replace(CHOICE, candidates=8, edit_scale=0.2)
    core = replace(CORE, critic_learning_rate=2e-3, actor_learning_rate=2e-3, initial_temperature=0.01, discount=0.0)
    policy, behaviour, core = make_best_of(base, choice, core, "target", 0, backup_candidates=1)
    behaviour.learning = True
    history = {"state": np.zeros((64, 1, 2), np.float32)}
    replay = make_replay(core.state_size, 1, {"online": 5000}, 0, behaviour.extra_fields)
    seen = []
    for i in range(40):
        behaviour.plan(history)
        record = behaviour.record
        ends = {name: torch.ones(64) for name in ("terminated", "exponent", "weight")}
        row = {"state": record["state"], "next_state": record["state"], "action": record["action"]} | ends
        row |= {"next_candidates": record["candidates"], "truncated": torch.zeros(64)}
        replay.add("online", row | {"reward": -(record["action"][:, 0] - 0.6).abs()})
        core.update(replay.sample(10, 64, {"online": 1.0}))
        if i >= 20:
            seen.append(record["action"][:, 0])
    seen = torch.cat(seen)
    assert (seen.abs() > 0.25).all()
    assert (seen[-320:] > 0).float().mean() > 0.97  # one plan in 256 is not offered the better mode at all
    plans = policy.plan(history)
    assert plans[plans > 0].mean() == pytest.approx(0.6, abs=0.04)


def test_what_is_stored_is_what_was_executed(reach_env, fake_base):
    """Edits beyond the bounds are clipped before the critic sees them, as the environment would."""
    policy, behaviour, core = made(reach_env, fake_base, replace(CHOICE, edit_scale=1.0), offset=0.8, hold=True)
    behaviour.learning = True
    replay = make_replay(core.state_size, core.action_size, {"online": 500}, 0, behaviour.extra_fields)
    executed = []
    env = reach_env(8, hold=True, limit=6)
    step = env.step
    env.step = lambda actions: executed.append(actions.copy()) or step(actions)
    Collector(env, behaviour, DecisionConfig(), 0).collect(replay, 20)
    stored = replay.all("online")["action"]
    assert stored.abs().max() <= 1.0
    assert (stored.abs() == 1.0).any()
    played = {tuple(np.round(a, 5)) for actions in executed for a in actions}
    assert all(tuple(np.round(a, 5)) in played for a in stored.numpy())
    assert policy.execute_steps == 1


def test_edits_reach_what_the_base_never_does(tmp_path, reach_env, fake_base):
    """The base misses every goal by more than the radius and hardly varies; only edits succeed."""

    def make(num_envs=1):
        return reach_env(num_envs, hold=True, radius=0.15, limit=6)

    base = fake_base(make().spec, offset=0.2, noise_gain=0.02, hold=True)
    learning = {"start_steps": 400, "updates_per_step": 0.2, "critic_learning_rate": 2e-3, "actor_learning_rate": 2e-3}
    core = replace(CORE, **learning, initial_temperature=0.02)
    config = expo.ExpoConfig(lanes=16, core=core, choice=replace(CHOICE, edit_scale=0.35), backup_candidates=2)
    with Run.create(tmp_path / "run", {}, spec=base.spec) as run:
        session = SessionConfig(steps=2600, evaluations=2, eval_episodes=50)
        policy = expo.finetune(base, make, config, run, session=session)
    rows = read_metrics(tmp_path / "run", "eval")
    assert rows[0]["success"] < 0.1
    assert max(row["success"] for row in rows[1:]) > 0.7
    loaded = load_policy(tmp_path / "run" / "checkpoints" / "best")
    history = {"state": np.random.default_rng(0).uniform(-0.5, 0.5, (5, 2, 4)).astype(np.float32)}
    for one in (policy, loaded):
        one.seed(1)
    np.testing.assert_array_equal(loaded.plan(history), policy.plan(history))


def test_no_edits_is_another_method(tmp_path, reach_env, fake_base):
    base = fake_base(reach_env().spec)
    config = expo.ExpoConfig(choice=BestOfConfig())
    with Run.create(tmp_path / "run", {}, spec=base.spec) as run, pytest.raises(ConfigError, match="'qchunk'"):
        expo.finetune(base, reach_env, config, run, session=SessionConfig(steps=1))
