"""Our own figures: `results.json` files -> runs, and reasons not to compare them with published figures."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from semaim.errors import UserError
from semaim.places import is_name
from semaim.record import Record, read_record
from semaim.registry import Metric, methods, task_titled, tasks
from semaim.results import SINGLE, Catalogue, Recipe, measured
from semaim.results.skipping import Skipped, files_in

NO_RECIPE = "its config follows no published recipe"
CLS = "class token"  #: the default features, which a metric's name does not mention

#: Changed options that do not affect the figure.
HARMLESS = re.compile(r"work_dir|pretrained|num_workers|seed|compile|default_hooks\..*|(.*\.)?(data_)?root")
#: Options of a run's length, which is reported itself.
SCHEDULE = re.compile(r"train_cfg\..*")

#: A public name of weights: timm's, which are those of timm's repositories on the hub.
PUBLIC = re.compile(r"(?:timm:|hf[-_]hub:timm/)(.+)")

SIZES = {"tiny": "ViT-T", "small": "ViT-S", "base": "ViT-B", "large": "ViT-L", "huge": "ViT-H"}


@dataclass(frozen=True)
class Run:
    """One metric, in its table's unit, of one results.json, its `record`; `recipe` is the one its config follows.

    `key` and `kind` are the metric's in results.json. The name in `metric` says if predictions were averaged over
    scales.
    """

    method: str
    backbone: str | None
    task: str
    metric: str
    value: float
    recipe: Recipe | None
    folder: str
    record: Record
    key: str
    kind: Metric

    @property
    def config(self) -> str:
        """The config's file name, or an empty string."""
        return Path(self.record.config or "").name

    @property
    def scales(self) -> tuple[float, ...] | None:
        """Image scales that predictions are averaged over, each also flipped; None if not recorded."""
        return scales_of(self.record)

    @property
    def length(self) -> tuple[str, float] | None:
        """Length of training, ("epochs" or "iterations", number), if recorded."""
        names = ("iterations", "epochs") if self.recipe and self.recipe.iterations else ("epochs", "iterations")
        found = ((name, getattr(self.record, name)) for name in names)
        return next((pair for pair in found if pair[1] is not None), None)

    @property
    def changes(self) -> str:
        """`changed` as text."""
        return ", ".join(self.changed)

    @property
    def changed(self) -> list[str]:
        """Differences from the suite's config that may affect the figure: another file, options, the schedule."""
        found = []
        for whose, name in (("", "cfg_options"), ("pretraining's ", "pretrain_options")):
            options = getattr(self.record, name) or {}
            config = getattr(self.record, "pretrain_config" if whose else "config") or ""
            found += [f"{whose}config {config}"] if "/" in config else []
            found += [f"{whose}schedule"] if any(SCHEDULE.fullmatch(key) for key in options) else []
            apart = [key for key in options if not HARMLESS.fullmatch(key) and not SCHEDULE.fullmatch(key)]
            found += [f"{whose}{key}={options[key]}" for key in apart]
        return found + [f"{key} overridden in mid-run" for key in self.record.overrides or {}]

    @property
    def own_data(self) -> str:
        """What the classes of data of one's own are, and which files are read, as text; empty for other data."""
        described = self.record.more.get("own_data")
        kept = {key: value for key, value in described.items() if key != "root"} if isinstance(described, dict) else {}
        return json.dumps(kept, sort_keys=True) if kept else ""

    @property
    def identified(self) -> bool:
        """Whether the file records more about the measured weights than their path."""
        names = ("method", "pretrain_epochs", "pretrain_images")
        trained = not trains(self.task) or self.length is not None
        return trained and all(getattr(self.record, name) is not None for name in names)


def find_results(folders: Iterable[str | Path], skipped: Skipped | None = None) -> list[Path]:
    """All results.json in the folders, searched recursively, each once; `skipped` takes what cannot be searched."""
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
        files = sorted(path for path in files_in(folder, skipped or Skipped()) if path.name == "results.json")
        if not files:
            raise UserError(f"no results.json in {folder}: runs that measure something write it to their work folder")
        for path in files:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def read_runs(path: Path, catalogue: Catalogue) -> list[Run]:
    """The runs in one file: one for each metric in the table."""
    record = completed(read_record(path), catalogue)
    recipe = catalogue.recipe_of(Path(record.config or "").name, record.task)
    runs = []
    for name, (title, metric) in reported(record.metrics, record.task, record.reported).items():
        title = title or record.task or (recipe.task if recipe else "classification")
        if not metric.measured(record.metrics[name]):
            continue
        value = metric.factor * float(record.metrics[name])
        follows = recipe if recipe and recipe.task == title else None
        label = measured(metric.label, scales_of(record))
        label += f", {record.features}" if (record.features or CLS) != CLS else ""
        backbone, folder = backbone_of(record, recipe), str(path.parent)
        runs.append(Run(method_of(record), backbone, title, label, value, follows, folder, record, name, metric))
    return runs


