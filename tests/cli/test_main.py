"""The command line: teaches, suggests, and never shows a traceback for a user's mistake."""

import resource
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from robot_rl.cli import main as cli
from robot_rl.cli.catalog import entries, summary
from robot_rl.core.errors import DataError


@dataclass(frozen=True)
class Config:
    """Settings."""

    steps: int = 3
    """How many."""
    resume: bool = False
    """Go on."""


@pytest.fixture
def verb(monkeypatch):
    """Install a verb `try` whose `run` is given by the test."""

    def install(run, **extra):
        module = SimpleNamespace(__doc__="Try it.", Config=Config, run=run, **extra)
        entry = SimpleNamespace(name="try", load=lambda: module, module="robot_rl.cli.list", attr="")
        monkeypatch.setattr(cli, "entries", lambda group: {"try": entry})

    return install


def test_the_overview_lists_every_verb_with_one_line():
    text = cli.overview()
    for name, entry in entries("commands").items():
        assert f"  {name} " in text
        assert summary(entry) in text
        assert "missing" not in summary(entry)


def test_help_is_quick_and_loads_neither_torch_nor_numpy():
    code = (
        "import sys; from robot_rl.cli.main import main; main(['--help']); "
        "assert not {'torch', 'numpy', 'mujoco', 'rclpy', 'tyro'} & set(sys.modules)"
    )
    took = {code: [], "pass": []}
    for _ in range(3):
        for program, times in took.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            # Processor time, so that other load on the machine does not count.
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took[code]) < max(0.3, 7 * min(took["pass"])), "seven times Python's own start, on a slow machine"


def test_an_unknown_verb_suggests_the_nearest(capsys):
    assert cli.main(["evl"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Unknown command 'evl'. Did you mean 'eval'? Available: ")
    assert error.count("\n") == 1


def test_a_users_mistake_is_one_line_and_status_2(verb, capsys):
    def run(config):
        raise DataError("dataset 'x'\nis not there")

    verb(run)
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == "dataset 'x' is not there\n"
    with pytest.raises(DataError):
        cli.main(["try", "--debug"])


def test_what_the_file_system_refuses_is_one_line_and_status_2(verb, capsys, tmp_path):
    verb(lambda config: (tmp_path / "nodir" / "x.mp4").open("w"))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == f"No such file or directory: {tmp_path / 'nodir' / 'x.mp4'}\n"
    with pytest.raises(FileNotFoundError):
        cli.main(["try", "--debug"])


@pytest.mark.parametrize("setting", ["--out", "--video"])
def test_deploy_knows_where_it_cannot_write_before_it_connects(tmp_path, capsys, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    place = "file" if setting == "--out" else "file/x.mp4"
    assert cli.main(["deploy", "--policy", "missing", "--operator", "none", setting, place]) == 2
    assert "cannot write to file: File exists" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(verb):
    verb(lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


def test_an_interrupt_says_how_to_resume(verb, capsys):
    def run(config):
        raise KeyboardInterrupt

    verb(run)
    assert cli.main(["try", "--steps", "5"]) == 130
    assert capsys.readouterr().err == "Interrupted. Continue with: robot-rl try --steps 5 --resume\n"
    verb(run, resume_hint=lambda config: f"{config.steps} steps are safe.")
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "Interrupted. 3 steps are safe.\n"


def test_settings_are_parsed_and_a_misspelt_one_is_suggested(verb, capsys):
    seen = []
    verb(lambda config: seen.append(config.steps))
    assert cli.main(["try", "--steps", "7"]) == 0
    assert seen == [7]
    with pytest.raises(SystemExit) as stop:
        cli.main(["try", "--stps", "7"])
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_field_docstrings_are_the_help(verb, capsys):
    verb(lambda config: None)
    with pytest.raises(SystemExit):
        cli.main(["try", "--help"])
    output = capsys.readouterr().out
    assert "How many." in output
    assert "Try it." in output


def test_list_names_what_is_plugged_in(capsys):
    assert cli.main(["list", "tasks"]) == 0
    output = capsys.readouterr().out
    assert "peg_insert" in output
    assert "gym:gym_pusht/PushT-v0" in output
    assert cli.main(["list", "tasksk"]) == 2
    assert "Did you mean 'tasks'?" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("robot-rl 0.")
