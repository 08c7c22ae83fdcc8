"""The off-policy residual: n-step rows, the base untouched, corrections that mean what was executed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.data.frames import Frames
from robot_rl.policies.checkpoint import load_policy, save_policy
from robot_rl.policies.residual import ResidualPolicy, ResidualPolicyConfig
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.methods.residual_offpolicy import (
    CorrectionBehaviour,
    CorrectionProposal,
    ResidualOffPolicyConfig,
    finetune,
)
from robot_rl.rl.off_policy.collector import Collector, add_demonstrations, make_replay
from robot_rl.rl.off_policy.core import OffPolicyCore
from robot_rl.rl.off_policy.n_step import NStepRows
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run, read_metrics

SMALL = ResidualPolicyConfig(squashed=True, hidden=(16,), scale=0.2)


def step(reward, lanes, terminated=0.0, truncated=0.0):
    """Rows of one step of ``lanes``; the state is the reward's number, the next state one more."""
    column = torch.full((len(lanes), 1), float(reward))
    numbers = {
        "reward": float(reward),
        "terminated": terminated,
        "truncated": truncated,
        "exponent": 1.0,
        "weight": 1.0,
    }
    rows = {name: torch.full((len(lanes),), value) for name, value in numbers.items()}
    return torch.tensor(lanes), rows | {"state": column, "action": -column, "next_state": column + 1}


def test_n_step_rows_by_hand():
    rows = NStepRows(2, 3, discount=0.5)
    assert len(rows.push(*step(1, [0]))["reward"]) == 0
    assert len(rows.push(*step(2, [0, 1]))["reward"]) == 0
    found = rows.push(*step(4, [0]))
    assert found["state"].tolist() == [[1]]
    assert found["action"].tolist() == [[-1]]
    assert found["reward"].tolist() == [1 + 0.5 * 2 + 0.25 * 4]
    assert found["next_state"].tolist() == [[5]]
    assert found["exponent"].tolist() == [3]
    found = rows.push(*step(8, [0], terminated=1.0))
    assert found["state"].flatten().tolist() == [2, 4, 8]
    assert found["reward"].tolist() == [2 + 0.5 * 4 + 0.25 * 8, 4 + 0.5 * 8, 8]
    assert found["exponent"].tolist() == [3, 2, 1]
    assert found["terminated"].tolist() == [1, 1, 1]
    # Lane 1 has one row waiting since its own step, of which lane 0's end took nothing.
    found = rows.push(*step(16, [1], truncated=1.0))
    assert found["reward"].tolist() == [2 + 0.5 * 16, 16]
    assert found["terminated"].tolist() == [0, 0]
    assert found["next_state"].flatten().tolist() == [17, 17]


def test_one_step_rows_pass_unchanged():
    rows = NStepRows(3, 1, discount=0.9)
    lanes, single = step(5, [0, 2])
    found = rows.push(lanes, single)
    assert all(torch.equal(found[name], single[name]) for name in single)


def make(reach_env, fake_base, lanes=4, n_steps=1, **options):
    torch.manual_seed(0)
    env = reach_env(lanes, limit=6)
    policy = ResidualPolicy(fake_base(env.spec, **options), SMALL)
    policy.actor.requires_grad_(True)
    proposal = CorrectionProposal(policy, anchor=1.0)
    return env, policy, proposal, CorrectionBehaviour(policy, proposal, n_steps, seed=3)


def test_new_policy_is_the_base_bit_for_bit_and_stays_bounded(reach_env, fake_base, tmp_path):
    _, policy, _, _ = make(reach_env, fake_base, offset=0.1)
    history = {"state": np.random.default_rng(0).normal(size=(50, 2, 4)).astype(np.float32)}
    chunks = policy.plan(history)
    np.testing.assert_array_equal(policy.refine(history, chunks[:, 0]), chunks[:, 0])
    with torch.no_grad():
        for parameter in policy.actor.parameters():
            parameter += 3 * torch.randn(parameter.shape)
    corrected = policy.refine(history, chunks[:, 0])
    assert 0.1 < np.abs(corrected - chunks[:, 0]).max() <= 0.2 + 1e-6
    save_policy(policy, tmp_path / "policy")
    np.testing.assert_array_equal(load_policy(tmp_path / "policy").refine(history, chunks[:, 0]), corrected)


def test_correction_is_the_difference_in_normalised_units(reach_env, fake_base):
    _, policy, _, _ = make(reach_env, fake_base)
    policy.base.normalizer.action__scale.fill_(0.5)
    base = np.random.default_rng(0).uniform(-0.3, 0.3, (20, 2)).astype(np.float32)
    u = torch.rand(20, 2) * 2 - 1
    moved = policy.apply_correction(base, u)
    np.testing.assert_allclose(moved - base, 0.2 * 0.5 * u.numpy(), atol=1e-6)
    torch.testing.assert_close(policy.correction_of(moved, base), u, atol=1e-5, rtol=0)


