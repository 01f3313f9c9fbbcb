"""Random weights: no pretraining, the baseline that every method has to beat."""

from semaim.registry import METHODS, Method, Variant


@METHODS.register_module(name="random weights")
class Scratch(Method):
    """A method without a network: tasks start from, or measure, an encoder with its initial weights."""

    place = 1000
    variants = {
        "scratch": Variant(
            {
                "detection": {"paper": "mmdet_configs/scratch_mask_rcnn.py"},
                "segmentation": {"paper": "mmseg_configs/scratch_upernet.py"},
            },
            pretrains=False,
            compared=True,
            quick=True,
        )
    }
