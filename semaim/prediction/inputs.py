"""What is predicted: image files, folders of images and videos, video files."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
from torchvision.datasets.folder import IMG_EXTENSIONS

from semaim.data.folder import every_file, find_images
from semaim.data.shards import printable
from semaim.errors import UserError
from semaim.prediction.predictor import Item

VIDEOS = (".mp4", ".avi", ".mov")
#: Share of the frames that a video's header counts which may be missing: the header of some formats estimates.
MISSING = 0.05


def is_video(path: str) -> bool:
    """Whether a file is a video by its name."""
    return path.lower().endswith(VIDEOS)


def find_inputs(given: Sequence[str], out: Path) -> list[str]:
    """Paths of the images and videos that are given or lie in given folders, each once.

    A folder is searched as pretraining searches it, and for videos; what lies in `out` inside of it, which an earlier
    prediction has written, is left out.
    """
    paths: list[str] = []
    for name in given:
        if not os.path.isdir(name):
            paths.append(name)
            continue
        files = every_file(Path(name))
        videos = [path for path in files if is_video(path)]
        images = any(path.lower().endswith(IMG_EXTENSIONS) for path in files) or not videos
        found = [*(find_images(name) if images else ()), *videos]
        written = out.resolve()
        inside = Path(name).resolve() in written.parents
        paths += [path for path in found if not (inside and written in Path(path).resolve().parents)]
    if not paths:
        raise UserError(f"nothing to predict in {', '.join(given)}: its images are those that --out {out} holds")
    return list(dict.fromkeys(paths))


def output_names(paths: Sequence[str]) -> list[str]:
    """A file name without extension for what is written of each input: its own, with its folders if not unique."""
    stems = Counter(Path(path).stem.lower() for path in paths)
    common = os.path.commonpath([os.path.abspath(os.path.dirname(path)) for path in paths])
    names: dict[str, None] = {}
    for path in paths:
        name = Path(path).stem
        if stems[name.lower()] > 1:
            folders = Path(os.path.relpath(os.path.abspath(path), common)).parent.parts
            name = "_".join((*folders, name))
        taken = {other.lower() for other in names}  # some file systems ignore case
        number = 2
        while (numbered := name if number == 2 else f"{name}_{number - 1}").lower() in taken:
            number += 1
        names[numbered] = None
    return list(names)


class Video:
    """A video file, by OpenCV.

    Attributes:
        rate: frames per second.
        frames: their number, as the file's header says.
    """

    def __init__(self, path: str):
        """`UserError` if it cannot be opened or holds no frame."""
        # What FFmpeg writes about damaged files would stand beside our line. It reads the variable at its first use.
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        self.path = path
        if not os.path.isfile(path):
            raise UserError(f"cannot read video {printable(path)}: no such file")
        self.capture = cv2.VideoCapture(path)
        if not self.capture.isOpened():
            raise UserError(f"cannot read video {printable(path)}: broken, or no video that OpenCV reads")
        rate = self.capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= 1000 else 25.0  # some files do not tell
        self.frames = max(0, round(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def items(self, every: int = 1) -> Iterator[Item]:
        """Every N-th frame from the first; `UserError` after the last that can be read if the video is damaged there.

        A frame's time is the one that the file gives it.
        """
        number = 0
        while self.capture.grab():
            if number % every == 0:
                there, pixels = self.capture.retrieve()
                if not there:
                    break
                seconds = round(max(0.0, self.capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000, 3)
                yield Item(self.path, pixels, number, seconds)
            number += 1
        if not number:
            raise UserError(f"cannot read video {printable(self.path)}: it has no frames, or its first is broken")
        if number < (1 - MISSING) * self.frames:
            raise UserError(
                f"video {printable(self.path)} is damaged: {number} of its {self.frames} frames can be read; those are"
                " predicted"
            )

    def close(self) -> None:
        """Release the file."""
        self.capture.release()
