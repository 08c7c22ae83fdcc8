import numpy as np
import pytest

from robot_rl.core.errors import DataError
from robot_rl.data.video import VideoReader, VideoWriter, join_videos


def grey(level, shape=(32, 48, 3)):
    return np.full(shape, level, np.uint8)


def write(path, levels, fps=10, shape=(32, 48, 3)):
    with VideoWriter(path, fps, *shape[:2]) as writer:
        for level in levels:
            writer.add(grey(level, shape))
    return path


def level_of(image):
    return round(float(image.mean()))


@pytest.mark.parametrize("fps", [10, 29.97, 30])
def test_random_access_is_exact(tmp_path, fps):
    levels = list(range(20, 220, 4))
    reader = VideoReader(write(tmp_path / "a.mp4", levels, fps))
    assert reader.num_frames == len(levels)
    assert reader.fps == pytest.approx(fps, rel=1e-4)
    order = np.random.default_rng(0).permutation(len(levels))
    for index in [0, 0, len(levels) - 1, *order]:
        assert level_of(reader.frame(int(index))) == pytest.approx(levels[index], abs=2)
    assert [level_of(image) for image in reader.frames(5, 4)] == pytest.approx(levels[5:9], abs=2)


def test_colours_keep_their_channel(tmp_path):
    image = grey(0)
    image[..., 0] = 200
    with VideoWriter(tmp_path / "red.mp4", 10, 32, 48) as writer:
        writer.add(image)
    red = VideoReader(tmp_path / "red.mp4").frame(0).reshape(-1, 3).mean(0)
    assert red[0] > 190
    assert red[1:].max() < 15


def test_odd_sizes_are_written(tmp_path):
    path = write(tmp_path / "odd.mp4", [40, 80], shape=(33, 47, 3))
    assert VideoReader(path).frames(0, 2).shape == (2, 33, 47, 3)


def test_joined_videos_hold_all_frames_in_order(tmp_path):
    parts = [write(tmp_path / f"{i}.mp4", range(20 + 60 * i, 60 + 60 * i, 4)) for i in range(3)]
    assert join_videos(parts, tmp_path / "all.mp4") == [10, 10, 10]
    reader = VideoReader(tmp_path / "all.mp4")
    assert reader.num_frames == 30
    for index in (0, 9, 10, 19, 20, 29, 3):
        part, row = divmod(index, 10)
        assert level_of(reader.frame(index)) == pytest.approx(20 + 60 * part + 4 * row, abs=2)


def test_videos_of_different_size_are_not_joined(tmp_path):
    parts = [write(tmp_path / "a.mp4", [9]), write(tmp_path / "b.mp4", [9], shape=(64, 48, 3))]
    with pytest.raises(DataError, match=r"b\.mp4: encoded differently from .*a\.mp4"):
        join_videos(parts, tmp_path / "all.mp4")


def test_errors_are_one_line_and_name_the_file(tmp_path):
    path = write(tmp_path / "a.mp4", range(0, 100, 5))
    with pytest.raises(DataError, match=r"a\.mp4: frame 20 is missing \(the file states 20 frames\)"):
        VideoReader(path).frame(20)
    with pytest.raises(DataError, match=r"gone\.mp4: the file does not exist"):
        VideoReader(tmp_path / "gone.mp4")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"cut\.mp4: cannot be read") as caught:
        VideoReader(cut).frames(0, 20)
    assert "\n" not in str(caught.value)
    with (
        pytest.raises(DataError, match=r"image of shape \(8, 8, 3\) uint8, expected \(32, 48, 3\) uint8"),
        VideoWriter(tmp_path / "b.mp4", 10, 32, 48) as writer,
    ):
        writer.add(grey(1, (8, 8, 3)))
