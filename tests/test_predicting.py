"""A prediction beside its annotation: compared as the data sample says what it holds."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from PIL import Image

from semaim.drawing.objects import colour_of
from semaim.engine.predicting import compare
from semaim.errors import UserError

IMAGE, NAMES = Image.new("RGB", (8, 4)), ["grass", "sky"]


def test_class_maps_are_compared_where_they_are_labelled():
    truth = np.array([[0, 0, 1, 1, 255, 255, 255, 255]] * 4)
    sample = BaseDataElement(pred_sem_seg=PixelData(data=torch.tensor([[[0, 1, 1, 1, 0, 0, 0, 0]] * 4])))
    found = compare(IMAGE, {"gt_seg_map": truth}, sample, NAMES, 0.3)
    assert found.summary == "75% of the pixels right" and found.predicted.size == found.annotated.size == (480, 240)
    annotated, predicted = found.classes
    assert (annotated == truth.ravel()).all() and predicted[:8].tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    # In the second of the eight columns of pixels, at 60 to 120, another class begins: a border, in full colour.
    inside = [np.array(picture.getpixel((110, 120))) for picture in (found.annotated, found.predicted)]
    assert np.abs(inside[0] - 0.6 * np.array(colour_of(0))).max() <= 1, "on black"
    assert (inside[1] == colour_of(1)).all()
    unlabelled = compare(IMAGE, {"gt_seg_map": np.full((4, 8), 255)}, sample, NAMES, 0.3)
    assert unlabelled.summary == "unlabelled" and not any(unlabelled.annotated.getextrema()[0])


def test_objects_are_compared_without_crowds_and_above_the_threshold():
    boxes, scores = torch.tensor([[0.0, 0, 4, 4], [0, 0, 2, 2], [4, 0, 8, 4]]), torch.tensor([0.9, 0.1, 0.3])
    objects = InstanceData(bboxes=boxes, scores=scores, labels=torch.tensor([0, 1, 0]))
    info = {
        "gt_bboxes": SimpleNamespace(tensor=boxes[:2]),
        "gt_bboxes_labels": [0, 1],
        "gt_ignore_flags": [False, True],
    }
    found = compare(IMAGE, info, BaseDataElement(pred_instances=objects), NAMES, 0.3)
    assert found.summary == "1 there, 2 found" and found.classes is None
    # The second object has its right side at 480, the first at 240.
    assert found.predicted.getpixel((479, 200)) == colour_of(0) and found.annotated.getpixel((479, 200)) == (0, 0, 0)
    assert found.annotated.getpixel((239, 200)) == colour_of(0)


def test_a_sample_that_holds_neither_is_refused():
    with pytest.raises(UserError, match="neither pred_instances nor pred_sem_seg"):
        compare(IMAGE, {}, BaseDataElement(pred_depth=PixelData()), NAMES, 0.3)
