"""Videos in and out of the demos."""

import signal
import sys

import numpy as np
import pytest

from common.coco import video
from common.coco.video import FrameName, Video, VideoWriter, find_videos, is_video, read_videos
from common.errors import UserError

RATE = 10.0
SHADES = (40, 90, 140, 190, 240)  # of the frames, grey


@pytest.fixture
def clip(tmp_path):
    """Five frames of 64 x 48 pixels, red on the left, each in its shade on the right."""
    path = tmp_path / "in/clip.avi"
    writer = VideoWriter(path, RATE, width=64, height=48)
    for shade in SHADES:
        frame = np.full((48, 64, 3), shade, np.uint8)
        frame[:, :32] = (200, 20, 20)
        writer.write(frame)
    writer.close()
    return path


def test_a_suffix_or_a_number_is_a_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7").mkdir()
    assert [is_video(name) for name in ("a.mp4", "a/B.MOV", "0")] == [True] * 3
    assert [is_video(name) for name in ("a.jpg", "a", "7")] == [False] * 3  # 7 is a folder


def test_the_frames_come_in_batches(clip):
    (source,) = find_videos([clip], clip.parent / "out")
    assert source == Video(str(clip), "clip.mp4")
    batches = list(read_videos([source], batch_size=2))
    names = [[name.number for name in names] for names, _ in batches]
    assert names == [[1, 2], [3, 4], [5]]
    assert batches[0][0][0] == FrameName("clip.mp4", 1, RATE)
    assert str(batches[0][0][0]) == "clip.mp4/000001"
    frames = [frame for _, frames in batches for frame in frames]
    for shade, frame in zip(SHADES, frames, strict=True):
        assert frame.shape == (48, 64, 3)
        assert frame.dtype == np.uint8
        assert abs(int(frame[24, 48, 1]) - shade) < 8
        assert frame[24, 8, 0] > 150 > 60 > frame[24, 8, 2]  # RGB


def test_videos_of_one_name_have_pictures_of_two(clip, tmp_path):
    other = tmp_path / "other/clip.avi"
    other.parent.mkdir()
    other.write_bytes(clip.read_bytes())
    found = find_videos([clip, "photo.jpg", other, "1"], tmp_path / "out")
    assert [one.name for one in found] == ["camera1.mp4", "in/clip.mp4", "other/clip.mp4"]


def test_videos_that_differ_in_their_suffix_have_pictures_of_two(clip):
    other = clip.with_suffix(".mov")
    other.write_bytes(clip.read_bytes())
    found = find_videos([clip, other, clip], clip.parent / "out")
    assert [one.name for one in found] == ["clip.mp4", "clip.mov.mp4"]


def test_what_is_no_video_is_one_line(clip, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.mp4 does not exist"):
        find_videos(["nowhere.mp4"], tmp_path / "out")
    with pytest.raises(UserError, match="lies in --show_dir"):
        find_videos([clip], clip.parent)
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    with pytest.raises(UserError, match=r"text\.mp4: OpenCV reads no frame of it"):
        list(read_videos(find_videos([text], tmp_path / "out"), 1))


def test_without_opencv_the_line_says_how_to_get_it(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"clip\.avi: .* -m pip install opencv-python-headless"):
        list(read_videos(find_videos([clip], tmp_path / "out"), 1))


def test_ctrl_c_ends_a_camera(clip, monkeypatch):
    """A video file stands for the camera, which no test machine has."""
    cv2 = video.opencv("0")
    capture_class = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: capture_class(str(clip)))
    numbers = []
    for names, _ in read_videos([Video("0", "camera0.mp4")], batch_size=1):
        numbers.append(names[0].number)
        if len(numbers) == 3:
            signal.raise_signal(signal.SIGINT)
    assert numbers == [1, 2, 3]
    with pytest.raises(KeyboardInterrupt):  # what was before is back
        signal.raise_signal(signal.SIGINT)
