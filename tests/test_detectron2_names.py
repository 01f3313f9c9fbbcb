"""Whole ViTDet detectors of detectron2: every name and shape, and the numbers of one through the real commands."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import ROOT, one_line, tool
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")

from mmengine.registry import MODELS  # noqa: E402

from semaim.checkpoints.safe_reading import read_file  # noqa: E402
from semaim.detection import detectron2_names  # noqa: E402
from semaim.engine import dense  # noqa: E402
from semaim.engine.config import load_config  # noqa: E402
from semaim.errors import UserError  # noqa: E402

MAIN = "mmdet_configs/semaim_mask_rcnn.py"
#: The recorded detector: 48 channels, 4 blocks, 5 classes, photos of 256 pixels.
TINY = """
_base_ = "{main}"
heads = {{"in_channels": 32, "conv_out_channels": 32, "num_classes": 5}}
model = dict(
    data_preprocessor=dict(side=256),
    backbone=dict(img_size=256, embed_dim=48, depth=4, num_heads=3, window_size=5, global_blocks=(1, 3)),
    neck=dict(in_channels=48, out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        bbox_head=dict(fc_out_channels=64, **heads),
        mask_roi_extractor=dict(out_channels=32),
        mask_head=heads,
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=30)),
)
del heads
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(256, 256), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
val_dataset = dict(metainfo=dict(classes=("a", "b", "c", "d", "e")))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A config file of the recorded detector."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY.format(main=ROOT / MAIN))
    return path


def build(config=MAIN, options=None, device="cpu"):
    cfg = load_config(ROOT / config, options)
    dense.enter(cfg)
    with torch.device(device):
        return MODELS.build(cfg.model)


@pytest.fixture(scope="module")
def recorded(shared):
    """Tensors of the recorded detector by their names."""
    return load_file(shared / "golden/detector/mask_rcnn_test.safetensors")


@pytest.fixture(scope="module")
def tolerances(shared):
    meta = json.loads((shared / "golden/detector/mask_rcnn_test.json").read_text())
    return {name: about["atol"] for name, about in meta["tensors"].items()}


