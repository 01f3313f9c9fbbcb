"""UperNet against mmseg's own: its shipped config, its optimizer's groups, and files with its names."""

from pathlib import Path

import pytest
import torch
from commands import flags, results, tool
from schedules import rates, walked

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")

from mmengine.config import Config  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, init_default_scope  # noqa: E402

from semaim import checkpoints  # noqa: E402
from semaim.checkpoints.safe_reading import read_file  # noqa: E402
from semaim.data.scenes import write_scenes  # noqa: E402
from semaim.engine import dense, dense_task  # noqa: E402
from semaim.engine.config import load_config  # noqa: E402
from semaim.engine.schedule import plan_batch  # noqa: E402
from semaim.errors import UserError
from semaim.models.classifier import Classifier  # noqa: E402
from semaim.parity import FAMILIES  # noqa: E402
from semaim.parity.cases import Case, run_case  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "mmseg_configs/mae_upernet.py"
#: MAE's UperNet of 12 blocks, but narrow, on crops of 64 pixels.
SMALL = {
    "model.backbone.embed_dim": 24,
    "model.backbone.num_heads": 4,
    "model.backbone.img_size": 64,
    "model.neck.embed_dim": 24,
    "model.decode_head.in_channels": [24] * 4,
    "model.decode_head.channels": 8,
    "model.auxiliary_head.in_channels": 24,
    "model.auxiliary_head.channels": 8,
    "model.test_cfg.crop_size": (64, 64),
    "model.test_cfg.stride": (43, 43),
    "num_workers": 0,
}


@pytest.fixture(scope="module", autouse=True)
def scope():
    """Names are looked up in mmseg here, and not in tests of other files that follow in the same process."""
    yield
    init_default_scope("mmengine")


@pytest.fixture(scope="module")
def shipped():
    """mmseg's config of the released MAE UperNet."""
    import mmseg

    folder = Path(mmseg.__file__).parent / ".mim/configs/mae"
    return Config.fromfile(folder / "mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py")


@pytest.fixture(scope="module")
def theirs(shipped):
    """mmseg's own segmentor of that config, as small as ours, with random weights, tables and statistics."""
    model = Config(shipped.model.to_dict())
    model.pretrained = None
    model.backbone.update(embed_dims=24, num_heads=4, img_size=(64, 64))
    model.neck.embed_dim = model.auxiliary_head.in_channels = 24
    model.decode_head.update(in_channels=[24] * 4, channels=8)
    model.auxiliary_head.channels = 8
    model.test_cfg.update(crop_size=(64, 64), stride=(43, 43))
    dense.enter(load_config(ROOT / CONFIG))
    torch.manual_seed(0)
    segmentor = revert_sync_batchnorm(MODELS.build(model))
    for name, tensor in segmentor.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(std=0.3)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    segmentor.eval()
    return segmentor


@pytest.fixture(scope="module")
def released(theirs, tmp_path_factory):
    """A file as mmseg 0.x released it."""
    path = tmp_path_factory.mktemp("released") / "upernet_mae.pth"
    meta = {"iter": 160000, "CLASSES": ("wall", "building"), "mmseg_version": "0.24.1"}
    torch.save({"meta": meta, "state_dict": theirs.state_dict(), "optimizer": {}}, path)
    return path


def ours():
    """Our segmentor of `SMALL`."""
    cfg = load_config(ROOT / CONFIG, SMALL)
    dense.enter(cfg)
    return revert_sync_batchnorm(MODELS.build(cfg.model)).eval()


