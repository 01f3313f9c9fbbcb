"""The files of a prediction: predictions.json and .csv, pictures, label maps, videos; none is left half written."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from PIL import Image

from semaim.errors import UserError
from semaim.prediction.predictor import Found, Item


class Results:
    """predictions.json, a list of entries, and predictions.csv if there are columns for it: written one by one.

    The entries of an interrupted prediction are kept, too: the files get their names when the context ends.
    """

    def __init__(self, folder: Path, columns: Sequence[str] = ()):
        self.count = 0
        self.files = [folder / "predictions.json", *([folder / "predictions.csv"] if columns else [])]
        try:
            # A path that is no UTF-8 is written as the bytes that it has, and the csv module ends lines itself.
            self.open = [
                open(self.part(file), "w", encoding="utf-8", errors="surrogateescape", newline="")
                for file in self.files
            ]
        except OSError as error:
            raise UserError(f"cannot write to --out {folder}: {error.strerror}") from None
        self.json = self.open[0]
        self.json.write("[")
        self.csv = csv.writer(self.open[1]) if columns else None
        if self.csv:
            self.csv.writerow(["image", "frame", "time", *columns])

    @staticmethod
    def part(file: Path) -> Path:
        """The name of a file that is being written."""
        return file.with_name(f"{file.name}.part")

    def add(self, item: Item, found: Found) -> None:
        """Write what is found of an item."""
        for entry in found.entries:
            self.json.write(",\n" * bool(self.count) + json.dumps(entry))
            self.count += 1
        if self.csv and found.row:
            place = ["", ""] if item.frame is None else [item.frame, item.time]
            self.csv.writerow([item.path, *place, *found.row])

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.json.write("]\n")
        for file, handle in zip(self.files, self.open, strict=True):
            handle.close()
            os.replace(self.part(file), file)


class VideoFile:
    """An mp4 file (MPEG-4 Part 2, which OpenCV's own FFmpeg can write) of pictures that all have one size.

    Args:
        path: gets its name when all frames are in it.
        rate: frames per second.
    """

    def __init__(self, path: Path, rate: float):
        self.path, self.rate, self.count = path, rate, 0
        self.part = path.with_name(f".{path.stem}.part{path.suffix}")  # OpenCV takes the format from the ending
        self.writer: cv2.VideoWriter | None = None

    def add(self, picture: Image.Image) -> None:
        """Append a picture, whose sides are made even, as the format needs."""
        size = picture.width + picture.width % 2, picture.height + picture.height % 2
        if picture.size != size:
            whole = Image.new("RGB", size, "white")
            whole.paste(picture)
            picture = whole
        if self.writer is None:
            self.writer = cv2.VideoWriter(str(self.part), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, size)
            if not self.writer.isOpened():
                raise UserError(
                    f"cannot write {self.path}: OpenCV cannot write mp4 files of {size[0]} x {size[1]} here"
                )
        self.writer.write(np.ascontiguousarray(np.asarray(picture)[..., ::-1]))
        self.count += 1

    def close(self) -> None:
        """Give the file its name; `UserError` if frames are missing in it, as on a full disk."""
        if self.writer is None:
            return
        self.writer.release()
        capture = cv2.VideoCapture(str(self.part))
        written = round(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        if written != self.count:
            self.part.unlink(missing_ok=True)
            raise UserError(f"cannot write {self.path}: {written} of {self.count} frames are in the file; disk full?")
        os.replace(self.part, self.path)


def save_whole(picture: Image.Image, path: Path) -> None:
    """Save a picture as PNG; a file of that name is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Results.part(path)
    try:
        picture.save(part, format="PNG")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
