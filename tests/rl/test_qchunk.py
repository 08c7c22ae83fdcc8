"""Best of N with a learned critic: the backup's choice and its valuation, values of chunks, and learning as a whole."""

import numpy as np
import pytest
import torch

from robot_rl.core.env import Step
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames
from robot_rl.policies.best_of import BestOfConfig
from robot_rl.policies.checkpoint import load_policy
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.methods import qchunk
from robot_rl.rl.off_policy.best_of import BestOfProposal, make_best_of
from robot_rl.rl.off_policy.collector import Collector, add_demonstrations, make_replay
from robot_rl.rl.off_policy.core import OffPolicyConfig, OffPolicyCore
from robot_rl.rl.session import SessionConfig
from robot_rl.train.run import Run, read_metrics

SMALL = {"hidden": (32, 32), "batch_size": 64, "precision": "fp32", "entropy_backup": False}


def make_core(kept=3, state=4, action=2, choice=None, **options):
    torch.manual_seed(0)
    config = OffPolicyConfig(**{**SMALL, "reduce": "mean", **options})
    proposal = BestOfProposal(None, choice or BestOfConfig(candidates=kept), kept, "online", config.critics)
    return OffPolicyCore(state, action, proposal, config, 0)


def rows(slices, size, state=4, action=2, kept=3, seed=0, **fixed):
    generator = torch.Generator().manual_seed(seed)
    batch = {"state": (state,), "action": (action,), "reward": (), "next_state": (state,)}
    batch |= {"next_candidates": (kept, action)}
    made = {k: torch.randn(slices, size, *shape, generator=generator) for k, shape in batch.items()}
    made |= {k: torch.full((slices, size), v) for k, v in (("terminated", 0.0), ("exponent", 1.0), ("weight", 1.0))}
    return made | {k: torch.full((slices, size), float(v)) for k, v in fixed.items()}


def test_the_online_critic_chooses_and_the_target_values():
    core = make_core(discount=0.9)
    for parameter in core.target.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # no longer the same opinion
    batch = {k: v[0] for k, v in rows(1, 32).items()}
    with torch.no_grad():
        each = [core.critic(batch["next_state"], batch["next_candidates"][:, i]).mean(0) for i in range(3)]
        best = torch.stack(each).argmax(0)
        action = batch["next_candidates"][torch.arange(32), best]
        target = batch["reward"] + 0.9 * core.target(batch["next_state"], action).mean(0)
        expected = 0.5 * (core.critic(batch["state"], batch["action"]) - target).square().mean(-1).sum()
    torch.testing.assert_close(core.critic_loss(batch, torch.zeros(32, 0), torch.tensor([0, 1])), expected)
    greedy = torch.stack([core.target(batch["next_state"], batch["next_candidates"][:, i]).mean(0) for i in range(3)])
    assert not torch.equal(greedy.argmax(0), best)


def test_a_single_candidate_is_sarsa_of_the_base():
    core = make_core(kept=1, discount=0.9)
    batch = {k: v[0] for k, v in rows(1, 32, kept=1).items()}
    with torch.no_grad():
        following = core.target(batch["next_state"], batch["next_candidates"][:, 0]).mean(0)
        error = core.critic(batch["state"], batch["action"]) - (batch["reward"] + 0.9 * following)
        expected = 0.5 * error.square().mean(-1).sum()
    torch.testing.assert_close(core.critic_loss(batch, torch.zeros(32, 0), torch.tensor([0, 1])), expected)


def test_there_is_no_actor():
    core = make_core()
    metrics = core.update(rows(3, 64))
    assert set(metrics) == {"critic_loss", "value"}
    assert core.log_temperature.item() == 0.0
    with pytest.raises(CapabilityError):
        core.actor_loss({}, torch.zeros(0))


