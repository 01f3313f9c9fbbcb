"""mmdet's and mmseg's own tools: stock configs start from our checkpoints, and open the models that we have trained."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from commands import flags, tool

pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
pytest.importorskip("mmseg", reason="mmseg is not installed: runs after tools/setup.sh --extras all")

import semaim.detection  # noqa: E402
import semaim.segmentation  # noqa: E402, F401  both before mm's own modules, which need mmcv's operators

# isort: split
from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmseg.apis import inference_model, init_model  # noqa: E402

from semaim import checkpoints  # noqa: E402
from semaim.checkpoints.normalisation import settle  # noqa: E402
from semaim.data.scenes import CLASSES, write_scenes  # noqa: E402
from semaim.engine.config import load_config  # noqa: E402
from semaim.engine.dense import build, enter, load_whole  # noqa: E402
from semaim.engine.predicting import build_pipeline, predict  # noqa: E402
from semaim.engine.training import prepare_training  # noqa: E402
from semaim.errors import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/library.md"
DETECTOR, SEGMENTOR = "mmdet_configs/semaim_mask_rcnn_scenes.py", "mmseg_configs/semaim_upernet_scenes.py"
RUN = {
    "num_workers": 0,
    "total_batch_size": 2,
    "train_cfg.max_iters": 2,
    "train_cfg.val_interval": 2,
    "default_hooks.logger.interval": 1,
    "model.backbone.embed_dim": 32,
    "model.backbone.num_heads": 2,
}
#: Small networks, and all that the detector finds.
SMALL = {
    DETECTOR: {
        **RUN,
        "model.backbone.depth": 2,
        "model.neck.in_channels": 32,
        "model.test_cfg.rcnn.score_thr": 0.0,
        "model.test_cfg.rcnn.max_per_img": 10,
    },
    SEGMENTOR: {
        **RUN,
        "model.neck.embed_dim": 32,
        "model.decode_head.in_channels": [32] * 4,
        "model.auxiliary_head.in_channels": 32,
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
    options = flags({key: str(value).replace(" ", "") for key, value in {**SMALL[config], **more}.items()})
    done = tool("train.py", config, "--data-root", root, "--work-dir", work_dir, *options)
    assert done.returncode == 0, done.stderr
    return work_dir / "latest.pth"


def encoder_of(file):
    """A pretrained encoder's tensors, by our names."""
    return {
        name: tensor for name, tensor in checkpoints.read(file).state.items() if name.startswith(("blocks", "patch"))
    }


def snippet(words):
    """The code of docs/library.md that has these words."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if words in code]
    return code


@pytest.fixture(scope="module")
def detector(data, tmp_path_factory):
    """A detector's checkpoint; its images have statistics of their own."""
    own = {"model.data_preprocessor.mean": [120.0, 110.0, 100.0], "model.data_preprocessor.std": [60.0, 61.0, 62.0]}
    return train(DETECTOR, data / "coco", tmp_path_factory.mktemp("detector") / "run", **own)


def run(code, paths, names=None):
    """What a snippet defines, with files of the test in place of those it names."""
    names = {} if names is None else names
    for word, path in paths.items():
        assert word in code
        code = code.replace(word, str(path))
    exec(compile(code, PAGE.name, "exec"), names)
    return names


def own_prediction(config, weights, image):
    """What tools/predict.py computes."""
    cfg = load_config(config, SMALL[config])
    enter(cfg)
    settle(cfg, str(weights))
    model = build(cfg.model, MODELS, "model")
    load_whole(model, str(weights), lambda line: None)
    return predict(model.eval(), build_pipeline(cfg), str(image))[1]


def test_mmdets_own_functions_open_our_detector_as_the_page_says(detector, data):
    image = next((data / "coco/val2017").iterdir())
    expected = own_prediction(DETECTOR, detector, image).pred_instances
    code = snippet("init_detector").replace("semaim_mask_rcnn.py", Path(DETECTOR).name)
    names = run(code, {"work_dirs/NAME": detector.parent, "image.jpg": image})
    model = names["detector"]
    assert list(model.dataset_meta["classes"]) == list(CLASSES) and len(model.dataset_meta["palette"]) >= len(CLASSES)
    found = names["inference_detector"](model, str(image)).pred_instances
    assert len(found) == 10 and found.masks.any()
    for name in ("bboxes", "scores", "labels", "masks"):
        assert torch.equal(found[name], expected[name]), name


