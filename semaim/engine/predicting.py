"""Running a trained detector or segmentor on images: COCO results, and comparison with annotations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, TRANSFORMS
from PIL import Image

from semaim import checkpoints
from semaim.data.coco import read_json
from semaim.data.decoding import load_image
from semaim.drawing.objects import (
    READABLE,
    Instances,
    add_legend,
    draw_classes,
    draw_instances,
    draw_pairs,
    join_left_to_right,
    percent,
    shares_of,
)
from semaim.engine.dense import build, build_data, check_dense, enter, load_whole
from semaim.engine.encoders import settle_images
from semaim.errors import UserError

#: COCO's ids of its 80 classes, in the order of their labels: 1 to 90 without the ids of dropped classes.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


# Names and ids of classes


def class_names(cfg: Config, weights: str) -> list[str]:
    """Names of the classes: the checkpoint's, else the config's, else its data set's own."""
    if names := checkpoints.classes_of(checkpoints.read_file(weights)):
        return names
    name = cfg.val_dataset.type
    if (kind := _dataset_class(cfg, name)) is None:
        raise UserError(f"val_dataset: unknown type {name!r}")
    return list(kind._load_metainfo(cfg.val_dataset.get("metainfo")).get("classes", ()))


def _dataset_class(cfg: Config, name: str) -> type[Any] | None:
    """The data set class of this name in the config's scope; None if there is none."""
    with DATASETS.switch_scope_and_registry(cfg.default_scope) as registry:
        return registry.get(name)


def category_ids(cfg: Config, names: Sequence[str]) -> tuple[list[int], str]:
    """The category id of each label, and where the ids come from.

    Ids are those of the config's validation annotations, if that file exists and names the classes; else COCO's own
    (1 to 90), if the classes are COCO's 80; else label + 1.
    """
    data = cfg.val_dataset
    file = Path(data.get("data_root") or "") / (data.get("ann_file") or "")
    if file.is_file() and file.suffix == ".json":
        try:
            ids = {category["name"]: category["id"] for category in read_json(file)["categories"]}
        except (KeyError, TypeError):
            raise UserError(f"{file} is no COCO annotation file: its list 'categories' has no names and ids") from None
        if names and all(name in ids for name in names):
            return [ids[name] for name in names], f"as in {file}"
    coco = _dataset_class(cfg, "CocoDataset")
    if coco is not None and tuple(names) == coco.METAINFO["classes"]:
        return COCO_IDS, "COCO's, 1 to 90"
    return list(range(1, len(names) + 1)), "label + 1"


# Predicting


def build_pipeline(cfg: Config) -> list[Callable[[dict], dict]]:
    """The transforms of the config's `test_pipeline`, without those that read annotations."""
    return [_transform(step) for step in cfg.test_pipeline if not step["type"].endswith("Annotations")]


def _transform(step: dict) -> Callable[[dict], dict]:
    return build(step, TRANSFORMS, f"test_pipeline, {step['type']}")


@torch.no_grad()
def predict(
    model: BaseModel,
    pipeline: Iterable[Callable[[dict], dict]],
    path: str,
    pixels: np.ndarray | None = None,
    max_side: int | None = None,
) -> tuple[Image.Image, Any]:
    """An image as the pipeline reads it, with EXIF rotation applied, and the model's data sample for it.

    Args:
        model: on its device, in eval mode.
        pipeline: of `build_pipeline`.
        path: of the image.
        pixels: BGR (H, W, 3), uint8, in place of what the file holds and the pipeline's first step reads.
        max_side: limit of the long side in pixels, to which the image is reduced after it is read; None for none. The
            results are in pixels of the image as read, all the same.

    `UserError` for an image that cannot be read, prepared or predicted.
    """
    # Pillow raises for a truncated file, which OpenCV would read partly.
    width, height = load_image(path).size if pixels is None else pixels.shape[1::-1]
    image, reduced = None, (1.0, 1.0)
    data: dict[str, Any] = {"img_path": path, "img_id": 0}
    try:
        for step in pipeline:
            data = step(data) if pixels is None or image is not None else as_read(data, pixels)
            if image is None and "img" in data:
                image = to_picture(data["img"])
                data["img"], reduced = reduce(data["img"], max_side)
                data["img_shape"] = data["img"].shape[:2]
        for sample in _samples_of(data):  # boxes are divided by this factor, masks and class maps have `ori_shape`
            if reduced != (1.0, 1.0) and "scale_factor" in sample:
                factors = zip(sample.scale_factor, reduced, strict=True)
                sample.set_metainfo({"scale_factor": tuple(own * before for own, before in factors)})
        batch = pseudo_collate([data])
    except Exception as error:  # OpenCV and the transforms raise many types
        reason = f"OpenCV needs {error.err}" if isinstance(error, cv2.error) else " ".join(str(error).split())[:200]
        raise UserError(f"cannot prepare image {path} of {width} x {height} pixels: {reason}") from None
    assert image is not None  # every pipeline loads the image
    try:
        return image, model.test_step(batch)[0]
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"out of GPU memory for image {path}: give --device cpu") from None
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot predict image {path} of {width} x {height} pixels: {reason}") from None


