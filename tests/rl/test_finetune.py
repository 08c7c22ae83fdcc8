"""Fine-tuning as a whole: every method makes the toy better, survives a kill, and stops at a NaN."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from robot_rl.cli import finetune as command
from robot_rl.core import registry
from robot_rl.core.errors import ConfigError, DataError, SpecMismatchError, UnknownNameError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames
from robot_rl.data.store import EpisodeWriter
from robot_rl.nets.ensemble import EnsembleMLP
from robot_rl.policies.checkpoint import load_policy, save_policy
from robot_rl.policies.residual import ResidualPolicyConfig
from robot_rl.policies.steered import SteeredPolicyConfig
from robot_rl.rl.guard import Guard, NonFiniteError
from robot_rl.rl.methods import dsrl, residual, rlpd
from robot_rl.rl.off_policy.core import OffPolicyConfig
from robot_rl.rl.on_policy.learner import OnPolicyConfig, OnPolicyLearner
from robot_rl.rl.options import config_class, override
from robot_rl.rl.session import VALIDATION_SEED, SessionConfig, resumed_seed
from robot_rl.rl.state import load_state
from robot_rl.rl.testing import TWO_MODES, TwoModesEnv, clone, small_settings
from robot_rl.rollout.evaluate import evaluate
from robot_rl.train.run import Run, read_metrics

CORE = OffPolicyConfig(
    hidden=(32, 32), batch_size=64, start_steps=500, updates_per_step=0.1, target_entropy=0.0, initial_temperature=0.1,
    critic_learning_rate=1e-3, actor_learning_rate=1e-3, replay_capacity=5000,
)  # fmt: skip
METHODS = {
    "residual": residual.ResidualConfig(
        lanes=16,
        residual=ResidualPolicyConfig(hidden=(32, 32), scale=0.2),
        core=OnPolicyConfig(rollout_steps=16, epochs=4, minibatches=4, value_hidden=(32, 32), actor_learning_rate=1e-3),
    ),
    "plain": dsrl.DSRLConfig(
        "plain", lanes=16, core=CORE, steering=SteeredPolicyConfig(noise_steps=1, hidden=(32, 32))
    ),
    "na": dsrl.DSRLConfig(
        "na",
        lanes=16,
        core=replace(CORE, updates_per_step=0.3, critic_learning_rate=3e-3),
        steering=SteeredPolicyConfig(noise_steps=1, hidden=(32, 32)),
    ),
    "rlpd": rlpd.RLPDConfig(lanes=8, hidden=(32, 32), core=replace(CORE, target_entropy=None, entropy_backup=False)),
}
MODULES = {"residual": residual, "plain": dsrl, "na": dsrl, "rlpd": rlpd}


def toy(reach_env, **options):
    def make(num_envs=1):
        env = reach_env(num_envs, hold=True, radius=0.12, limit=6)
        env.__dict__.update(options)
        return env

    return make


def go(method, path, make, base, session, config=None, resume=False, demonstrations=None):
    with Run.create(path, {"method": method}, spec=base.spec, resume=resume) as run:
        return MODULES[method].finetune(
            base, make, config or METHODS[method], run, session=session, demonstrations=demonstrations
        )


@pytest.mark.parametrize("method", ["residual", "plain", "na"])
def test_result_is_better_and_is_a_policy_again(method, tmp_path, reach_env, fake_base):
    make = toy(reach_env)
    base = fake_base(make().spec, offset=0.11, noise_gain=0.3 if method in ("plain", "na") else 0.0, hold=True)
    steps = {"residual": 5000, "plain": 3000, "na": 4000}[method]
    session = SessionConfig(steps=steps, evaluations=3, eval_episodes=50)
    policy = go(method, tmp_path / "run", make, base, session)
    rows = read_metrics(tmp_path / "run", "eval")
    assert max(row["success"] for row in rows[1:]) > rows[0]["success"] + 0.15
    require_same_when_loaded(policy, tmp_path / "run")


def test_a_correction_goes_by_the_action_that_it_corrects(tmp_path, reach_env, fake_base):
    """The base misses the goal by chance: with another lane's action in view the correction is worse than none."""

    def make(num_envs=1):
        return reach_env(num_envs, size=1, hold=True, limit=1)

    base = fake_base(make().spec, noise_gain=0.25, hold=True, horizon=1, execute_steps=1)
    config = small_settings(residual.finetune, ("lanes=32", "scale=0.4", "epochs=8"))
    session = SessionConfig(steps=4000, evaluations=4, eval_episodes=100)
    policy, env = go("residual", tmp_path / "run", make, base, session, config), make(100)
    before, after = (evaluate(one, env, 200).success_rate for one in (base, policy))
    features = policy.features
    policy.features = lambda history, actions: features(history, np.roll(actions, 1, axis=0))
    shuffled = evaluate(policy, env, 200).success_rate
    assert after > before + 0.15
    assert shuffled < before


