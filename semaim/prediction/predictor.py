"""What every predictor has: the options of the command, an item to predict, and what is found of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from semaim.errors import UserError

#: Field of `Options` -> its flag, and whose it is.
FLAGS = {
    "threshold": ("--score-thr", "detectors"),
    "labels": ("--labels", "segmentors"),
    "averaged": ("--tta", "segmentors"),
}


@dataclass(frozen=True)
class Options:
    """What the user asks for.

    Attributes:
        threshold: least score of an object; None for 0.3.
        labels: whether label maps are written.
        averaged: whether a segmentor is averaged over scales and flips.
        max_side: limit of an image's long side in pixels, before it is prepared; None for none.
        device: to compute on.
    """

    threshold: float | None = None
    labels: bool = False
    averaged: bool = False
    max_side: int | None = None
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True)
class Item:
    """An image file, or a frame of a video.

    Attributes:
        path: of the file.
        pixels: BGR (H, W, 3), uint8, of a frame; None for an image file, which the predictor reads.
        frame: number of the frame from 0; None for an image file.
        time: of the frame in seconds.
    """

    path: str
    pixels: np.ndarray | None = None
    frame: int | None = None
    time: float | None = None

    @property
    def entry(self) -> dict[str, Any]:
        """How entries of predictions.json name it."""
        named = {"image_id": self.path, "file_name": Path(self.path).name}
        return named if self.frame is None else {**named, "frame": self.frame, "time": self.time}


@dataclass(frozen=True)
class Found:
    """What is predicted of an item.

    Attributes:
        picture: the image with what is drawn; of a video's frames all have one size.
        entries: for predictions.json.
        words: what is found, for a line of the log.
        label_map: 8 bits with a palette, the size of the image; None where the model gives none or none is asked for.
        row: for predictions.csv, in the order of the predictor's `columns`.
    """

    picture: Image.Image
    entries: list[dict]
    words: str
    label_map: Image.Image | None = None
    row: list = field(default_factory=list)


class Predictor:
    """A trained model that predicts items.

    Attributes:
        reads: fields of `Options` that it follows, of those in `FLAGS`.
        columns: of predictions.csv; empty if it writes none.
        lines: for the log, about what was loaded.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    columns: Sequence[str] = ()

    def __init__(self, options: Options):
        for name, (flag, whose) in FLAGS.items():
            if getattr(options, name) not in (None, False) and name not in self.reads:
                raise UserError(f"{flag} is for {whose}")
        self.options = options
        self.lines: list[str] = []

    def predict(self, item: Item) -> Found:
        """What is found in an item; `UserError` if it cannot be read, prepared or predicted."""
        raise NotImplementedError