def completed(record: Record, catalogue: Catalogue) -> Record:
    """A record whose weights are known by their public name, with what is known of their pretraining."""
    name = PUBLIC.fullmatch(record.checkpoint or "")
    known = catalogue.released.get(name[1]) if name else None
    if not name or known is None:
        return record
    (images,) = catalogue.datasets["fine-tuning"].train_images
    return replace(
        record,
        method=known.method,
        backbone=known.backbone,
        pretrain_config=name[1],
        pretrain_epochs=known.pretrain_epochs,
        pretrain_images=images,
    )


def reported(
    names: Iterable[str], title: str | None = None, recorded: Mapping | None = None
) -> dict[str, tuple[str | None, Metric]]:
    """The metrics in the table among these names, with their task's title; None for a name that several tasks have.

    Args:
        names: keys of the metrics in results.json.
        title: of the recorded task; None if none is recorded.
        recorded: the file's own description of its metrics, used if that task is not known here.
    """
    names = list(names)
    task = task_titled(title)
    if task:
        return {name: (title, metric) for name, metric in task.reported(names).items()}
    if recorded:
        return {name: (title, metric) for name, metric in metrics_in(recorded).items() if name in names}
    found: dict[str, tuple[str | None, Metric]] = {}
    for other in tasks():
        for name, metric in other().reported(names).items():
            found[name] = (None if name in found else other.title, metric)
    return found


def metrics_in(recorded: Mapping) -> dict[str, Metric]:
    """The metrics that a results.json describes itself; `UserError` if the description is invalid."""
    kinds = {entry.name: type(entry.default) for entry in fields(Metric)} | {"label": str, "least": int | float}
    kinds["factor"] = int | float
    try:
        found = {name: Metric(**settings) for name, settings in recorded.items()}
    except TypeError as error:
        raise UserError(f"results.json is broken: reported: {error}") from None
    for metric in found.values():
        for name, kind in kinds.items():
            value = getattr(metric, name)
            if not isinstance(value, kind) and not (name == "least" and value is None):
                raise UserError(f"results.json is broken: reported: {name} is {value!r:.60}")
    return found


def trains(title: str) -> bool:
    """Whether a task has a length of training."""
    task = task_titled(title)
    return task is None or task.trains


def published(title: str) -> bool:
    """Whether there are published figures of a task to compare with."""
    task = task_titled(title)
    return task is None or task.published


def scales_of(record: Record) -> tuple[float, ...] | None:
    """The recorded scales; `SINGLE` if a test was not multi-scale, None if it was and does not name them."""
    if record.scales is not None:
        return tuple(record.scales)
    return None if "several scales" in (record.stage or "") else SINGLE


def words_of(*names: str) -> set[str]:
    """The words in file names."""
    return set(re.split(r"[^a-z0-9]+", " ".join(names).lower()))


def method_of(record: Record) -> str:
    """The recorded method, or the one that the names of the checkpoint and its folder suggest; else those names."""
    named_source = is_name(record.checkpoint)
    if record.method and (not named_source or record.pretrain_epochs is not None):
        return record.method
    if not record.checkpoint:
        return "random weights"
    names = Path(record.checkpoint).parts[-2:]
    named = [item for method in methods().values() for item in method.words.items()]
    named.sort(key=lambda item: len(item[0]), reverse=True)  # the most specific first
    method = next((method for needed, method in named if needed <= words_of(*names)), None)
    if named_source:
        return method or record.method or record.checkpoint
    return f"{method} (by its path)" if method else f"unnamed ({'/'.join(names)})"


def backbone_of(record: Record, recipe: Recipe | None) -> str | None:
    """The recorded backbone, the config's, or the one that names suggest; None if there is none."""
    config, checkpoint = Path(record.config or "").name, Path(record.checkpoint or "")
    if record.backbone or recipe:
        return record.backbone or (recipe.configs[config] if recipe else None)
    names = words_of(config), words_of(*checkpoint.parts[-2:])
    return next((backbone for words in names for size, backbone in SIZES.items() if size in words), None)


