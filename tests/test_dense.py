"""What detectors and segmentors share."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")

from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402

from semaim.data.scenes import write_scenes  # noqa: E402
from semaim.engine import dense  # noqa: E402
from semaim.engine.config import load_config  # noqa: E402
from semaim.engine.runner import ResumableIterations  # noqa: E402

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
    dense.set_data_root(cfg, str(tmp_path / "scenes" / folder))
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
    runner = SimpleNamespace(val_loop=val_loop, call_hook=lambda name: None, model=torch.nn.Identity())
    loop = Loop.__new__(Loop)
    loop._runner, loop.dataloader, loop.max_iters, loop.val_interval, loop._iter = runner, Batches([0] * 4), 4, 2, 0
    loop.metrics = None
    loop.work()
    assert loop.metrics == {} and next(validations, None) is None
