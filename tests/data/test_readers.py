"""Readers on files made here: layouts, irregularities, damage."""

import io
import json
import pickle
import shutil
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robot_rl.core import registry
from robot_rl.core.errors import DataError, RobotRLError, UnknownNameError
from robot_rl.data.adroit import open_adroit
from robot_rl.data.dataset import open_dataset
from robot_rl.data.testing import check_reader
from robot_rl.data.video import VideoWriter

RNG = np.random.default_rng(0)


def write_adroit(path, lengths=(5, 8)):
    episodes = [
        {
            "observations": RNG.normal(size=(n, 39)),
            "actions": RNG.uniform(-1, 1, (n, 28)),
            "rewards": RNG.normal(size=n),
            "init_state_dict": {"qpos": np.zeros(30), "qvel": np.zeros(30)},
        }
        for n in lengths
    ]
    path.write_bytes(pickle.dumps(episodes, protocol=2))
    return path


def write_hdf5(path, demos=12):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        environment = {"env_name": "Lift", "env_kwargs": {"control_freq": 20, "controller_configs": {}}}
        file.create_group("data").attrs["env_args"] = json.dumps(environment)
        for number in range(demos):
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"] = np.full((4 + number, 7), number / 20)
            demo["rewards"] = np.zeros(4 + number)
            demo["obs/object"] = np.full((4 + number, 10), float(number))
            demo["obs/gripper"] = np.full(4 + number, float(number))
            demo["obs/camera"] = np.full((4 + number, 8, 8, 3), number, np.uint8)
        file["mask/train"] = np.array([b"demo_0", b"demo_10"])
    return path


def write_zarr(path, images=False):
    zarr = pytest.importorskip("zarr")
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    arrays = {
        "data/state": RNG.normal(size=(20, 5)).astype(np.float32),
        "data/action": RNG.normal(size=(20, 2)).astype(np.float32),
        "data/reward": RNG.normal(size=20).astype(np.float32),
        "meta/episode_ends": np.array([6, 20]),
    }
    if images:
        arrays["data/img"] = RNG.integers(0, 255, (20, 8, 8, 3)).astype(np.float32)
    for name, value in arrays.items():
        array = root.create_array(name, shape=value.shape, chunks=(7, *value.shape[1:]), dtype=value.dtype)
        array[:] = value
    return path


def zip_up(directory, target):
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(directory).as_posix())
    return target


