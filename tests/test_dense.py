"""What detectors and segmentors share."""

import signal
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")

from mmengine.config import Config  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import MODELS, PARAM_SCHEDULERS  # noqa: E402

from semaim.data.scenes import write_scenes  # noqa: E402
from semaim.engine import dense  # noqa: E402
from semaim.engine.config import load_config, set_data_root  # noqa: E402
from semaim.engine.runner import ResumableIterations  # noqa: E402
from semaim.engine.saving import restore_training_state, training_state  # noqa: E402
from semaim.engine.schedule import BatchPlan, schedule_of  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("config, folder", [("mmdet_configs/semaim_mask_rcnn_scenes.py", "coco"),
                                            ("mmseg_configs/semaim_upernet_scenes.py", "ade")])  # fmt: skip
def test_bfloat16_gives_nearly_the_same_losses_and_gradients(config, folder, tmp_path):
    """As on a GPU the network runs under autocast, mmdet's and mmseg's heads and the operators of `compat` too."""
    write_scenes(tmp_path / "scenes", 6, 64, seed=0)
    cfg = load_config(ROOT / config, {"model.backbone.embed_dim": 64, "model.backbone.num_heads": 2})
    if folder == "coco":
        cfg.model.neck.in_channels = 64
    else:
        cfg.model.neck.embed_dim, cfg.model.decode_head.in_channels = 64, [64] * 4
        cfg.model.auxiliary_head.in_channels = 64
    dense.enter(cfg)
    set_data_root(cfg, str(tmp_path / "scenes" / folder))
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    train, val = dense.build_data(cfg)
    batch = model.data_preprocessor(
        pseudo_collate([dense.SeededImages(train, 0)[0, index] for index in range(2)]), True
    )
    if folder == "coco":
        # Which proposals are among the best hangs on the last bits of their scores: both runs have the same ones.
        with torch.no_grad():
            features = model.extract_feat(batch["inputs"])
            proposals = model.rpn_head.predict(features, batch["data_samples"])
        model.rpn_head.predict_by_feat = lambda *args, **kwargs: deepcopy(proposals)
    found = {}
    for enabled in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        np.random.seed(0)  # mmdet samples boxes with it
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = model(**batch, mode="loss")
        loss, logged = model.parse_losses(losses)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.backbone.parameters() if p.grad is not None])
        assert loss.dtype == torch.float32 and gradients.isfinite().all() and gradients.norm() > 0
        found[enabled] = {name: float(value) for name, value in logged.items() if "loss" in name}, gradients
    assert found[True][0] == pytest.approx(found[False][0], rel=0.05, abs=0.02)
    assert torch.cosine_similarity(found[True][1], found[False][1], dim=0) > 0.7  # of two small images, at the start
    if folder == "coco":
        del model.rpn_head.predict_by_feat
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert len(model.eval().test_step(pseudo_collate([val[0]]))) == 1


def test_boxes_stay_in_fp32_where_maps_are_in_bf16():
    """Proposals and regions are those of the same numbers in fp32; mmdet's own are pixels off."""
    cfg = load_config(ROOT / "mmdet_configs/semaim_mask_rcnn.py")
    dense.enter(cfg)
    from mmdet.models import RPNHead, SingleRoIExtractor

    torch.manual_seed(0)
    sides = [256, 128, 64, 32, 16]
    scores = [torch.randn(1, 3, side, side).bfloat16() for side in sides]
    moves = [(0.3 * torch.randn(1, 12, side, side)).bfloat16() for side in sides]
    metas = [{"img_shape": (1024, 1024), "scale_factor": (1.0, 1.0)}]
    settings = {k: v for k, v in cfg.model.rpn_head.items() if k != "type"} | {"test_cfg": cfg.model.test_cfg.rpn}
    ours, theirs = MODELS.build(cfg.model.rpn_head | {"test_cfg": cfg.model.test_cfg.rpn}), RPNHead(**settings)
    as_fp32 = [[t.float() for t in maps] for maps in (scores, moves)]
    expected = ours.predict_by_feat(*as_fp32, batch_img_metas=metas)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = ours.predict_by_feat(scores, moves, batch_img_metas=metas)[0]
        rounded = theirs.predict_by_feat(scores, moves, batch_img_metas=metas)[0]
    assert torch.equal(found.bboxes, expected.bboxes) and torch.equal(found.scores, expected.scores)
    near = torch.cdist(rounded.bboxes.float(), expected.bboxes, p=float("inf")).amin(1)
    assert near.median() > 0.5  # px

    settings = {k: v for k, v in cfg.model.roi_head.bbox_roi_extractor.items() if k != "type"}
    ours, theirs = MODELS.build(cfg.model.roi_head.bbox_roi_extractor), SingleRoIExtractor(**settings)
    ramp = torch.arange(256.0).expand(1, 256, 256, 256)  # a map whose every value is its column, exact in bf16
    boxes = torch.tensor([[0.0, 641.3, 610.7, 684.9, 655.1]])
    found = ours((ramp.bfloat16(),) * 4, boxes)
    assert torch.equal(found, theirs((ramp,) * 4, boxes))
    assert (theirs((ramp.bfloat16(),) * 4, boxes).float() - found).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:Detected call of .scheduler.step")
