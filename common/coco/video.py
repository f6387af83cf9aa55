"""Videos and cameras in, videos out, through OpenCV: the demos alone need that package."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import cannot_be_written

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv")
USUAL_RATE = 25.0  # frames a second, where a video or a camera does not say
CODEC = "mp4v"  # MPEG-4 part 2, which every build of OpenCV writes


class FrameName(NamedTuple):
    """A frame: the name of the video that it is drawn in, its number from 1, frames a second."""

    video: str
    number: int
    rate: float

    def __str__(self) -> str:
        return f"{self.video}/{self.number:06}"


class Video(NamedTuple):
    """A video file or a camera, and the name of the video of its detections."""

    source: str
    name: str


def is_video(name: str | Path) -> bool:
    """Return whether an input is a video by its suffix, or the number of a camera."""
    text = str(name)
    if text.isdecimal() and not Path(text).exists():
        return True
    return Path(text).suffix.lower() in SUFFIXES


def find_videos(inputs: Sequence[str | Path], show_dir: Path) -> list[Video]:
    """Return the videos and cameras among the inputs of a demo.

    The names are those of the files below the folder that all have in common, and "camera0".
    Raise UserError for a file that does not exist, and one that its own picture would replace.
    """
    cameras = []
    files = []
    for name in map(str, inputs):
        if not is_video(name):
            continue
        if name.isdecimal():
            cameras.append(Video(name, f"camera{name}.mp4"))
            continue
        if not os.path.isfile(name):
            raise UserError(f"{name} does not exist; give images, videos or folders of images")
        files.append(os.path.abspath(name))
    if not files:
        return cameras
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    videos = []
    names = set()
    for file in dict.fromkeys(files):  # one that is given twice is read once
        path = Path(file)
        if path.is_relative_to(os.path.abspath(show_dir)):
            raise UserError(f"{file}: lies in --show_dir; give another folder")
        name = path.relative_to(root).with_suffix(".mp4").as_posix()
        if name in names:
            name = f"{path.relative_to(root).as_posix()}.mp4"  # a.avi beside a.mp4
        names.add(name)
        videos.append(Video(file, name))
    return cameras + videos


def opencv(source: str) -> ModuleType:
    """Return the package; raise UserError, naming the video that needs it, where it is absent."""
    try:
        import cv2
    except ImportError:
        raise UserError(
            f"{source}: videos and cameras are read by OpenCV, which is not installed",
            f"{sys.executable} -m pip install opencv-python-headless",
        ) from None
    return cv2


def read_videos(
    videos: Sequence[Video], batch_size: int
) -> Iterator[tuple[list[FrameName], list[np.ndarray]]]:
    """Yield names and images (H, W, 3) uint8 RGB of up to `batch_size` frames of a video at a time.

    Ctrl-C ends a camera. Raise UserError for what OpenCV cannot read.
    """
    for video in videos:
        names = []
        frames = []
        for name, frame in _read_video(video):
            names.append(name)
            frames.append(frame)
            if len(frames) == batch_size:
                yield names, frames
                names = []
                frames = []
        if frames:
            yield names, frames


def _read_video(video: Video) -> Iterator[tuple[FrameName, np.ndarray]]:
    cv2 = opencv(video.source)
    is_camera = video.source.isdecimal()
    capture = cv2.VideoCapture(int(video.source) if is_camera else video.source)
    rate = capture.get(cv2.CAP_PROP_FPS)
    if not rate > 0:
        rate = USUAL_RATE
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    bar = tqdm(
        total=count if count > 0 else None,
        desc=video.name,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    number = 0
    stops = []
    before = None
    if is_camera:
        before = signal.signal(signal.SIGINT, lambda *signal_and_frame: stops.append(True))
    try:
        while not stops:
            is_there, frame = capture.read()
            if not is_there:
                break
            number += 1
            bar.update()
            yield FrameName(video.name, number, rate), cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        if is_camera:
            signal.signal(signal.SIGINT, before)
        bar.close()
        capture.release()
    if number == 0:
        what = f"camera {video.source}" if is_camera else video.source
        raise UserError(f"{what}: OpenCV reads no frame of it", "check it with another program")


class VideoWriter:
    """A video that is written frame by frame."""

    def __init__(self, path: Path, rate: float, width: int, height: int):
        cv2 = opencv(str(path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_be_written(path, error) from None
        codec = cv2.VideoWriter_fourcc(*CODEC)
        self.to_bgr = lambda frame: cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        self.writer = cv2.VideoWriter(str(path), codec, rate, (width, height))
        if not self.writer.isOpened():
            raise UserError(f"{path}: OpenCV cannot write it", "name another --show_dir")

    def write(self, frame: np.ndarray) -> None:
        """Append a frame (H, W, 3) uint8 RGB."""
        self.writer.write(self.to_bgr(frame))

    def close(self) -> None:
        """Write what is missing at the end of the file."""
        self.writer.release()