def require_same_when_loaded(policy, path):
    loaded = load_policy(path / "checkpoints" / "best")
    shape = (5, policy.obs_steps, policy.spec.observation["state"].size)
    history = {"state": np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)}
    policy.seed(1)
    expected = policy.plan(history)
    loaded.seed(1)
    np.testing.assert_array_equal(loaded.plan(history), expected)
    np.testing.assert_array_equal(loaded.refine(history, expected[:, 0]), policy.refine(history, expected[:, 0]))


def test_sparse_reach_is_solved_with_demonstrations(tmp_path, reach_env, fake_base):
    def make(num_envs=1):
        return reach_env(num_envs, size=1, radius=0.08, limit=50)

    frames = reach_demonstrations(make(10))
    config = replace(
        METHODS["rlpd"], core=replace(CORE, critics=4, target_entropy=None, entropy_backup=False, updates_per_step=0.4)
    )
    base = fake_base(make().spec)
    session = SessionConfig(steps=2400, evaluations=2, eval_episodes=50)
    policy = go("rlpd", tmp_path / "run", make, base, session, config, demonstrations=frames)
    require_same_when_loaded(policy, tmp_path / "run")
    assert max(row["success"] for row in read_metrics(tmp_path / "run", "eval")[1:]) > 0.9


class Unrewarded(TwoModesEnv):
    """Nothing succeeds here; what is worth doing is known from demonstrations alone."""

    def play(self, action):
        return np.zeros(len(action)), np.zeros(len(action), bool), np.ones(len(action), bool)


@pytest.mark.parametrize("method", ["rlpd", "dsrl", "expo", "qchunk", "residual_offpolicy"])
def test_the_critic_of_every_off_policy_method_learns_from_demonstrations(method, tmp_path):
    """It values what was demonstrated, and knows that what it tried itself earned nothing."""
    finetune, base = registry.load("finetuners", method), clone(TWO_MODES)
    state = np.stack([np.zeros(60), np.random.default_rng(0).uniform(-1, 1, 60)], 1).astype(np.float32)
    frames = Frames({"state": state}, np.full((60, 1), 0.95, np.float32), np.arange(1, 61), base.spec)
    options = ["updates_per_step=0.4", "start_steps=100", "tau=0.05", "demonstration_share=0.25"]
    options += {"dsrl": ["variant=na"], "residual_offpolicy": ["core.critic_updates=0"]}.get(method, [])
    with Run.create(tmp_path, {}, spec=base.spec) as run:
        session = SessionConfig(steps=400, evaluations=0, eval_episodes=5, eval_lanes=5)
        config = small_settings(finetune, options)
        finetune(base, Unrewarded, config, run, session=session, demonstrations=frames)
    tensors, _ = load_state(tmp_path / "learner.safetensors")
    weights = {k.removeprefix("critic.net."): value for k, value in tensors.items() if k.startswith("critic.net.")}
    members, size, _ = weights["weights.0"].shape
    critic = EnsembleMLP((size, 32, 32, 1), members, layer_norm=True)
    critic.load_state_dict(weights)
    assert len(tensors["replay.demonstrations"]) == 60
    # Rows begin with state and action, as the critic takes them.
    shown, tried = (critic(tensors[f"replay.{name}"][:, :size]).mean().item() for name in ("demonstrations", "online"))
    assert shown > tried + 0.3


def reach_demonstrations(env):
    observation, paths, done = env.reset(0), [[] for _ in range(env.num_envs)], []
    while len(done) < 10:
        action = np.clip(10 * (observation["state"][:, 1:] - observation["state"][:, :1]), -0.5, 0.5)
        step = env.step(action)
        for i, path in enumerate(paths):
            path.append((observation["state"][i].copy(), action[i]))
            if step.done[i]:
                done.append(path)
                paths[i] = []
        observation = step.observation
    states, actions = (np.stack([row[k] for path in done for row in path]).astype(np.float32) for k in (0, 1))
    return Frames({"state": states}, actions, np.cumsum([len(path) for path in done]), env.spec)


