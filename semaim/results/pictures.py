"""Pictures of a run as data URIs, for a page that contains them."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from semaim.results.skipping import Skipped

WIDEST = 1000  #: largest width of a picture in the report, in pixels
MOST = 6  #: largest number of pictures of one kind and run, except of orders
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")  #: whatever the ending says
LARGEST = 50_000_000  #: pixels of a picture, as decoding takes 8 bytes for each


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI."""

    name: str
    source: str
    width: int
    height: int


def pictures_of(folder: Path, skipped: Skipped | None = None) -> dict[str, list[Picture]]:
    """Caption -> pictures of a run: its orders during training, predictions, and those in the folder itself."""
    skipped = skipped or Skipped()
    predicted = [path.parent for path in folder.glob("*/predictions.json")]
    chosen = {"Orders over training": spread(listed(folder / "orders"), 3)}  # first, middle, last
    for place in sorted({*predicted, folder / "predictions"}):
        words = "Predictions" if place.name == "predictions" else f"Predictions ({place.name})"
        chosen[words] = spread(listed(place), MOST)
    chosen["Pictures"] = spread(listed(folder), MOST)
    shown = {words: [shown for path in paths if (shown := encode(path, skipped))] for words, paths in chosen.items()}
    return {words: pictures for words, pictures in shown.items() if pictures}


def listed(folder: Path) -> list[Path]:
    """Picture files of a folder; numbers in names are sorted by value."""
    files = [path for path in folder.glob("*") if path.suffix.lower() in ENDINGS and not path.name.startswith(".")]
    return sorted(files, key=lambda path: [(part.zfill(12), part) for part in re.findall(r"\d+|\D+", path.name)])


def spread(items: Sequence, most: int) -> list:
    """At most `most` of the items, evenly spaced from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def encode(path: Path, skipped: Skipped) -> Picture | None:
    """A picture, at most `WIDEST` pixels wide, as the smaller of PNG and JPEG; None if it cannot be read."""
    try:
        if not path.is_file():
            raise ValueError("no regular file")
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > LARGEST:
                raise ValueError(f"it has more than {LARGEST:,} pixels")
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except Exception as error:  # Pillow raises many types; a training may be writing it
        skipped.add(f"{path}: no picture that can be read: {str(error)[:100]}")
        return None
    ground = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(ground, image).convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, max(1, round(image.height * WIDEST / image.width))), Image.Resampling.LANCZOS)
    coded = []
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        coded.append((buffer.tell(), kind.lower(), buffer.getvalue()))
    _, kind, data = min(coded)
    return Picture(path.stem, f"data:image/{kind};base64,{base64.b64encode(data).decode()}", *image.size)