def test_a_detectors_file_has_mms_keys_and_no_byte_twice(detector):
    content = torch.load(detector, weights_only=True)
    assert content["meta"]["dataset_meta"]["classes"] == CLASSES
    assert content["state_dict"].keys() == content["model"].keys()
    for name, tensor in content["model"].items():
        assert tensor.data_ptr() == content["state_dict"][name].data_ptr() or not tensor.numel(), name
    tensors = [*content["model"].values()]
    tensors += [value for state in content["optimizer"]["state"].values() for value in state.values()]
    held = sum(tensor.nbytes for tensor in tensors)
    assert held < detector.stat().st_size < 1.15 * held
    found = checkpoints.read(detector)
    assert found.dialect == "semaim" and found.classes == list(CLASSES) and "mask_head" not in str([*found.state])


def test_mmsegs_own_functions_open_our_segmentor(data, tmp_path):
    weights = train(SEGMENTOR, data / "ade", tmp_path / "run")
    image = next((data / "ade/images/validation").iterdir())
    expected = own_prediction(SEGMENTOR, weights, image)
    model = init_model(Config.fromfile(weights.parent / Path(SEGMENTOR).name), str(weights), device="cpu")
    assert list(model.dataset_meta["classes"]) == [*CLASSES, "background"]
    assert len(model.dataset_meta["palette"]) == len(CLASSES) + 1
    found = inference_model(model, str(image))
    assert torch.equal(found.seg_logits.data, expected.seg_logits.data)
    assert torch.equal(found.pred_sem_seg.data, expected.pred_sem_seg.data)


def test_other_checkpoints_have_no_keys_of_mms(pretrained):
    assert not {"state_dict", "meta"} & torch.load(pretrained, weights_only=True).keys()


# Stock configs.


def bases(package):
    """Where an installed mmdet or mmseg keeps what a checkout has in configs/_base_."""
    return str(Path(importlib.util.find_spec(package).origin).parent / ".mim/configs/_base_")


def stock(pretrained, tmp_path, **options):
    """The page's stock config of mmdet, with the encoder of the tests."""
    (tmp_path / "stock.py").write_text(
        snippet("_base_ = [").replace("FILE", str(pretrained)).replace("../_base_", bases("mmdet"))
    )
    cfg = Config.fromfile(tmp_path / "stock.py")
    encoder = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 64, "pretrain_img_size": 32}
    cfg.model.backbone.update(encoder)
    cfg.model.neck.update({"in_channels": 32, "stride": 8})
    cfg.model.rpn_head.anchor_generator.strides = [2, 4, 8, 16, 32]
    cfg.merge_from_dict(options)
    return cfg


@pytest.mark.slow
def test_a_stock_config_trains_under_mmdets_own_runner_from_our_checkpoint(data, pretrained, tmp_path):
    cfg = stock(pretrained, tmp_path, work_dir=str(tmp_path / "run"))
    cfg.train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": 1, "val_interval": 1}
    cfg.optim_wrapper.optimizer.lr = 0.0  # what is loaded stays as it is
    annotations = str(data / "coco/annotations/instances_{}2017.json")
    for split in ("train", "val", "test"):
        loader = cfg[f"{split}_dataloader"]
        loader.update({"num_workers": 0, "persistent_workers": False})
        loader.dataset.update({"data_root": str(data / "coco"), "metainfo": {"classes": CLASSES}})
        next(step for step in loader.dataset.pipeline if step.type == "Resize").scale = (64, 64)
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = annotations.format("val")
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 4
    assert "loaded 27 tensors from" in next((tmp_path / "run").rglob("*.log")).read_text()
    own, expected = runner.model.backbone.state_dict(), encoder_of(pretrained)
    assert len(expected) == 26 and all(torch.equal(own[name].cpu(), tensor) for name, tensor in expected.items())
    # Its file opens here too, as an encoder of mmdet's.
    assert checkpoints.read(tmp_path / "run/epoch_1.pth").dialect == "detector or segmentor"