def write_lerobot_v21(root, lengths=(5, 7)):
    """A v2.1 data set with one camera."""
    (root / "meta").mkdir(parents=True)
    feature = {"dtype": "float32", "shape": [3], "names": ["a", "b", "c"]}
    info = {
        "codebase_version": "v2.1",
        "robot_type": "arm",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_chunks": 1,
        "total_videos": len(lengths),
        "chunks_size": 1000,
        "fps": 10,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "observation.state": feature,
            "action": feature,
            "observation.images.top": {"dtype": "video", "shape": [16, 16, 3], "names": ["height", "width", "channel"]},
        },
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/episodes_stats.jsonl").write_text("")
    lines = [json.dumps({"episode_index": i, "tasks": ["pick"], "length": n}) for i, n in enumerate(lengths)]
    (root / "meta/episodes.jsonl").write_text("\n".join(lines))
    for i, n in enumerate(lengths):
        rows = RNG.normal(size=(n, 3)).astype(np.float32)
        table = pa.table({"observation.state": rows.tolist(), "action": rows.tolist(), "episode_index": [i] * n})
        path = root / info["data_path"].format(episode_chunk=0, episode_index=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        film = root / info["video_path"].format(episode_chunk=0, video_key="observation.images.top", episode_index=i)
        film.parent.mkdir(parents=True, exist_ok=True)
        with VideoWriter(film, 10, 16, 16) as writer:
            for level in range(n):
                writer.add(np.full((16, 16, 3), 20 * level, np.uint8))
    return root


def change_info(root, **changes):
    path = root / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def one_line(call, *parts):
    """Assert that ``call`` raises a one-line error that holds ``parts``."""
    with pytest.raises(RobotRLError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def test_every_format_keeps_the_contract(tmp_path, record):
    record(tmp_path / "native")
    sources = [
        (tmp_path / "native", "lerobot"),
        (write_lerobot_v21(tmp_path / "v21"), "lerobot"),
        (write_adroit(tmp_path / "a.pickle"), "adroit"),
        (write_hdf5(tmp_path / "b.hdf5"), "hdf5"),
        (write_zarr(tmp_path / "c.zarr", images=True), "zarr"),
        (zip_up(tmp_path / "c.zarr", tmp_path / "d.zarr.zip"), "zarr"),
    ]
    for path, name in sources:
        dataset = open_dataset(path)
        assert dataset.format == name
        check_reader(dataset)
    assert {name for _, name in sources} <= set(registry.names("datasets"))


def test_what_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    one_line(lambda: open_dataset(tmp_path / "notes.txt"), "notes.txt", "adroit, hdf5, lerobot, zarr")
    one_line(lambda: open_dataset(tmp_path / "note.txt"), "does not exist", "Did you mean", "notes.txt")
    one_line(lambda: open_dataset(tmp_path / "notes.txt", "zar"), "Did you mean 'zarr'")
    write_adroit(tmp_path / "door.pickle")
    one_line(lambda: open_dataset(tmp_path), "inside it are: door.pickle")


def test_a_plug_in_takes_the_same_road(tmp_path, monkeypatch):
    def opener(path):
        return ("opened", path)

    monkeypatch.setattr(registry, "_overrides", {})
    registry.register("datasets", "mine", opener)
    (tmp_path / "x.mine").write_text("")
    assert open_dataset(tmp_path / "x.mine", "mine") == ("opened", tmp_path / "x.mine")
    one_line(lambda: open_dataset(tmp_path / "x.mine"), "looks like none")
    opener.recognises = lambda path: path.suffix == ".mine"
    assert open_dataset(tmp_path / "x.mine")[0] == "opened"


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9, 0.999])
def test_truncated_files_give_one_line_that_names_them(tmp_path, record, kept):
    def cut(path):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * kept)])
        return path

    path = cut(write_adroit(tmp_path / "a.pickle"))
    one_line(lambda: open_dataset(path).load(), "a.pickle")
    path = cut(write_hdf5(tmp_path / "b.hdf5"))
    one_line(lambda: open_dataset(path).load(), "b.hdf5")
    archive = cut(zip_up(write_zarr(tmp_path / "c.zarr"), tmp_path / "d.zarr.zip"))
    one_line(lambda: open_dataset(archive).load(), "d.zarr.zip")
    cut(tmp_path / "c.zarr/data/state/1.0")
    one_line(lambda: open_dataset(tmp_path / "c.zarr").load(), "c.zarr/data/state")
    record(tmp_path / "set")
    for name in ("data/chunk-000/file-001.parquet", "meta/episodes/chunk-000/file-001.parquet", "meta/info.json"):
        shutil.copytree(tmp_path / "set", tmp_path / "copy")
        cut(tmp_path / "copy" / name)
        one_line(lambda: open_dataset(tmp_path / "copy").load(), name.partition("/chunk")[0])
        shutil.rmtree(tmp_path / "copy")
    cut(tmp_path / "set/videos/observation.images.front/chunk-000/file-001.mp4")
    if kept < 0.99:  # the last bytes of an mp4 file say nothing about its frames
        one_line(lambda: open_dataset(tmp_path / "set").images("images.front", 1), "file-001.mp4")
    root = write_lerobot_v21(tmp_path / "v21")
    cut(root / "data/chunk-000/episode_000001.parquet")
    one_line(lambda: open_dataset(root).load(), "episode_000001.parquet")


