"""mmdet's and mmseg's own tools: stock configs start from our checkpoints, and open the models that we have trained."""

from pathlib import Path

import pytest
import torch
from commands import flags, tool

pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
pytest.importorskip("mmseg", reason="mmseg is not installed: runs after tools/setup.sh --extras all")

import semaim.detection  # noqa: E402
import semaim.segmentation  # noqa: E402, F401  both before mm's own modules, which need mmcv's operators

# isort: split
from mmdet.apis import inference_detector, init_detector  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402
from semaim.drawing.prediction import build_pipeline, predict  # noqa: E402

from semaim import checkpoints  # noqa: E402
from semaim.checkpoints.normalisation import settle  # noqa: E402
from semaim.data.scenes import CLASSES, write_scenes  # noqa: E402
from semaim.engine.config import load_config  # noqa: E402
from semaim.engine.dense import build, enter, load_whole  # noqa: E402

DETECTOR, SEGMENTOR = "mmdet_configs/semaim_mask_rcnn_scenes.py", "mmseg_configs/semaim_upernet_scenes.py"
ENCODER = {"embed_dim": 32, "num_heads": 2, "depth": 2}
RUN = {
    "num_workers": 0,
    "total_batch_size": 2,
    "train_cfg.max_iters": 2,
    "train_cfg.val_interval": 2,
    "default_hooks.logger.interval": 1,
}
#: Small networks; what they find does not depend on a threshold, and the statistics are not ImageNet's.
SMALL = {
    DETECTOR: {
        **{f"model.backbone.{name}": value for name, value in ENCODER.items()},
        "model.neck.in_channels": 32,
        "model.test_cfg.rcnn.score_thr": 0.0,
        "model.test_cfg.rcnn.max_per_img": 10,
        **RUN,
    },
    SEGMENTOR: {
        **{f"model.backbone.{name}": value for name, value in ENCODER.items()},
        "model.backbone.out_blocks": (0, 0, 1, 1),
        **RUN,
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """8 scenes to train on and 2 others, of 64 pixels."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 10, 64, seed=0, val_fraction=0.2)
    return folder


def train(config, root, work_dir, **more):
    """A run of two steps by the command; its newest checkpoint."""
    options = flags({**SMALL[config], **more})
    done = tool("train.py", config, "--data-root", root, "--work-dir", work_dir, *options)
    assert done.returncode == 0, done.stderr
    return work_dir / "latest.pth"


@pytest.fixture(scope="module")
def detector(data, tmp_path_factory):
    """A detector's checkpoint; its images have statistics of their own."""
    own = {"model.data_preprocessor.mean": [120.0, 110.0, 100.0], "model.data_preprocessor.std": [60.0, 61.0, 62.0]}
    return train(DETECTOR, data / "coco", tmp_path_factory.mktemp("detector") / "run", **own)


def own_prediction(config, weights, image):
    """What tools/predict.py computes."""
    cfg = load_config(config, SMALL[config])
    enter(cfg)
    settle(cfg, str(weights))
    model = build(cfg.model, MODELS, "model")
    load_whole(model, str(weights), lambda line: None)
    return predict(model.eval(), build_pipeline(cfg), str(image))[1]


def test_mmdets_init_detector_opens_our_detector(detector, data):
    image = next((data / "coco/val2017").iterdir())
    expected = own_prediction(DETECTOR, detector, image).pred_instances
    cfg = Config.fromfile(detector.parent / Path(DETECTOR).name)  # as the run has written it
    cfg.test_dataloader = {"dataset": cfg.val_dataset}
    model = init_detector(cfg, str(detector), device="cpu")
    assert list(model.dataset_meta["classes"]) == list(CLASSES) and len(model.dataset_meta["palette"]) >= len(CLASSES)
    found = inference_detector(model, str(image)).pred_instances
    assert len(found) == 10 and found.masks.any()
    for name in ("bboxes", "scores", "labels", "masks"):
        assert torch.equal(found[name], expected[name]), name


def test_a_detectors_file_has_mms_keys_and_no_byte_twice(detector):
    content = torch.load(detector, weights_only=True)
    assert content["meta"]["dataset_meta"]["classes"] == list(CLASSES) == content["classes"]
    assert content["state_dict"].keys() == content["model"].keys()
    for name, tensor in content["model"].items():
        assert tensor.data_ptr() == content["state_dict"][name].data_ptr() or not tensor.numel(), name
    tensors = [*content["model"].values()]
    tensors += [value for state in content["optimizer"]["state"].values() for value in state.values()]
    held = sum(tensor.nbytes for tensor in tensors)
    assert held < detector.stat().st_size < 1.15 * held
    found = checkpoints.read(detector)
    assert found.dialect == "semaim" and found.classes == list(CLASSES) and "mask_head" not in str([*found.state])
