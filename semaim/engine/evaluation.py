"""Shared by the tasks on frozen features: k-NN, the fast probes. One pass over the images serves any number of them.

Shapes: N training and M validation images, D channels, P prefix tokens, L patches.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.registry import LOOPS
from torch import Tensor, nn

from semaim.data.contents import digest_of_files
from semaim.data.labelled import LabelledImages
from semaim.engine.classification import Classification
from semaim.engine.compiling import compile_for
from semaim.engine.encoders import settle_images
from semaim.engine.extraction import LABELS, extract_features, processes
from semaim.engine.features import ProbeResult, Split
from semaim.engine.full_disk import go_on
from semaim.engine.images import ImageTask, build_datasets, empty_model, fit_encoder
from semaim.engine.results import record_load, record_origin, write_results
from semaim.engine.runner import evaluation_loader
from semaim.engine.training import Prepared
from semaim.errors import UserError
from semaim.models.attentive import ATTENTIVE
from semaim.outcomes import write_outcomes
from semaim.reading import forget
from semaim.registry import build_model, task_named, tasks

RANDOM = "random"  #: instead of a checkpoint: the encoder with its initial weights
FEATURES = "features"  #: one vector per image, pooled as the config says: (D,)
TOKENS = "tokens"  #: all tokens: (P + L, D)
MOST_GB = 50.0  #: of `most_gb`, where the config does not set it


@dataclass(frozen=True)
class Frozen:
    """What a pass over the images has found. Arrays are read-only memory maps.

    Attributes:
        train, val: (features, labels): fp16 (N, D) or tokens (N, P + L, D), and int64 (N,); (M, ...) for `val`.
        classes: number of classes.
        device: to compute on.
        log: called with lines for the log.
        seed: of the run.
        prefix: P.
        more: further sets that the evaluation asked for, by name.
    """

    train: Split
    val: Split
    classes: int
    device: torch.device
    log: Callable[[str], None]
    seed: int = 0
    prefix: int = 1
    more: Mapping[str, Split] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What an evaluation has found.

    Attributes:
        metrics: name -> number, as in results.json.
        scores: name of a metric -> (M,) per validation image, whose mean times 100 is the metric; see `outcomes`.
    """

    metrics: dict[str, float]
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)


class Evaluation:
    """What a `FeatureTask` does with features; the config's `evaluation` names a subclass that is registered in LOOPS.

    Attributes:
        reads: FEATURES or TOKENS.
        roots: further test sets that it measures: name -> folder.
    """

    reads: ClassVar[str] = FEATURES
    roots: Mapping[str, str] = MappingProxyType({})

    def check(self, train: LabelledImages, val: LabelledImages, shape: tuple[int, ...]) -> None:
        """`UserError` for settings that cannot work on these images, or with an image's features of this shape.

        Called before anything is extracted.
        """

    def read(self, train: LabelledImages) -> None:
        """Read what the settings name besides images; called in every process, after any `check`."""

    def sets(self, val: LabelledImages) -> dict[str, LabelledImages]:
        """Further images to extract, by a name that is a folder's: for example the validation images, corrupted."""
        return {}

    def run(self, data: Frozen) -> Measured:
        """Called in every process with the same data; only what it returns on the main process is written."""
        raise NotImplementedError


@dataclass(frozen=True)
class Job:
    """One task of a pass: its settings are `evaluation`'s; `folder` is in the work folder, "" for that itself."""

    task: "FeatureTask"
    settings: dict[str, Any]
    evaluation: Evaluation
    folder: str = ""


@dataclass(kw_only=True)
class PreparedFeatures(Prepared):
    """`Prepared` for one pass.

    Attributes:
        jobs: what is measured.
    """

    jobs: list[Job]


