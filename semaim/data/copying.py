"""A copy of a data set with smaller images, in tar shards: training decodes less.

Every folder of the source becomes a folder of shards, `CLASS/*.jpg` in `SRC` the files `CLASS/000000.tar` and further
ones. So the copy is read wherever the source is: unlabelled images, class folders, further test sets. The same source
and settings give the same bytes, on any number of processes.
"""

import io
import os
import sys
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from semaim.data.findings import Report, StrPath, parallel, progress_bar
from semaim.data.folder import every_file, name_of
from semaim.data.identity import identity_of
from semaim.data.image_files import DAMAGED, listen
from semaim.data.pools import locked, process_pool
from semaim.data.shards import RECORD, find_in_shards, inner_name, printable
from semaim.data.shrinking import Small, compare, list_source, shrink_image
from semaim.errors import UserError
from semaim.reading import read_json, write_json

COPY = 1  #: increase when the bytes of a copy change
SHARD = 2000  #: images of a shard; ImageNet has at most 1,300 in a folder
CHUNK = 8  #: images that a process takes at a time
EVERY = 1.0  #: s between two writes of the record, which has a line for every shard
AHEAD = 4  #: chunks per process that are worked on or wait to be written
FORM = tarfile.GNU_FORMAT
COUNTED = ("images", "as_they_were", "bytes", "bytes_of_source")  #: what the record counts of each shard


def shards_of(images: Iterable[str]) -> dict[str, list[str]]:
    """Shards by their names, each with its images: at most `SHARD` of one folder, in the order of the images."""
    folders: dict[str, list[str]] = {}
    for name in images:
        folders.setdefault(os.path.dirname(name), []).append(name)
    return {
        os.path.join(folder, f"{start // SHARD:06}.tar"): names[start : start + SHARD]
        for folder, names in folders.items()
        for start in range(0, len(names), SHARD)
    }


def shrink(
    source: StrPath,
    target: StrPath,
    side: int,
    quality: int = 90,
    *,
    on_error: str = "raise",
    most_damaged: float = 0.01,
    workers: int = 1,
    only_check: bool = False,
    progress: bool = False,
) -> Report:
    """Write a copy of the images below `source` whose short sides have at most `side` pixels, and check it.

    It is written to the folder `.NAME.part` beside `target`, shard by shard, and gets its name when it is complete and
    checked. After an interrupt or a kill, the next call goes on. A copy that is there is only checked.

    Args:
        source: folder of images in folders.
        target: folder of the copy.
        side: pixels.
        quality: of the JPEGs, from 1 to 100.
        on_error: "raise" at the first image that cannot be read; "skip" leaves such images out and lists them.
        most_damaged: with "skip", the largest share of the images that may be left out.
        workers: processes.
        only_check: write nothing.
        progress: show a bar if the standard error is a terminal.

    Returns:
        What the copy has; problems if it is not what it should be. It is then not under its name, and the next call
        writes the wrong shards again.

    Raises:
        UserError: there are no images; one cannot be read; `target` is something else, or of other settings; another
            process is writing it.
    """
    source, target = Path(source), Path(target).resolve()
    here = source.resolve()
    if here == target or here in target.parents or target in here.parents:
        raise UserError(f"{target} and {source} lie in each other: name another folder for the copy")
    images, others = list_source(source)
    request: dict[str, Any] = {"copy": COPY, "side": side, "quality": quality, "images": len(images)}
    request["source"] = identity_of((str(source / name) for name in images), source)
    if target.is_mount():  # another file system than the folder beside it, and it cannot be renamed
        raise UserError(f"{target} is a mount point: name a folder in it")
    copy = Copy(source, target, request, shards_of(images), max(1, workers), progress)
    report = Report(str(target))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        copy.read(f"{target} exists and is no copy that this command has finished: name another folder")
        copy.check(report)
        if report.problems:
            report.summary.append(f"remove {target}, and the command without --check makes it anew")
    elif only_check:
        unfinished = "; an unfinished copy is: leave out --check to go on" * copy.unfinished.exists()
        raise UserError(f"{target} is not there{unfinished}")
    else:
        with copy.being_written():
            copy.write(on_error, most_damaged)
            wrong = copy.check(report)
            if report.problems:
                copy.forget(wrong)
                report.summary.append(f"unfinished, in {copy.folder}: the same command writes the wrong shards again")
            else:
                copy.folder.rename(target)
    for name in others:
        report.warning("file that is no image by its name, not copied", printable(name))
    return report