@pytest.mark.parametrize("method", ["residual", "plain"])
def test_interrupted_run_goes_on(method, tmp_path, reach_env, fake_base):
    make = toy(reach_env)
    base = fake_base(make().spec, offset=0.11, noise_gain=0.3, hold=True)
    go(method, tmp_path / "run", make, base, SessionConfig(steps=1500, evaluations=1, eval_episodes=20))
    before = read_metrics(tmp_path / "run", "finetune")[-1]
    go(method, tmp_path / "run", make, base, SessionConfig(steps=3000, evaluations=2, eval_episodes=20), resume=True)
    rows = read_metrics(tmp_path / "run", "finetune")
    after = next(row for row in rows if row["step"] > before["step"])
    assert after["step"] - before["step"] < 1000
    assert after["seconds"] > before["seconds"]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})


def test_not_finite_reward_stops_and_keeps_the_last_good_policy(tmp_path, reach_env, fake_base):
    for method in ("residual", "plain"):
        path = tmp_path / method
        make = toy(reach_env, nan_at=40)
        base = fake_base(make().spec, hold=True)
        with pytest.raises(NonFiniteError, match="reward is not finite at environment step"):
            go(method, path, make, base, SessionConfig(steps=5000, eval_episodes=10, eval_lanes=10))
        assert list(path.glob("not_finite_*.npz"))
        load_policy(path / "checkpoints" / "best")


def test_a_new_best_is_on_disk_before_a_worse_one_can_come(tmp_path, reach_env, fake_base):
    make = toy(reach_env, nan_at=40)
    session = SessionConfig(steps=5000, eval_episodes=10, eval_lanes=10, save_every=1e3)
    with pytest.raises(NonFiniteError):
        go("residual", tmp_path, make, fake_base(make().spec, hold=True), session)
    _, numbers = load_state(tmp_path / "learner.safetensors")
    success = read_metrics(tmp_path, "eval")[0]["success"]
    assert numbers["best"] == pytest.approx(success, abs=1e-3)


def test_evaluations_after_the_saved_state_are_logged_once(tmp_path, reach_env, fake_base):
    make = toy(reach_env)
    base = fake_base(make().spec, hold=True)
    go("residual", tmp_path, make, base, SessionConfig(steps=600, evaluations=1, eval_episodes=10))
    with Run.create(tmp_path, {"method": "residual"}, spec=base.spec, resume=True) as run:
        run.log({"success": 1.0}, 1100, "eval")  # by what was killed before it saved its state
    go("residual", tmp_path, make, base, SessionConfig(steps=1200, evaluations=1, eval_episodes=10), resume=True)
    steps = [row["step"] for row in read_metrics(tmp_path, "eval")]
    assert 1100 not in steps
    assert steps == sorted(set(steps))


def test_ctrl_c_saves_the_iteration_under_way(tmp_path, reach_env, fake_base, monkeypatch):
    make = toy(reach_env)
    base = fake_base(make().spec, hold=True)
    check = Guard.check

    def interrupted(guard, step, values, **context):
        if "success" in values and step > 0:
            os.kill(os.getpid(), signal.SIGINT)
        check(guard, step, values, **context)

    monkeypatch.setattr(Guard, "check", interrupted)
    session = SessionConfig(steps=100_000, evaluations=0, eval_episodes=5)
    with pytest.raises(KeyboardInterrupt):
        go("residual", tmp_path / "run", make, base, session)
    _, numbers = load_state(tmp_path / "run" / "learner.safetensors")
    rows = read_metrics(tmp_path / "run", "finetune")
    assert [row["step"] for row in rows] == [numbers["steps"]]


def test_weights_that_are_not_finite_are_not_saved(tmp_path, reach_env, fake_base, monkeypatch):
    make = toy(reach_env)
    base = fake_base(make().spec, hold=True)
    iterate = OnPolicyLearner.iterate

    def broken(learner, fraction):
        metrics = iterate(learner, fraction)
        with torch.no_grad():
            next(iter(learner.policy.parameters())).fill_(float("nan"))
        return metrics

    monkeypatch.setattr(OnPolicyLearner, "iterate", broken)
    with pytest.raises(NonFiniteError, match="weight"):
        go("residual", tmp_path / "run", make, base, SessionConfig(steps=256, evaluations=0, eval_episodes=5))
    assert not (tmp_path / "run" / "learner.safetensors").exists()