class Hostile:
    def __reduce__(self):
        return (eval, ("__import__('os').system('touch pwned')",))


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Hostile(), "builtins.eval"),
        ([{"observations": Hostile()}], "builtins.eval"),
        ([np.array([Hostile()], dtype=object)], "builtins.eval"),
        (np.random.default_rng(0), "numpy.random._pickle.__generator_ctor"),
        (io.BytesIO(b""), "_io.BytesIO"),
        (np.float64(1.0), "numpy._core.multiarray.scalar"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_pickles_are_refused_by_name(tmp_path, content, name, protocol, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "door.pickle"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = name.replace("builtins", "__builtin__") if protocol == 2 else name
    one_line(lambda: open_dataset(path), "door.pickle: refused", f"'{found}'", "only plain numpy arrays")
    assert not (tmp_path / "pwned").exists()


def test_pickles_of_another_layout_are_refused(tmp_path):
    path = tmp_path / "a.pickle"
    for content, message in [
        ({"observations": [1]}, "holds a dict, expected a list of episodes"),
        ([{"observations": np.zeros((3, 2))}], "episode 0 lacks one of observations, actions, rewards"),
        ([[1, 2]], "episode 0 lacks one of"),
        ([{"observations": np.zeros((3, 2)), "actions": np.zeros((2, 2)), "rewards": np.zeros(3)}], "different or no"),
        ([{"observations": "abc", "actions": np.zeros((2, 2)), "rewards": np.zeros(3)}], "no array of numbers"),
    ]:
        path.write_bytes(pickle.dumps(content, protocol=2))
        one_line(lambda: open_adroit(path), "a.pickle", message)


def test_hdf5_sorts_demonstrations_by_number_and_reads_masks(tmp_path):
    dataset = open_dataset(write_hdf5(tmp_path / "a.hdf5"))
    frames = dataset.load()
    assert frames.episode_lengths.tolist() == list(range(4, 16))
    assert frames.observation["object"][frames.episode(10), 0].tolist() == [10.0] * 14
    assert frames.observation["gripper"].shape == (len(frames.action), 1)
    assert dataset.splits == {"train": [0, 10]}
    assert dataset.spec.rate_hz == 20
    assert dataset.images("camera", 3).mean() == 3
    assert dataset.warnings == []


def test_hdf5_of_another_layout_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.hdf5"
    for fill, message in [
        ({"other": np.zeros(3)}, "no group 'data'; found other"),
        ({"data/x": np.zeros(3)}, "no demonstration 'data/demo_…'; found x"),
        ({"data/demo_0/obs/s": np.zeros((3, 1))}, "demo_0 has no 'actions'; found obs"),
        ({"data/demo_0/actions": np.zeros((3, 1))}, "neither 'obs' nor 'states'; found actions"),
        ({"data/demo_0/actions": np.zeros((3, 1)), "data/demo_0/obs/s": np.zeros((2, 1))}, "expected (3, 1)"),
    ]:
        with h5py.File(path, "w") as file:
            for name, value in fill.items():
                file[name] = value
        one_line(lambda: open_dataset(path), "a.hdf5", message)


def test_zarr_extras_images_and_missing_chunks(tmp_path):
    dataset = open_dataset(write_zarr(tmp_path / "c.zarr", images=True))
    assert set(dataset.load().extras) == {"reward"}
    assert dataset.warnings == [
        "data/img: images are stored as float32; read as uint8 in 0..255",
        "the format states no control rate: rate_hz is 0",
    ]
    (tmp_path / "c.zarr/data/state/1.0").unlink()
    assert "data/state: 1 of 3 chunks are not stored" in "".join(open_dataset(tmp_path / "c.zarr").warnings)
    shutil.rmtree(tmp_path / "c.zarr/data/action")
    one_line(lambda: open_dataset(tmp_path / "c.zarr"), "no array 'data/action'; found data/img")


def test_lerobot_versions_and_layouts(tmp_path):
    root = write_lerobot_v21(tmp_path / "set")
    dataset = open_dataset(root)
    assert dataset.warnings == []
    assert dataset.spec.observation["state"].names == ("a", "b", "c")
    assert dataset.image("images.top", 1, 6).mean() == pytest.approx(120, abs=2)
    assert dataset.tasks == ["pick", "pick"]
    change_info(root, codebase_version="v1.6")
    one_line(lambda: open_dataset(root), "info.json: codebase_version v1.6 is not supported; known: v2.0, v2.1, v3.0")


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"total_episodes": 9}, "meta/info.json: total_episodes is 9, but there are 2"),
        ({"splits": {"train": "0:9"}}, "meta/info.json: split 'train' is 0:9, but there are 2 episodes"),
        ({"splits": {"train": "all"}}, "meta/info.json: split 'train' is 'all', expected 'start:stop'; left out"),
        ({"fps": None}, "meta/info.json: no fps, rate_hz is 0"),
        ({"robot_type": None}, "meta/info.json: robot_type is None"),
        (
            {"data_path": "data/{episode_index:03d}.parquet"},
            "meta/info.json: data_path 'data/{episode_index:03d}.parquet' leads to no file; "
            "found under the standard path",
        ),
    ],
)
def test_lerobot_irregular_info_is_tolerated_and_told(tmp_path, changes, warning):
    root = write_lerobot_v21(tmp_path / "set")
    change_info(root, **changes)
    dataset = open_dataset(root)
    assert dataset.warnings == [warning]
    assert dataset.load().num_frames == 12