@pytest.mark.parametrize("steps", [1, 5])
def test_constant_reward_is_worth_the_same_for_every_length_of_chunk(steps):
    discount = 0.8
    core = make_core(discount=discount, critic_learning_rate=5e-3, tau=0.1)
    reward = (1 - discount**steps) / (1 - discount)
    for i in range(12):
        core.update(rows(20, 64, seed=i, reward=reward, exponent=steps))
    batch = rows(1, 64, seed=99)
    assert core.critic(batch["state"][0], batch["action"][0]).mean().item() == pytest.approx(5.0, rel=0.05)


class Chain:
    """Walks right one place per step, whatever is done; 1 at the end of ``length`` places, where it terminates."""

    length, max_episode_steps = 12, 100
    spec = Spec({"state": ArraySpec((12,))}, ArraySpec((1,), low=(-1.0,), high=(1.0,)), 10.0)

    def __init__(self, num_envs=4):
        self.num_envs = num_envs

    def reset(self, seed=None):
        self.place = np.arange(self.num_envs) * 3
        return self._observe()

    def _observe(self):
        return {"state": np.eye(self.length, dtype=np.float32)[np.minimum(self.place, self.length - 1)]}

    def step(self, actions):
        self.place = self.place + 1
        ended, final = self.place >= self.length, self._observe()
        self.place[ended] = np.flatnonzero(ended)  # starts differ, so that chunks begin everywhere
        none = np.zeros(self.num_envs, bool)
        info = {"success": ended, "episode_seed": np.zeros(self.num_envs, int)}
        return Step(self._observe(), ended.astype(np.float32), ended, none, final, info)

    def close(self):
        pass


def test_values_of_a_chain_under_chunks(fake_base):
    """The value k places before the end is discount^(k - 1), and needs length / h sweeps, not length."""
    discount, steps = 0.9, 4
    base = fake_base(Chain.spec, horizon=steps, execute_steps=steps, obs_steps=1, fold="identity")
    config = OffPolicyConfig(**{**SMALL, "discount": discount, "critic_learning_rate": 1e-2, "tau": 0.0})
    _, behaviour, core = make_best_of(base, BestOfConfig(candidates=4), config, "online", 0)
    decision = DecisionConfig(reward="discounted", clock="step")
    replay = make_replay(core.state_size, core.action_size, {"online": 500}, 0, behaviour.extra_fields)
    Collector(Chain(), behaviour, decision, 0, discount=discount).collect(replay, 200)
    places = replay.all("online")["state"].argmax(-1)
    assert len(places.unique()) == 12
    for sweep in range(3):
        core.target.load_state_dict(core.critic.state_dict())  # one sweep: regression to fixed targets
        for _ in range(15):
            core.update(replay.sample(10, 64, {"online": 1.0}))
        rows = replay.all("online")
        with torch.no_grad():
            value = core.critic(rows["state"], rows["action"]).mean(0)
        truth = discount ** (11 - rows["state"].argmax(-1)).float()
        near = rows["state"].argmax(-1) >= 12 - steps * (sweep + 1)
        assert (value - truth)[near].abs().mean() < 0.03
        if sweep == 0:
            assert (value - truth)[~near].abs().mean() > 0.1


def test_candidates_of_the_next_state_are_what_the_base_offered_there(reach_env, fake_base):
    base = fake_base(reach_env().spec, noise_gain=0.3, hold=True, execute_steps=2)
    config = OffPolicyConfig(**SMALL)
    _, behaviour, core = make_best_of(base, BestOfConfig(candidates=6), config, "online", 0, backup_candidates=4)
    shape = (core.state_size, core.action_size)
    assert shape == (8, 4)  # two observations of four numbers; two executed actions of two
    replay = make_replay(*shape, {"online": 200, "demonstrations": 50}, 0, behaviour.extra_fields)
    Collector(reach_env(4, hold=True, limit=6), behaviour, DecisionConfig(), 0).collect(replay, 20)
    frames = Frames({"state": np.zeros((9, 4), np.float32)}, np.zeros((9, 2), np.float32), np.array([9]), base.spec)
    add_demonstrations(replay, frames, behaviour, DecisionConfig())
    for source in ("online", "demonstrations"):
        rows = replay.all(source)
        goal = rows["next_state"][:, 6:]
        offered = rows["next_candidates"].unflatten(-1, (2, 2))
        assert offered.shape[1] == 4
        assert offered.std(1).min() > 1e-3
        assert (offered - goal[:, None, None]).abs().mean() < 0.4
    assert replay.all("demonstrations")["action"].abs().max() == 0


