"""Run directories: what they hold, how they resume, what a user reads when the disk is in the way."""

import errno
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from robot_rl.core.errors import ConfigError, DataError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.train import run as run_module
from robot_rl.train.run import Run, differences, read_metrics, to_plain, write_text


@dataclass(frozen=True)
class Head:
    steps: int = 10


@dataclass(frozen=True)
class Config:
    learning_rate: float = 1e-3
    head: Head = field(default_factory=Head)
    out: Path = Path("x")
    resume: bool = False


def test_a_run_carries_all_that_is_needed_to_repeat_it(tmp_path):
    spec = Spec({"state": ArraySpec((2,))}, ArraySpec((1,)), 10.0)
    with Run.create(tmp_path / "a" / "run", Config(), spec=spec, seed=3) as run:
        run.log({"loss": 0.5, "bad": float("nan")}, step=1)
        run.log({"success": 0.25}, step=7, stage="evaluate")
        assert run.checkpoint_dir("best").is_dir()
    path = tmp_path / "a" / "run"
    assert {"config.yaml", "specs.json", "versions.json", "seed", "metrics.jsonl", "tensorboard"} <= {
        file.name for file in path.iterdir()
    }
    assert Spec.from_json(json.loads((path / "specs.json").read_text())) == spec
    assert (path / "seed").read_text() == "3\n"
    assert json.loads((path / "versions.json").read_text())["torch"]
    first, second = read_metrics(path)
    assert (first["step"], first["loss"], first["bad"]) == (1, 0.5, None)
    assert second["stage"] == "evaluate"
    assert read_metrics(path, "evaluate") == [second]
    assert any((path / "tensorboard").iterdir())


def test_an_existing_run_is_not_overwritten(tmp_path):
    Run.create(tmp_path / "run", Config()).close()
    with pytest.raises(ConfigError, match="already holds a run: resume it"):
        Run.create(tmp_path / "run", Config())


def test_resume_lists_every_difference(tmp_path):
    Run.create(tmp_path / "run", Config()).close()
    Run.create(tmp_path / "run", Config(resume=True), resume=True).close()
    with pytest.raises(ConfigError) as error:
        Run.create(tmp_path / "run", Config(1e-4, Head(20)), seed=1, resume=True)
    for part in ("learning_rate was 0.001, now 0.0001", "head.steps was 10, now 20", "seed was 0, now 1"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_is_resumed_by_another_path_from_another_place_with_other_threads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"out": "run", "threads": 0, "data": "demos", "command": {"out": "run", "threads": 0, "resume": False}}
    Run.create("run", given).close()
    (tmp_path / "run").rename(tmp_path / "moved")
    command = {"out": "moved", "threads": 2, "resume": True}
    now = {"out": "moved", "threads": 2, "data": str(tmp_path / "demos"), "command": command}
    Run.create(tmp_path / "moved", now, resume=True).close()
    with pytest.raises(ConfigError, match="data was 'demos', now 'others'"):
        Run.create(tmp_path / "moved", now | {"data": "others"}, resume=True)


def test_a_run_that_came_to_nothing_leaves_its_place_free(tmp_path):
    def begin(write):
        with Run.create(tmp_path / "run", Config(), resume=True) as run:
            write(run)
            raise ConfigError("refused")

    def fail(write=lambda run: None):
        with pytest.raises(ConfigError, match="refused"):
            begin(write)

    fail(lambda run: run.checkpoint_dir("trainer"))
    assert not (tmp_path / "run").exists()
    for write in (
        lambda run: run.log({"loss": 1.0}, 1),
        lambda run: (run.checkpoint_dir("trainer") / "state.safetensors").write_text(""),
    ):
        fail(write)
        assert (tmp_path / "run" / "config.yaml").exists()
        fail()
        assert (tmp_path / "run" / "config.yaml").exists(), "it was not made by that call"
        shutil.rmtree(tmp_path / "run")


def test_resume_drops_an_unfinished_line_and_rewind_forgets_later_steps(tmp_path):
    with Run.create(tmp_path / "run", Config()) as run:
        for step in (1, 2, 3):
            run.log({"loss": 1.0}, step)
        run.log({"success": 1.0}, 3, stage="evaluate")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "train", "st')
    with Run.create(tmp_path / "run", Config(), resume=True) as run:
        run.rewind(2)
        run.log({"loss": 0.5}, 3)
    rows = read_metrics(tmp_path / "run")
    assert [(row["stage"], row["step"]) for row in rows] == [("train", 1), ("train", 2), ("evaluate", 3), ("train", 3)]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_module.os, "fsync", full)
    with pytest.raises(DataError, match=r"no space left for .*--out"):
        Run.create(tmp_path / "run", Config())
    assert not list((tmp_path / "run").glob(".*")), "the unfinished file is removed"


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write to .*choose another directory"):
        Run.create(tmp_path / "file" / "run", Config())


def test_an_interrupted_write_keeps_the_old_content(tmp_path, monkeypatch):
    write_text(tmp_path / "note", "old")
    monkeypatch.setattr(run_module.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "note", "new")
    assert (tmp_path / "note").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["note"]


def test_plain_configurations_and_their_differences():
    assert to_plain(Config()) == {"learning_rate": 1e-3, "head": {"steps": 10}, "out": "x", "resume": False}
    assert differences({"a": {"b": 1}, "c": [1]}, {"a": {"b": 1}, "c": [1]}) == []
    assert differences({"a": 1}, {"b": 2}) == ["a was 1, now None", "b was None, now 2"]


def test_an_evaluation_makes_the_directory_of_its_results_before_it_begins(tmp_path):
    from robot_rl.cli import eval as command

    results, video = tmp_path / "new" / "x.json", tmp_path / "other" / "x.mp4"
    with pytest.raises(DataError, match="no checkpoint"):
        command.run(command.Config("missing", "push_t", json=results, video=video))
    assert results.parent.is_dir()
    assert video.parent.is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write to"):
        command.run(command.Config("missing", "push_t", json=tmp_path / "file" / "x.json"))