def explored(path, make, base, steps, seed=0):
    """The noises that a run of `plain` DSRL has drawn, before it learns."""
    config = METHODS["plain"]
    with Run.create(path, {}, spec=base.spec, seed=seed, resume=True) as run:
        dsrl.finetune(base, make, config, run, session=SessionConfig(steps=steps, evaluations=0, eval_episodes=10))
    tensors, _ = load_state(path / "learner.safetensors")
    return tensors["replay.online"][:, 4:6]


def test_seeds_explore_differently_whatever_is_evaluated(tmp_path, reach_env, fake_base):
    make = toy(reach_env)
    base = fake_base(make().spec, noise_gain=0.3, hold=True, horizon=1, execute_steps=1)
    first, second = (explored(tmp_path / str(seed), make, base, 64, seed) for seed in (0, 1))
    assert not torch.isclose(first[:16], second[:16]).any()
    resumed = explored(tmp_path / "0", make, base, 400)
    assert torch.equal(resumed[: len(first)], first)
    assert not torch.isclose(resumed[len(first) : len(first) + 16], first[:16]).any()


def test_minutes_are_kept(tmp_path, reach_env, fake_base):
    import time

    make = toy(reach_env)
    began = time.monotonic()
    go(
        "residual",
        tmp_path / "run",
        make,
        fake_base(make().spec, hold=True),
        SessionConfig(minutes=0.03, evaluations=1),
    )
    assert time.monotonic() - began < 15


def test_slow_evaluations_leave_time_to_learn(tmp_path, reach_env, fake_base, monkeypatch):
    import time

    from robot_rl.rl import session

    make = toy(reach_env)
    base, run = fake_base(make().spec, hold=True), tmp_path / "run"
    evaluate = session.evaluate

    def slow(*arguments):
        time.sleep(0.5)
        return evaluate(*arguments)

    monkeypatch.setattr(session, "evaluate", slow)
    go("residual", run, make, base, SessionConfig(minutes=0.1, evaluations=50, eval_episodes=5, eval_share=0.25))
    seconds = [row["seconds"] for row in read_metrics(run) if row["stage"] == "eval"]
    assert 2 <= len(seconds) <= 5
    assert seconds[1] >= 2
    assert seconds[-1] >= 6  # the last one always happens


def test_truncated_state_is_one_line(tmp_path, reach_env, fake_base):
    make = toy(reach_env)
    base = fake_base(make().spec, hold=True)
    go("residual", tmp_path / "run", make, base, SessionConfig(steps=300, evaluations=0, eval_episodes=10))
    state = tmp_path / "run" / "learner.safetensors"
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot read the learner's state"):
        go("residual", tmp_path / "run", make, base, SessionConfig(steps=600, eval_episodes=10), resume=True)


def test_seeds_of_training_validation_and_test_are_disjoint():
    session = SessionConfig(steps=1)
    starts = {session.training_seed(seed) for seed in range(100)}
    assert max(starts) + 50_000 <= VALIDATION_SEED < 1_000_000
    for steps in (0, 850_000, 950_000, 10**8 - 1):
        assert max(starts) <= resumed_seed(max(starts), steps) < VALIDATION_SEED - 50_000
    with pytest.raises(ConfigError, match="budget"):
        SessionConfig()


