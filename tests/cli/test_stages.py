"""Stages: finished ones are kept, changed ones run again with all that follow, interrupted ones go on."""

import fcntl

import pytest

from robot_rl.cli.stages import Pipeline, Stage
from robot_rl.core.errors import ConfigError


class Job:
    """Two stages; the second reads what the first has written."""

    def __init__(self, root):
        self.root, self.log, self.interrupt = root, [], False
        self.first, self.second = {"n": 1}, {"m": 1}

    def run(self):
        a, b = self.root / "a", self.root / "b"

        def make_a():
            self.log.append("a")
            a.write_text(str(self.first["n"]))
            return {"value": self.first["n"]}

        def make_b():
            self.log.append("b")
            b.mkdir(exist_ok=True)
            parts = sorted(path.name for path in b.iterdir())
            (b / f"part{len(parts)}").write_text("")
            if self.interrupt:
                raise KeyboardInterrupt
            return {"parts": len(parts) + 1}

        stages = [Stage("a", "Make a", self.first, make_a, (a,)), Stage("b", "Make b", self.second, make_b, (b,), True)]
        return Pipeline(self.root).run(stages)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "job")


def test_finished_stages_are_kept(job, capsys):
    first = job.run()
    again = job.run()
    assert job.log == ["a", "b"]
    assert again == first
    assert first["b"].facts == {"parts": 1}
    assert "[2/2] Make b: kept from before" in capsys.readouterr().out


def test_a_changed_setting_runs_its_stage_and_all_that_follow(job):
    job.run()
    job.second = {"m": 2}
    job.run()
    assert job.log == ["a", "b", "b"]
    job.first = {"n": 2}
    assert job.run()["b"].facts == {"parts": 1}, "a fresh start finds nothing of the old one"
    assert job.log == ["a", "b", "b", "a", "b"]


def test_a_missing_output_is_made_again_with_all_that_follow(job):
    job.run()
    (job.root / "a").unlink()
    job.run()
    assert job.log == ["a", "b", "a", "b"]


def test_an_interrupted_stage_goes_on(job):
    job.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        job.run()
    job.interrupt = False
    assert job.run()["b"].facts == {"parts": 2}
    assert job.log == ["a", "b", "b"]


def test_an_interrupted_stage_with_other_settings_starts_afresh(job):
    job.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        job.run()
    job.interrupt, job.second = False, {"m": 2}
    assert job.run()["b"].facts == {"parts": 1}


def test_two_processes_do_not_share_a_directory(job):
    job.run()
    with (job.root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is at work"):
            job.run()


def test_nothing_outside_the_directory_is_removed(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    stage = Stage("a", "Make a", {}, dict, (precious,))
    with pytest.raises(ValueError, match="outside"):
        Pipeline(tmp_path / "job").run([stage])
    assert precious.exists()