def test_rows_hold_the_base_actions_of_their_own_and_the_next_step(reach_env, fake_base):
    """Three lanes over several episodes: the last columns of a state are what the base does there."""
    env, policy, _, behaviour = make(reach_env, fake_base, lanes=3, noise_gain=0.3)
    replay = make_replay(policy.state_size, 2, {"online": 500}, 0)
    collector = Collector(env, behaviour, DecisionConfig(), 0)
    executed, base = [], []
    original = env.step

    def watched(actions):
        executed.append(actions.copy())
        base.append(collector._runner.base_action.copy())
        return original(actions)

    env.step = watched
    collector.collect(replay, 20)
    rows = replay.all("online")
    assert replay.size["online"] >= 3 * 19
    base, executed = np.concatenate(base), np.concatenate(executed)
    state, u = rows["state"].numpy(), rows["action"].numpy()
    for row in range(len(state)):
        match = np.flatnonzero(np.isclose(base, state[row, -2:], atol=1e-6).all(1))
        assert len(match) >= 1
        np.testing.assert_allclose(np.clip(base[match] + 0.2 * u[row], -1, 1) - executed[match], 0, atol=1e-5)
    ended = (rows["terminated"] + rows["truncated"]).bool()
    # Within an episode the next state is the state of a row that was stored as well.
    for following in rows["next_state"][~ended][: 3 * 15]:
        assert (rows["state"] - following).abs().amax(1).min() < 1e-6
    assert rows["truncated"].sum() > 0


def test_rows_of_several_decisions_need_a_discount(reach_env, fake_base):
    env, _, _, behaviour = make(reach_env, fake_base, n_steps=3)
    with pytest.raises(ConfigError, match="rows of several decisions need the core's discount"):
        Collector(env, behaviour, DecisionConfig(), 0)


def test_the_base_plans_once_per_chunk(reach_env, fake_base):
    env, policy, _, behaviour = make(reach_env, fake_base, lanes=2, n_steps=3)
    env.radius = 0.0
    replay = make_replay(policy.state_size, 2, {"online": 500}, 0)
    Collector(env, behaviour, DecisionConfig(), 0, discount=0.99).collect(replay, 12)
    # Two lanes, two episodes of six steps: chunks at steps 0 and 4 of each.
    assert policy.base.calls == 2 * 2 * 2


def test_exploration_is_the_configured_noise(reach_env, fake_base):
    _, policy, _, behaviour = make(reach_env, fake_base)
    history = {"state": np.zeros((4000, 2, 4), np.float32)}
    behaviour.refine(history, np.zeros((4000, 2), np.float32))
    expected = np.exp(policy.config.log_std)
    np.testing.assert_allclose(behaviour.record["action"].std(0), expected, rtol=0.05)
    np.testing.assert_allclose(behaviour.record["action"].mean(0), 0, atol=0.02)


def test_anchor_pulls_to_what_was_tried_and_gradients_reach_the_actor_only(reach_env, fake_base):
    _, policy, proposal, _ = make(reach_env, fake_base)
    config = replace(ResidualOffPolicyConfig().core, hidden=(16,))
    core = OffPolicyCore(policy.state_size, 2, proposal, config, 0)
    batch = {"state": torch.randn(64, policy.state_size), "action": torch.full((64, 2), 0.4), "reward": torch.zeros(64)}
    proposal.anchor = 1e3
    optimizer = torch.optim.Adam(policy.actor.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        core.actor_loss(batch, torch.randn(64, 2))[0].backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in core.critic.parameters())
    assert (policy.actor(batch["state"]) - 0.4).abs().mean() < 0.05


def demonstrations(env, action, length=5):
    state = np.random.default_rng(1).uniform(-0.5, 0.5, (2 * length, 4)).astype(np.float32)
    ends = np.array([length, 2 * length])
    success = np.zeros(2 * length, bool)
    success[length - 1] = True
    return Frames({"state": state}, np.full((2 * length, 2), action, np.float32), ends, env.spec, {"success": success})


