"""Whole detectors against detectron2's recorded results, and each of their rules: without it a case fails."""

import re

import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")

from semaim.errors import UserError  # noqa: E402
from semaim.parity import detector, detector_runs  # noqa: E402
from semaim.parity.cases import Case, run_case  # noqa: E402

INPUTS = re.compile(r"param\..*|\d\.image|\d\.gt_.*")


@pytest.fixture(scope="module")
def recorded(shared):
    """A function: name -> the recorded case."""
    return lambda name: Case(shared / f"golden/detector/{name}.json")


@pytest.mark.parametrize("name", ["mask_rcnn_test", "cascade_test", "mask_rcnn_train", "cascade_train"])
def test_every_recorded_tensor_is_met(recorded, name):
    case = recorded(name)
    report = run_case(case, detector.check)
    assert report.passed, [check for check in report.checks if not check.passed]
    compared = {check.name for check in report.checks}
    assert {tensor for tensor in case.tensors if not INPUTS.fullmatch(tensor)} <= compared
    if name.endswith("test"):  # each photo by itself too
        alone = {name.removesuffix(", alone") for name in compared if name.endswith(", alone")}
        assert {f"{index}.{what}" for index in range(3) for what in ("proposal_boxes", "boxes", "mask_probs")} <= alone
    else:
        norms = {name.removeprefix("norm of grad.") for name in compared if name.startswith("norm of grad.")}
        assert norms == set(case.parameters()) and any("bitmaps" in line for line in report.deviations)


def mmdets(**changes):
    """A function that builds mmdet's own part in place of ours."""

    def build(cfg, registry, what):
        for path, value in changes.items():
            *way, key = path.split("__")
            node = cfg
            for step in way:
                node = node[step]
            node[key] = value
        return registry.build(cfg)

    return build


MAX_IOU = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.7, "neg_iou_thr": 0.3}


@pytest.mark.parametrize(
    ("name", "changes", "fails"),
    [
        ("mask_rcnn_train", {"train_cfg__rpn__assigner": MAX_IOU | {"min_pos_iou": 0.3}}, {"rpn.match_label"}),
        ("mask_rcnn_train", {"train_cfg__rpn__assigner": MAX_IOU | {"min_pos_iou": 1e-9}}, {"rpn.match_index"}),
        ("mask_rcnn_train", {"rpn_head__type": "RPNHead"}, {"loss_rpn_cls", "loss_rpn_loc"}),
    ],
)
def test_mmdets_own_parts_do_not_meet_them(recorded, monkeypatch, name, changes, fails):
    monkeypatch.setattr(detector_runs, "build", mmdets(**changes))
    report = run_case(recorded(name), detector.check)
    failed = {check.name for check in report.checks if not check.passed}
    assert fails <= failed and not {"p2", "rpn.logits.p2", "mask_targets"} & failed


def test_a_batch_with_a_square_photo_hides_missing_padding(recorded, monkeypatch):
    statistics = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
    plain = {"type": "DetDataPreprocessor", "pad_size_divisor": 32, "bgr_to_rgb": True, **statistics}
    monkeypatch.setattr(detector_runs, "build", mmdets(data_preprocessor=plain))
    with pytest.raises(UserError, match="last_feat, alone has shape"):  # the first of those of one photo
        run_case(recorded("mask_rcnn_test"), detector.check)