class FeatureTask(ImageTask):
    """Measures features of a frozen encoder, extracted once, by the config's `evaluation`.

    Attributes:
        evaluation: the settings for a config of another task, see `--tasks`; a config's `evaluations` changes them.
        uncached: what to do in place of storing features that are too large, as the end of a sentence.
        shares: one pass may serve several tasks.
    """

    keys = {
        **ImageTask.keys,
        "evaluation": "what is measured on features",
        "test_roots": "further test sets of the same classes: name -> folder, see --test-root",
        "evaluations": "settings of further tasks, by name, for --tasks",
        "most_gb": f"the largest size of the stored features, in GB of 10^9 bytes (default: {MOST_GB:g})",
    }
    instead = f" (or {RANDOM}, for an untrained encoder)"
    trains = False
    published = False
    evaluation: ClassVar[Mapping[str, Any]] = {}
    uncached: ClassVar[str] = ""
    shares = True

    def prepare_test(self, cfg: Config, weights: str, check: bool) -> PreparedFeatures:
        """See `semaim.engine.testing.prepare_test`; with `cfg.tasks` every one of them is measured."""
        self.enter(cfg)
        jobs = self.jobs(cfg)
        if cfg.model.network.get("pool") in ATTENTIVE:
            raise UserError(f"pool {cfg.model.network.pool!r} gives no vectors: set model.network.pool to cls or avg")
        statistics = settle_images(cfg, None if weights == RANDOM else weights)
        if check and weights != RANDOM:
            fit_encoder(cfg, empty_model(cfg).network, weights)
        train, val = build_datasets(cfg)
        assert isinstance(train, LabelledImages) and val is not None
        if check:
            network: Any = empty_model(cfg).network
            shapes: dict[str, tuple[int, ...]] = network.shapes
            for job in jobs:
                job.evaluation.check(train, val, shapes[job.evaluation.reads])
            check_size(cfg, jobs, shapes, train, val)
        for job in jobs:
            job.evaluation.read(train)
        return PreparedFeatures(self, statistics, train=train, val=val, jobs=jobs)

    def jobs(self, cfg: Config) -> list[Job]:
        """What is measured; `UserError` for a task that reads no features, or settings that its evaluation refuses."""
        names: Sequence[str] | None = cfg.get("tasks")
        if names is None:
            settings = self.adjusted(cfg, dict(cfg.evaluation))
            return check_read(cfg, [Job(self, settings, build_evaluation(self, settings))])
        found = []
        for name in dict.fromkeys(names):
            task = task_named(name, "--tasks: task")
            if not isinstance(task, FeatureTask):
                known = ", ".join(kind.name for kind in tasks() if issubclass(kind, FeatureTask))
                raise UserError(f"--tasks: {name} does not read frozen features: choose from {known}")
            settings = dict(cfg.evaluation if name == self.name else task.evaluation)
            settings = task.adjusted(cfg, settings | (cfg.get("evaluations") or {}).get(name, {}))
            found.append(Job(task, settings, build_evaluation(task, settings), name))
        for name in cfg.get("evaluations") or {}:
            task_named(name, "evaluations: task")
        return check_read(cfg, found)

    def adjusted(self, cfg: Config, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings of this task with what other keys of the config say."""
        return settings

    def measure(self, cfg: Config, run: Prepared, weights: str) -> dict[str, float]:
        """The metrics of the config's `evaluation`; of several tasks all, as TASK/METRIC."""
        assert isinstance(run, PreparedFeatures)
        device = torch.device(get_device())
        logger = logger_of(cfg)
        log = logger.info
        path = None if weights == RANDOM else weights
        record_origin(cfg, path)
        model: Classification = build_model(cfg.model)
        if path is None:
            log("random weights: the encoder as initialised")
        else:
            log(str(record_load(self.load_encoder(cfg, model, path), cfg)))
        compile_for(cfg, model, 0, device, logger)
        log(f"images normalised with {run.statistics}; {cfg.model.network.img_size} pixels")
        forget()
        found = extract_sets(cfg, run, model.to(device).eval(), device, log)
        everything: dict[str, float] = {}
        for job in run.jobs:
            if job.folder:
                log(f"{job.task.title}:")
            reads = job.evaluation.reads
            named = {name: (arrays[reads], arrays[LABELS]) for name, arrays in found.items() if reads in arrays}
            train, val = named.pop("train"), named.pop("val")
            more = {name: named[name] for name in job.evaluation.sets(run.val)}
            prefix = model.network.num_prefix_tokens
            data = Frozen(train, val, len(run.train.classes), device, log, cfg.seed, prefix, more)
            measured = job.evaluation.run(data)
            own = config_of(cfg, job)
            words = model.network.pooling if reads == FEATURES else "all tokens"
            recorded = {"stage": job.settings["type"], "features": words, "precision": model.computed_in(device)}
            recorded |= {"held_out": run.val.held_out} if run.val.held_out else {}
            write_results(own, measured.metrics, len(run.train), len(run.val), path, **recorded)
            if measured.scores and is_main_process():
                write_outcomes(Path(own.work_dir), run.val.names(), measured.scores)
            named_so = f"{job.folder}/" if job.folder else ""
            everything |= {named_so + name: value for name, value in measured.metrics.items()}
        return everything


def check_read(cfg: Config, jobs: list[Job]) -> list[Job]:
    """The jobs; `UserError` if the config names further test sets, or the user settings, that none of them reads."""
    if cfg.get("test_roots") and not any(job.evaluation.roots for job in jobs):
        raise UserError("--test-root: no task here reads further test sets: add test_sets to --tasks")
    for key in cfg.get("cfg_options") or {}:
        part, _, rest = str(key).partition(".")
        name = rest.partition(".")[0]
        if part == "evaluations" and name not in [job.folder for job in jobs]:
            raise UserError(f"{key}: {name or 'that'} is not measured here: name it in --tasks")
    return jobs


def measured_probe(found: ProbeResult, name: str, key: str, log: Callable[[str], None]) -> Measured:
    """A probe's figures as KEY_top1, KEY_top5 and KEY_lr; what it tried goes to the log under its name."""
    for lr, accuracy in found.held_out.items():
        log(f"{name}, learning rate {lr:8.4g}: {accuracy:.2f} on the held-out training images")
    log(f"{name}: top-1 {found.top1:.2f}  top-5 {found.top5:.2f} with learning rate {found.lr:g}")
    if found.at_border:
        log("the best learning rate is at the border of those tried: widen evaluation.lrs")
    metrics = {f"{key}_top1": found.top1, f"{key}_top5": found.top5, f"{key}_lr": found.lr}
    return Measured(metrics, {f"{key}_top1": found.hits})


def build_evaluation(task: FeatureTask, settings: Mapping[str, Any]) -> Evaluation:
    """What a task's settings describe; `UserError` if they cannot be built."""
    try:
        found = LOOPS.build(dict(settings))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{task.name}: evaluation {dict(settings)}: {' '.join(str(error).split())}") from None
    if not isinstance(found, Evaluation):
        raise UserError(f"task {task.name}: derive {type(found).__name__} from semaim.engine.evaluation.Evaluation")
    return found


def config_of(cfg: Config, job: Job) -> Config:
    """The config of a run of one job alone, for its results."""
    if not job.folder:
        return cfg
    own = Config(cfg.to_dict(), filename=cfg.filename)
    own.task, own.work_dir = job.task.name, str(Path(cfg.work_dir) / job.folder)
    own.evaluation = job.settings
    apart = ("evaluations.",) if job.task.name == cfg.task else ("evaluation.", "evaluations.")
    changed = {key: value for key, value in (cfg.get("cfg_options") or {}).items() if not key.startswith(apart)}
    mine = f"evaluations.{job.task.name}."
    given = {key: value for key, value in (cfg.get("cfg_options") or {}).items() if key.startswith(mine)}
    own.cfg_options = changed | {f"evaluation.{key[len(mine) :]}": value for key, value in given.items()}
    return own


def shapes_of(network: Any, jobs: Sequence[Job]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of an image's row, of all that the jobs read."""
    read = {job.evaluation.reads for job in jobs}
    return {name: shape for name, shape in network.shapes.items() if name in read}


def check_size(
    cfg: Config, jobs: Sequence[Job], shapes: Mapping[str, tuple[int, ...]], train: LabelledImages, val: LabelledImages
) -> None:
    """`UserError` if the features of all images, of an image's `shapes`, are larger than the config's `most_gb`."""
    most = cfg.get("most_gb", MOST_GB)
    if isinstance(most, bool) or not isinstance(most, int | float) or not most > 0:
        raise UserError(f"most_gb is {most!r}: give a number of GB above 0")
    for name, shape in shapes.items():
        reading = [job for job in jobs if job.evaluation.reads == name]
        readers = [job.task for job in reading]
        sets = {key: len(part) for job in reading for key, part in job.evaluation.sets(val).items()}
        images = len(train) + len(val) + sum(sets.values())
        size = 2 * images * math.prod(shape) / 1e9
        if readers and size > most:
            raise UserError(
                f"{', '.join(task.name for task in readers)}: the {name} of {images:,} images,"
                f" {' x '.join(map(str, shape))} values of fp16 each, take {size:,.1f} GB, more than most_gb={most:g}:"
                f" set --cfg-options most_gb={math.ceil(size)}{readers[0].uncached}"
            )


def extract_sets(
    cfg: Config, run: PreparedFeatures, model: Classification, device: torch.device, log
) -> dict[str, dict[str, np.ndarray]]:
    """Of every set of images the arrays that the jobs read; what is in the work folder already is not extracted."""
    network = model.network
    wanted = {name: shapes_of(network, run.jobs) for name in ("train", "val")}
    images = {"train": run.train, "val": run.val}
    for job in run.jobs:
        for name, further in job.evaluation.sets(run.val).items():
            images[name] = further
            wanted[name] = wanted.get(name, {}) | shapes_of(network, [job])

    def encode(batch: Tensor) -> dict[str, Tensor]:
        with model.autocast(device):
            tokens = network.tokens(batch)
            pooled = network.pooled(tokens) if FEATURES in shapes else tokens
        return {FEATURES: pooled.float(), TOKENS: tokens.float()}

    main = processes()[0] == 0
    digest = digest_of(network) if main else ""
    found = {}
    for name, shapes in wanted.items():
        part = images[name]
        key = {
            "weights": digest,
            "network": str({name: value for name, value in sorted(cfg.model.network.items()) if name != "pool"}),
            "pooling": network.pooling,
            "precision": model.computed_in(device),
            "files": digest_of_files(part.paths.tolist(), part.root) if main else "",
            "labels": hashlib.sha256(part.labels.tobytes()).hexdigest(),
            "transform": part.preparation(),
        }
        loader = evaluation_loader(part, cfg.images_per_gpu, cfg.num_workers)
        cache = Path(cfg.work_dir) / "features" / name
        start = time.monotonic()
        found[name] = extract_features(encode, loader, len(part), shapes, device, cache, key, log)
        log(f"{name}: {len(part)} images in {time.monotonic() - start:.1f} s")
    return found


def digest_of(network: nn.Module) -> str:
    """A hash of all weights."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def logger_of(cfg: Config) -> MMLogger:
    """A logger to the terminal, on the main process."""
    name = str(Path(cfg.work_dir).resolve()).replace("/", "_")
    return go_on(MMLogger.get_instance(name, logger_name="mmengine", distributed=torch.distributed.is_initialized()))
