"""What can be learned from, and what is said of a place that holds no data set."""

import pytest

from robot_rl.cli.main import main
from robot_rl.core import registry
from robot_rl.core.errors import CapabilityError, RobotRLError
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data import dataset
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy


def test_formats_are_looked_up_once_for_a_whole_directory(tmp_path, monkeypatch, capsys):
    for i in range(40):
        (tmp_path / f"{i}.txt").touch()
    load, loaded = registry.load, []
    monkeypatch.setattr(registry, "load", lambda group, name: loaded.append(name) or load(group, name))
    assert main(["data", "info", str(tmp_path)]) == 2
    assert "looks like none of the known formats" in capsys.readouterr().err
    assert sorted(loaded) == registry.names("datasets")


def test_a_large_directory_is_not_scanned_to_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "SCANNED", 10)
    for i in range(30):
        (tmp_path / f"{i}.txt").touch()
    asked = []
    monkeypatch.setattr(dataset, "_recognise", lambda path, formats: asked.append(path))
    assert main(["data", "info", str(tmp_path)]) == 2
    assert "nor does any of 10 entries in it" in capsys.readouterr().err
    assert len(asked) == 11  # the directory itself and ten of its entries


def test_data_sets_inside_are_named_and_what_may_not_be_read_is_passed_over(tmp_path, monkeypatch, capsys):
    def recognise(path, formats):
        if path.name == "private":
            raise PermissionError(path)
        return "lerobot" if path.name.startswith("run") else None

    monkeypatch.setattr(dataset, "_recognise", recognise)
    for name in ("private", *(f"run_{i}" for i in range(7))):
        (tmp_path / name).mkdir()
    assert main(["data", "info", str(tmp_path)]) == 2
    assert "inside it are: run_0, run_1, run_2, run_3, run_4\n" in capsys.readouterr().err


def test_a_format_that_cannot_be_loaded_does_not_hide_the_others(tmp_path, monkeypatch):
    def load(group, name):
        raise RobotRLError(f"The dataset format '{name}' is broken.")

    monkeypatch.setattr(registry, "load", load)
    with pytest.raises(RobotRLError, match=r"none of the known formats.*The dataset format 'adroit' is broken"):
        dataset.open_dataset(tmp_path)


def test_images_are_refused_for_what_they_are():
    front = ArraySpec((4, 6, 3), "uint8")
    spec = Spec({"images.front": front, "state": ArraySpec((2,))}, ArraySpec((2,)))
    with pytest.raises(CapabilityError) as error:
        ChunkedPolicy(spec, ChunkedConfig())
    message = "there is no image encoder: no policy here sees images, and 'images.front' is one; choose from: state"
    assert str(error.value) == message
