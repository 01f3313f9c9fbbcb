"""Check the label maps of a run against its config before it starts: classes, heads, losses and metric must agree."""

from collections.abc import Iterator, Mapping

from mmengine.config import Config
from mmseg.datasets import BaseSegDataset
from mmseg.registry import MODELS

from semaim.data.label_maps import count_values
from semaim.data.label_rules import IGNORED, Found, Labels, errors, warnings
from semaim.errors import UserError

TRAIN = "train_dataset"


def check_labels(cfg: Config, sets: Mapping[str, BaseSegDataset]) -> list[str]:
    """Lines about the label maps of these splits, and warnings; `UserError` for the errors of docs/labels.md.

    Args:
        cfg: config of the run, for its model, metric and `most_ignored`.
        sets: mmseg's data sets by their keys in the config.
    """
    lines, trained = [], None
    for split, images in sets.items():
        refuse(disagreements(cfg, split, images))
        labels = labels_of(cfg, split, images)
        if (unclear := getattr(images, "unclear", None)) and (text := unclear(labels.pixels)):
            raise UserError(f"{split}: {text}")
        refuse(errors(labels, cfg.get("most_ignored")))
        lines += [str(labels), *(f"warning: {kind}: {text}" for kind, text in warnings(labels, trained))]
        trained = labels
    if len({tuple(images.metainfo["classes"]) for images in sets.values()}) > 1:
        text = f"{' and '.join(sets)} have other classes: give both the same metainfo.classes"
        refuse(iter([("classes differ", text)]))
    return lines


def refuse(found: Iterator[Found]) -> None:
    """Raise `UserError` for the first finding."""
    for kind, text in found:
        raise UserError(f"{kind}: {text} (docs/labels.md)")


def labels_of(cfg: Config, split: str, images: BaseSegDataset) -> Labels:
    """The values of a data set's label maps."""
    infos = [images.get_data_info(index) for index in range(len(images))]
    if "seg_map_path" not in infos[0]:
        raise UserError(f"{split} has no label maps: name their folder in data_prefix.seg_map_path")
    counts = count_values([(info["img_path"], info["seg_map_path"]) for info in infos])
    reduced, label_map = infos[0]["reduce_zero_label"], infos[0].get("label_map")
    classes = tuple(images.metainfo["classes"])
    ignored = next((head.get("ignore_index", IGNORED) for _, head in heads(cfg.model)), IGNORED)
    return Labels(split, counts, classes, split == TRAIN, reduced, label_map, ignored)


def heads(model: Mapping) -> Iterator[tuple[str, Mapping]]:
    """A segmentor's heads with their keys in the config."""
    for key in ("decode_head", "auxiliary_head"):
        found = model.get(key)
        for index, head in enumerate(found if isinstance(found, list | tuple) else [found]):
            if isinstance(head, Mapping):
                yield f"model.{key}" + (f"[{index}]" if isinstance(found, list | tuple) else ""), head


def disagreements(cfg: Config, split: str, images: BaseSegDataset) -> Iterator[Found]:
    """Where the config contradicts itself about classes and labels, before any label map is read."""
    classes = images.metainfo.get("classes")
    if not classes:
        raise UserError(f"{split} names no classes: give metainfo=dict(classes=(...))")
    requested = (cfg[split].get("metainfo") or {}).get("label_map")
    if requested is not None and requested != images.metainfo.get("label_map"):
        text = f"{split}.metainfo.label_map is not read, mmseg makes its own from `classes`: change the maps themselves"
        yield "label_map that is not read", f"{text} (tools/convert_labels.py values MAPS OUT OLD=NEW)"
    for step in cfg[split].pipeline:
        if step.get("reduce_zero_label") not in (None, images.reduce_zero_label):
            text = f"{split}.reduce_zero_label is {images.reduce_zero_label}, that of {step['type']} in its pipeline"
            yield "reduce_zero_label twice", f"{text} {step['reduce_zero_label']}: set it in {split} alone"
    measured = cfg.val_evaluator.get("ignore_index", IGNORED)
    padding = (cfg.model.get("data_preprocessor") or {}).get("seg_pad_val", IGNORED)
    for place, head in heads(cfg.model):
        if head.get("num_classes", len(classes)) != len(classes):
            text = f"{place}.num_classes is {head['num_classes']}, {split} has {len(classes)} classes"
            yield "head of another number of classes", f"{text}: set it to {len(classes)}"
        if head.get("ignore_index", IGNORED) != measured:
            text = f"{place}.ignore_index is {head.get('ignore_index', IGNORED)}, val_evaluator's is {measured}"
            yield "ignore_index of head and metric differ", text
        if head.get("ignore_index", IGNORED) != padding:
            text = f"{place}.ignore_index is {head.get('ignore_index', IGNORED)}, what pads label maps is {padding}"
            yield "padding is not ignored", f"{text}: set model.data_preprocessor.seg_pad_val to it"
        if head.get("out_channels") == 1:
            losses = head.get("loss_decode", {"type": "CrossEntropyLoss"})
            for loss in losses if isinstance(losses, list | tuple) else [losses]:
                if getattr(MODELS.build(loss), "use_sigmoid", None) is False:
                    text = f"{place} has one output channel, over which a softmax is always 1: its loss learns nothing"
                    yield "softmax over one channel", f"{text}; set loss_decode.use_sigmoid=True"
