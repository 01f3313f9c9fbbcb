"""The extension points: registries of the suite, and the contracts of a task, a metric and a pretraining method.

Each task is a file in `semaim/tasks`, each method one in `semaim/methods`. A third-party package adds either by
registering it here; the config names the package in mmengine's `custom_imports`. Everything else (training, testing,
table, report, sweep, reproduce, pictures) uses these objects and knows no task or method by name.

The registries have the scope `semaim`, as mmdet's have `mmdet`, so our types never collide with another library's of
the same name. Loops, hooks, optimizers and metrics of the engine are in mmengine's own registries, so that configs of
every scope can name them.
"""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import mmengine.registry
from mmengine.registry import Registry

from semaim.errors import UserError, nearest

SCOPE = "semaim"

MODELS = Registry("model", parent=mmengine.registry.MODELS, scope=SCOPE)
TASKS = Registry("task", scope=SCOPE, locations=["semaim.tasks"])
METHODS = Registry("method", scope=SCOPE, locations=["semaim.methods"])
#: mmengine warns when a config of this scope names one of its types and the scope has no child of that registry.
CHILDREN = [
    Registry(parent.name, parent=parent, scope=SCOPE)
    for parent in vars(mmengine.registry).values()
    if isinstance(parent, Registry) and parent.name not in ("model", "function")
]


def import_modules(names: Iterable[str]) -> None:
    """Import modules that register user-defined tasks, methods and types; `UserError` if an import fails."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"cannot import {name}: {error}; its folder has to be on PYTHONPATH") from None


def build_model(config: Mapping) -> Any:
    """Build one of the suite's models, such as `Pretraining`, whatever the current default scope."""
    return MODELS.build({**config, "_scope_": SCOPE})


# Tasks


@dataclass(frozen=True)
class Metric:
    """A figure that a task measures.

    Args:
        label: in the table, such as "AP box".
        short: in the report's first lines, such as "box AP"; empty to leave it out there.
        unit: of the table's figure.
        factor: converts the recorded number to that unit.
        higher_is_better: the direction.
        tabled: whether it is in the table, or only in the report.
        least: a smaller number means there was nothing to measure, as COCO's -1; None if every number is a figure.
        share: whether it is a share of the validation images, whose sampling gives it an interval.
    """

    label: str
    short: str = ""
    unit: str = "%"
    factor: float = 1.0
    higher_is_better: bool = True
    tabled: bool = True
    least: float | None = None
    share: bool = False

    def measured(self, number: float | None) -> bool:
        """Whether a recorded number is a real figure."""
        return number is not None and (self.least is None or number >= self.least)


