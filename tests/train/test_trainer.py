import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from robot_rl.core.errors import ConfigError, DataError, RobotRLError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.frames import Frames
from robot_rl.data.windows import WindowSampler
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
from robot_rl.train import trainer as training
from robot_rl.train.ema import EMA
from robot_rl.train.interrupt import finishing_steps
from robot_rl.train.run import Run, read_metrics
from robot_rl.train.trainer import TrainConfig, Trainer, step_generator, train

SPEC = Spec({"state": ArraySpec((3,))}, ArraySpec((2,)), 10.0)
CONFIG = TrainConfig(steps=60, batch_size=32, warmup_steps=5, checkpoint_every=20, log_every=10, precision="fp32")


def make():
    rng = np.random.default_rng(0)
    state = rng.normal(size=(200, 3)).astype(np.float32)
    frames = Frames({"state": state}, state[:, :2] * 2, np.array([120, 200]), SPEC)
    torch.manual_seed(0)
    policy = ChunkedPolicy.fit(frames, ChunkedConfig(width=32, depth=1, horizon=4, execute_steps=2))
    return policy, WindowSampler(frames, 2, 4)


def weights(policy):
    return {name: value.clone() for name, value in policy.state_dict().items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interrupted_training_ends_with_the_same_weights(tmp_path, precision):
    config = replace(CONFIG, precision=precision)
    policy, sampler = make()
    with Run.create(tmp_path / "whole", config) as run:
        expected = weights(train(policy, sampler, config, run))
    policy, sampler = make()
    with Run.create(tmp_path / "cut", config) as run:
        trainer = Trainer(policy, sampler, config, run)
        for _ in range(33):  # past the checkpoint at step 20, in the middle of an epoch
            trainer.update()
            if trainer.step == 20:
                trainer._save()
    policy, sampler = make()
    with Run.create(tmp_path / "cut", config, resume=True) as run:
        resumed = weights(train(policy, sampler, config, run))
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from test_trainer import CONFIG, Trainer, Run, make
    policy, sampler = make()
    run = Run.create({path!r}, CONFIG, resume=True)
    original = Trainer.update
    def update(self):
        if self.step == 47:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self)
    Trainer.update = update
    Trainer(policy, sampler, CONFIG, run).run_all()
    """
)


def test_killed_process_resumes_to_the_same_weights(tmp_path):
    policy, sampler = make()
    with Run.create(tmp_path / "whole", CONFIG) as run:
        expected = weights(train(policy, sampler, CONFIG, run))
    script = KILLED.format(tests=os.path.dirname(__file__), path=str(tmp_path / "killed"))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", script], timeout=120, check=False, env={**os.environ, **threads})
    assert done.returncode == -signal.SIGKILL
    policy, sampler = make()
    with Run.create(tmp_path / "killed", CONFIG, resume=True) as run:
        trainer = Trainer(policy, sampler, CONFIG, run)
        assert trainer.step == 40
        trainer.run_all()
    for name, value in weights(trainer.ema.module).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("broken", [False, True])
def test_ctrl_c_saves_the_step_under_way_unless_it_is_not_finite(tmp_path, monkeypatch, broken):
    policy, sampler = make()
    sample = sampler.sample

    def interrupted(step, *arguments):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            if broken:
                with torch.no_grad():
                    next(policy.parameters()).fill_(float("nan"))
        return sample(step, *arguments)

    monkeypatch.setattr(sampler, "sample", interrupted)
    with Run.create(tmp_path / "run", CONFIG) as run:
        trainer = Trainer(policy, sampler, CONFIG, run)
        with pytest.raises(RobotRLError if broken else KeyboardInterrupt):
            trainer.run_all()
        assert trainer._state_path().exists() is not broken
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not broken:
        with Run.create(tmp_path / "run", CONFIG, resume=True) as run:
            assert Trainer(*make(), CONFIG, run).step == 7


def test_a_second_ctrl_c_ends_at_once():
    with finishing_steps() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    policy, sampler = make()
    with Run.create(tmp_path / "run", CONFIG) as run:
        trainer = Trainer(policy, sampler, CONFIG, run)
        for _ in range(20):
            trainer.update()
        trainer._save()
        with torch.no_grad():
            next(policy.parameters()).fill_(float("nan"))
        with pytest.raises(RobotRLError, match="not finite near step 30; the last good checkpoint"):
            trainer.run_all()
        state = safetensors.torch.load_file(trainer._state_path())
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("what", ["loss is", "weights are"])
def test_a_checkpoint_is_never_replaced_by_one_that_is_not_finite(tmp_path, monkeypatch, what):
    config = replace(CONFIG, log_every=1000)
    policy, sampler = make()
    with Run.create(tmp_path / "run", config) as run:
        trainer = Trainer(policy, sampler, config, run)
        update = trainer.update

        def broken():
            loss = update()
            if what == "weights are" and trainer.step == 40:
                with torch.no_grad():
                    next(policy.parameters())[0] = float("nan")
            return loss * float("nan") if what == "loss is" and trainer.step == 30 else loss

        monkeypatch.setattr(trainer, "update", broken)
        with pytest.raises(RobotRLError, match=f"the {what} not finite near step 40; the last good checkpoint"):
            trainer.run_all()
        assert safetensors.safe_open(trainer._state_path(), "pt").metadata()["trainer"].startswith('{"step": 20')


def test_a_resumed_run_has_every_step_once_in_its_metrics(tmp_path):
    policy, sampler = make()
    with Run.create(tmp_path / "run", CONFIG) as run:
        trainer = Trainer(policy, sampler, replace(CONFIG, steps=30), run)
        trainer.run_all()
        trainer.step = 20
        trainer._save()  # as if it had been killed after the log of step 30 and before its checkpoint
    policy, sampler = make()
    with Run.create(tmp_path / "run", CONFIG, resume=True) as run:
        train(policy, sampler, CONFIG, run)
    assert [row["step"] for row in read_metrics(tmp_path / "run", "train")] == [10, 20, 30, 40, 50, 60]


def test_a_full_disk_ends_training_with_one_line(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    policy, sampler = make()
    with Run.create(tmp_path / "run", CONFIG) as run:
        trainer = Trainer(policy, sampler, CONFIG, run)
        monkeypatch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(DataError, match=r"cannot write the checkpoint .*No space left"):
            trainer._save()
        assert not list(trainer._state_path().parent.iterdir())


def test_damaged_or_foreign_trainer_state_is_refused(tmp_path):
    policy, sampler = make()
    with Run.create(tmp_path / "run", CONFIG) as run:
        trainer = Trainer(policy, sampler, CONFIG, run)
        trainer.update()
        trainer._save()
        with pytest.raises(ConfigError, match="seed 0, not 1"):
            Trainer(policy, sampler, CONFIG, run, seed=1)
        path = trainer._state_path()
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(DataError, match="cannot resume"):
            Trainer(policy, sampler, CONFIG, run)


def test_every_seed_and_every_step_draws_its_own_numbers():
    drawn = {
        (seed, step): torch.rand((), generator=step_generator(seed, step)).item()
        for seed in range(4)
        for step in range(100)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert torch.rand((), generator=step_generator(3, 7)).item() == drawn[3, 7]


def test_ema_follows_the_published_schedule():
    module = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(module, maximum=0.9999)
    assert ema.decay(999) == pytest.approx(0.9944, abs=1e-4)
    assert ema.decay(9999) == pytest.approx(0.999, abs=1e-4)
    with torch.no_grad():
        module.weight.fill_(3.0)
    before = ema.module.weight.item()
    ema.update(10)
    decay = 1 - 11**-0.75
    assert ema.module.weight.item() == pytest.approx(decay * before + (1 - decay) * 3.0, rel=1e-5)


def test_learning_rate_warms_up_and_decays_to_zero(tmp_path):
    policy, sampler = make()
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0, batch_size=4, precision="fp32")
    with Run.create(tmp_path / "run", config) as run:
        trainer = Trainer(policy, sampler, config, run)
        rates = []
        for step in range(100):
            trainer.step = step
            rates.append(trainer._learning_rate())
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[99] < 0.001
    assert np.all(np.diff(rates[10:]) <= 0)


def gradients(path, scale):
    """Return what the optimiser is given in a first step on ``scale`` times the loss, all in one vector."""
    policy, sampler = make()
    with Run.create(path, CONFIG) as run:
        trainer = Trainer(policy, sampler, CONFIG, run)
    loss, step, given = policy.loss, trainer.optimizer.step, []
    policy.loss = lambda *arguments: scale * loss(*arguments)

    def stepped():
        given.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).clone())
        step()

    trainer.optimizer.step = stepped
    trainer.update()
    return given[0]


def test_the_gradient_of_a_huge_loss_is_clipped_and_a_small_one_is_not(tmp_path):
    huge, small, smaller = (gradients(tmp_path / str(scale), scale) for scale in (1e6, 1e-3, 1e-4))
    assert huge.norm().item() == pytest.approx(CONFIG.gradient_clip, rel=1e-4)
    assert 10 * smaller.norm().item() == pytest.approx(small.norm().item(), rel=1e-4)
    assert 0 < small.norm().item() < CONFIG.gradient_clip
    torch.testing.assert_close(huge / huge.norm(), small / small.norm(), rtol=1e-3, atol=1e-5)


def pretend(monkeypatch, policy, supported, seconds):
    """Let a processor support bf16 or not, and a loss take ``seconds`` by whether it is computed in bf16."""
    clock = SimpleNamespace(now=0.0, calls=[])
    loss = policy.loss

    def timed(*arguments):
        bf16 = torch.is_autocast_enabled("cpu")
        # The first of a kind is slow: it sets things up.
        clock.now += seconds[bf16] + (0.0 if bf16 in clock.calls else 100.0 * (1 + bf16))
        clock.calls.append(bf16)
        return loss(*arguments)

    monkeypatch.setattr(policy, "loss", timed)
    monkeypatch.setattr(training, "has_fast_bf16", lambda device: supported)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.mark.parametrize(
    ("precision", "supported", "seconds", "bf16"),
    [
        ("auto", True, (2.0, 1.0), True),
        ("auto", True, (1.0, 2.0), False),
        ("auto", False, (2.0, 1.0), False),
        ("bf16", False, (1.0, 2.0), True),
        ("fp32", True, (2.0, 1.0), False),
    ],
)
def test_auto_takes_bf16_where_it_is_supported_and_measured_to_be_faster(
    tmp_path, monkeypatch, precision, supported, seconds, bf16
):
    config = replace(CONFIG, precision=precision)
    policy, sampler = make()
    before = weights(policy)
    clock = pretend(monkeypatch, policy, supported, seconds)
    with Run.create(tmp_path / "run", config) as run:
        trainer = Trainer(policy, sampler, config, run)
        assert trainer.bf16 is bf16
        assert set(clock.calls) == ({False, True} if precision == "auto" and supported else set())
        assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
        assert all(p.grad is None for p in policy.parameters()), "measuring leaves nothing behind"
        trainer.update()
        assert clock.calls[-1] is bf16


def test_a_resumed_run_keeps_the_precision_that_was_chosen(tmp_path, monkeypatch):
    config = replace(CONFIG, precision="auto")
    policy, sampler = make()
    pretend(monkeypatch, policy, True, (2.0, 1.0))
    with Run.create(tmp_path / "run", config) as run:
        trainer = Trainer(policy, sampler, config, run)
        trainer.update()
        trainer._save()
    policy, sampler = make()
    clock = pretend(monkeypatch, policy, True, (1.0, 2.0))
    with Run.create(tmp_path / "run", config, resume=True) as run:
        assert Trainer(policy, sampler, config, run).bf16
    assert clock.calls == []
