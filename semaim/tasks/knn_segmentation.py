"""k-NN segmentation: pixels of validation images by the nearest patches of the training images, without training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.device import get_device
from mmengine.evaluator import BaseMetric
from mmengine.registry import LOOPS, METRICS, MODELS
from torch import Tensor
from torch.utils.data import DataLoader

from semaim.data.folder import seed_of
from semaim.engine import dense
from semaim.engine.dense_neighbours import (
    Bank,
    gather,
    known,
    patch_classes,
    patch_counts,
    predict_patches,
    sample_patches,
    shares,
    to_pixels,
)
from semaim.engine.dense_task import SPLITS
from semaim.engine.encoders import settle_images
from semaim.engine.evaluation import RANDOM, logger_of
from semaim.engine.extraction import processes
from semaim.engine.results import record_load, record_origin, write_results
from semaim.engine.runner import prepare_worker
from semaim.engine.training import Prepared
from semaim.engine.watching import progress
from semaim.errors import UserError
from semaim.reading import forget
from semaim.registry import TASKS, Metric
from semaim.tasks.segmentation import SegmentationTask


@dataclass(frozen=True)
class Encoded:
    """An image's patches.

    Args:
        index: of the image in its data set.
        features: (L, D), fp32.
        grid: (rows, columns), L in all.
        labels: (H, W), as the data set has them.
    """

    index: int
    features: Tensor
    grid: tuple[int, int]
    labels: Tensor


@LOOPS.register_module()
class DenseNeighbours:
    """k nearest neighbours of patches, see `semaim.engine.dense_neighbours`.

    Args:
        k: number of neighbours.
        temperature: of the softmax over their cosine similarities.
        memory_size: most patches in the bank, the same number from each image; None for all.
    """

    def __init__(self, k: int = 30, temperature: float = 0.02, memory_size: int | None = 1_024_000):
        if k < 1 or temperature <= 0:
            raise UserError(f"evaluation: k is {k} and temperature {temperature}: give 1 or more, and a number above 0")
        self.k, self.temperature, self.memory_size = k, temperature, memory_size

    def per_image(self, images: int) -> int | None:
        """Most patches of each of so many images; None for all; `UserError` if that is none, or k cannot be reached."""
        least = max(images, self.k)
        if self.memory_size is not None and self.memory_size < least:
            raise UserError(f"evaluation.memory_size is {self.memory_size}: give {least} or more, or None for all")
        return None if self.memory_size is None else self.memory_size // images

    def collect(self, images: Iterator[Encoded], count: int, classes: int, ignored: int, seed: int) -> Bank:
        """The bank of `count` training images, of which this process has encoded its share."""
        most, rows = self.per_image(count), []
        for image in images:
            counts = patch_counts(known(image.labels, ignored), image.grid, classes)
            draw = torch.Generator().manual_seed(seed_of(seed, image.index))
            chosen = sample_patches(counts, most, draw).to(image.features.device)
            features = torch.nn.functional.normalize(image.features[chosen], dim=1).half()
            rows.append((features, shares(counts[chosen]).half(), torch.full_like(chosen, image.index)))
        return gather(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def predict(self, features: Tensor, bank: Bank) -> Tensor:
        """Features of an image's patches (L, D) -> each class's share (L, C)."""
        return predict_patches(features, bank, self.k, self.temperature)


@torch.no_grad()
def encoded(images: dense.DenseImages, keys: list, model: Any, cfg: Config) -> Iterator[Encoded]:
    """The patches of these images of a data set, in this order, by the model on its device.

    Args:
        images: the data set; `keys` are what it is indexed by, an index or a pair that ends in one.
        model: a `FrozenPatches`.
        cfg: of the run, for batch size and workers.
    """
    loader = DataLoader(
        images,
        batch_size=cfg.images_per_gpu,
        sampler=keys,
        num_workers=cfg.num_workers,
        collate_fn=pseudo_collate,
        worker_init_fn=prepare_worker,
    )
    places = iter(key[-1] if isinstance(key, tuple) else key for key in keys)
    for number, batch in enumerate(loader):
        progress(f"features of batch {number + 1}")
        inputs, samples = batch["inputs"], batch["data_samples"]
        same = len({image.shape for image in inputs}) == 1
        parts = [slice(None)] if same else [slice(place, place + 1) for place in range(len(inputs))]
        for part in parts:
            data = model.data_preprocessor({"inputs": inputs[part], "data_samples": samples[part]}, False)
            maps = model(data["inputs"]).float()
            for found, sample in zip(maps, data["data_samples"], strict=True):
                labels = sample.gt_sem_seg.data.squeeze(0).to(maps.device)
                yield Encoded(next(places), found.flatten(1).T.contiguous(), tuple(found.shape[1:]), labels)


@TASKS.register_module()
class KNNSegmentation(SegmentationTask):
    """Mean IoU over the classes, of pixels and of patches: what a patch holds most of, against what is found there."""

    name = "knn_segmentation"
    title = "k-NN segmentation"
    place = 9
    metrics = {
        "mIoU": Metric("mIoU", "k-NN mIoU"),
        "mAcc": Metric("mAcc"),
        "aAcc": Metric("aAcc"),
        "patch_mIoU": Metric("mIoU of patches", tabled=False),
        "patch_aAcc": Metric("aAcc of patches", tabled=False),
    }
    keys = {**SegmentationTask.keys, "evaluation": "what is measured on patches"}
    instead = f" (or {RANDOM}, for an untrained encoder)"
    shows = ""
    trains = False
    published = False
    averages = False

    def prepare_test(self, cfg: Config, weights: str, check: bool) -> Prepared:
        """See `semaim.engine.testing.prepare_test`."""
        self.enter(cfg)
        path = None if weights == RANDOM else weights
        statistics = settle_images(cfg, path)
        if check:
            model = dense.build(cfg.model, MODELS, "model")
            if path is not None:
                self.load_encoder(cfg, model, path)
        (train, val), described = self.data(cfg, SPLITS, check)
        if check:
            LOOPS.build(cfg.evaluation).per_image(len(train))
            dense.check_fit(cfg, val)
        recorded = {"data": cfg.val_dataset.data_root, "stage": cfg.evaluation.type}
        return Prepared(self, statistics, train=train, val=val, lines=described, recorded=recorded)

    def measure(self, cfg: Config, run: Prepared, weights: str) -> dict[str, float]:
        """The mIoU of pixels and patches of the validation images."""
        log, path = logger_of(cfg).info, None if weights == RANDOM else weights
        record_origin(cfg, path)
        model = dense.build(cfg.model, MODELS, "model")
        if path is None:
            log("random weights: the encoder as initialised")
        else:
            log(str(record_load(self.load_encoder(cfg, model, path), cfg)))
        for line in (*run.lines, f"images normalised with {run.statistics}"):
            log(line)
        forget()
        model = model.to(torch.device(get_device())).eval()
        classes = len(run.val.metainfo["classes"])
        pixels, patches = (self.metric(cfg, run.val) for _ in range(2))
        rank, world = processes()

        keys = [(0, index) for index in range(rank, len(run.train), world)]
        images = encoded(dense.SeededImages(run.train, cfg.seed), keys, model, cfg)
        neighbours = LOOPS.build(cfg.evaluation)
        bank = neighbours.collect(images, len(run.train), classes, pixels.ignore_index, cfg.seed)
        log(f"bank: {len(bank.features):,} patches of {len(run.train):,} images, {bank.megabytes:,.0f} MB per process")

        share = list(range(rank, len(run.val), world))
        for image in encoded(dense.NamedImages(run.val), share, model, cfg):
            found = neighbours.predict(image.features, bank)
            score(pixels, to_pixels(found, image.grid, (image.labels.shape[-2], image.labels.shape[-1])), image.labels)
            truth = patch_classes(image.labels, image.grid, classes, patches.ignore_index)
            score(patches, found.argmax(dim=1), truth)
        metrics = pixels.evaluate(len(run.val))
        log("by patches, of which each counts as the class that it has most of:")
        metrics |= {f"patch_{name}": value for name, value in patches.evaluate(len(run.val)).items()}
        self.keep_outcomes(cfg, run.val, pixels)
        more = {**run.recorded, "bank": len(bank.features), **dense.by_class(pixels)}
        write_results(cfg, metrics, len(run.train), len(run.val), path, **more)
        log(f"mIoU {metrics['mIoU']:.2f} of pixels, {metrics['patch_mIoU']:.2f} of patches")
        return metrics

    @staticmethod
    def metric(cfg: Config, images: BaseDataset) -> Any:
        """The config's metric, for these images."""
        metric: BaseMetric = dense.build(dense.evaluator_of(cfg), METRICS, "val_evaluator")
        metric.dataset_meta = images.metainfo
        return metric


def score(metric: BaseMetric, found: Tensor, labels: Tensor) -> None:
    """Add an image to a metric of mmseg's: predicted and annotated classes of the same shape."""
    metric.process({}, [{"pred_sem_seg": {"data": found}, "gt_sem_seg": {"data": labels}}])