def test_a_stock_segmentor_starts_from_our_checkpoint(pretrained, tmp_path):
    code = f"""
_base_ = [{bases("mmseg") + "/models/upernet_mae.py"!r}]
custom_imports = dict(imports=["semaim.segmentation"])
default_scope = "mmseg"
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(_delete_=True, type="SegmentationViT", embed_dim=32, depth=2, num_heads=2, patch_size=8, img_size=64,
                  out_blocks=(0, 1), init_cfg=dict(type="Pretrained", checkpoint={str(pretrained)!r})),
    neck=dict(embed_dim=32, rescales=[2, 1]),
    decode_head=dict(in_channels=[32, 32], in_index=[0, 1], channels=32),
    auxiliary_head=dict(in_channels=32, in_index=1),
)
"""
    (tmp_path / "stock.py").write_text(code)
    cfg = Config.fromfile(tmp_path / "stock.py")
    enter(cfg)
    model = MODELS.build(cfg.model)
    expected = encoder_of(pretrained)
    assert not torch.equal(
        model.backbone.state_dict()["blocks.0.attn.qkv.weight"], expected["blocks.0.attn.qkv.weight"]
    )
    model.init_weights()
    own = model.backbone.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())
    assert own["pos_embed"].shape == (1, 65, 32)


def test_another_networks_encoder_is_refused_by_init_cfg(pretrained, tmp_path):
    content = torch.load(pretrained, weights_only=True)
    content["model"]["blocks.0.ls1.gamma"] = torch.ones(32)
    content["config"] = None
    torch.save(content, tmp_path / "more.pth")
    cfg = stock(tmp_path / "more.pth", tmp_path)
    enter(cfg)
    with pytest.raises(UserError, match=r"it computes with blocks\.\*\.ls1\.gamma"):
        MODELS.build(cfg.model).init_weights()
    cfg.model.backbone.init_cfg.allow_partial = True
    model = MODELS.build(cfg.model)
    model.init_weights()
    assert torch.equal(model.backbone.patch_embed.proj.weight, encoder_of(pretrained)["patch_embed.proj.weight"])
    for wrong in ({"type": "Kaiming"}, {"type": "Pretrained"}, [], "x.pth"):
        cfg.model.backbone.init_cfg = wrong or [{}]
        with pytest.raises(
            UserError, match="model.backbone.init_cfg is .*give dict.type='Pretrained', checkpoint=FILE"
        ):
            MODELS.build(cfg.model)
    cfg.model.backbone.init_cfg = {
        "type": "Pretrained",
        "checkpoint": str(tmp_path / "more.pth"),
        "prefix": "backbone.",
    }
    with pytest.raises(UserError, match="give dict"):
        MODELS.build(cfg.model)


def test_our_own_runs_take_pretrained_and_no_init_cfg(data, pretrained, tmp_path):
    cfg = load_config(DETECTOR, {**SMALL[DETECTOR], "model.backbone.pretrain_img_size": 32})
    cfg.train_dataset.data_root = cfg.val_dataset.data_root = str(data / "coco")
    cfg.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(pretrained)}
    with pytest.raises(UserError, match="model.backbone.init_cfg is for mmdet's .*: give --pretrained FILE"):
        prepare_training(cfg, 1)


# The library.


def test_the_pages_encoder_and_order(pretrained, data):
    weights = {"work_dirs/tiny/latest.pth": pretrained}
    paths = {**weights, "data/scenes/coco": data / "coco", "(64, 64)": (48, 48)}
    names = run(snippet("load_encoder"), paths)
    assert names["tokens"].shape == (1, 1 + 36, 32)
    run(snippet("order_of"), weights, names)
    assert names["order"].sort().values.tolist() == [list(range(36))] and names["similarity"].shape == (1, 36)


def test_timms_network_of_the_files_sizes_gives_the_librarys_tokens(pretrained):
    names = run(snippet("load_state_dict"), {"work_dirs/tiny/latest.pth": pretrained})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = names["network"].eval().forward_features(images)
        torch.testing.assert_close(found, semaim.load_encoder(pretrained)(images), atol=1e-5, rtol=1e-5)