def test_lerobot_missing_files_are_told(tmp_path):
    root = write_lerobot_v21(tmp_path / "set")
    (root / "videos/chunk-000/observation.images.top/episode_000001.mp4").unlink()
    (root / "data/chunk-000/episode_000001.parquet").unlink()
    dataset = open_dataset(root)
    assert "episode 1: its data file is missing" in dataset.warnings
    assert "camera 'observation.images.top': no video file for episodes 1" in dataset.warnings
    one_line(lambda: dataset.load(), "episode_000001.parquet: the file does not exist")
    assert dataset.load(episodes=[0]).num_frames == 5
    one_line(lambda: dataset.images("images.top", 1), "episode_000001.mp4: the file does not exist")


def test_lerobot_features_without_data_and_columns_without_feature(tmp_path):
    root = write_lerobot_v21(tmp_path / "set")
    info = json.loads((root / "meta/info.json").read_text())
    features = {**info["features"], "observation.force": {"dtype": "float32", "shape": [6]}}
    del features["observation.state"]
    change_info(root, features=features)
    dataset = open_dataset(root)
    assert dataset.warnings == [
        "feature 'observation.force' is declared in meta/info.json but is no column of the data: left out",
        "columns not declared in meta/info.json are left out: observation.state",
    ]
    del features["action"]
    change_info(root, features=features)
    one_line(lambda: open_dataset(root), "there is no 'action'; found observation.images.top")


def test_lerobot_paths_stay_inside(tmp_path):
    root = write_lerobot_v21(tmp_path / "set")
    change_info(root, data_path="../../{episode_index}.parquet")
    one_line(lambda: open_dataset(root), "leads out of the data set")
    change_info(root, data_path="data/{nonsense}.parquet")
    one_line(lambda: open_dataset(root), "cannot be filled ('nonsense')")
    for field in ("{episode_index:0999999999d}", "{episode_index:>99}", "{episode_index.real}", "{video_key!r:999}"):
        change_info(root, data_path=f"data/{field}.parquet")
        one_line(lambda: open_dataset(root), "expected fields like {name} or {name:03d}")


def test_lerobot_wrong_shapes_are_errors(tmp_path):
    root = write_lerobot_v21(tmp_path / "set")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"]["shape"], info["features"]["action"]["names"] = [4], None
    info["features"]["observation.images.top"]["shape"] = [32, 16, 3]
    change_info(root, features=info["features"])
    dataset = open_dataset(root)
    one_line(lambda: dataset.load(), "column 'action' holds 15 numbers in 5 rows; meta/info.json says (4,) each")
    one_line(lambda: dataset.images("images.top", 0), "frames are (16, 16, 3), meta/info.json says (32, 16, 3)")


def test_images_inside_parquet_are_decoded(tmp_path):
    cv2 = pytest.importorskip("cv2")
    root = write_lerobot_v21(tmp_path / "set")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.images.top"]["dtype"] = "image"
    change_info(root, features=info["features"], total_videos=0)
    for i, n in enumerate((5, 7)):
        path = root / f"data/chunk-000/episode_{i:06d}.parquet"
        red = np.zeros((16, 16, 3), np.uint8)
        red[..., 2] = 200  # OpenCV's order is blue, green, red
        encoded = {"bytes": cv2.imencode(".png", red)[1].tobytes(), "path": None}
        pq.write_table(pq.read_table(path).append_column("observation.images.top", pa.array([encoded] * n)), path)
    dataset = open_dataset(root)
    assert dataset.warnings == []
    check_reader(dataset)
    assert dataset.image("images.top", 1, 3)[0, 0].tolist() == [200, 0, 0]


def test_missing_optional_packages_say_what_to_install(tmp_path, monkeypatch):
    sources = {"h5py": write_hdf5(tmp_path / "a.hdf5"), "zarr": write_zarr(tmp_path / "c.zarr")}
    for package, path in sources.items():
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, package, None)
            one_line(lambda path=path: open_dataset(path), package, "pip install 'robot-rl[datasets]'")


def test_unknown_episode_and_frame(tmp_path, record):
    record(tmp_path / "set", lengths=(3,))
    dataset = open_dataset(tmp_path / "set")
    with pytest.raises(DataError, match="there is no episode 1; the data set holds 1"):
        dataset.load(episodes=[1])
    with pytest.raises(DataError, match="episode 0 has no frame 3; it holds 3"):
        dataset.image("images.front", 0, 3)
    with pytest.raises(UnknownNameError, match=r"Did you mean 'images\.front'"):
        dataset.images("images.frnt", 0)