def make(reach_env):
    return lambda num_envs=1: reach_env(num_envs, hold=True, radius=0.12, limit=6)


def test_result_is_better_than_the_base_and_is_a_policy_again(tmp_path, reach_env, fake_base):
    base = fake_base(make(reach_env)().spec, offset=0.11, noise_gain=0.2, hold=True)
    core = OffPolicyConfig(**SMALL, start_steps=500, updates_per_step=0.15, critic_learning_rate=2e-3)
    config = qchunk.QChunkConfig(lanes=16, core=core, choice=BestOfConfig(candidates=8, execute_steps=1))
    with Run.create(tmp_path / "run", {}, spec=base.spec) as run:
        session = SessionConfig(steps=3500, evaluations=3, eval_episodes=60)
        policy = qchunk.finetune(base, make(reach_env), config, run, session=session)
    rows = read_metrics(tmp_path / "run", "eval")
    assert max(row["success"] for row in rows[1:]) > rows[0]["success"] + 0.2
    loaded = load_policy(tmp_path / "run" / "checkpoints" / "best")
    history = {"state": np.random.default_rng(0).uniform(-0.5, 0.5, (5, 2, 4)).astype(np.float32)}
    for one in (policy, loaded):
        one.seed(1)
    np.testing.assert_array_equal(loaded.plan(history), policy.plan(history))
    first = load_policy(tmp_path / "run" / "checkpoints" / "last")
    assert not first.config.prior


def test_until_it_learns_the_policy_is_the_base(reach_env, fake_base):
    base = fake_base(reach_env().spec, noise_gain=0.3, hold=True)
    policy, behaviour, _ = make_best_of(base, BestOfConfig(candidates=8), OffPolicyConfig(**SMALL), "online", 0)
    history = {"state": np.tile(np.array([0, 0, 0.5, -0.5], np.float32), (3000, 2, 1))}
    behaviour.learning = False
    policy.seed(0)
    own, ours = base.plan(history), policy.plan(history)
    np.testing.assert_allclose(ours.mean((0, 1)), own.mean((0, 1)), atol=0.02)
    np.testing.assert_allclose(ours.std((0, 1)), own.std((0, 1)), rtol=0.05)
    behaviour.learning = True
    assert not policy.config.prior


def test_edits_belong_to_expo_and_wrong_numbers_are_refused(tmp_path, reach_env, fake_base):
    base = fake_base(reach_env().spec)
    config = qchunk.QChunkConfig(choice=BestOfConfig(edits=2))
    with Run.create(tmp_path / "run", {}, spec=base.spec) as run, pytest.raises(ConfigError, match="'expo'"):
        qchunk.finetune(base, make(reach_env), config, run, session=SessionConfig(steps=1))
    with pytest.raises(ConfigError, match="backup_candidates"):
        make_best_of(base, BestOfConfig(candidates=8), OffPolicyConfig(**SMALL), "online", 0, backup_candidates=-1)


def test_a_finished_run_that_is_resumed_keeps_what_it_learned(tmp_path, reach_env, fake_base):
    base = fake_base(make(reach_env)().spec, noise_gain=0.2, hold=True)
    core = OffPolicyConfig(**SMALL, start_steps=300, updates_per_step=0.1)
    config = qchunk.QChunkConfig(lanes=16, core=core, choice=BestOfConfig(candidates=4))
    for _ in range(2):
        with Run.create(tmp_path / "run", {}, spec=base.spec, resume=True) as run:
            session = SessionConfig(steps=600, evaluations=1, eval_episodes=20)
            qchunk.finetune(base, make(reach_env), config, run, session=session)
        assert not load_policy(tmp_path / "run" / "checkpoints" / "last").config.prior