def as_read(data: dict[str, Any], pixels: np.ndarray) -> dict[str, Any]:
    """What a pipeline's loading step gives of an image, here BGR (H, W, 3)."""
    return {**data, "img": pixels, "img_shape": pixels.shape[:2], "ori_shape": pixels.shape[:2]}


def reduce(pixels: np.ndarray, most: int | None) -> tuple[np.ndarray, tuple[float, float]]:
    """Pixels (H, W, C) whose long side is at most `most`, and by which factors width and height have changed."""
    height, width = pixels.shape[:2]
    if most is None or max(height, width) <= most:
        return pixels, (1.0, 1.0)
    scale = most / max(height, width)
    sides = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(pixels, sides, interpolation=cv2.INTER_AREA), (sides[0] / width, sides[1] / height)


def _samples_of(data: Mapping[str, Any]) -> Sequence[Any]:
    """The data samples of a prepared image: one, or one for each scale and flip."""
    samples = data["data_samples"]
    return samples if isinstance(samples, list) else [samples]


def to_picture(bgr: np.ndarray) -> Image.Image:
    """BGR pixels (H, W, 3), as in mmcv's pipelines, as an image."""
    return Image.fromarray(np.ascontiguousarray(bgr[..., ::-1]).clip(0, 255).astype(np.uint8))


# COCO results


def encode(mask: np.ndarray) -> dict:
    """A mask (H, W) as COCO's compressed run lengths, in a form that JSON accepts."""
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise UserError("pycocotools is missing: install it with tools/setup.sh --extras all") from None
    code = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode()}


def coco_results(path: str, found: Instances, ids: Sequence[int]) -> list[dict]:
    """Objects of an image as COCO results; `image_id` is its path, as the image's id in a data set is not known."""
    assert found.scores is not None  # of a prediction, not of an annotation
    results = []
    for i, (left, top, right, bottom) in enumerate(found.boxes.tolist()):
        results.append(
            {
                "image_id": path,
                "file_name": Path(path).name,
                "category_id": ids[found.labels[i]] if found.labels[i] < len(ids) else int(found.labels[i]) + 1,
                "bbox": [round(side, 3) for side in (left, top, right - left, bottom - top)],
                "score": round(float(found.scores[i]), 6),
            }
        )
        if found.masks is not None:
            results[-1]["segmentation"] = encode(found.masks[i])
    return results


def class_results(path: str, classes: np.ndarray, ids: Sequence[int]) -> list[dict]:
    """A class map (H, W) as COCO "stuff" results: one mask for each class in it."""
    return [
        {
            "image_id": path,
            "file_name": Path(path).name,
            "category_id": ids[label],
            "segmentation": encode(classes == label),
        }
        for label in shares_of(classes, len(ids))
    ]


# Predictions next to annotations


class Comparison(NamedTuple):
    """An image drawn with its annotation and with its prediction, and a line that compares them.

    For class maps it also has the two maps, flattened; for objects these are None.
    """

    annotated: Image.Image
    predicted: Image.Image
    summary: str
    classes: tuple[np.ndarray, np.ndarray] | None = None


def compare_objects(image: Image.Image, info: dict, sample: Any, names: Sequence[str], threshold: float) -> Comparison:
    """Annotated and predicted objects; arguments as for `compare`."""
    annotated, found = annotated_objects(info), Instances.of(sample.pred_instances).above(threshold)
    scale = READABLE / max(image.size)
    there, predicted = (draw_instances(image, objects, names, scale) for objects in (annotated, found))
    return Comparison(there, predicted, f"{len(annotated.labels)} there, {len(found.labels)} found")


