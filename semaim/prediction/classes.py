"""Prediction by a classifier, fine-tuned or a probe: the most probable classes of an image."""

from collections.abc import Sequence

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from semaim.data.decoding import load_image
from semaim.drawing.bars import Bar, add_bars
from semaim.drawing.objects import colour_of, enlargement
from semaim.engine.encoders import head_of, settle_images
from semaim.engine.images import evaluation_of, load_trained
from semaim.engine.predicting import to_picture
from semaim.errors import UserError
from semaim.prediction.predictor import Found, Item, Options, Predictor
from semaim.registry import build_model

MOST = 5  #: classes of each image


class ClassPredictor(Predictor):
    """A classifier, with the evaluation transform of its config."""

    def __init__(self, cfg: Config, weights: str, options: Options):
        super().__init__(options)
        init_default_scope(cfg.default_scope)
        statistics = settle_images(cfg, weights, whole=True)
        head, names = head_of(weights)
        if head is None:
            raise UserError(f"{weights} has no classifier: train it first (semaim train CONFIG --pretrained FILE)")
        self.names = names or [f"class {label}" for label in range(len(head))]
        cfg.model.network.num_classes = len(head)
        self.transform = evaluation_of(cfg)
        self.model = build_model(cfg.model)
        self.lines.append(str(load_trained(self.model.network, weights, cfg.get("allow_partial", False))))
        self.model.to(options.device).eval()
        self.columns = [f"{part}_{place + 1}" for place in range(self.most) for part in ("class", "probability")]
        named = f"{len(self.names)} classes" + ("" if names else ", which the file does not name")
        self.lines += [f"images normalised with {statistics}; {cfg.model.network.img_size} pixels", named]

    @property
    def most(self) -> int:
        """How many classes are given of each image."""
        return min(MOST, len(self.names))

    def predict(self, item: Item) -> Found:
        """See `Predictor.predict`."""
        image = load_image(item.path) if item.pixels is None else to_picture(item.pixels)
        probabilities = self.probabilities(limited(image, self.options.max_side))
        best = np.argsort(-probabilities, kind="stable")[: self.most].tolist()
        found = [(self.names[label], label, float(probabilities[label])) for label in best]
        entry = [{"class": name, "label": label, "probability": round(value, 6)} for name, label, value in found]
        bars = [Bar(name, value, colour_of(label)) for name, label, value in found]
        scale = enlargement(image.size)
        large = image.resize([side * scale for side in image.size], Image.Resampling.BICUBIC)
        picture = add_bars(large, bars, self.names if item.frame is not None else (), least=self.most)
        row = [part for name, _, value in found for part in (name, f"{value:.6f}")]
        words = ", ".join(f"{name} {value:.1%}" for name, _, value in found[:3])
        return Found(picture, [{**item.entry, "classes": entry}], words, row=row)

    @torch.no_grad()
    def probabilities(self, image: Image.Image) -> np.ndarray:
        """The probability of each class, float32 (C,), of an RGB image."""
        pixels, device = self.transform(image)[None].to(self.options.device), self.options.device
        try:
            with self.model.autocast(device):
                logits = self.model.network(pixels)
        except torch.cuda.OutOfMemoryError:
            raise UserError("out of GPU memory: give --device cpu") from None
        return logits.float().softmax(dim=1)[0].cpu().numpy()


def limited(image: Image.Image, most: int | None) -> Image.Image:
    """The image, its long side reduced to `most` pixels if it is longer."""
    if most is None or max(image.size) <= most:
        return image
    sides: Sequence[int] = [max(1, round(side * most / max(image.size))) for side in image.size]
    return image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC, reducing_gap=3.0)