@pytest.fixture(scope="module")
def released(recorded, tmp_path_factory):
    """The recorded weights as detectron2's model zoo keeps such a file."""
    weights = {name.removeprefix("param."): t.numpy() for name, t in recorded.items() if name.startswith("param.")}
    weights |= {f"proposal_generator.anchor_generator.cell_anchors.{n}": np.zeros((3, 4), np.float32) for n in range(5)}
    weights |= {"pixel_mean": np.array([123.675, 116.28, 103.53], np.float32).reshape(3, 1, 1)}
    weights |= {"pixel_std": np.array([58.395, 57.12, 57.375], np.float32).reshape(3, 1, 1)}
    path = tmp_path_factory.mktemp("released") / "model.pkl"
    content = {"model": weights, "__author__": "someone", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    return path


#: Published detectors, our configs of them, and what is theirs beyond.
CASCADE = "mmdet_configs/semaim_cascade_mask_rcnn.py"
PUBLISHED = {
    "mask_rcnn_vitdet_b_100ep": (MAIN, {}),
    "mask_rcnn_vitdet_l_100ep": ("mmdet_configs/semaim_mask_rcnn_large.py", {}),
    "mask_rcnn_vitdet_h_75ep": ("mmdet_configs/semaim_mask_rcnn_huge.py", {}),
    "cascade_mask_rcnn_vitdet_b_100ep": (CASCADE, {}),
    "cascade_mask_rcnn_vitdet_l_100ep": (CASCADE, {"model.backbone.size": "large", "model.neck.in_channels": 1024}),
    "cascade_mask_rcnn_vitdet_h_75ep": (CASCADE, {"model.backbone.size": "huge", "model.neck.in_channels": 1280}),
}


def test_published_detectors_have_our_names_and_shapes(shared):
    """One to one; of the position table, the class token's row apart."""
    keys = json.loads((shared / "golden/detector/keys.json").read_text())["keys"]
    assert keys.keys() == PUBLISHED.keys()
    for name, (config, options) in PUBLISHED.items():
        theirs = {n: torch.empty(shape, device="meta") for n, shape in keys[name].items()}
        found = {n: tuple(t.shape) for n, t in detectron2_names.to_ours(theirs).items()}
        assert len(found) == len(theirs)
        assert found == {n: tuple(t.shape) for n, t in build(config, options, "meta").state_dict().items()}, name


@torch.no_grad()
def test_a_released_file_computes_what_it_did_there(tiny, released, recorded, tolerances):
    """Read as a pickle and renamed: maps, pyramid, RPN, boxes and masks of the recorded photo 1."""
    model, lines = build(tiny).eval(), []
    dense.load_whole(model, str(released), lines.append)
    assert lines == [f"loaded {len(model.state_dict())} tensors from {released}"]

    def close(ours, name, rows=slice(None)):
        error = (ours - recorded[name][rows]).abs().max()
        assert error <= tolerances[name], (name, error)

    feature = model.backbone(recorded["padded_input"])
    levels = model.neck(feature)
    close(feature[0], "last_feat", 1)
    for level, maps, logits, deltas in zip(range(2, 7), levels, *model.rpn_head(levels), strict=True):
        close(maps[0], f"p{level}", 1)
        close(logits[0], f"rpn.logits.p{level}", 1)
        close(deltas[0], f"rpn.deltas.p{level}", 1)
    found = model.roi_head._bbox_forward(levels, F.pad(recorded["1.proposal_boxes"], (1, 0)))
    close(found["cls_score"], "box.cls_logits", slice(100, 200))
    close(found["bbox_pred"], "box.deltas", slice(100, 200))
    masks = model.roi_head._mask_forward(levels, F.pad(recorded["1.boxes"], (1, 0)))["mask_preds"].sigmoid()
    close(masks[torch.arange(30), recorded["1.classes"]], "1.mask_probs")


def test_the_commands_take_a_released_file(tiny, released, recorded, tolerances, tmp_path):
    """tools/predict.py finds in the recorded photo 2 what detectron2 found; a converted file is the same to the bit."""
    Image.fromarray(recorded["2.image"].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    line = [tiny, released, tmp_path / "photo.png", "--out", tmp_path / "out", "--score-thr", "0.05"]
    done = tool("predict.py", *line)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/predictions.json").read_text())
    x, y, width, height = torch.tensor([one["bbox"] for one in found]).T
    boxes, scores = torch.stack([x, y, x + width, y + height], dim=1), torch.tensor([one["score"] for one in found])
    assert (boxes - recorded["2.final_boxes"]).abs().max() <= tolerances["2.final_boxes"] + 1e-3  # written so rounded
    assert (scores - recorded["2.scores"]).abs().max() <= tolerances["2.scores"]
    assert [one["category_id"] - 1 for one in found] == recorded["2.classes"].tolist()

    done = tool("checkpoint.py", "convert", released, tmp_path / "ours.pth", "--to", "mmdet")
    assert done.returncode == 0, done.stderr
    assert "left out: proposal_generator (5), pixel_mean, pixel_std" in done.stdout
    whole, converted = build(tiny), build(tiny)
    dense.load_whole(whole, str(released), print)
    dense.load_whole(converted, str(tmp_path / "ours.pth"), print)
    state = whole.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in converted.state_dict().items())
    one_line(
        tool("checkpoint.py", "convert", tmp_path / "ours.pth", tmp_path / "x.pth", "--to", "mmdet"),
        "ours.pth holds no whole detector of detectron2",
    )


def test_files_that_do_not_fit_are_refused(tiny, released, tmp_path):
    content = read_file(released)
    model = build(tiny)

    def refuses(message, change, model=model):
        weights = dict(content["model"])
        change(weights)
        path = tmp_path / "changed.pkl"
        path.write_bytes(pickle.dumps({"model": weights}))
        with pytest.raises(UserError, match=message):
            dense.load_whole(model, str(path), print)

    def bgr(weights):
        weights["pixel_mean"] = weights["pixel_mean"][::-1].copy()

    refuses(r"pixel_mean \[103.5.*data_preprocessor.mean is \[123.6", bgr)
    refuses("pixel_std .* is ", lambda weights: weights.update(pixel_std=np.ones(3, np.float32)))
    refuses("no weight of detectron2's .*: roi_heads.keypoint_head.conv", lambda weights: weights.update(
        {"roi_heads.keypoint_head.conv.weight": np.ones(3)}))  # fmt: skip
    refuses("1 weights are missing .* rpn_head.rpn_cls.bias", lambda weights: weights.pop(
        "proposal_generator.rpn_head.objectness_logits.bias"))  # fmt: skip
    refuses("1 of another shape", lambda weights: weights.update({"backbone.net.patch_embed.proj.bias": np.ones(3)}))
    refuses("is no tensor", lambda weights: weights.update({"backbone.net.pos_embed": "x"}))
    more = {"backbone.net.blocks.4.norm1.weight": np.ones(48, np.float32)}
    refuses("does not read backbone.blocks.*.norm1.weight", lambda weights: weights.update(more))


# Pickles of arrays.


class Renaming(pickle._Pickler):
    """Writes numpy's core under its name in numpy 1 or 2."""

    core = ""

    def save_global(self, obj, name=None):
        module, name = obj.__module__, name or obj.__qualname__
        if not re.match(r"numpy\._?core\.", module or ""):
            return super().save_global(obj, name)
        module = re.sub(r"numpy\._?core", f"numpy.{self.core}", module)
        if self.proto < 4:
            self.write(f"c{module}\n{name}\n".encode())
        else:
            self.save(module)
            self.save(name)
            self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_every_numpy_are_read(protocol, core, tmp_path):
    drawn = np.random.default_rng(0).normal(size=(3, 4))
    arrays = {"plain": drawn.astype("f4"), "columns": np.asfortranarray(drawn), "half": drawn.astype("f2"),
              "view": drawn[::2, 1:], "empty": np.zeros((0, 3), "f4"), "swapped": drawn.astype(">f4"),
              "whole": np.arange(3), "truth": drawn > 0, "one": np.float64(3.5), "zero": np.array(2),
              "words": np.array(["a", "bc"])}  # fmt: skip
    with open(tmp_path / "x.pkl", "wb") as file:
        pickler = Renaming(file, protocol)
        pickler.core = core
        pickler.dump({"model": arrays, "__author__": "someone", "nested": [(arrays["half"],)]})
    found = read_file(tmp_path / "x.pkl")
    assert f"numpy.{core}.".encode() in (tmp_path / "x.pkl").read_bytes() and found["__author__"] == "someone"
    for name, array in arrays.items():
        read = found["model"][name]
        assert read.dtype == array.dtype and read.shape == array.shape and np.array_equal(read, array), name
        assert read.flags.writeable and read.flags.owndata
    assert np.array_equal(found["nested"][0][0], arrays["half"])


class State:
    """Pickles to a call, and to what is set on its result."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def test_forged_arrays_are_refused(tmp_path):
    """Object arrays of raw bytes would be pointers; types of several fields could hide such."""
    reconstruct = np.zeros(1).__reduce__()[0]
    pointers = State(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))
    fields = State(np.dtype, ("V8", False, True), (3, "|", None, ("x",), {"x": (np.dtype("O"), 0)}, 8, 1, 0))
    long = State(np.dtype, ("f4", False, True), (3, "<", None, None, None, -1, -1, 0))
    for dtype, shape, data in ((pointers, (1,), b"A" * 8), (fields, (1,), b"A" * 8), (long, (1 << 40,), b"A" * 8)):
        forged = State(reconstruct, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, data))
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": {"x": forged}}))
        with pytest.raises(UserError, match="x.pkl: broken or no checkpoint"):
            read_file(tmp_path / "x.pkl")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": {"x": np.array(["a", None], dtype=object)}}))
    with pytest.raises(UserError, match="x.pkl: broken or no checkpoint"):
        read_file(tmp_path / "x.pkl")
