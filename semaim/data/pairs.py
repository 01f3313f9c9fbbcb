"""Images beside their label maps, and the share of a data set that is held out where it has no validation split."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from torchvision.datasets.folder import IMG_EXTENSIONS

from semaim.data.findings import shortened
from semaim.data.folder import every_file
from semaim.data.shards import printable
from semaim.errors import UserError

HELD_OUT = 0.2  #: share of the images that is validated on, where a data set has no validation split
MAPS = (".png", ".bmp", ".tif", ".tiff", ".pgm", ".gif")  #: suffixes of label maps: without loss
StrPath = str | os.PathLike


def draw_of(name: str) -> float:
    """A number from 0 to below 1 that depends on a file's name alone, without its suffix."""
    return (
        int.from_bytes(hashlib.blake2b(_stem(name).encode(errors="surrogateescape"), digest_size=6).digest(), "big")
        / 2**48
    )


def held_out(names: Iterable[str], share: float = HELD_OUT) -> set[str]:
    """The names that are validated on: those whose `draw_of` is below the share.

    Whether a name is held out does not depend on the others, so adding files moves none, with one exception: of two
    names or more at least one is held out and one trained on, the smallest and the largest draw.
    """
    drawn = sorted((draw_of(name), name) for name in set(names))
    kept = {name for draw, name in drawn if draw < share}
    if len(drawn) > 1:
        kept = (kept | {drawn[0][1]}) - {drawn[-1][1]}
    return kept


def part_of(names: Iterable[str], part: str, share: float) -> set[str]:
    """The names of "train" or "val", of which `share` is held out."""
    names = set(names)
    kept = held_out(names, share)
    return kept if part == "val" else names - kept


def label_suffix_of(images: StrPath, labels: StrPath, image_suffix: str | None = None) -> str | None:
    """What follows an image's stem in the names of its label maps, such as "_mask.png"; None if nothing but a suffix.

    `UserError` if no label map belongs to an image, or there are several for each.
    """
    stems = set(_stems(_files(images, labels), image_suffix, IMG_EXTENSIONS))
    maps = _stems(_files(labels, images), None, MAPS)
    if not stems:
        raise UserError(f"no images in {images}: looked for {', '.join(IMG_EXTENSIONS)}")
    if not maps:
        raise UserError(f"no label maps in {labels}: looked for {', '.join(MAPS)}")
    if any(stem in stems for stem in maps):
        return None
    first = next((stem for stem in sorted(stems) if any(other.startswith(stem) for other in maps)), None)
    if first is None:
        raise UserError(
            f"no label map in {labels} is named like an image in {images}: {printable(sorted(maps)[0])} and"
            f" {printable(sorted(stems)[0])}, for example; if both have endings of their own, write image_suffix and"
            " label_suffix, such as _mask.png, in the YAML file of --data"
        )
    ends = {name[len(first) :] for stem, name in maps.items() if stem.startswith(first)}
    ends = {end for end in ends if any(stem + PurePosixPath(end).stem in maps for stem in stems - {first})} or ends
    if len(ends) > 1:
        found = ", ".join(sorted(ends)[:5])
        raise UserError(f"{labels}: images have several label maps, ending in {found}: write label_suffix in the YAML")
    return ends.pop()


def pair_up(
    images: StrPath,
    labels: StrPath,
    listed: StrPath | None = None,
    image_suffix: str | None = None,
    label_suffix: str | None = None,
) -> tuple[list[tuple[str, str]], list[str]]:
    """(image, label map) files with the same names but for their suffixes, sorted, and images without a label map.

    Args:
        images, labels: folders, with their sub-folders.
        listed: a text file of names without suffix, as VOC's, of which the pairs are; None for all.
        image_suffix, label_suffix: ends of the names that are left out of the comparison, such as "_mask.png"; None
            for any suffix of an image, or of a picture without loss.

    `UserError` if two images or maps have the same name, a map has no image, or a listed name no pair.
    """
    pictures = _stems(_files(images, labels), image_suffix, IMG_EXTENSIONS)
    maps = _stems(_files(labels, images), label_suffix, MAPS)
    both = sorted(pictures.keys() & maps.keys())
    if listed is not None:
        both = list(dict.fromkeys(_listed(listed)))
        if lacking := [name for name in both if name not in pictures or name not in maps]:
            where = images if lacking[0] not in pictures else labels
            raise UserError(f"{listed} names {printable(lacking[0])}, which is not in {where} ({len(lacking)} such)")
    elif lost := sorted(maps.keys() - pictures.keys()):
        raise UserError(
            f"{len(lost)} of {len(maps)} label maps in {labels} have no image in {images}:"
            f" {shortened([printable(maps[stem]) for stem in lost], 3)}; remove them, or write image_suffix and"
            " label_suffix in the YAML file of --data if the names end differently"
        )
    if not both:
        raise UserError(f"no image in {images} has a label map of its name in {labels}")
    bare = [] if listed is not None else [pictures[stem] for stem in sorted(pictures.keys() - maps.keys())]
    return [(os.path.join(images, pictures[stem]), os.path.join(labels, maps[stem])) for stem in both], bare


def check_apart(train: Iterable[str], val: Iterable[str], where: str) -> None:
    """`UserError` if an image is in both splits."""
    trained = {os.path.realpath(path): path for path in train}
    if both := [path for path in val if os.path.realpath(path) in trained]:
        raise UserError(
            f"{where}: {len(both)} images are trained on and validated on, such as {printable(both[0])}: leave each in"
            " one split, or leave out val, which holds a share of the images out"
        )


def _listed(file: StrPath) -> list[str]:
    try:
        lines = Path(file).read_text("utf-8", "surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the list {file}: {error.strerror}") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"the list {file} is empty")
    return [line.strip() for line in lines if line.strip()]


def _files(folder: StrPath, other: StrPath) -> list[str]:
    """Files below a folder, relative to it, but for those in the other folder if that lies inside it."""
    inner = os.path.join(os.path.realpath(other), "")
    within = os.path.realpath(other) != os.path.realpath(folder) and inner.startswith(
        os.path.join(os.path.realpath(folder), "")
    )
    found = every_file(Path(folder))
    if within:
        found = [path for path in found if not os.path.realpath(path).startswith(inner)]
    return [os.path.relpath(path, folder) for path in found]


def _stems(names: Iterable[str], end: str | None, suffixes: tuple[str, ...]) -> Mapping[str, str]:
    """Name without its end -> name; `UserError` if two have the same."""
    found: dict[str, str] = {}
    for name in names:
        if end is None:
            if not name.lower().endswith(suffixes):
                continue
            stem = _stem(name)
        elif name.endswith(end) and name != end:
            stem = name[: -len(end)]
        else:
            continue
        if stem in found:
            raise UserError(
                f"{printable(found[stem])} and {printable(name)} have the same name: give each its own, or write"
                " image_suffix and label_suffix in the YAML file of --data"
            )
        found[stem] = name
    return found


def _stem(name: str) -> str:
    return name[: len(name) - len(PurePosixPath(name).suffix)]
