"""Prediction by mmdet's and mmseg's models: objects with boxes and masks, and class maps."""

from collections import Counter
from functools import cached_property
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from PIL import Image

from semaim import checkpoints
from semaim.data.label_rules import IGNORED, trained_as
from semaim.drawing.bars import Bar, add_bars
from semaim.drawing.objects import (
    Instances,
    add_legend,
    colour_of,
    draw_classes,
    draw_instances,
    name_of,
    percent,
    shares_of,
)
from semaim.engine.dense import averaged, build, enter, load_whole
from semaim.engine.encoders import settle_images
from semaim.engine.predicting import build_pipeline, category_ids, class_names, class_results, coco_results, predict
from semaim.errors import UserError
from semaim.prediction.predictor import Found, Item, Options, Predictor

THRESHOLD = 0.3  #: least score of an object that is drawn and written


class DensePredictor(Predictor):
    """A detector or segmentor with its config's `test_pipeline`."""

    def __init__(self, cfg: Config, weights: str, options: Options):
        super().__init__(options)
        enter(cfg)
        statistics = settle_images(cfg, weights, whole=True)
        if options.averaged:
            cfg.val_dataset.pipeline = [s for s in cfg.test_pipeline if not s["type"].endswith("Annotations")]
            averaged(cfg)
            cfg.test_pipeline = cfg.val_dataset.pipeline
        self.cfg, self.weights = cfg, weights
        self.model = build(cfg.model, MODELS, "model")
        load_whole(getattr(self.model, "module", self.model), weights, self.lines.append)
        self.model.to(options.device).eval()
        self.pipeline, self.names = build_pipeline(cfg), class_names(cfg, weights)
        self.ids, origin = category_ids(cfg, self.names)
        self.lines += [f"images normalised with {statistics}", f"{len(self.names)} classes; category_id: {origin}"]

    def predict(self, item: Item) -> Found:
        """See `Predictor.predict`."""
        image, sample = predict(self.model, self.pipeline, item.path, item.pixels, self.options.max_side)
        return self.found(item, image, sample)

    def found(self, item: Item, image: Image.Image, sample: Any) -> Found:
        """What a data sample holds of an image, drawn and as entries."""
        raise NotImplementedError


class ObjectPredictor(DensePredictor):
    """A detector: objects above a score, as COCO results."""

    reads = frozenset({"threshold"})

    def found(self, item: Item, image: Image.Image, sample: Any) -> Found:
        """See `DensePredictor.found`."""
        least = THRESHOLD if self.options.threshold is None else self.options.threshold
        objects = Instances.of(sample.pred_instances).above(least)
        entries = [{**entry, **item.entry} for entry in coco_results(item.path, objects, self.ids)]
        counts = Counter(name_of(self.names, label) for label in objects.labels.tolist())
        words = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing found"
        return Found(draw_instances(image, objects, self.names), entries, words)


class ClassMapPredictor(DensePredictor):
    """A segmentor: a class for every pixel, as COCO "stuff" results and as a label map."""

    reads = frozenset({"labels", "averaged"})

    def __init__(self, cfg: Config, weights: str, options: Options):
        super().__init__(cfg, weights, options)
        if options.labels:
            _ = self.values  # raises

    def found(self, item: Item, image: Image.Image, sample: Any) -> Found:
        """See `DensePredictor.found`."""
        data = sample.pred_sem_seg.data
        classes = data.reshape(data.shape[-2:]).cpu().numpy()  # averaged ones lack the first dimension
        shares = shares_of(classes, len(self.names))
        entries = [{**entry, **item.entry} for entry in class_results(item.path, classes, self.ids)]
        drawn = draw_classes(image, classes, len(self.names))
        if item.frame is None:
            drawn = add_legend(drawn, shares, self.names)
        else:  # the pictures of a video have one size
            bars = [Bar(name_of(self.names, label), share, colour_of(label)) for label, share in shares.items()]
            drawn = add_bars(drawn, bars, self.names)
        words = ", ".join(f"{name_of(self.names, label)} {percent(share)}" for label, share in shares.items())
        return Found(drawn, entries, words, self.label_map(classes) if self.options.labels else None)

    def label_map(self, classes: np.ndarray) -> Image.Image:
        """A class map (H, W) with the values that the data set's own label maps have, and its colours."""
        values, palette = self.values
        image = Image.fromarray(values[classes])
        image.putpalette(palette.tobytes())
        return image

    @cached_property
    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """The value of each class in label maps, uint8 (C,), and the colour of each value, uint8 (256, 3)."""
        images = build({**self.cfg.val_dataset, "pipeline": [], "lazy_init": True}, DATASETS, "val_dataset")
        own = list(images.metainfo["classes"])
        if own != list(self.names):
            raise UserError(
                f"--labels: {self.weights} was trained on other classes than val_dataset names, whose values label maps"
                " have: give the config of its training"
            )
        trained = trained_as(images.reduce_zero_label, images.label_map, IGNORED)
        if lacking := [name for number, name in enumerate(own) if number not in trained]:
            raise UserError(f"--labels: no value of 8 bits trains the class {lacking[0]}")
        values = np.array([trained.index(number) for number in range(len(own))], dtype=np.uint8)
        palette = np.zeros((256, 3), dtype=np.uint8)
        palette[values] = self.colours(images.metainfo)
        return values, palette

    def colours(self, metainfo: dict) -> np.ndarray:
        """The colours of the classes (C, 3): the checkpoint's, else the data set's."""
        held = checkpoints.palette_of(checkpoints.read_file(self.weights))
        colours = np.array(held if held and len(held) == len(self.names) else metainfo["palette"])
        return colours.reshape(len(self.names), 3).clip(0, 255)
