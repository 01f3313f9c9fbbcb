"""The meaning of the values of label maps in training, and checks that find wrong ones.

docs/labels.md has the table of all errors and warnings: when each is found, and what to do.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from semaim.data.findings import shortened

IGNORED = 255  #: class number of pixels that are neither trained nor measured, in mmseg and here
VALUES = range(256)  #: mmseg reads a map as 8 bits
HALF = 0.5  #: share of ignored pixels above which there is a warning
CONVERT = "tools/convert_labels.py values MAPS OUT"


def trained_as(
    reduce_zero_label: bool, label_map: Mapping[int, int] | None = None, ignored: int = IGNORED
) -> list[int | None]:
    """The class that each value of 0 to 255 trains, None if it is ignored, as in mmseg's `LoadAnnotations`.

    `reduce_zero_label` comes first: 0 is ignored, the others are reduced by one, 255 stays. `label_map` then replaces
    the numbers it lists, each once.
    """
    numbers = [IGNORED if value in (0, IGNORED) else value - 1 for value in VALUES] if reduce_zero_label else VALUES
    numbers = [(label_map or {}).get(number, number) for number in numbers]
    return [None if number == ignored else number for number in numbers]


@dataclass(frozen=True)
class Labels:
    """The values of a split's label maps, and the class that each value trains.

    Args:
        split: its name in messages.
        counts: file -> the pixels of each value in it.
        classes: names in the order of their numbers; empty strings if there are no names.
        train: whether it is the training split, not the validation split.
        reduce_zero_label, label_map, ignored_number: of `trained_as`.
    """

    split: str
    counts: Mapping[str, Mapping[int, int]]
    classes: tuple[str, ...]
    train: bool
    reduce_zero_label: bool
    label_map: Mapping[int, int] | None = None
    ignored_number: int = IGNORED

    @cached_property
    def trained(self) -> list[int | None]:
        """Class number by value."""
        return trained_as(self.reduce_zero_label, self.label_map, self.ignored_number)

    @cached_property
    def pixels(self) -> Counter:
        """Value -> pixels, over all maps."""
        total: Counter = Counter()
        for found in self.counts.values():
            total.update(found)
        return total

    @cached_property
    def images(self) -> Counter:
        """Value -> number of maps that contain it."""
        return Counter(value for found in self.counts.values() for value in found)

    @cached_property
    def values(self) -> list[int]:
        """The values that occur, sorted."""
        return sorted(self.pixels)

    @cached_property
    def occurring(self) -> set[int]:
        """Numbers of the classes that occur."""
        return {number for value in self.values if (number := self.number(value)) is not None}

    @property
    def absent(self) -> list[int]:
        """Numbers of the classes that do not occur."""
        return [number for number in range(len(self.classes)) if number not in self.occurring]

    @property
    def ignored(self) -> float:
        """Share of the pixels that belong to no class."""
        return sum(self.pixels[value] for value in self.values if self.number(value) is None) / self.pixels.total()

    def number(self, value: int) -> int | None:
        """The class that a value trains; a value over 255 is returned as it is and belongs to no class."""
        return self.trained[value] if value in VALUES else value

    def beyond(self, found: Mapping[int, int]) -> list[int]:
        """Values that train no class and are not ignored either."""
        numbers = {value: self.number(value) for value in found}
        return [value for value, number in numbers.items() if number is not None and number >= len(self.classes)]

    def name(self, number: int) -> str:
        """A class by its first value and its name."""
        value = self.trained.index(number) if number in self.trained else f"number {number}"
        return f"{value} {self.classes[number]}".strip()

    def names(self, numbers: list[int]) -> str:
        """A list of classes for a message, shortened if it is long."""
        return shortened([self.name(number) for number in numbers])

    def __str__(self) -> str:
        """Which values occur in how many maps, with which share of the pixels, and which classes never do."""
        total, lines = self.pixels.total(), []
        for value in self.values:
            number = self.number(value)
            if number is None:
                name = "ignored"
            else:
                name = self.classes[number] if number < len(self.classes) else "no class"
            lines.append(" ".join(f"{value} {name} {self.pixels[value] / total:.2%} in {self.images[value]:,}".split()))
        head = f"labels of {self.split}: {len(self.counts):,} maps, {self.ignored:.2%} of the pixels ignored"
        head += f"; {len(self.classes) - len(self.absent)} of {len(self.classes)} classes occur"
        return "\n".join([f"{head}; value, class, pixels, maps:", *folded(lines)])


def folded(parts: list[str]) -> list[str]:
    """Join parts into lines of 116 characters without breaking a part."""
    kept = ", ".join(part.replace(" ", "\0") for part in parts)
    wrapped = textwrap.wrap(kept, 116, break_long_words=False, break_on_hyphens=False)
    return [f"  {line}".replace("\0", " ") for line in wrapped]


Found = tuple[str, str]  # a kind of docs/labels.md, and the details


def errors(labels: Labels, most_ignored: float | None = None) -> Iterator[Found]:
    """What would stop a training or silently make it learn wrong labels; `most_ignored` is a share, from the config."""
    classes = len(labels.classes)
    if classes < 2:
        text = f"{labels.split} has {classes} class{'es' * (classes != 1)}: a prediction has nothing to choose from and"
        yield "fewer than two classes", f"{text} mIoU is 100 whatever is learned; name the background as a class, too"
        return
    for name, found in labels.counts.items():
        if over := labels.beyond(found):
            yield "value beyond the classes", f"{name} holds the value {over[0]}; {limits(labels, over[0])}"
            return
    remedy = ""
    if labels.values == [0, IGNORED]:  # a mask as image editors write it
        remedy = f": write 1 in place of 255 ({CONVERT} 255=1) and set reduce_zero_label=False"
    if not labels.occurring:
        values = ", ".join(map(str, labels.values))
        text = f"all pixels of {labels.split} are ignored, its maps hold {values} with reduce_zero_label="
        yield "nothing labelled at all", f"{text}{labels.reduce_zero_label}{remedy or ': nothing can be learned'}"
        return
    if len(labels.occurring) == 1:
        (one,) = labels.occurring
        text = f"all labelled pixels of {labels.split} are of the class {labels.name(one)}"
        why = remedy or f": {'nothing is learned' if labels.train else 'to predict it everywhere gives an mIoU of 100'}"
        yield "one class only", text + why
        return
    whole = labels.occurring == set(range(classes - 1))
    if labels.train and most_ignored is None and whole and counted_from_zero(labels):
        yield (
            "counted from 0, it seems",
            f"{labels.split} holds every value from 0 to {classes - 1} and never {classes}, the last of {classes}"
            " classes with reduce_zero_label=True, which ignores 0: set it to False if the classes count from 0; if 0"
            f" is unlabelled and {labels.name(classes - 1)} just absent, say so with"
            f" most_ignored={math.ceil(100 * labels.ignored) / 100:g}",
        )
    if most_ignored is not None and labels.ignored > most_ignored:
        shares = [f"value {value}: {labels.pixels[value] / labels.pixels.total():.1%}" for value in labels.values
                  if labels.number(value) is None]  # fmt: skip
        yield (
            "more ignored than the config expects",
            f"{labels.ignored:.1%} of the pixels of {labels.split} are ignored ({', '.join(shares)}), the config's"
            f" most_ignored is {most_ignored:.1%}: are these labels numbered differently? (CamVid's own, 0 to 10 with"
            " 11 for void, become the config's by tools/convert_labels.py camvid ROOT OUT)",
        )


def warnings(labels: Labels, trained: Labels | None = None) -> Iterator[Found]:
    """What does not stop a training but should be known; `trained` is the training split, for a validation split."""
    if labels.absent:
        text = f"{len(labels.absent)} of {len(labels.classes)} never occur in {labels.split}"
        if not labels.train:
            text += ", so that mIoU leaves them out, or counts 0 where they are predicted"
        yield "classes that never occur", f"{text}: {labels.names(labels.absent)}"
    if trained and (unseen := sorted(labels.occurring - trained.occurring)):
        text = f"{labels.split} has {labels.names(unseen)}, {trained.split} has not: its IoU can only be 0"
        yield "validated on, but never trained", text
    if empty := [name for name, found in labels.counts.items() if all(labels.number(v) is None for v in found)]:
        yield "nothing labelled", f"{len(empty)} of {len(labels.counts)} maps of {labels.split}: {shortened(empty, 3)}"
    if labels.ignored > HALF:
        yield "most is ignored", f"{labels.ignored:.1%} of the pixels of {labels.split}"
    classes, values = len(labels.classes), [value for value in labels.values if value != IGNORED]
    kind = "reduce_zero_label looks wrong"
    if counted_from_zero(labels):
        zero = "0 occurs" if 0 in values else "0 never occurs"
        text = f"{labels.split}: it is on, but the largest value is {classes - 1} and {zero}"
        yield kind, f"{text}: do the classes count from 0, or are there only {classes - 1}?"
    elif not labels.reduce_zero_label and not labels.label_map and values and values[0] > 0:
        yield kind, f"{labels.split}: it is off, but 0 never occurs: do the classes count from 1?"


def counted_from_zero(labels: Labels) -> bool:
    """Whether 0 is ignored and the largest value is one below the last class's, as when classes count from 0."""
    values = [value for value in labels.values if value != IGNORED]
    return labels.reduce_zero_label and not labels.label_map and values[-1:] == [len(labels.classes) - 1]


def limits(labels: Labels, value: int) -> str:
    """The values that are allowed, and a likely cause of a larger one."""
    classes = len(labels.classes)
    last = max((v for v in VALUES if (n := labels.trained[v]) is not None and n < classes), default=0)
    text = f"of {classes} classes, with reduce_zero_label={labels.reduce_zero_label}, the largest is {last}"
    if not labels.reduce_zero_label and value == classes:
        text += f" (values reach {value}: do the classes count from 1? Then set reduce_zero_label=True)"
    return text
