"""The pipeline from images to the results table as plain data: every stage, its command and its dependencies."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config

from semaim.data.scenes import LEVELS
from semaim.errors import UserError, nearest
from semaim.places import own_config, typed_config
from semaim.registry import Task, stage_of, tasks, variants
from semaim.results.running import as_words, python, shortened, tool

PRETRAIN = "pretrain"  #: the stage whose checkpoint the others start from
SCALES = ("quick", "study", "paper")

#: Settings of the built-in scenes that --length changes.
SCENES = ("images", "unlabelled", "size")
LEVEL = "easy"  #: of the built-in scenes at quick scale

#: Lengths that differ from the config's: epochs of pretrain and finetune, steps of detection and segmentation; numbers
#: of scenes with and without labels, and the side of the labelled ones in pixels.
LENGTHS = {
    "quick": {"images": 2500, "unlabelled": 10000, "size": 96},  # the rest as in the configs
    "study": {"pretrain": 100, "finetune": 30, "detection": 5000, "segmentation": 5000},
    "paper": {},
}
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  #: file extensions of images
#: Changes to configs, by scale.
OPTIONS = {"quick": {}, "study": {"num_workers": 8}, "paper": {}}

#: ImageNet-1k, in training and validation images.
IMAGENET = (1_281_167, 50_000)


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline from images to the table.

    Args:
        name: of `stage_names`, or "scenes", which draws the images.
        method: of `semaim.registry.variants`; empty for "scenes".
        config: its name, which is its path in a checkout.
        folder: where it writes.
        pretrained: the checkpoint it starts from, "random", or None.
        data_root: folder of its images; None for the config's own.
        options: changes by --cfg-options.
        needs: the title of the stage that makes `pretrained`.
        unit, length: length of training, in "epochs" or "iterations"; None if it only measures.
        images: per epoch or, if it only measures, in all; None for iterations, or if not known.
        batch: images per optimizer step; None if it only measures.
        gpus, nodes: that it runs on: as many of those given as its batch can be split over.
        scenes: folder of built-in scenes for pictures of a pretraining; None for its own validation images.
        task: what it trains or measures; None for "scenes".
    """

    name: str
    method: str
    seed: int
    config: str
    folder: Path
    pretrained: Path | str | None = None
    data_root: Path | None = None
    options: dict[str, object] = field(default_factory=dict)
    needs: str | None = None
    unit: str | None = None
    length: int | None = None
    images: int | None = None
    batch: int | None = None
    gpus: int = 1
    nodes: int = 1
    scenes: Path | None = None
    task: Task | None = None

    @property
    def title(self) -> str:
        """Its unique name."""
        return f"{self.method}/seed{self.seed}/{self.name}" if self.method else self.name

    @property
    def trains(self) -> bool:
        """Whether it trains, so that it can resume; else it only measures, or draws scenes."""
        return self.unit is not None

    @property
    def result(self) -> Path:
        """The file that exists once it has finished."""
        own = {"scenes": "scenes.json", "pretrain": f"epoch_{self.length}.pth"}
        return self.folder / own.get(self.name, "results.json")

    @property
    def settings(self) -> dict:
        """Settings that must not change while its folder is in use; the number of GPUs may."""

        def whole(path: Path | str | None) -> str | None:
            return str(path.resolve()) if isinstance(path, Path) else path

        paths = {"pretrained": whole(self.pretrained), "data_root": whole(self.data_root)}
        return {"config": self.config, **paths, "options": as_words(self.options)}

    def command(self) -> list[str]:
        """The command line as it would be typed here, on one node; it resumes from its folder."""
        if self.name == "scenes":
            flags = []
            for name, value in self.options.items():
                flags += [f"--{name.replace('_', '-')}", str(value)]
            return [python(), "-m", "semaim.data.scenes", str(self.folder), *flags]
        line = [*tool("train" if self.trains else "test"), typed_config(self.config)]
        line += [str(self.pretrained)] if self.pretrained and not self.trains else []
        line += ["--gpus", str(self.gpus), "--work-dir", str(self.folder)]
        line += ["--pretrained", str(self.pretrained)] if self.pretrained and self.trains else []
        line += ["--data-root", str(self.data_root)] if self.data_root else []
        line += ["--resume"] if self.trains and os.path.lexists(self.folder / "latest.pth") else []
        options = [f"{key}={value}" for key, value in as_words(self.options).items()]
        return line + (["--cfg-options", *options] if options else [])

    def drawings(self) -> list[tuple[Path, list[str]]]:
        """Further files for the report -> the command lines that make them once the stage has finished.

        For a detector or segmentor, its predictions. For a pretraining, eight validation images drawn as its method
        specifies, and where the centre falls on built-in scenes, if the order has one.
        """
        if self.task and self.task.shows:
            file = self.folder / "predictions.png"
            line = [*tool("visualize"), "predictions", str(self.folder / "latest.pth"), "--config"]
            line += [typed_config(self.config)]
            line += ["--data-root", str(self.data_root)] if self.data_root else []
            return [(file, [*line, "--most", "8", "--columns", "2", "--out", str(file)])]
        if self.name != PRETRAIN:
            return []
        found = []
        method, variant = variants()[self.method]
        if images := self.shown():
            kind = method.picture
            file = self.folder / {"order": "orders.png"}.get(kind, f"{kind}.png")
            line = [*tool("visualize"), kind, str(self.result), *map(str, images)]
            found.append((file, [*line, "--across", "--out", str(file)]))
        if self.scenes and variant.centre:
            file = self.folder / "centres.json"
            line = [python(), "-m", "semaim.benchmarks.centres", str(self.result), "--scenes", str(self.scenes)]
            found.append((file, [*line, "--out", str(file)]))
        return found

    def shown(self, most: int = 8) -> list[Path]:
        """Validation images spread over the class folders; empty if there are none."""
        root = self.scenes / "classes" if self.scenes else self.data_root
        images = sorted((root / "val").glob("*/*")) if root else []
        images = [path for path in images if path.suffix.lower() in PICTURES]
        return [images[len(images) * place // most] for place in range(most)] if len(images) > most else images


def stage_tasks(scale: str) -> dict[str, Task]:
    """Stage -> its task at a scale, in the order in which stages run."""
    found = {}
    for task in tasks():
        if task.name == PRETRAIN or scale in task.configs:
            found[stage_of(task)] = task()
    return found


def stage_names() -> list[str]:
    """All stages except "scenes", of any scale."""
    return list(dict.fromkeys(stage_of(task) for task in tasks() if task.name == PRETRAIN or task.configs))


def default_methods(scale: str) -> list[str]:
    """The default methods of a scale."""
    return [name for name, (_, it) in variants().items() if (it.quick if scale == "quick" else it.compared)]


def lengths_of(scale: str, given: Mapping[str, int] | None = None) -> dict[str, int]:
    """The lengths of a scale, some replaced by those given; `UserError` for an unknown name or an invalid length."""
    known = [name for name, task in stage_tasks(scale).items() if task.trains]
    known += SCENES if scale == "quick" else ()
    for name, length in (given or {}).items():
        if name not in known:
            raise UserError(f"--length {name}: no length of scale {scale}: {nearest(name, known)}")
        least = 2 if name == "images" else 1
        if length < least:
            raise UserError(f"--length {name}={length}: give {least} or more")
    return {**LENGTHS[scale], **(given or {})}


def plan(
    scale: str,
    work: Path,
    methods: Iterable[str] | None = None,
    seeds: Iterable[int] = (0,),
    roots: Mapping[str, Path | None] | None = None,
    lengths: Mapping[str, int] | None = None,
    images: tuple[int, int] | None = None,
    gpus: int = 1,
    nodes: int = 1,
) -> list[Stage]:
    """All stages in the order they run: seed by seed, method by method. Reads only configs and writes nothing.

    Args:
        scale: of `SCALES`.
        work: folder of all runs.
        methods, seeds: to run; None for the scale's default methods.
        roots: folders of the images by `Task.source`: "images" (class folders), "coco", "ade"; "scenes" at quick scale.
            If one is None or missing, the config's own is used at paper scale; at other scales the stages that need it
            are left out.
        lengths: replace some of `LENGTHS`.
        images: numbers of training and validation images in the class folders, if known.
        gpus, nodes: largest number of GPUs per node, and of nodes.
    """
    lengths, roots = lengths_of(scale, lengths), dict(roots or {})
    stages, scenes = [], None
    if scale == "quick":
        scenes = roots.get("scenes") or work / "scenes"
        roots = {"images": scenes / "classes", "coco": scenes / "coco", "ade": scenes / "ade"}
        drawn: dict[str, Any] = {
            **{name: lengths[name] for name in SCENES},
            "level": LEVEL,
            "unlabelled_size": 64,
            "seed": 0,
        }
        stages = [Stage("scenes", "", 0, "", scenes, options=drawn)]
        val = min(drawn["images"] - 1, max(1, round(0.2 * drawn["images"])))  # as semaim.data.scenes splits
        images = (drawn["images"] - val, val)
    images = IMAGENET if scale == "paper" and images is None else images
    for seed in dict.fromkeys(seeds):
        for method in dict.fromkeys(methods or default_methods(scale)):
            first = None
            for name, task in stage_tasks(scale).items():
                if name == PRETRAIN and not variants()[method][1].pretrains:
                    continue
                root, count = roots.get(task.source), images
                if scenes and name == PRETRAIN:
                    root, count = scenes / "unlabelled", (lengths["unlabelled"], 0)
                if root is None and scale != "paper":
                    continue
                stage = plan_stage(scale, task, method, seed, work, lengths.get(name), count, gpus, nodes, first, root)
                if name == PRETRAIN:
                    first = stage = replace(stage, scenes=scenes)
                stages.append(stage)
    return stages


def plan_stage(
    scale: str,
    task: Task,
    method: str,
    seed: int,
    work: Path,
    length: int | None,
    images: tuple[int, int] | None,
    gpus: int,
    nodes: int,
    pretraining: Stage | None,
    root: Path | None,
) -> Stage:
    """One stage of `plan`; None as `length` for the config's own."""
    from semaim.engine.config import load_config  # takes a second
    from semaim.engine.precision import cpu_has_bf16

    name, variant = stage_of(task), variants()[method][1]
    config = variant.configs.get(task.name, {}).get(scale) or task.configs.get(scale)
    if config is None:
        raise UserError(f"--methods {method}: it has no pretraining at scale {scale}")
    cfg = load_config(own_config(config), check=False)
    unit, own = length_of(cfg)
    options: dict[str, object] = {}
    if length not in (None, own):
        options |= shortened(cfg, iters=length) if unit == "iterations" else shortened(cfg, epochs=length)
    options |= {} if seed == cfg.seed else {"seed": seed}
    options |= OPTIONS[scale]
    if name == PRETRAIN:
        options |= variant.options.get(scale, {})
        if scale == "quick" and cpu_has_bf16():  # a quarter less time a step on Zen 4: docs/performance.md
            options |= {"model.cpu_precision": "bf16"}
    if images and (few := cfg.get("dataset", {}).get("images_per_class")):
        images = (few * len(LEVELS[LEVEL].classes), images[1])
    passing = images and (images[0] if unit == "epochs" else sum(images) if unit is None else None)
    batch = cfg.get("total_batch_size") if unit else None
    gpus, nodes = split(batch, gpus, nodes) if batch else (gpus, 1)
    return Stage(
        name=name,
        method=method,
        seed=seed,
        config=config,
        folder=work / method / f"seed{seed}" / name,
        pretrained=pretraining.result if pretraining else None if unit else "random",
        data_root=root,
        options=options,
        needs=pretraining.title if pretraining else None,
        unit=unit,
        length=length or own,
        images=passing,
        batch=batch,
        gpus=gpus,
        nodes=nodes,
        task=task,
    )


def length_of(cfg: Config) -> tuple[str | None, int | None]:
    """The unit of a config's training length, epochs or iterations, and the length; None if it only measures."""
    train = cfg.get("train_cfg") or {}
    units = (("epochs", "max_epochs"), ("iterations", "max_iters"))
    return next(((unit, train[key]) for unit, key in units if key in train), (None, None))


def split(batch: int, gpus: int, nodes: int) -> tuple[int, int]:
    """GPUs per node, and nodes, at most those given, over which a batch can be split evenly."""
    for count in range(nodes, 0, -1):
        if batch % (gpus * count) == 0:
            return gpus, count
    return next((count, 1) for count in range(gpus, 0, -1) if batch % count == 0)