def remarks_of(run: Run, catalogue: Catalogue) -> tuple[str, ...]:
    """Reasons not to compare a run with published figures of its task; empty if there are none."""
    less, changed = reduced(run, catalogue), f"changed: {run.changes}" if run.changes else ""
    partly = f"partly loaded: {run.record.partly_loaded}" if run.record.partly_loaded else ""
    remarks = [less, changed, partial(run), partly, unfinished(run, catalogue), unlike_recipe(run)]
    if not less and published(run.task):
        remarks += ["" if run.recipe else NO_RECIPE, unrecorded(run)]
    return tuple(remark for remark in remarks if remark)


def reduced(run: Run, catalogue: Catalogue) -> str:
    """How much less, or more, a run was trained, pretrained or validated on than published ones."""
    imagenet = catalogue.datasets["fine-tuning"]
    whole = catalogue.datasets.get(run.task, imagenet)
    images, validated, pretrained = (getattr(run.record, f"{name}_images") for name in ("train", "val", "pretrain"))
    asked: int | None = getattr(run.recipe, run.length[0]) if run.recipe and run.length else None
    more_of_it = run.length[1] - asked if run.length and asked else 0
    other_validation = validated not in (None, whole.val_images)
    other_pretraining = pretrained is not None and pretrained not in imagenet.train_images
    if not (more_of_it or other_validation or other_pretraining or images not in (None, *whole.train_images)):
        return ""
    parts = [f"{images:,} images"] if images is not None else []
    parts += [f"{run.length[1]:,} {run.length[0]}"] if run.length else []
    parts += [f"validated on {validated:,}"] if other_validation else []
    parts += [f"pretrained on {pretrained:,} images"] if other_pretraining else []
    largest = ((images, whole.train_images), (validated, [whole.val_images]), (pretrained, imagenet.train_images))
    more = more_of_it > 0 or any((number or 0) > max(known) for number, known in largest)
    return f"{'other than published' if more else 'reduced'}: {', '.join(parts)}"


def partial(run: Run) -> str:
    """A remark if a mean over classes leaves some out, which are in no label and no prediction."""
    counted, classes = run.record.classes_evaluated, run.record.classes
    return f"mean over {counted} of {classes} classes" if counted is not None and counted != classes else ""


def unfinished(run: Run, catalogue: Catalogue) -> str:
    """A remark if a pretraining had not ended, as far as is known: one that is shorter has another schedule."""
    known = catalogue.pretrainings.get(run.record.pretrain_config or "")
    options, done = run.record.pretrain_options or {}, run.record.pretrain_epochs
    whole = options.get("train_cfg.max_epochs", known.pretrain_epochs if known else None)
    short = isinstance(whole, int | float) and done is not None and done < whole
    return f"pretraining not ended: {done} of {whole} epochs" if short else ""


def unlike_recipe(run: Run) -> str:
    """A remark if the config, or the encoder that it takes the preparation of images from, is unlike its recipe."""
    if run.recipe is None:
        return ""
    words = run.recipe.unlike.get(Path(run.config or "").name, "")
    parts = [words] if words else []
    recorded, asked = run.record.more.get("images"), run.recipe.images
    if isinstance(recorded, Mapping) and asked is not None:
        usual = {"crop_mode": "center", "interpolation": "bicubic"}
        pairs = ((key, recorded.get(key, usual.get(key)), asked.get(key, usual.get(key))) for key in {**asked, **usual})
        parts += [f"images of {key} {ours} ({theirs})" for key, ours, theirs in pairs if ours != theirs]
    return f"unlike its recipe: {', '.join(parts)}" if parts else ""


def unrecorded(run: Run) -> str:
    """What a comparison requires and the file does not record."""
    names = ["train_images", "val_images", "cfg_options"]
    if run.record.checkpoint or run.record.method:
        names += ["method", "pretrain_config", "pretrain_epochs", "pretrain_images"]
    missing = [name.replace("_", " ") for name in names if getattr(run.record, name) is None]
    if not run.length or run.recipe and not getattr(run.recipe, run.length[0]):
        missing.append("length of training")
    return "not recorded: " + ", ".join(missing) if missing else ""