def compare_classes(image: Image.Image, info: dict, sample: Any, names: Sequence[str], threshold: float) -> Comparison:
    """Annotated and predicted class maps, without a threshold; arguments as for `compare`."""
    annotated, found = info["gt_seg_map"], sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
    known = annotated < len(names)
    right = f"{percent((annotated == found)[known].mean())} of the pixels right" if known.any() else "unlabelled"
    scale = READABLE / max(image.size)
    there, predicted = (draw_classes(image, classes, len(names), scale) for classes in (annotated, found))
    return Comparison(there, predicted, right, (annotated.ravel(), found.ravel()))


#: Field of a predicted data sample -> function that compares it; the first existing field is used.
COMPARISONS = {"pred_instances": compare_objects, "pred_sem_seg": compare_classes}


def compare(image: Image.Image, info: dict, sample: Any, names: Sequence[str], threshold: float) -> Comparison:
    """An image's prediction next to its annotation, drawn by the kind of prediction.

    Args:
        image: RGB, as it was read.
        info: its entry in the data set after the pipeline's loading steps.
        sample: the model's data sample.
        names: of the classes.
        threshold: least score of an object.
    """
    for field, function in COMPARISONS.items():
        if field in sample:
            return function(image, info, sample, names, threshold)
    raise UserError(f"the model predicts neither {' nor '.join(COMPARISONS)}: its predictions cannot be drawn")


def draw_predictions(
    cfg: Config, weights: str, paths: Sequence[str] = (), most: int = 8, threshold: float = 0.3, columns: int = 1
) -> Image.Image:
    """Annotations and predictions side by side, one image per row; for class maps also the classes' annotated shares.

    Args:
        cfg: the detector's or segmentor's config; names the validation set.
        weights: its checkpoint.
        paths: images of that set; if empty, `most` images spread over it.
        most: largest number of images.
        threshold: least score of a predicted object.
        columns: pairs per row.
    """
    check_dense(cfg)
    enter(cfg)
    settle_images(cfg, weights, whole=True)
    (images,) = build_data(cfg, ("val_dataset",))
    chosen = choose_images(images, paths, most)
    model = build(cfg.model, MODELS, "model")
    load_whole(model, weights, lambda line: None)
    model.eval()
    pipeline, names = build_pipeline(cfg), class_names(cfg, weights)
    # The annotation is that of the whole image, so only loading steps are applied.
    loading = [_transform(step) for step in cfg.test_pipeline if step["type"].startswith("Load")]
    pairs, classes = [], []
    for index in chosen:
        info = images.get_data_info(index)
        path = info["img_path"]
        image, sample = predict(model, pipeline, path)
        for step in loading:
            info = step(info)
        found = compare(image, info, sample, names, threshold)
        pairs.append((found.annotated, found.predicted, f"{Path(path).name}: {found.summary}"))
        classes += [found.classes] if found.classes else []
    rows = -(-len(pairs) // columns)
    picture = join_left_to_right([draw_pairs(pairs[first : first + rows]) for first in range(0, len(pairs), rows)])
    if not classes:
        return picture
    there, predicted = (shares_of(np.concatenate(maps), len(names)) for maps in zip(*classes, strict=True))
    return add_legend(picture, there | {label: 0.0 for label in predicted if label not in there}, names)


def choose_images(images: BaseDataset, paths: Sequence[str], most: int) -> list[int]:
    """Indices of these paths in a data set, or of images spread over it; `UserError` for a path not in the data set."""
    if not paths:
        return np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int).tolist()
    places = {Path(images.get_data_info(index)["img_path"]).resolve(): index for index in range(len(images))}
    for path in paths[:most]:
        if Path(path).resolve() not in places:
            example = next(iter(places))
            raise UserError(
                f"{path} is none of the {len(places)} annotated validation images, such as {example}: for any image,"
                " tools/predict.py"
            )
    return [places[Path(path).resolve()] for path in paths[:most]]


def annotated_objects(info: dict) -> Instances:
    """The annotated objects of an image as loaded by mmdet, without crowds."""
    kept = ~np.asarray(info["gt_ignore_flags"], dtype=bool)
    boxes, labels = info["gt_bboxes"].tensor.numpy().reshape(-1, 4), np.asarray(info["gt_bboxes_labels"])
    masks = info.get("gt_masks")
    masks = None if masks is None else masks.to_ndarray().astype(bool)[kept]
    return Instances(boxes[kept], labels[kept], None, masks)