def test_the_schedule_goes_on_with_another_accumulation_and_base_rate():
    """Against mmengine's formula: 10 steps of warm-up, then a straight line down to 0 in the last step of 100.

    Within a step the rate stays, and each step has the same one however many passes it takes.
    """
    settings = {"type": "PolyWithWarmup", "warmup": 0.09, "start_factor": 0.1, "power": 1.0, "min_lr": 0.0}

    def run(rate, accumulation):
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        plan = BatchPlan(16, 1, 16 // accumulation, accumulation, rate, 16)
        schedule = {**schedule_of(settings, plan, 100), "optimizer": optimizer, "end": 100 * accumulation}
        batches = SimpleNamespace(accumulation=accumulation, length=50)
        return SimpleNamespace(
            model=model,
            optim_wrapper=SimpleNamespace(optimizer=optimizer),
            param_schedulers=[PARAM_SCHEDULERS.build(schedule)],
            train_dataloader=SimpleNamespace(batch_sampler=batches, dataset=None),
            train_loop=SimpleNamespace(seek=lambda epoch, iteration: None),
            message_hub=SimpleNamespace(log_scalars={}),
            cfg=Config({}),
            data_identity=None,
            hooks=[],
        )

    def walk(runner, iterations):
        for _ in range(iterations):
            for scheduler in runner.param_schedulers:
                scheduler.step()
        return runner.optim_wrapper.optimizer.param_groups[0]["lr"]

    def line(step):
        return 1 - (step - 10) / 89

    first = run(1.0, 2)
    assert walk(first, 61) == pytest.approx(line(30))
    saved = training_state(first, 1, 61)  # one pass into the 31st step
    for rate, accumulation in ((1.0, 2), (1.0, 1), (0.5, 3)):
        runner = run(rate, accumulation)
        restore_training_state(runner, saved, "file")
        assert walk(runner, 0) == pytest.approx(rate * line(30))
        assert walk(runner, 35 * accumulation) == pytest.approx(rate * line(65))
        assert walk(runner, 35 * accumulation - 1) == pytest.approx(0, abs=1e-9)


def test_a_detector_that_finds_nothing_has_an_ap_of_zero():
    cfg = load_config(ROOT / "mmdet_configs/semaim_mask_rcnn_scenes.py", {})
    dense.enter(cfg)
    from mmdet.evaluation import CocoMetric  # needs our operators

    assert dense.figures(cfg, {"data_time": 0.1, "time": 0.2}) == {"coco/bbox_mAP": 0.0, "coco/segm_mAP": 0.0}
    assert CocoMetric.default_prefix == "coco"
    found = {"coco/bbox_mAP": 0.5, "coco/cat_precision": 0.5, "time": 0.2}
    assert dense.figures(cfg, found) == {"coco/bbox_mAP": 0.5}
    cfg = load_config(ROOT / "mmseg_configs/semaim_upernet_scenes.py", {})
    assert dense.figures(cfg, {"mIoU": 4.0, "time": 0.2}) == {"mIoU": 4.0} and dense.figures(cfg, {}) == {}


def test_a_signal_in_a_validation_stops_at_once_and_in_training_after_the_iteration():
    loop = ResumableIterations.__new__(ResumableIterations)
    loop._runner = SimpleNamespace(message_hub=SimpleNamespace(get_info=lambda name: stage))
    stage = "val"
    with pytest.raises(KeyboardInterrupt):
        loop._on_signal(signal.SIGTERM, None)
    assert loop.stop_signal == signal.SIGTERM
    loop.stop_signal, stage = None, "train"
    loop._on_signal(signal.SIGTERM, None)
    assert loop.stopping and loop.stop_signal == signal.SIGTERM


def test_a_run_has_the_figures_of_its_last_validation_though_it_found_nothing():
    validations = iter([{"coco/bbox_mAP": 0.5}, {}])

    class Batches(list):
        batch_sampler = SimpleNamespace(start=0)

    class Loop(ResumableIterations):
        def run_iter(self, idx, data_batch):
            self._iter += 1

        def share_buffers(self):
            pass

    val_loop = SimpleNamespace(run=lambda: next(validations))
    runner = SimpleNamespace(val_loop=val_loop, call_hook=lambda name: None, model=torch.nn.Identity(), hooks=[])
    loop = Loop.__new__(Loop)
    loop._runner, loop.dataloader, loop.max_iters, loop.val_interval, loop._iter = runner, Batches([0] * 4), 4, 2, 0
    loop.metrics = None
    loop.work()
    assert loop.metrics == {} and next(validations, None) is None