def test_the_config_is_the_shipped_one(shipped):
    cfg = load_config(ROOT / CONFIG)
    norm = {"type": "SyncBN", "requires_grad": True}
    for part in ("decode_head", "auxiliary_head"):
        assert {**cfg.model[part], "norm_cfg": norm} == shipped.model[part]
    assert {**shipped.model.neck, "norm_cfg": {"type": "SyncBN"}} == cfg.model.neck
    assert cfg.model.data_preprocessor == shipped.model.data_preprocessor
    assert cfg.model.test_cfg == shipped.model.test_cfg and cfg.model.train_cfg == shipped.model.train_cfg == {}
    backbone = shipped.model.backbone
    assert (cfg.model.backbone.drop_path_rate, cfg.model.backbone.layer_scale) == (0.1, 1.0)
    assert (backbone.drop_path_rate, backbone.init_values, backbone.norm_cfg.eps) == (0.1, 1.0, 1e-6)
    assert backbone.out_indices == [3, 5, 7, 11] and backbone.img_size == (512, 512) and backbone.attn_drop_rate == 0
    # The optimizer, its rate, and the schedule; of the batch, 8 cards of 2 images.
    assert {**cfg.optim_wrapper.optimizer, "lr": cfg.base_lr} == shipped.optim_wrapper.optimizer
    assert cfg.base_batch_size == cfg.total_batch_size == 8 * shipped.train_dataloader.batch_size
    assert cfg.train_cfg.max_iters == shipped.train_cfg.max_iters == 160000
    assert rates(cfg) == pytest.approx(walked(shipped.param_scheduler, 160000), rel=1e-9, abs=1e-12)
    assert cfg.train_cfg.val_interval == shipped.train_cfg.val_interval
    # The images: labels lose their 0 in mmseg's step, in ours by the data set, which tells the step.
    train, test = shipped.train_dataloader.dataset, shipped.val_dataloader.dataset
    for mine, other in ((cfg.train_dataset, train), (cfg.val_dataset, test)):
        steps = [{k: v for k, v in step.items() if k != "reduce_zero_label"} for step in other.pipeline]
        assert mine.pipeline == steps and mine.type == other.type and mine.data_prefix == other.data_prefix
    assert all(step.get("reduce_zero_label", True) for step in train.pipeline)
    dense.enter(cfg)
    from mmseg.evaluation import IoUMetric
    from mmseg.registry import METRICS

    assert issubclass(METRICS.get(cfg.val_evaluator.type), IoUMetric)  # ours may count besides
    assert cfg.val_evaluator.iou_metrics == shipped.val_evaluator.iou_metrics


def test_the_large_and_the_wide_config_have_the_sizes_of_mmsegs_beit():
    import mmseg

    beit = Path(mmseg.__file__).parent / ".mim/configs/beit/beit-large_upernet_8xb1-amp-160k_ade20k-640x640.py"
    shipped = Config.fromfile(beit)
    large, wide = (load_config(ROOT / f"mmseg_configs/semaim_upernet_{name}.py") for name in ("large", "640"))
    backbone, head = large.model.backbone, large.model.decode_head
    assert list(backbone.out_blocks) == shipped.model.backbone.out_indices
    assert backbone.drop_path_rate == shipped.model.backbone.drop_path_rate
    assert (head.in_channels, head.channels) == (shipped.model.decode_head.in_channels, 1024)
    assert wide.model.test_cfg == shipped.model.test_cfg
    for mine, loader in ((wide.train_dataset, shipped.train_dataloader), (wide.val_dataset, shipped.val_dataloader)):
        steps = [{k: v for k, v in one.items() if k != "reduce_zero_label"} for one in loader.dataset.pipeline]
        assert mine.pipeline == steps


def test_a_changed_record_of_sizes_or_names_fails(shared):
    golden = shared / "golden/mmseg"
    changes = {
        "tta_sizes": (("300x400", "released", 0, "size", 1), 684),
        "upernet_keys": (("keys", "backbone.layers.7.gamma_2", "shape", 0), 767),
    }
    for name, (place, value) in changes.items():
        case = Case(golden / f"{name}.json")
        assert run_case(case, FAMILIES["mmseg"]).passed
        holder = case.scalars
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = value
        assert [check.passed for check in run_case(case, FAMILIES["mmseg"]).checks].count(False) == 1


