"""Gains between our own runs: a method against a baseline, by one recipe, on the same data, with the same seeds.

Two things vary: the seed of the training, and the images that happen to be the validation set. Each has an interval of
its own, and a gain counts only if all its intervals exclude 0.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from semaim.errors import UserError, nearest
from semaim.registry import methods as method_classes
from semaim.results import Catalogue, Published
from semaim.results.cells import AGAIN, Cell, data_of
from semaim.results.comparing import compare, unusable
from semaim.results.intervals import OTHER_IMAGES, Interval, images_interval, seeds_interval
from semaim.results.runs import HARMLESS, NO_RECIPE, Run

RANDOM = "random weights"  #: as `semaim.results.runs.method_of` names them


class Place(NamedTuple):
    """What two encoders must have in common to be compared: task, recipe and data, as far as recorded."""

    task: str
    metric: str
    data: str
    backbone: str | None
    recipe: str  #: the published one that the config follows, else the config
    val_images: float | None
    train_images: float | None
    folder: str | None  #: of the data; None for a complete data set
    stage: str | None
    kept: tuple  #: length, scales, changed options, classes of own data, and what was left out when weights were loaded


class Encoder(NamedTuple):
    """What is compared at a place: a method, how long it was pretrained, and changes to its pretraining."""

    method: str
    epochs: float | None = None
    changes: str = ""


@dataclass(frozen=True)
class Gain:
    """Ours minus the baseline.

    Args:
        points: mean over the seeds that both have, or of all runs if there is none, in the metric's unit.
        seeds: number of pairs.
        over_seeds, over_images: intervals; None if there is none, for which a remark gives the reason.
        published: the same gain as published, if there is one.
    """

    ours: Cell
    baseline: Cell
    place: Place
    points: float
    seeds: int
    over_seeds: Interval | None
    over_images: Interval | None
    remarks: tuple[str, ...]
    published: Published | None = None

    @property
    def difference(self) -> float | None:
        """Ours minus the published gain."""
        if self.published is None or self.published.value is None:
            return None
        return self.points - self.published.value

    @property
    def intervals(self) -> list[Interval]:
        """Those that there are."""
        return [interval for interval in (self.over_seeds, self.over_images) if interval]

    @property
    def side(self) -> int | None:
        """1 if every interval is above 0, -1 if every one is below, None without an interval, else 0."""
        sides = {interval.side for interval in self.intervals}
        return None if not sides else sides.pop() if len(sides) == 1 else 0

    @property
    def verdict(self) -> str:
        """The side in words."""
        if not self.side:
            return "no interval" if self.side is None else "cannot tell"
        word = "better" if (self.side > 0) == self.ours.runs[0].kind.higher_is_better else "worse"
        return word if self.varied else f"{word}, for these weights"

    @property
    def varied(self) -> bool:
        """Whether several pretrainings were compared; else another one may differ by more."""
        return bool(self.over_seeds) and not one_pretraining(self.ours) and not one_pretraining(self.baseline)


# What is compared


def place_of(run: Run, catalogue: Catalogue) -> Place:
    """The `Place` at which a run is compared."""
    options = {key: value for key, value in (run.record.cfg_options or {}).items() if not HARMLESS.fullmatch(key)}
    settings = json.dumps([options, run.record.overrides or {}], sort_keys=True, default=str)
    kept = (run.length, run.scales, settings, run.own_data, run.record.partly_loaded)
    val, train, stage = (getattr(run.record, key) for key in ("val_images", "train_images", "stage"))
    data = data_of(run, catalogue)
    complete = any(data == whole.name for whole in catalogue.datasets.values())
    recipe = run.recipe.name if run.recipe else run.config
    folder = None if complete else run.record.data
    return Place(run.task, run.metric, data, run.backbone, recipe, val, train, folder, stage, kept)


def encoder_of(run: Run) -> Encoder:
    """The `Encoder` that a run measured; for random weights only the method."""
    changes = ", ".join(part for part in run.changed if part.startswith("pretraining's "))
    return Encoder(RANDOM) if run.method == RANDOM else Encoder(run.method, run.record.pretrain_epochs, changes)


def baseline_in(methods: Iterable[str], asked: str | None, catalogue: Catalogue) -> str | None:
    """The method to compare with: the one asked for, by name or its beginning; else the usual one that is there.

    Usual is what published gains are over, then random weights. None if there is no other method to compare, or no
    usual one; `UserError` if none of the methods is the one asked for, or several are.
    """
    known = list(dict.fromkeys(methods))
    if asked is not None:
        # tools/reproduce.py's name of random weights counts as well
        named = (name for name, method in method_classes().items() if asked in method.variants and not method.network)
        wanted = next(named, asked).casefold()
        found = [name for name in known if name.casefold() == wanted]
        found = found or [name for name in known if name.casefold().startswith(wanted)]
        if len(found) != 1:
            which = (
                f"several methods: {', '.join(found)}" if found else f"no method of these runs: {nearest(asked, known)}"
            )
            raise UserError(f"--against {asked}: it is {which}")
        return found[0]
    usual = [*dict.fromkeys(figure.over for figure in catalogue.figures if figure.over), RANDOM]
    return next((name for name in usual if name in known and len(known) > 1), None)


def gains_of(cells: Iterable[Cell], asked: str | None, catalogue: Catalogue) -> list[Gain]:
    """The gains of all cells over the baseline's cells at the same places, in the order of the cells."""
    cells = list(cells)
    baseline = baseline_in((cell.runs[0].method for cell in cells), asked, catalogue)
    judged = [cell for cell in cells if AGAIN not in cell.remarks]
    theirs: dict[Place, list[Cell]] = {}
    for cell in judged:
        if cell.runs[0].method == baseline:
            theirs.setdefault(place_of(cell.runs[0], catalogue), []).append(cell)
    found = []
    for cell in judged:
        place = place_of(cell.runs[0], catalogue)
        others = theirs.get(place, []) if cell.runs[0].method != baseline else []
        found += [measure(cell, other, place, catalogue) for other in others]
    if asked is not None and not found:
        alike = "by the same recipe with the same options, on the same data, with the same backbone, no seed twice"
        raise UserError(f"--against {asked}: no other method was measured as {baseline} was: {alike}")
    return found