class Task:
    """A way to train or measure an encoder; the config's `task` names it.

    Tasks derive from one of the families in `semaim.engine`: `images.ImageTask` (class folders),
    `evaluation.FeatureTask` (frozen features), `dense_task.DenseTask` (mmdet and mmseg).

    Attributes:
        name: the value of a config's `task`.
        title: in tables and in results.json.
        stage: its name for tools/reproduce.py, if different.
        place: its position in tables; a new task comes after those of the suite.
        scope: mmengine's scope of its configs.
        package: the module that registers what its configs name; None if the suite already has.
        needs: the library it requires besides the core ones; None for none.
        metrics: key in results.json -> `Metric`; the first one decides in a sweep.
        keys: top-level config keys besides those of every config, and what they are.
        roots: dotted config keys of the folders that --data-root sets.
        trains: whether it trains; else it only measures.
        pretrains: whether the other tasks start from its checkpoints.
        published: whether there are published figures that a run may be compared with.
        configs: scale of tools/reproduce.py -> config; a method may have its own, see `Variant`.
        shows: what a picture of its results shows, for the report; empty for none.
        source: which of reproduce's data folders it reads: "images", "coco" or "ade".
        weight: relative duration of a run; tools/reproduce.py starts the longest first.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    stage: ClassVar[str] = ""
    place: ClassVar[int] = 100
    scope: ClassVar[str] = SCOPE
    package: ClassVar[str | None] = None
    needs: ClassVar[str | None] = None
    metrics: ClassVar[Mapping[str, Metric]] = {}
    keys: ClassVar[Mapping[str, str]] = {}
    roots: ClassVar[tuple[str, ...]] = ("dataset.root",)
    trains: ClassVar[bool] = True
    pretrains: ClassVar[bool] = False
    published: ClassVar[bool] = True
    configs: ClassVar[Mapping[str, str]] = {}
    shows: ClassVar[str] = ""
    source: ClassVar[str] = "images"
    weight: ClassVar[int] = 1

    def enter(self, cfg: Any) -> None:
        """Register the types that a config names."""

    def reported(self, names: Iterable[str]) -> dict[str, Metric]:
        """The metrics in the table, among these keys of results.json."""
        names = set(names)
        return {name: metric for name, metric in self.metrics.items() if name in names and metric.tabled}

    def described(self, names: Iterable[str]) -> dict[str, Metric]:
        """All metrics among these keys, those that only the report shows too."""
        names = set(names)
        return {name: metric for name, metric in self.metrics.items() if name in names}

    def predictor(self, cfg: Any, weights: str, options: Any) -> Any:
        """What predicts images with a checkpoint of this task's, a `semaim.prediction.predictor.Predictor`.

        Args:
            cfg: config of the training; completed in place.
            weights: the checkpoint.
            options: a `semaim.prediction.predictor.Options`.

        Raises:
            UserError: the task's checkpoints predict nothing, or this one does not fit.
        """
        raise UserError(
            f"{self.title} predicts no images: give a detector's, segmentor's or classifier's config (for pictures of"
            " an encoder see semaim visualize, for its features semaim features)"
        )

    def browse(self, cfg: Any, count: int) -> Any:
        """At most `count` training images as the model gets them, a `semaim.engine.browsing.Browsed`.

        `UserError` if the task trains nothing.
        """
        raise UserError(f"{self.title} trains on no images: browse the config of a training")

    def matches(self, cfg: Mapping) -> bool:
        """Whether an old config without a `task` key belongs to this task; such configs come only from checkpoints."""
        return False


def tasks() -> list[type[Task]]:
    """All tasks, in the order of the tables."""
    importlib.import_module("semaim.tasks")
    return sorted(TASKS.module_dict.values(), key=lambda task: task.place)


def list_tasks() -> list[str]:
    """Names of all tasks, as in configs."""
    return [task.name for task in tasks()]


def task_for(cfg: Mapping) -> Task:
    """As `task_of`; `UserError` if there is none."""
    return task_of(cfg) or task_named(cfg.get("task"), "the config's task")


def task_named(name: object, where: str = "task") -> Task:
    """The task of that name; `UserError` if there is none."""
    known = {task.name: task for task in tasks()}
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{where} is {name!r}: {nearest(str(name), known)}")
    return known[name]()


def task_of(cfg: Mapping) -> Task | None:
    """The task of a config; None if it names none and matches none."""
    name = cfg.get("task")
    if name is not None:
        return next((task() for task in tasks() if task.name == name), None)
    return next((task() for task in tasks() if task().matches(cfg)), None)


def task_titled(title: object) -> Task | None:
    """The task with that title, as in results.json; None if there is none."""
    return next((task() for task in tasks() if task.title == title), None)


def stage_of(task: Task | type[Task]) -> str:
    """Its name for tools/reproduce.py."""
    return task.stage or task.name


# Methods


@dataclass(frozen=True)
class Variant:
    """A method as tools/reproduce.py --methods names it.

    Attributes:
        configs: task -> scale -> config, for configs of the method's own; for pretraining, every scale it supports.
        options: scale -> changes to the pretraining config that make it this variant.
        pretrains: False for random weights.
        compared: whether scales study and paper run it by default.
        quick: whether scale quick runs it by default.
        centre: whether its order has a first patch that the image determines.
    """

    configs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pretrains: bool = True
    compared: bool = False
    quick: bool = False
    centre: bool = False


class Method:
    """A pretraining method; the config's `model.network.type` is the name it is registered under.

    Attributes:
        network: an nn.Module built on our encoder, or None for random weights. It is called with images (B, 3, H, W),
            normalised, and draw (B, L), uniform numbers in [0, 1) that come with each image. It returns an object with
            a scalar `loss`, and `prediction` and `target` (B, L, width). Its parameters keep the encoder's names. Its
            pictures depend on what else the object has: the `order` int64 (B, L) of the prediction, or a `mask`
            (B, L), 1 where a patch was removed; see `semaim.drawing.encoder`.
        variants: name for tools/reproduce.py -> `Variant`.
        place: its position in lists; a new one comes before random weights.
        picture: which picture of tools/visualize.py shows it best: "order" or "reconstruction".
        words: words in a file's path -> the method's published name, for files that do not record it.
    """

    network: ClassVar[type | None] = None
    variants: ClassVar[Mapping[str, Variant]] = {}
    place: ClassVar[int] = 50
    picture: ClassVar[str] = "reconstruction"
    words: ClassVar[Mapping[frozenset, str]] = {}

    @classmethod
    def build(cls, **arguments: Any) -> Any:
        """Build the network from the plain values of a config; ValueError or TypeError if they are wrong."""
        if cls.network is None:
            raise ValueError(f"{cls.__name__} has no network")
        return cls.network(**arguments)

    @staticmethod
    def describe(network) -> str:
        """What is predicted, and how: the text after the method's name in the log."""
        return f"target {type(network.target).__name__}"

    @classmethod
    def title(cls, config: Mapping) -> str:
        """The method's name as published.yaml spells it; `config` is the network's."""
        return str(config.get("type"))


def methods() -> dict[str, type[Method]]:
    """All methods by their name in configs."""
    importlib.import_module("semaim.methods")
    return dict(sorted(METHODS.module_dict.items(), key=lambda item: item[1].place))


def list_methods() -> list[str]:
    """Names of all pretraining methods, as in configs."""
    return [name for name, method in methods().items() if method.network]


def method_of(network: Mapping) -> type[Method] | None:
    """The method that a network config names, or None."""
    name = network.get("type")
    return methods().get(name) if isinstance(name, str) else None


def variants() -> dict[str, tuple[type[Method], Variant]]:
    """All names that tools/reproduce.py --methods accepts, with the method and variant of each."""
    return {name: (method, variant) for method in methods().values() for name, variant in method.variants.items()}