def test_options_by_name():
    config = override(
        residual.ResidualConfig(), ["lanes=8", "core.epochs=3", "scale=2e-1", "hidden=64,64", "learn_std=no"]
    )
    assert (config.lanes, config.core.epochs, config.residual.scale) == (8, 3, 0.2)
    assert config.residual.hidden == (64, 64)
    assert config.learn_std is False
    assert override(rlpd.RLPDConfig(), ["core.hidden=8", "target_entropy=-3"]).core.target_entropy == -3
    assert override(rlpd.RLPDConfig(), ["target_entropy=-3", "target_entropy=none"]).core.target_entropy is None
    for option, nearest in (
        ("core.reduce=max", "mean"),
        ("precision=fp16", "bf16"),
        ("clock=steps", "step"),
    ):
        with pytest.raises(UnknownNameError, match=f"value of '.*{option.split('=')[0]}'.*{nearest}"):
            override(rlpd.RLPDConfig(), [option])
    for option, nearest in (("core.loss=bop", "bpo"), ("schedule=cosin", "cosine"), ("core.timeout=finl", "final")):
        with pytest.raises(UnknownNameError, match=f"Did you mean '{nearest}'"):
            override(config, [option])
    for option, expected in (("target_entropy=abc", "a number"), ("hidden=64,x", "a whole number"), ("tau=nan", "a n")):
        with pytest.raises(ConfigError, match=f"expects {expected}"):
            override(rlpd.RLPDConfig(), [f"core.{option}"])
    with pytest.raises(UnknownNameError, match="lanes"):
        override(config, ["lane=8"])
    assert override(rlpd.RLPDConfig(), ["discount=0.9"]).core.discount == 0.9
    with pytest.raises(ConfigError, match=r"ambiguous: steering.hidden, core.hidden"):
        override(dsrl.DSRLConfig(), ["hidden=8"])
    with pytest.raises(ConfigError, match="expects a number"):
        override(config, ["scale='x'"])
    with pytest.raises(ConfigError, match="name=value"):
        override(config, ["lanes"])


@pytest.mark.parametrize("name", ["residual", "dsrl", "rlpd"])
def test_registered_methods_say_what_they_take(name):
    config = config_class(registry.load("finetuners", name))()
    from robot_rl.rl.options import describe

    assert all(text for _, _, text in describe(config))


def test_command(tmp_path, monkeypatch, reach_env, fake_base):
    monkeypatch.setitem(registry._overrides, ("tasks", "toy"), lambda num_envs=1, **options: toy(reach_env)(num_envs))
    save_policy(fake_base(toy(reach_env)().spec, hold=True), tmp_path / "base")
    settings = ("lanes=8", "rollout_steps=8", "epochs=1")
    config = command.Config(
        policy=tmp_path / "base", task="toy", steps=200, out=tmp_path / "out", options=settings, eval_episodes=5
    )
    command.run(config)
    description = json.loads((tmp_path / "out" / "checkpoints" / "best" / "policy.json").read_text())
    assert description["policy"]["kind"] == "residual"
    assert description["policy"]["base"]["kind"] == "fake_base"
    with pytest.raises(ConfigError, match="already holds a run"):
        command.run(config)
    command.run(replace(config, resume=True, steps=400))
    with pytest.raises(UnknownNameError, match="Did you mean 'residual'"):
        command.run(replace(config, method="residuall"))
    with pytest.raises(ConfigError, match="which task"):
        command.run(replace(config, task=""))
    command.run(replace(config, list_options=True))


def record_demonstrations(root, spec):
    with EpisodeWriter(root, spec, task="toy") as writer:
        for _ in range(4):
            observation = {key: np.zeros(array.shape, array.dtype) for key, array in spec.observation.items()}
            writer.add(observation, np.zeros(spec.action.shape, np.float32), reward=0.0, actor="human")
        writer.save_episode(success=True)
    return root


def test_demonstrations_of_another_spec_are_refused_with_the_differences(tmp_path, monkeypatch, reach_env, fake_base):
    monkeypatch.setitem(registry._overrides, ("tasks", "toy"), lambda num_envs=1, **options: toy(reach_env)(num_envs))
    base = fake_base(toy(reach_env)().spec, hold=True)
    config = command.Config(
        policy=save_policy(base, tmp_path / "base"), task="toy", method="rlpd", steps=100, out=tmp_path / "out"
    )
    fitting = Spec({"other": ArraySpec((3,)), **base.spec.observation}, base.spec.action, base.spec.rate_hz)
    other = Spec({"position": ArraySpec((4,))}, ArraySpec((3,), low=(-1.0,) * 3, high=(1.0,) * 3), 20.0)
    with pytest.raises(SpecMismatchError, match="the policy does not fit the demonstrations: ") as refusal:
        command.run(replace(config, demos=record_demonstrations(tmp_path / "demos", other)))
    assert refusal.value.differences == [
        "observation 'state' is missing (available: position)",
        "action: shape (2,) against (3,)",
        "rate 10 Hz against 20 Hz",
    ]
    assert all(difference in str(refusal.value) for difference in refusal.value.differences)
    assert not config.out.exists()
    # What a policy does not ask for is no difference.
    frames = command._demonstrations(record_demonstrations(tmp_path / "fitting", fitting), base)
    assert frames.num_frames == 4
    assert list(frames.observation) == ["state"]