def names_of(encoders: Sequence[Encoder]) -> list[str]:
    """Method names, with as many details as needed to distinguish them."""
    for count in (1, 2, 3):
        names = [
            ", ".join(str(part) + " epochs" * (place == 1) for place, part in enumerate(it[:count]) if part)
            for it in encoders
        ]
        if len(set(names)) == len(names):
            break
    return names


# How much, and how certain


def measure(ours: Cell, baseline: Cell, place: Place, catalogue: Catalogue) -> Gain:
    """The gain of one cell over another at the same place."""
    by_seed = [{run.record.seed: run for run in cell.runs} for cell in (ours, baseline)]
    several = [
        cell.runs[0].method for cell, runs in zip((ours, baseline), by_seed, strict=True) if len(runs) < len(cell.runs)
    ]
    shared = [seed for seed in by_seed[0] if seed in by_seed[1] and not several]
    pairs = [(by_seed[0][seed], by_seed[1][seed]) for seed in shared]
    cautions = (unlike(ours, baseline), measured_unlike(ours, baseline), *map(one_pretraining, (ours, baseline)))
    remarks = [remark for remark in ours.remarks if remark in baseline.remarks and remark != NO_RECIPE]
    remarks += [caution for caution in cautions if caution]
    alone = [str(seed) for seeds, others in (by_seed, by_seed[::-1]) for seed in seeds if seed not in others]
    if alone and pairs:
        remarks.append(f"left out, as only one of the two has it: seed {', '.join(alone)}")
    if several:
        remarks.append(
            f"seeds of {' and of '.join(several)} are not recorded, or repeat: not paired, no interval over seeds"
        )
    elif not pairs:
        remarks.append("no seed in common: not paired")
    points = statistics.fmean(a.value - b.value for a, b in pairs) if pairs else ours.mean - baseline.mean
    groups = ([a for a, _ in pairs], [b for _, b in pairs]) if pairs else (ours.runs, baseline.runs)
    over_images, why = images_interval(*groups)
    over_seeds, own = seeds_interval([a.value - b.value for a, b in pairs]) if why != OTHER_IMAGES else (None, "")
    remarks += [reason for reason in (own, why) if reason]
    figure = next((f for f in catalogue.figures if is_gain(f, place, ours, baseline)), None)
    return Gain(ours, baseline, place, points, len(pairs), over_seeds, over_images, tuple(remarks), figure)


def is_gain(figure: Published, place: Place, ours: Cell, baseline: Cell) -> bool:
    """Whether a published figure is this gain, and both cells might stand beside published figures."""
    what = (place.task, f"{place.metric}, gain over {figure.over}", place.data, baseline.runs[0].method)
    same = what == (figure.task, figure.metric, figure.data, figure.over) and compare(ours.runs[0], figure).allowed
    return same and not (ours.remarks or baseline.remarks or unusable(figure))


def unlike(ours: Cell, baseline: Cell) -> str:
    """What a reader has to know about two pretrainings: they may differ in length, images and changes."""
    first, second = ours.runs[0], baseline.runs[0]
    if RANDOM in (first.method, second.method):
        return ""
    parts = []
    for name, key in (("epochs", "pretrain_epochs"), ("images", "pretrain_images")):
        mine, other = getattr(first.record, key), getattr(second.record, key)
        if mine != other:
            words = ("an unknown number of" if number is None else f"{number:,}" for number in (mine, other))
            parts.append(f"{' against '.join(words)} {name}")
    changes = [encoder_of(run).changes for run in (first, second)]
    if changes[0] != changes[1]:
        parts.append(f"{changes[0] or 'nothing changed'} against {changes[1] or 'nothing changed'}")
    return f"pretrained differently: {', '.join(parts)}" if parts else ""


def measured_unlike(ours: Cell, baseline: Cell) -> str:
    """What a reader has to know about two measurements at one place: configs, classes in the mean, sizes of images."""
    runs = ours.runs[0], baseline.runs[0]
    configs = [run.config or "one not recorded" for run in runs]
    counted = [str(run.record.classes_evaluated or "an unknown number of") for run in runs]
    parts = [f"configs {' against '.join(configs)}"] if configs[0] != configs[1] else []
    parts += [f"mean over {' against '.join(counted)} classes"] if counted[0] != counted[1] else []
    recorded = [run.record.more.get("images") for run in runs]
    prepared = [images for images in recorded if isinstance(images, Mapping)]
    if len(prepared) == 2 and prepared[0] != prepared[1]:
        words = [" ".join(f"{key} {value}" for key, value in images.items()) for images in prepared]
        parts.append(f"images of {' against '.join(words)}")
    return "; ".join(parts)


def one_pretraining(cell: Cell) -> str:
    """A caution if the seeds of a cell share one checkpoint: they do not show how pretrainings vary."""
    paths = {run.record.checkpoint for run in cell.runs}
    shared = len(cell.runs) > 1 and len(paths) == 1 and None not in paths
    return f"all seeds of {cell.runs[0].method} are of one pretraining" if shared else ""
