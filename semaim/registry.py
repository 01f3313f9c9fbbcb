"""What grows: the registries of the suite, and the contracts of a task, a metric and a pretraining method.

A task is a file in `semaim/tasks`, a method one in `semaim/methods`. A package of your own adds either by registering
it here; the config names the package in mmengine's `custom_imports`. Everything else - training, testing, table,
report, sweep, reproduce, pictures - asks these objects and knows no task or method by name.

The registries have the scope `semaim`, as mmdet's have `mmdet`: a type of ours never meets another library's of the
same name. Loops, hooks, optimizers and metrics of the engine stand in mmengine's own registries, so that configs of
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
#: Without a child of each of its registries, mmengine warns whenever a config of this scope names one of its types.
CHILDREN = [
    Registry(parent.name, parent=parent, scope=SCOPE)
    for parent in vars(mmengine.registry).values()
    if isinstance(parent, Registry) and parent.name not in ("model", "function")
]


def import_modules(names: Iterable[str]) -> None:
    """Import modules that register tasks, methods and types of one's own; `UserError` for one that cannot be."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"cannot import {name}: {error}; its folder has to be on PYTHONPATH") from None


def build_model(config: Mapping) -> Any:
    """A model of the suite's own, such as `Pretraining`, whatever scope is the default now."""
    return MODELS.build({**config, "_scope_": SCOPE})


# Tasks


@dataclass(frozen=True)
class Metric:
    """A figure of a task, by its key in results.json.

    Args:
        label: in the table, such as "AP box".
        short: in the report's first lines, such as "box AP"; empty for not there.
        unit: of the table's figure.
        factor: the recorded number times this is in that unit.
        higher_is_better: the direction.
        tabled: whether the table has it, or only the report.
        least: a smaller number says that there was nothing to measure, as COCO's -1; None where all are measured.
    """

    label: str
    short: str = ""
    unit: str = "%"
    factor: float = 1.0
    higher_is_better: bool = True
    tabled: bool = True
    least: float | None = None

    def measured(self, number: float | None) -> bool:
        """Whether a recorded number is a figure."""
        return number is not None and (self.least is None or number >= self.least)


