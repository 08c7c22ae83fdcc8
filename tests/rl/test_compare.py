"""Comparisons: every run once, nothing lost, failures told, and figures that are right."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from robot_rl.core import registry
from robot_rl.core.errors import ConfigError, DataError, UnknownNameError
from robot_rl.rl.compare.jobs import LocalPlaces
from robot_rl.rl.compare.results import (
    Test as Outcome,
)
from robot_rl.rl.compare.results import (
    difference_interval,
    mean_curve,
    over_seeds,
    recommend,
    success_interval,
    summarise,
)
from robot_rl.rl.compare.run import Comparison, Config
from robot_rl.rollout.evaluate import wilson

LAUNCHER = (str(Path(__file__).parent / "fake_commands.py"),)


@dataclass(frozen=True)
class Settings:
    scale: float = 0.1


@pytest.fixture(autouse=True)
def _methods(monkeypatch):
    def finetune(base, env_factory, config: Settings, run):
        raise AssertionError("runs are processes of their own")

    finetune.__annotations__["config"] = Settings
    for name in ("good", "fair", "bad", "broken", "killed", "slow"):
        monkeypatch.setitem(registry._overrides, ("finetuners", name), finetune)


@pytest.fixture
def config(tmp_path):
    return Config(make_policy(tmp_path / "base", 0.5), "toy", ("good", "bad"), minutes=1.0, out=tmp_path / "out")


def make_policy(path, rate):
    path.mkdir(parents=True)
    (path / "policy.json").write_text(json.dumps({"rate": rate}))
    (path / "model.safetensors").write_bytes(b"")
    return path


def execute(config, places=None):
    return Comparison(config, LAUNCHER).execute(places)


def events(config):
    file = config.out / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_every_method_and_seed_is_run_once_and_measured(config):
    results = execute(replace(config, methods=("bad", "good"), seeds=(0, 1), test_episodes=100))
    good, bad = results["methods"]
    assert (good["method"], bad["method"]) == ("good", "bad"), "best first"
    assert good["success_by_seed"] == [0.9, 0.92]
    assert good["success"] == pytest.approx(0.91)
    assert good["gain"] == pytest.approx(0.41)
    assert good["wilson"] == pytest.approx(wilson(182, 200))
    assert (good["steps"], good["minutes"]) == (300, pytest.approx(4 / 60))
    assert good["curve_steps"]["x"] == [0, 100, 200]
    assert good["curve_steps"]["mean"][-1] == pytest.approx(0.91)
    assert (good["curve_steps"]["low"][-1], good["curve_steps"]["high"][-1]) == pytest.approx((0.9, 0.92))
    assert good["curve_minutes"]["x"] == pytest.approx([1 / 60, 2 / 60, 3 / 60])
    assert sorted(event["run"] for event in events(config)) == ["bad 0", "bad 1", "good 0", "good 1"]
    assert json.loads((config.out / "compare.json").read_text()) == json.loads(json.dumps(results))
    execute(replace(config, seeds=(0, 1), test_episodes=100))
    assert len(events(config)) == 4, "finished runs are kept"


def test_runs_are_given_what_was_asked_for(config):
    demos = config.out.parent / "demos"
    execute(
        replace(
            config,
            methods=("good", "good@wide"),
            options=("good@wide:scale=0.3",),
            demos=demos,
            demos_for=("good",),
            reward="shaped",
        )
    )
    plain, wide = sorted((event["given"] for event in events(config)), key=lambda given: given["--out"])
    assert plain["--method"] == wide["--method"] == ["good"]
    assert wide["--options"] == ["scale=0.3"]
    assert "--options" not in plain
    assert plain["--demos"] == [str(demos)]
    assert "--demos" not in wide
    assert plain["--minutes"] == ["1.0"]
    assert plain["--reward"] == ["shaped"]


def test_as_many_at_once_as_there_are_places_each_with_its_threads(config):
    class Counted(LocalPlaces):
        under_way, most = 0, 0

        def start(self, job):
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            return super().start(job)

        def poll(self, handle):
            code = super().poll(handle)
            self.under_way -= code is not None
            return code

    places = Counted(2)
    execute(replace(config, methods=("good", "bad", "fair")), places)
    assert places.most == 2
    assert {event["threads"] for event in events(config)} == {str(places.threads)}
    cores = len(LocalPlaces(1)._free[0])
    assert {event["cores"] for event in events(config)} == {max(1, cores // 2)}


@pytest.mark.parametrize(
    ("method", "why"),
    [("broken", "The method cannot do this. It can do that."), ("killed", "ended by SIGKILL")],
)
def test_a_failure_is_told_and_does_not_stop_the_others(config, method, why):
    config = replace(config, methods=(method, "good"))
    results = execute(config)
    good, failed = results["methods"]
    assert (good["method"], good["seeds"], failed["seeds"]) == ("good", [0], [])
    assert failed["error"].startswith(why)
    assert any(line.startswith(f"{method} failed: {why}") for line in results["recommendation"])
    again = execute(config)
    assert {row["method"]: row["error"] for row in again["methods"]} == {"good": "", method: ""}
    assert [event["run"] for event in events(config)] == ["good 0", f"{method} 0"]
    assert events(config)[-1]["resume"], "what was interrupted goes on"


def test_interrupted_nothing_is_lost_and_nobody_left_behind(config):
    config = replace(config, methods=("good", "slow", "bad"))

    class Interrupted(LocalPlaces):
        started = ()

        def start(self, job):
            if job.name == "bad seed 0":
                raise KeyboardInterrupt
            process = super().start(job)
            self.started = (*self.started, process)
            return process

    places = Interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        execute(config, places)
    assert all(process.poll() is not None for process in places.started)
    assert [event["run"] for event in events(config)] == ["good 0"]
    results = execute(config)
    assert {row["method"] for row in results["methods"] if row["seeds"]} == {"good", "slow", "bad"}
    assert sorted(event["run"] for event in events(config)) == ["bad 0", "good 0", "slow 0"]


def test_a_base_of_its_own_is_what_a_method_is_measured_against(config, tmp_path):
    other = make_policy(tmp_path / "other", 0.2)
    results = execute(replace(config, other_bases=(f"bad:{other}",), test_episodes=10))
    assert {name: base["success"] for name, base in results["bases"].items()} == {"base": 0.5, "base_bad": 0.2}
    good, bad = results["methods"]
    assert (good["gain"], bad["gain"]) == (pytest.approx(0.4), pytest.approx(-0.1))
    assert [event["given"]["--policy"] for event in events(config) if event["run"] == "bad 0"] == [[str(other)]]


def test_what_cannot_work_is_refused_before_anything_runs(config, tmp_path):
    with pytest.raises(UnknownNameError, match=r"'goood'\. Did you mean 'good'"):
        Comparison(replace(config, methods=("goood",)), LAUNCHER)
    with pytest.raises(UnknownNameError, match="scael"):
        Comparison(replace(config, options=("good:scael=1",)), LAUNCHER)
    with pytest.raises(UnknownNameError, match="fair"):
        Comparison(replace(config, options=("fair:scale=1",)), LAUNCHER)
    with pytest.raises(ConfigError, match="method:value"):
        Comparison(replace(config, options=("scale=1",)), LAUNCHER)
    with pytest.raises(ConfigError, match="named twice: good"):
        Comparison(replace(config, methods=("good", "good")), LAUNCHER)
    with pytest.raises(DataError, match="no checkpoint in"):
        Comparison(replace(config, policy=tmp_path), LAUNCHER)
    with pytest.raises(UnknownNameError, match="Unknown task 'toy'"):
        Comparison(config)
    assert not config.out.exists()


def test_a_changed_comparison_is_refused(config):
    execute(config)
    with pytest.raises(ConfigError, match=r"minutes was 1.0, now 2.0"):
        execute(replace(config, minutes=2.0))
    with pytest.raises(ConfigError, match="made with other settings: options"):
        execute(replace(config, options=("good:scale=0.5",)))
    (config.policy / "policy.json").write_text(json.dumps({"rate": 0.6}))
    with pytest.raises(ConfigError, match="policy was"):
        execute(config)


def test_two_processes_do_not_share_a_directory(config):
    from robot_rl.train.run import alone

    with alone(config.out), pytest.raises(ConfigError, match="another process is at work"):
        execute(config)


def test_an_unusable_base_is_an_error(config):
    (config.policy / "policy.json").write_text("{}")
    with pytest.raises(DataError, match="the base could not be tested: base: KeyError: 'rate'"):
        execute(config)


# Figures


def test_the_interval_over_seeds_is_students():
    # Three seeds: mean 0.8, deviation 0.1, t(0.975, 2) = 4.303.
    assert over_seeds([0.7, 0.8, 0.9]) == pytest.approx((0.8 - 4.303 * 0.1 / math.sqrt(3), 1.0), abs=1e-4)
    assert over_seeds([0.5, 0.52]) == pytest.approx((0.51 - 12.706 * 0.01, 0.51 + 12.706 * 0.01), abs=1e-4)
    many = over_seeds([0.4, 0.6] * 10)
    assert (many[1] - many[0]) / 2 == pytest.approx(2.093 * 0.1 * math.sqrt(20 / 19) / math.sqrt(20), rel=1e-3)
    assert over_seeds([0.5]) == (0.0, 1.0)


def test_a_methods_interval_is_the_wider_one():
    alike, apart = [Outcome(50, 100)] * 3, [Outcome(20, 100), Outcome(50, 100), Outcome(80, 100)]
    assert success_interval(alike) == pytest.approx(wilson(150, 300))
    assert success_interval(apart)[0] < wilson(150, 300)[0] - 0.2
    assert success_interval(apart[:1]) == pytest.approx(wilson(20, 100))


def test_the_interval_of_a_gain_is_newcombes():
    # Example (a) of R. G. Newcombe, Statistics in Medicine 17 (1998): 56/70 against 48/80.
    found = difference_interval(56 / 70, wilson(56, 70), 48 / 80, wilson(48, 80))
    assert found == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_curves_are_averaged_where_all_of_them_are_known():
    curve = mean_curve([([0, 10, 20], [0.0, 0.5, 1.0]), ([0, 5, 10], [0.0, 0.5, 0.5])])
    assert curve["x"] == [0, 5, 10]
    assert curve["mean"] == pytest.approx([0, 0.375, 0.5])
    assert (curve["low"][1], curve["high"][1]) == (0.25, 0.5)
    assert mean_curve([([3], [0.2]), ([5, 9], [0.4, 0.6])])["mean"] == pytest.approx([0.3])


def summary(base, *tests, errors=None):
    from robot_rl.rl.compare.results import Curve, SeedResult

    names = [f"m{k}" for k in range(len(tests))]
    runs = [
        SeedResult(name, seed, test, 100, 10.0, Curve([0, 50 + 10 * k, 100], [1, 5, 10], [0.5, test.rate, test.rate]))
        for k, (name, seeds) in enumerate(zip(names, tests, strict=True))
        for seed, test in enumerate(seeds)
    ]
    return summarise(
        methods=names,
        bases={"base": base},
        base_of=dict.fromkeys(names, "base"),
        results=runs,
        errors=errors or {},
    )


def test_the_recommendation_says_how_certain_it_is():
    base = Outcome(100, 200)
    clear = summary(base, [Outcome(190, 200)], [Outcome(140, 200)])["recommendation"]
    assert clear[0].startswith("Use m0 at 95.0 %")
    assert "above those of all others" in clear[0]
    assert any("one seed" in line and "another seed may turn the order" in line for line in clear)

    close = summary(base, [Outcome(190, 200)], [Outcome(186, 200)], [Outcome(20, 200)])["recommendation"]
    assert close[0].startswith("No clear winner: m0")
    assert "overlap with it: m1 (93.0 %)" in close[0]
    assert "Of these m0 reached 91 %" in close[1]
    assert "Below their base, beyond both intervals: m2." in close

    none = summary(base, [Outcome(108, 200)], [Outcome(95, 200)])["recommendation"]
    assert none[0].startswith("No method is clearly better than its base")
    assert "+4.0 points" in none[0]

    worse = summary(base, [Outcome(99, 200)])["recommendation"]
    assert worse[0].startswith("No method is better than its base: the best is m0 at 49.5 %")

    scattered = summary(base, [Outcome(190, 200), Outcome(80, 200)])["recommendation"]
    assert scattered[0].startswith("No method is clearly better"), "seeds that disagree make a gain uncertain"

    assert recommend([], {}) == ["Nothing was measured: no run has finished."]
    failed = summary(base, [], errors={"m0": "no such head"})["recommendation"]
    assert failed[-1] == "m0 failed: no such head"