class Copy:
    """A copy: its request, the images of each shard, where it is now, and the record of its finished shards."""

    def __init__(
        self, source: Path, target: Path, request: dict, shards: dict[str, list[str]], workers: int, progress: bool
    ):
        self.source, self.request, self.shards = source, request, shards
        self.workers, self.progress = workers, progress
        self.folder = target
        self.unfinished = target.with_name(f".{target.name}.part")
        self.finished: dict[str, dict[str, Any]] = {}

    def read(self, otherwise: str) -> None:
        """Read the record; `UserError` if it is none, or one of another request."""
        try:
            record = read_json(self.folder / RECORD)
        except (FileNotFoundError, UserError):
            raise UserError(otherwise) from None
        for key, value in self.request.items():
            if record.get(key) == value:
                continue
            if key in ("side", "quality"):
                raise UserError(f"{self.folder} has --{key} {record.get(key)}: give the same, or name another folder")
            raise UserError(
                f"{self.folder} is no copy of {self.source} as it is now, by this command: name another folder"
            )
        shards = record.get("shards")
        if not isinstance(shards, dict) or not all(map(is_part, shards.values())):
            raise UserError(otherwise)
        self.finished = {shard: shards[key] for shard in self.shards if (key := printable(shard)) in shards}

    def save(self) -> None:
        """Write the record, with printable names: a name of other bytes than UTF-8 could not be read again."""
        total = {key: sum(part[key] for part in self.finished.values()) for key in COUNTED}
        finished = {printable(shard): self.finished[shard] for shard in self.shards if shard in self.finished}
        write_json(self.folder / RECORD, {**self.request, "total": total, "shards": finished})

    @contextmanager
    def being_written(self) -> Iterator[None]:
        """Context in which this process, and no other, writes the unfinished copy."""
        self.folder = self.unfinished
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder))
            except (BlockingIOError, PermissionError, FileNotFoundError):
                raise UserError(f"another process is writing {self.folder}: wait for it") from None
            except OSError:
                print(f"{self.folder} is on a file system without locks: start no second process", file=sys.stderr)
            if any(self.folder.iterdir()):
                self.read(f"{self.folder} is no unfinished copy: remove it")
            self.save()
            yield

    def write(self, on_error: str, most_damaged: float) -> None:
        """Write the shards that are missing, or not of the size that the record says."""
        missing = [shard for shard in self.shards if not self.whole(shard)]
        for shard in missing:
            self.finished.pop(shard, None)
        chunks = [
            [(str(self.source / name), name) for name in self.shards[shard][at : at + CHUNK]]
            for shard in missing
            for at in range(0, len(self.shards[shard]), CHUNK)
        ]
        work = partial(_shrink_all, side=self.request["side"], quality=self.request["quality"])
        with self.pool() as pool, progress_bar("images", sum(map(len, chunks)), self.progress) as advance:
            images, saved = in_order(pool, work, chunks, AHEAD * self.workers), time.monotonic()
            try:
                for shard in missing:
                    self.finished[shard] = self.write_shard(shard, images, advance, on_error, most_damaged)
                    if time.monotonic() > saved + EVERY:
                        self.save()
                        saved = time.monotonic()
            finally:
                self.save()

    def write_shard(
        self, shard: str, images: Iterator[Small], advance: Callable[[int], None], on_error: str, most_damaged: float
    ) -> dict[str, Any]:
        """Write a shard of the next images; returns what the record has of it."""
        part: dict[str, Any] = {**dict.fromkeys(COUNTED, 0), "left_out": {}, "damaged": []}
        path = self.folder / shard
        with new_file(path) as file, tarfile.open(fileobj=file, mode="w", format=FORM) as archive:
            for image in islice(images, len(self.shards[shard])):
                if image.data:
                    add(archive, image, part)
                else:
                    part["left_out"][printable(image.name)] = image.text
                    count = sum(len(one["left_out"]) for one in (*self.finished.values(), part))
                    self.check_left_out(image, count, on_error, most_damaged)
                advance(1)
        return {**part, "size": path.stat().st_size}

    def whole(self, shard: str) -> bool:
        """Whether a shard is there as the record says."""
        path = self.folder / shard
        return shard in self.finished and path.is_file() and path.stat().st_size == self.finished[shard]["size"]

    def check_left_out(self, image: Small, count: int, on_error: str, most_damaged: float) -> None:
        """`UserError` for an image that cannot be read, unless it may be left out as one of `count` so far."""
        name = printable(str(self.source / image.name))
        lists = "tools/verify_dataset.py images DIR lists those of a folder"
        if on_error == "raise":
            raise UserError(
                f"cannot read image {name}: {image.text}; repair or remove it, or leave such images out by --on-error"
                f" skip ({lists})"
            )
        if count > most_damaged * self.request["images"]:
            raise UserError(
                f"{count} of {self.request['images']:,} images cannot be read, more than --most-damaged"
                f" {most_damaged:g} ({lists}): the last is {name}: {image.text}"
            )

    def check(self, report: Report) -> set[str]:
        """Compare the copy with its source; returns the shards with problems.

        Every image has to be in it once, in its order, to be decoded, and to have the right size; one that was small
        enough has to be the source's file, byte for byte.
        """
        tasks, wrong = [], set()

        def problem(kind: str, shard: str, text: str) -> None:
            report.problem(kind, f"{printable(shard)}: {text}")
            wrong.add(shard)

        for shard, names in self.shards.items():
            try:
                found = find_in_shards([self.folder / shard], IMG_EXTENSIONS)
            except UserError as error:
                problem("broken shard", shard, str(error))
                continue
            left_out = self.finished.get(shard, {}).get("left_out", {})
            kept = [name for name in names if printable(name) not in left_out]
            if [inner_name(path).removesuffix(".jpg") for path in found] != [n.removesuffix(".jpg") for n in kept]:
                problem("shard with other images than its source", shard, f"{len(found):,}, not {len(kept):,}")
                continue
            tasks += [(str(self.source / name), path, shard) for name, path in zip(kept, found, strict=True)]
        if odd := {name_of(path, self.folder) for path in every_file(self.folder)} - {RECORD, *self.shards}:
            report.problem("file that the copy should not have", printable(min(odd)))
        with self.pool() as pool:
            work = partial(_compare, side=self.request["side"])
            texts = parallel(work, tasks, self.workers, self.progress, "checked", pool)
        for (_, _, shard), text in zip(tasks, texts, strict=True):
            if text:
                problem("wrong image", shard, text)
        self.summarise(report)
        return wrong

    def summarise(self, report: Report) -> None:
        """Add figures, and what is to be known of single images, to a report."""
        parts = self.finished.values()
        images, as_they_were, size, before = (sum(part[key] for part in parts) for key in COUNTED)
        report.summary.append(
            f"{images:,} images in {len(self.shards):,} shards, {as_they_were:,} of them small enough as they were:"
            f" {size / 1e6:,.1f} MB, {before / 1e6:,.1f} MB in {self.source}"
        )
        for part in parts:
            for name, text in part["left_out"].items():
                report.warning("image that cannot be read, left out", f"{name}: {text}")
            for name in part["damaged"]:
                report.warning(f"{DAMAGED} in the source, kept as training sees it", name)

    def forget(self, shards: set[str]) -> None:
        """Have shards be written again."""
        for shard in shards:
            self.finished.pop(shard, None)
        self.save()

    @contextmanager
    def pool(self) -> Iterator[ProcessPoolExecutor]:
        """Context with processes that decode images."""
        pool = process_pool(self.workers, None, _begin)
        try:
            yield pool
        except BrokenProcessPool:
            raise UserError(
                f"a process that reads images of {self.source} has ended: out of memory, or a decoder crashed; give a"
                " smaller --workers, and the command goes on"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def is_part(value: Any) -> bool:
    """Whether a value has what the record has of a shard."""
    if not isinstance(value, dict) or not all(isinstance(value.get(key), int) for key in (*COUNTED, "size")):
        return False
    return isinstance(value.get("left_out"), dict) and isinstance(value.get("damaged"), list)


def in_order(pool: ProcessPoolExecutor, work: Callable, tasks: Iterable, ahead: int) -> Iterator:
    """The items of `work(task)`, which is a list, of all tasks in order; at most `ahead` tasks wait."""
    waiting: deque = deque()
    for task in tasks:
        waiting.append(pool.submit(work, task))
        if len(waiting) >= ahead:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def add(archive: tarfile.TarFile, image: Small, part: dict[str, Any]) -> None:
    """Write an image into a shard, and count it."""
    entry = tarfile.TarInfo(image.name)  # no owner, no time: the same bytes in every run
    entry.size = len(image.data)
    archive.addfile(entry, io.BytesIO(image.data))
    counts = 1, int(image.as_it_was), len(image.data), image.bytes
    for key, count in zip(COUNTED, counts, strict=True):
        part[key] += count
    if image.kind == DAMAGED:
        part["damaged"].append(f"{printable(image.name)}: {image.text}")


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Context with a file that appears under its name, whole, at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}.partial")
    try:
        with open(partial_path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_path, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; the same command goes on") from None
    finally:
        partial_path.unlink(missing_ok=True)


def _begin() -> None:
    listen(1)
    torch.set_num_threads(1)


def _shrink_all(images: list[tuple[str, str]], side: int, quality: int) -> list[Small]:
    return [shrink_image(path, name, side, quality) for path, name in images]


def _compare(task: tuple[str, str, str], side: int) -> str:
    return compare(task[0], task[1], side)
