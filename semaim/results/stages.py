"""From images to the table as plain data: every stage, its command, and what it depends on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config

from semaim.data.scenes import LEVELS
from semaim.errors import UserError, nearest
from semaim.results.running import ROOT, here, in_words, shortened, tool

NAMES = ("pretrain", "knn", "linear", "finetune", "detection", "segmentation")
METHODS = ("semaim", "saim", "raster", "mae", "scratch")
#: What the study of orders and targets has besides; "-ema": the running average's features are the target.
VARIANTS = ("similarity", "semaim-ema", "similarity-ema", "saim-ema", "raster-ema")
SCALES = ("quick", "study", "paper")

#: What --length changes of the built-in scenes.
SCENES = ("images", "unlabelled", "size")
LEVEL = "easy"  #: of the built-in scenes at quick scale

#: How long each stage is, where the config's own length is not meant: epochs of pretrain and finetune, steps of
#: detection and segmentation; how many scenes with labels, and without, and the side of the former in pixels.
LENGTHS = {
    "quick": {"images": 2500, "unlabelled": 10000, "size": 96},  # the rest as in the configs
    "study": {"pretrain": 100, "finetune": 30, "detection": 5000, "segmentation": 5000},
    "paper": {},
}
DEFAULT_METHODS = {"quick": ("semaim", "scratch"), "study": METHODS, "paper": METHODS}

#: The config of each stage by scale: of all methods, or by method or its target, "" for those not named.
CONFIGS: dict[str, dict[str, str | dict[str, str]]] = {
    "quick": {
        "pretrain": {
            "": "semaim/configs/pretrain/semaim_vit_tiny_scenes_easy.py",
            "-ema": "semaim/configs/pretrain/semaim_ema_vit_tiny_scenes_easy.py",
            "mae": "semaim/configs/pretrain/mae_vit_tiny_scenes_easy.py",
        },
        "knn": "semaim/configs/knn/vit_tiny_scenes_easy.py",
        "linear": "semaim/configs/linear/vit_tiny_scenes_easy_fast.py",
        "finetune": "semaim/configs/finetune/vit_tiny_scenes_easy.py",
        "detection": "mmdet_configs/semaim_mask_rcnn_scenes_easy.py",
        "segmentation": "mmseg_configs/semaim_upernet_scenes_easy.py",
    },
    "study": {
        "pretrain": {
            "": "semaim/configs/pretrain/semaim_vit_tiny_cifar10.py",
            "-ema": "semaim/configs/pretrain/semaim_ema_vit_tiny_cifar10.py",
            "mae": "semaim/configs/pretrain/mae_vit_tiny_cifar10.py",
        },
        "knn": "semaim/configs/knn/vit_tiny_cifar10.py",
        "linear": "semaim/configs/linear/vit_tiny_cifar10_fast.py",
        "finetune": "semaim/configs/finetune/vit_tiny_cifar10.py",
        "detection": "mmdet_configs/semaim_mask_rcnn_cifar10.py",
        "segmentation": "mmseg_configs/semaim_upernet_cifar10.py",
    },
    "paper": {
        "pretrain": {
            "": "semaim/configs/pretrain/semaim_vit_base_800e.py",
            "-ema": "semaim/configs/pretrain/semaim_ema_vit_base_800e.py",
            "saim": "semaim/configs/pretrain/saim_vit_base_800e.py",
            "raster": "semaim/configs/pretrain/raster_vit_base_800e.py",
            "mae": "semaim/configs/pretrain/mae_vit_base_1600e.py",
        },
        "knn": "semaim/configs/knn/vit_base.py",
        "linear": {  # each by its own published protocol
            "": "semaim/configs/linear/vit_base_90e.py",
            "mae": "semaim/configs/linear/vit_base_90e_mae.py",
        },
        "finetune": "semaim/configs/finetune/vit_base_100e.py",
        "detection": {
            "": "mmdet_configs/semaim_mask_rcnn.py",
            "mae": "mmdet_configs/mae_mask_rcnn.py",
            "scratch": "mmdet_configs/scratch_mask_rcnn.py",
        },
        "segmentation": {
            "": "mmseg_configs/semaim_upernet.py",
            "mae": "mmseg_configs/mae_upernet.py",
            "scratch": "mmseg_configs/scratch_upernet.py",
        },
    },
}
#: Changes that make a method of SemAIM's config, where it has none of its own.
ORDERS = {"saim": "stochastic", "raster": "raster", "similarity": "similarity"}
LOOKING = ("semaim", "similarity")  #: methods whose order has a centre, which the image decides
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  #: endings of images
#: Changes at a scale.
OPTIONS = {"quick": {}, "study": {"num_workers": 8}, "paper": {}}

#: ImageNet-1k, in training and validation images.
IMAGENET = (1_281_167, 50_000)


@dataclass(frozen=True)
class Stage:
    """One command of the road from images to the table.

    Args:
        name: of `NAMES`, or "scenes", which draws the images.
        method: of `METHODS` or `VARIANTS`; empty for "scenes".
        config: as a path in the checkout.
        folder: where it writes.
        pretrained: the checkpoint it starts from, "random", or None.
        data_root: folder of its images; None for the config's own.
        options: what --cfg-options changes.
        needs: the title of the stage that makes `pretrained`.
        unit, length: "epochs" or "iterations" it trains, and how many; None where it only measures.
        images: that pass in an epoch or, where it only measures, once; None for iterations, or where it is not known.
        batch: images of an optimizer step; None where it only measures.
        gpus, nodes: that it runs on: of those given, as many as its batch can be split over.
        scenes: folder of the built-in scenes that a pretraining is looked at with; None for its own validation images.
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

    @property
    def title(self) -> str:
        """Its name among all stages."""
        return f"{self.method}/seed{self.seed}/{self.name}" if self.method else self.name

    @property
    def trains(self) -> bool:
        """Whether it trains, so that it can go on where it was cut; else it only measures, or draws."""
        return self.unit is not None

    @property
    def result(self) -> Path:
        """The file that is there once it has finished."""
        own = {"scenes": "scenes.json", "pretrain": f"epoch_{self.length}.pth"}
        return self.folder / own.get(self.name, "results.json")

    @property
    def settings(self) -> dict:
        """What must not change while its folder is in use; on how many GPUs it runs may."""

        def whole(path: Path | str | None) -> str | None:
            return str(path.resolve()) if isinstance(path, Path) else path

        paths = {"pretrained": whole(self.pretrained), "data_root": whole(self.data_root)}
        return {"config": self.config, **paths, "options": in_words(self.options)}

    def command(self) -> list[str]:
        """The command line as one would type it here, on one node; it goes on with what its folder holds."""
        if self.name == "scenes":
            flags = []
            for name, value in self.options.items():
                flags += [f"--{name.replace('_', '-')}", str(value)]
            return [*tool("")[:1], "-m", "semaim.data.scenes", str(self.folder), *flags]
        line = [*tool("train.py" if self.trains else "test.py"), here(ROOT / self.config)]
        line += [str(self.pretrained)] if self.pretrained and not self.trains else []
        line += ["--gpus", str(self.gpus), "--work-dir", str(self.folder)]
        line += ["--pretrained", str(self.pretrained)] if self.pretrained and self.trains else []
        line += ["--data-root", str(self.data_root)] if self.data_root else []
        line += ["--resume"] if self.trains and (self.folder / "latest.pth").exists() else []
        options = [f"{key}={value}" for key, value in in_words(self.options).items()]
        return line + (["--cfg-options", *options] if options else [])

    def drawings(self) -> list[tuple[Path, list[str]]]:
        """What else the report shows: file -> the command line that makes it, once the stage has finished.

        Of a detector and a segmentor, what they find. Of a pretraining, eight validation images in its order or, of
        MAE, rebuilt; and where the centre falls on built-in scenes, if the order has one.
        """
        if self.name in ("detection", "segmentation"):
            file = self.folder / "predictions.png"
            line = [*tool("visualize.py"), "predictions", str(self.folder / "latest.pth"), "--config", self.config]
            line += ["--data-root", str(self.data_root)] if self.data_root else []
            return [(file, [*line, "--most", "8", "--columns", "2", "--out", str(file)])]
        if self.name != "pretrain":
            return []
        found = []
        if images := self.shown():
            kind, name = ("reconstruction", "reconstruction.png") if self.method == "mae" else ("order", "orders.png")
            file = self.folder / name
            line = [*tool("visualize.py"), kind, str(self.result), *map(str, images)]
            found.append((file, [*line, "--across", "--out", str(file)]))
        if self.scenes and self.method.split("-")[0] in LOOKING:
            file = self.folder / "centres.json"
            line = [*tool("")[:1], "-m", "semaim.benchmarks.centres", str(self.result), "--scenes", str(self.scenes)]
            found.append((file, [*line, "--out", str(file)]))
        return found

    def shown(self, most: int = 8) -> list[Path]:
        """Validation images that are spread over the class folders; nothing where there are none."""
        root = self.scenes / "classes" if self.scenes else self.data_root
        images = sorted((root / "val").glob("*/*")) if root else []
        images = [path for path in images if path.suffix.lower() in PICTURES]
        return [images[len(images) * place // most] for place in range(most)] if len(images) > most else images


def lengths_of(scale: str, given: Mapping[str, int] | None = None) -> dict[str, int]:
    """The lengths of a scale, with those given in place of its own; `UserError` for what has none, and for nonsense."""
    known = [*NAMES[:1], *NAMES[3:], *(SCENES if scale == "quick" else ())]
    known += ["linear"] if scale == "paper" else []  # elsewhere it is the fast probe
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
    """All stages in the order they run: seed by seed, method by method. Nothing is written or looked at but configs.

    Args:
        scale: of `SCALES`.
        work: folder of all runs.
        methods, seeds: which; None for the scale's methods.
        roots: folders of the images: "images" (class folders), "coco", "ade", and "scenes" at quick scale. None, or
            missing, is the config's own at paper scale; elsewhere the stages that need it are left out.
        lengths: in place of some of `LENGTHS`.
        images: training and validation images in the class folders, where they are known.
        gpus, nodes: GPUs of a node, and nodes, at most.
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
    folders = {"detection": roots.get("coco"), "segmentation": roots.get("ade")}
    for seed in dict.fromkeys(seeds):
        for method in dict.fromkeys(methods or DEFAULT_METHODS[scale]):
            first = None
            for name in NAMES[1:] if method == "scratch" else NAMES:
                root, count = folders.get(name, roots.get("images")), images
                if scenes is not None and name == "pretrain":
                    root, count = scenes / "unlabelled", (lengths["unlabelled"], 0)
                if root is None and scale != "paper":
                    continue
                stage = plan_stage(scale, name, method, seed, work, lengths.get(name), count, gpus, nodes, first, root)
                if name == "pretrain":
                    first = stage = replace(stage, scenes=scenes)
                stages.append(stage)
    return stages


def plan_stage(
    scale: str,
    name: str,
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

    configs = CONFIGS[scale][name]
    order, *target = method.split("-")
    keys = (method, *(f"-{name}" for name in target), "")
    config = configs if isinstance(configs, str) else next(configs[key] for key in keys if key in configs)
    cfg = load_config(ROOT / config, check=False)
    unit, own = length_of(cfg)
    options: dict[str, object] = {}
    if length not in (None, own):
        options |= shortened(cfg, iters=length) if unit == "iterations" else shortened(cfg, epochs=length)
    options |= {} if seed == cfg.seed else {"seed": seed}
    options |= OPTIONS[scale]
    if name == "pretrain" and order in ORDERS and cfg.model.network.order != ORDERS[order]:
        options["model.network.order"] = ORDERS[order]
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
    )


def length_of(cfg: Config) -> tuple[str | None, int | None]:
    """What a config counts its training in, epochs or iterations, and how many; None of what only measures."""
    train = cfg.get("train_cfg") or {}
    units = (("epochs", "max_epochs"), ("iterations", "max_iters"))
    return next(((unit, train[key]) for unit, key in units if key in train), (None, None))


def split(batch: int, gpus: int, nodes: int) -> tuple[int, int]:
    """GPUs of a node and nodes, at most those given, that a batch can be split over evenly."""
    for count in range(nodes, 0, -1):
        if batch % (gpus * count) == 0:
            return gpus, count
    return next((count, 1) for count in range(gpus, 0, -1) if batch % count == 0)