class Task:
    """A way to train or measure an encoder; the config's `task` names it.

    Subclasses that train or test by mmengine's runner derive from one of the families in `semaim.engine`:
    `images.ImageTask` (class folders), `evaluation.FeatureTask` (frozen features), `dense_task.DenseTask` (mmdet and
    mmseg).

    Attributes:
        name: what a config's `task` says.
        title: in tables and in results.json.
        stage: its name for tools/reproduce.py, where it is another.
        place: where it stands among the others in tables; a new task comes after those of the suite.
        scope: mmengine's scope of its configs.
        package: the module that registers what its configs name; None where the suite has done so.
        needs: the library it cannot do without, beside the core ones; None for none.
        metrics: key in results.json -> `Metric`, the first one decides in a sweep.
        keys: top-level config keys besides those of every config, and what they are.
        roots: config keys, dotted, of the folders that --data-root sets.
        trains: whether it trains; else it only measures.
        pretrains: whether its checkpoints are what the other tasks start from.
        published: whether figures of it are published that a run may be compared with.
        configs: scale of tools/reproduce.py -> config; a method may have its own, see `Variant`.
        chart: title of the chart of its validations; its own and the metrics' unit where it is empty.
        shows: what a picture of its results shows, for the report; empty for none.
        source: which of reproduce's data folders it reads: "images", "coco" or "ade".
        weight: how long a run of it takes beside the others, for which begins first.
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
    chart: ClassVar[str] = ""
    shows: ClassVar[str] = ""
    source: ClassVar[str] = "images"
    weight: ClassVar[int] = 1

    def enter(self, cfg: Any) -> None:
        """Make the types of a config known by their names."""

    def reported(self, names: Iterable[str]) -> dict[str, Metric]:
        """The metrics that the table has, of these keys of results.json."""
        names = set(names)
        return {name: metric for name, metric in self.metrics.items() if name in names and metric.tabled}

    def matches(self, cfg: Mapping) -> bool:
        """Whether a config from before configs had a `task` is one of this task; read from checkpoints alone."""
        return False


def tasks() -> list[type[Task]]:
    """All tasks, in the order in which tables have them."""
    importlib.import_module("semaim.tasks")
    return sorted(TASKS.module_dict.values(), key=lambda task: task.place)


def list_tasks() -> list[str]:
    """Names of all tasks, as configs give them."""
    return [task.name for task in tasks()]


def charted() -> dict[str, dict[str, str]]:
    """Title of a chart -> key of a metric that validations log -> words for its curve; of all tasks that train."""
    found: dict[str, dict[str, str]] = {}
    for task in tasks():
        shown = {key: metric for key, metric in task.metrics.items() if metric.tabled and task.trains}
        for key, metric in shown.items():
            title = task.chart or f"{task.title}, {metric.unit}"
            found.setdefault(title, {})[key] = metric.label.removeprefix(f"{title} ")
    return found


def task_for(cfg: Mapping) -> Task:
    """The task of a config; `UserError` where it has none."""
    return task_named(cfg.get("task"), "the config's task")


def task_named(name: object, where: str = "task") -> Task:
    """The task of that name; `UserError` where there is none."""
    known = {task.name: task for task in tasks()}
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{where} is {name!r}: {nearest(str(name), known)}")
    return known[name]()


def task_of(cfg: Mapping) -> Task | None:
    """The task of a config; None where it names none and looks like none."""
    name = cfg.get("task")
    if name is not None:
        return next((task() for task in tasks() if task.name == name), None)
    return next((task() for task in tasks() if task().matches(cfg)), None)


def task_titled(title: object) -> Task | None:
    """The task of that title, as results.json has it; None where there is none."""
    return next((task() for task in tasks() if task.title == title), None)


def stage_of(task: Task | type[Task]) -> str:
    """Its name for tools/reproduce.py."""
    return task.stage or task.name


# Methods


@dataclass(frozen=True)
class Variant:
    """A method as tools/reproduce.py --methods names it.

    Attributes:
        configs: task -> scale -> config, where the method has its own; of a pretraining, all scales it has.
        options: scale -> changes of the pretraining's config that make it this variant.
        pretrains: False for random weights.
        compared: whether the study and the paper's scale run it without being asked.
        quick: whether scale quick does.
        centre: whether its order has a first patch that the image decides.
    """

    configs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pretrains: bool = True
    compared: bool = False
    quick: bool = False
    centre: bool = False


class Method:
    """A pretraining method; the config's `model.network.type` gives the name it is registered by.

    Attributes:
        network: an nn.Module over our encoder, or None for random weights. Its call takes images (B, 3, H, W),
            normalised, and draw (B, L), uniform numbers in [0, 1) that come with each image; it gives an object with
            a scalar `loss`, and `prediction` and `target` (B, L, width). Its parameters keep the encoder's names. It
            is drawn by what that object has besides: the `order` int64 (B, L) of the prediction, or a `mask` (B, L),
            1 where a patch was removed; see `semaim.drawing.encoder`.
        variants: name for tools/reproduce.py -> `Variant`.
        place: where it stands among the others; a new one comes before random weights.
        picture: which picture of tools/visualize.py shows it best: "order" or "reconstruction".
        words: words of a file's path -> the method's published name, for files that do not record it.
    """

    network: ClassVar[type | None] = None
    variants: ClassVar[Mapping[str, Variant]] = {}
    place: ClassVar[int] = 50
    picture: ClassVar[str] = "reconstruction"
    words: ClassVar[Mapping[frozenset, str]] = {}

    @classmethod
    def build(cls, **arguments: Any) -> Any:
        """The network from plain values, as a config has them; ValueError or TypeError for wrong ones."""
        if cls.network is None:
            raise ValueError(f"{cls.__name__} has no network")
        return cls.network(**arguments)

    @staticmethod
    def describe(network) -> str:
        """What is predicted, and how: the words after the method's name in a line of the log."""
        return f"target {type(network.target).__name__}"

    @classmethod
    def title(cls, config: Mapping) -> str:
        """The method's name as published.yaml spells it; `config` is the network's."""
        return str(config.get("type"))


def methods() -> dict[str, type[Method]]:
    """All methods by the name that configs give."""
    importlib.import_module("semaim.methods")
    return dict(sorted(METHODS.module_dict.items(), key=lambda item: item[1].place))


def list_methods() -> list[str]:
    """Names of all pretraining methods, as configs give them."""
    return [name for name, method in methods().items() if method.network]


def method_of(network: Mapping) -> type[Method] | None:
    """The method of a network's config, or None."""
    name = network.get("type")
    return methods().get(name) if isinstance(name, str) else None


def variants() -> dict[str, tuple[type[Method], Variant]]:
    """All that tools/reproduce.py --methods takes, with the method each belongs to."""
    return {name: (method, variant) for method in methods().values() for name, variant in method.variants.items()}