def groups_of(wrapper, model, rename=lambda name: name):
    """name -> (share of the learning rate, weight decay)."""
    names = {id(parameter): rename(name) for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (pytest.approx(group["lr"] / 1e-4), group["weight_decay"])
        for group in wrapper.optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.filterwarnings("ignore:.*DeprecationWarning")
def test_learning_rates_and_weight_decay_are_those_of_mmsegs_constructor(shipped, theirs):
    from mmseg.engine.optimizers import LayerDecayOptimizerConstructor

    from semaim.segmentation.mmseg_names import our_name

    wrapped = {"type": "OptimWrapper", "optimizer": dict(shipped.optim_wrapper.optimizer)}
    constructor = LayerDecayOptimizerConstructor(wrapped, dict(shipped.optim_wrapper.paramwise_cfg))
    expected = groups_of(constructor(theirs), theirs, our_name)
    cfg, model = load_config(ROOT / CONFIG), ours()
    options = dict(cfg.optim_wrapper)
    build = OPTIM_WRAPPER_CONSTRUCTORS.get(options.pop("constructor"))
    paramwise = options.pop("paramwise_cfg")
    options["optimizer"] = {**options["optimizer"], "lr": 1e-4}
    found = groups_of(build(options, paramwise)(model), model)
    assert found == expected and len(found) == len(list(model.parameters()))
    assert found["backbone.pos_embed"] == (pytest.approx(0.65**13), 0.05)


def test_a_released_file_computes_as_in_mmseg(released, theirs):
    model, lines = ours(), []
    before = model.state_dict()["backbone.blocks.0.gamma_1"].clone()
    dense.load_whole(model, str(released), lines.append)
    assert not torch.equal(model.backbone.blocks[0].gamma_1, before)
    assert lines[0].startswith(f"loaded {len(model.state_dict())} tensors from {released}")
    images = torch.randn(1, 3, 64, 100)
    metas = [{"ori_shape": (64, 100), "img_shape": (64, 100)}]
    with torch.no_grad():
        expected, found = (one.inference(images, metas) for one in (theirs, model))
    assert expected.shape == (1, 150, 64, 100) and expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_a_released_file_is_measured_and_predicts_through_the_tools(released, tmp_path):
    write_scenes(tmp_path / "scenes", 10, 64, seed=0)
    ade = tmp_path / "scenes/ade"
    small = {key: ",".join(map(str, v)) if isinstance(v, list | tuple) else v for key, v in SMALL.items()}
    small |= {"val_dataset.pipeline.1.scale": "(256,64)", "test_pipeline.1.scale": "(256,64)"}
    done = tool("test.py", CONFIG, released, "--data-root", ade, "--work-dir", tmp_path / "test", *flags(small))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tensors from" in done.stdout and "mIoU" in results(tmp_path / "test")["metrics"]
    image = next((ade / "images/validation").iterdir())
    done = tool("predict.py", CONFIG, released, image, "--out", tmp_path / "seen", *flags(small))
    assert done.returncode == 0 and "150 classes" in done.stdout, done.stderr[-3000:]


def test_what_is_no_mae_of_mmsegs_or_an_older_file_of_ours_is_refused(released, tmp_path):
    content = read_file(released)
    state, model = content["state_dict"], ours()

    def refused(changed, message):
        torch.save({"state_dict": changed}, tmp_path / "x.pth")
        with pytest.raises(UserError, match=message) as error:
            dense.load_whole(model, str(tmp_path / "x.pth"), print)
        assert "\n" not in str(error.value) and "x.pth" in str(error.value)

    index = "backbone.layers.3.attn.relative_position_index"
    refused({**state, index: state[index].flip(1)}, "layers.3.* is not that of square crops")
    refused({**state, "backbone.layers.0.attn.q_bias": torch.zeros(24)}, "does not have backbone.layers.0.attn.q_bias")
    refused({**state, "backbone.ln1.weight": torch.zeros(24)}, "backbone.norm.weight")
    refused({n: t for n, t in state.items() if "gamma_2" not in n}, "12 weights are missing")
    old = {**model.state_dict(), "backbone.pos_embed": torch.zeros(1, 5, 24)}
    refused(old, "older version, which kept the pretraining's table of 4 positions")


def test_a_released_file_is_told_from_a_pretrained_encoder(released):
    found = checkpoints.read(released)
    assert found.dialect == "mmseg segmentor" and not any("relative_position_index" in name for name in found.skipped)
    assert {"blocks.0.attn.rel_bias", "blocks.11.gamma_2"} <= found.state.keys()
    assert "mmseg segmentor" in checkpoints.inspect(released)
    model = Classifier(0, "avg", embed_dim=24, num_heads=4, img_size=64)
    with pytest.raises(UserError, match="another network's encoder: it computes with .*rel_bias"):
        checkpoints.load(model, released, ("fc_norm",))


@pytest.mark.parametrize(
    ("processes", "images", "synced", "seen"),
    [(1, 16, True, None), (8, 2, True, None), (1, 4, True, 4), (2, 4, True, 8), (4, 4, False, 4)],
)
def test_how_many_images_a_batch_normalisation_sees(processes, images, synced, seen):
    norm = torch.nn.SyncBatchNorm(3) if synced else torch.nn.BatchNorm2d(3)
    told = dense_task.batch_norm_note(torch.nn.Sequential(norm), plan_batch(16, processes, images, 1.0))
    assert told is None if seen is None else f"sees {seen} images at a time, not the 16 of a step" in told
    assert dense_task.batch_norm_note(torch.nn.LayerNorm(3), plan_batch(16, 1, 4, 1.0)) is None
