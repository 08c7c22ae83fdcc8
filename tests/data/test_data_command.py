import pytest

from robot_rl.cli.main import main
from robot_rl.data.dataset import open_dataset


def call(capsys, *arguments):
    """Run ``robot-rl data`` and return its status and output."""
    status = main(["data", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_info_check_import_compact(tmp_path, record, capsys):
    record(tmp_path / "a", lengths=(25, 30))
    status, out, _ = call(capsys, "info", tmp_path / "a")
    assert status == 0
    for line in (
        "format      lerobot v3.0",
        "episodes    2 of 25 to 30 frames, median 27.5",
        "frames      55, 0.1 min at 10 Hz",
        "tasks       push",
        "observation images.front (32, 48, 3) image",
        "success     1 of 2 episodes",
    ):
        assert line in out
    status, out, _ = call(capsys, "check", tmp_path / "a", "--images", "all")
    assert status == 0
    assert "2 episodes, 55 frames: 0 errors, 0 warnings, 0 notes" in out
    status, out, err = call(
        capsys,
        "import",
        tmp_path / "a",
        tmp_path / "b",
        "--rename",
        "keypoint=points",
        "state[0:2]=agent_pos",
        "--flatten",
    )
    assert status == 0
    assert "8 files became" not in err
    assert "import: 2/2 episodes" in err
    assert set(open_dataset(tmp_path / "b").spec.observation) == {"images.front", "points", "agent_pos"}
    assert len(list((tmp_path / "b").rglob("*.parquet"))) == 3
    status, out, _ = call(capsys, "compact", tmp_path / "a")
    assert status == 0
    assert "9 files became 6" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "{}/demo"), "demo: does not exist. Did you mean '{}/demos'?"),
        (("import", "{}/demos", "{}/c", "--rename", "state"), "--rename 'state' is not of the form old=new"),
        (("import", "{}/demos", "{}/c", "--rename", "x=y"), "Unknown observation 'x'. Available: images.front"),
        (("info", "{}/demos", "--format", "lerobt"), "Unknown dataset format 'lerobt'. Did you mean 'lerobot'?"),
    ],
)
def test_errors_are_one_line(tmp_path, record, capsys, arguments, message):
    record(tmp_path / "demos", lengths=(3,))
    status, _, err = call(capsys, *(part.format(tmp_path) for part in arguments))
    assert status == 2
    assert message.format(tmp_path) in err.splitlines()[-1]


def test_check_fails_on_errors(tmp_path, record, capsys):
    record(tmp_path / "a", lengths=(3, 4))
    next((tmp_path / "a").rglob("file-001.mp4")).unlink()
    status, out, _ = call(capsys, "check", tmp_path / "a")
    assert status == 1
    assert "error    video     episode 1: no video file for images.front" in out


def test_empty_data_set(tmp_path, record, capsys):
    record(tmp_path / "a", lengths=(3,))
    for path in (tmp_path / "a/meta/episodes").rglob("*.parquet"):
        path.unlink()
    status, out, _ = call(capsys, "info", tmp_path / "a")
    assert status == 0
    assert "no episode yet" in out
    assert call(capsys, "check", tmp_path / "a")[0] == 0