def test_demonstrations_become_corrections_of_the_base(reach_env, fake_base):
    env, policy, _, behaviour = make(reach_env, fake_base, n_steps=2)
    frames = demonstrations(env, 0.05)
    replay = make_replay(policy.state_size, 2, {"demonstrations": 10}, 0)
    assert add_demonstrations(replay, frames, behaviour, DecisionConfig(), discount=0.5) == frames.num_frames
    rows = replay.all("demonstrations")
    assert len(rows["reward"]) == frames.num_frames
    base = rows["state"][:, -2:]
    torch.testing.assert_close(rows["action"], ((0.05 - base) / 0.2).clamp(-1, 1))
    # The base's chunk runs along the episode: planned at frames 0 and 4 of each.
    assert policy.base.calls == 4
    order = [int(np.flatnonzero((frames.observation["state"] == s[:4].numpy()).all(1))[0]) for s in rows["state"]]
    assert sorted(order) == list(range(10))
    by_frame = {frame: row for row, frame in enumerate(order)}
    assert rows["reward"][by_frame[4]] == 1
    assert rows["reward"][by_frame[3]] == 0.5
    assert rows["terminated"][by_frame[3]] == 1
    assert rows["truncated"][by_frame[9]] == 1
    assert rows["reward"][[by_frame[i] for i in range(5, 10)]].sum() == 0


@pytest.mark.parametrize("changed", [0, 1])
def test_an_episode_of_the_demonstrations_leaves_the_other_alone(changed, reach_env, fake_base):
    """Of two episodes one is replaced: the rows of the other, of up to three steps each, stay as they were."""
    env, policy, _, behaviour = make(reach_env, fake_base, n_steps=3)
    frames = demonstrations(env, 0.05)

    def rows_of(state, action):
        replay = make_replay(policy.state_size, 2, {"demonstrations": 10}, 0)
        given = Frames({"state": state}, action, frames.episode_ends, env.spec, frames.extras)
        add_demonstrations(replay, given, behaviour, DecisionConfig(), discount=0.5)
        rows = replay.all("demonstrations")
        order = [int(np.flatnonzero((state == s[:4].numpy()).all(1))[0]) for s in rows["state"]]
        mine = torch.tensor([frame // 5 != changed for frame in order])
        return {name: values[mine] for name, values in rows.items()}

    state, action = frames.observation["state"], frames.action
    part = frames.episode(changed)
    other = [state.copy(), action.copy()]
    for array in other:
        array[part] = np.random.default_rng(2).uniform(-0.5, 0.5, array[part].shape)
    before, after = rows_of(state, action), rows_of(*other)
    assert len(before["reward"]) == 5
    for name, values in before.items():
        assert torch.equal(values, after[name]), name


def test_sparse_reach_with_a_wrong_base_is_learned(tmp_path, reach_env, fake_base):
    """The base overshoots in several steps and is never asked to know why: success goes from rare to sure."""

    def env(num_envs=1):
        return reach_env(num_envs, radius=0.04, limit=20)

    core = replace(
        ResidualOffPolicyConfig().core, hidden=(32, 32), batch_size=64, start_steps=512, updates_per_step=0.3,
        critic_learning_rate=1e-3, actor_learning_rate=1e-3, replay_capacity=5000, actor_every=1, precision="fp32",
        critic_updates=200,
    )  # fmt: skip
    residual = ResidualPolicyConfig(squashed=True, hidden=(32, 32), scale=0.4)
    config = ResidualOffPolicyConfig(lanes=16, n_steps=3, anchor=0.1, residual=residual, core=core)
    base = fake_base(env().spec, offset=0.2)
    with Run.create(tmp_path / "run", {}, spec=base.spec) as run:
        finetune(base, env, config, run, session=SessionConfig(steps=4000, evaluations=4, eval_episodes=40))
    rows = read_metrics(tmp_path / "run", "eval")
    assert rows[0]["success"] < 0.3
    assert max(row["success"] for row in rows) > 0.9
    learned = [row for row in read_metrics(tmp_path / "run", "finetune") if row.get("updates")]
    # All of the critic's own updates come at once, and until then nothing is corrected.
    assert learned[0]["updates"] == 200
    assert learned[0]["correction"] == 0


def test_what_cannot_work_is_refused(tmp_path, reach_env, fake_base):
    env = reach_env(1)
    base = fake_base(env.spec)
    with Run.create(tmp_path / "run", {}, spec=base.spec) as run:
        with pytest.raises(ConfigError, match=r"residual.squashed=true"):
            finetune(base, reach_env, ResidualOffPolicyConfig(residual=ResidualPolicyConfig()), run, session=ONCE)
        with pytest.raises(CapabilityError, match="needs a base with a normaliser"):
            finetune(ResidualPolicy(base, SMALL), reach_env, ResidualOffPolicyConfig(), run, session=ONCE)
        bad = ResidualOffPolicyConfig(demonstration_share=1.0)
        with pytest.raises(ConfigError, match="demonstration_share"):
            finetune(base, reach_env, bad, run, session=ONCE, demonstrations=demonstrations(env, 0.0))


ONCE = SessionConfig(steps=1)
