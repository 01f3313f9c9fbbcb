"""A resumed run continues with its own settings, through the command: options repeated, changed, or edited since."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import flags, losses, one_line, results, tool

from semaim.checkpoints.files import read_checkpoint, write_checkpoint
from semaim.engine.config import load_config
from semaim.engine.resuming import resume_settings
from semaim.errors import UserError
from semaim.results.logs import read_lines

ROOT = Path(__file__).resolve().parent.parent
SCENES = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"
PROBE = "semaim/configs/linear/vit_tiny_scenes.py"
SIZES = {
    "model.network.img_size": 32, "model.network.embed_dim": 32, "model.network.num_heads": 2, "model.network.depth": 1,
}  # fmt: skip
LOGS = {
    "num_workers": 0,
    "default_hooks.logger.interval": 1,
    "default_hooks.checkpoint.interval": 1,
    "log_processor.window_size": 1,
}
RECIPE = {"total_batch_size": 8, "base_lr": 0.05, "train_cfg.max_epochs": 2, "param_scheduler.warmup": 0.5}


def cut(whole, parts):
    """A copy of a run, as it was after its first epoch."""
    parts.mkdir()
    shutil.copy(whole / "epoch_1.pth", parts)
    (parts / "latest.pth").symlink_to("epoch_1.pth")
    return parts


def logged(done):
    """The lines of a run's log that tell of its resumption."""
    lines = [line.split("INFO - ", 1)[-1] for line in done.stdout.splitlines()]
    return [line for line in lines if line.startswith(("continues", "--override", "changed", "--resume"))]


@pytest.fixture(scope="module")
def whole(labelled, tmp_path_factory):
    """A linear probe of random weights, two epochs; begun with --resume in an empty folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    arguments = ["--data-root", labelled, "--work-dir", folder, "--resume", *flags(SIZES | LOGS | RECIPE)]
    done = tool("train.py", PROBE, *arguments)
    assert done.returncode == 0, done.stderr
    assert logged(done) == [f"--resume: no checkpoint in {folder}: the run starts anew"]
    return folder


def test_a_bare_resume_is_the_uninterrupted_run_to_the_last_bit(whole, tmp_path):
    parts = cut(whole, tmp_path / "parts")
    done = tool("train.py", PROBE, "--work-dir", parts, "--resume")
    assert done.returncode == 0, done.stderr
    expected = {step: loss for step, loss in losses(whole).items() if step > 5}
    assert losses(parts) == expected and len(expected) == 5
    ours, theirs = (read_checkpoint(folder / "epoch_2.pth")["model"] for folder in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    same = ("metrics", "cfg_options", "data", "config", "epochs", "seed")
    assert {key: results(parts)[key] for key in same} == {key: results(whole)[key] for key in same}
    assert "overrides" not in results(parts)
    (line,) = logged(done)
    assert "given at its start" in line and all(f"{key} = {value}" in line for key, value in RECIPE.items())


def test_what_is_given_otherwise_is_an_error_unless_overridden_and_then_on_record(whole, labelled, tmp_path):
    parts = cut(whole, tmp_path / "parts")
    longer = {"train_cfg.max_epochs": 3, "base_lr": 0.01}
    done = tool("train.py", PROBE, "--work-dir", parts, "--resume", *flags(longer))
    one_line(done, "latest.pth has base_lr = 0.05, given is 0.01; train_cfg.max_epochs = 2, given is 3")
    assert "--override" in done.stderr and {path.name for path in parts.iterdir()} == {"epoch_1.pth", "latest.pth"}
    one_line(tool("train.py", PROBE, "--work-dir", parts, "--override"), "--override is for --resume")

    # What is given again as it was, and what only says where and how to compute, needs no --override.
    given = flags(longer | {"total_batch_size": 8, "images_per_gpu": 4})
    done = tool("train.py", PROBE, "--data-root", labelled, "--work-dir", parts, "--resume", "--override", *given)
    assert done.returncode == 0, done.stderr
    assert "learning rate 0.0003125 = 0.01 x 8 / 256" in done.stdout and "3 epochs" in done.stdout
    assert logged(done)[1:] == [
        "--override: base_lr = 0.01, was 0.05",
        "--override: train_cfg.max_epochs = 3, was 2",
        "changed from here on: images_per_gpu = 4",
    ]
    assert max(losses(parts)) == 30  # 15 steps, each of two passes
    found = results(parts)
    assert found["overrides"] == {"base_lr": [0.05, 0.01], "train_cfg.max_epochs": [2, 3]}
    assert found["cfg_options"]["base_lr"] == 0.01 and found["cfg_options"]["total_batch_size"] == 8
    # They are the run's own from then on, and stay on record.
    (parts / "results.json").unlink()
    done = tool("train.py", PROBE, "--work-dir", parts, "--resume")
    assert done.returncode == 0, done.stderr
    assert results(parts)["overrides"] == found["overrides"] and results(parts)["metrics"] == found["metrics"]


def test_a_validations_logged_loss_is_its_own_and_no_mean_over_several(whole, tmp_path):
    parts = cut(whole, tmp_path / "parts")
    options = flags({"log_processor.window_size": 20, "train_cfg.max_epochs": 3})
    done = tool("train.py", PROBE, "--work-dir", parts, "--resume", "--override", *options)
    assert done.returncode == 0, done.stderr
    second, third = (line["loss"] for line in read_lines(parts) if "top1" in line)
    assert third == results(parts)["metrics"]["loss"] != second


def made(tmp_path, config=SCENES, changes=(), **options):
    """A checkpoint of a run of a config with these options, and a work folder for it, without the run."""
    cfg = load_config(ROOT / config, options)
    cfg.work_dir = str(tmp_path)
    cfg.origin = {"config": Path(config).name}
    settings = cfg.to_dict()
    for path, value in changes:
        *above, last = path.split(".")
        node = settings
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    write_checkpoint({"format": "semaim", "optimizer": {}, "config": settings}, tmp_path / "latest.pth")


def resumed(tmp_path, config=SCENES, given=None, override=False, **places):
    """The config of a resumed run, and the lines for its log."""
    cfg = load_config(ROOT / config, given)
    cfg.work_dir = str(tmp_path)
    lines = resume_settings(cfg, (given or {}) | places, "auto", override)[1]
    return cfg, lines


def test_an_edited_config_does_not_change_a_run(tmp_path):
    made(tmp_path, changes=[("optim_wrapper.optimizer.weight_decay", 0.3), ("dataset.min_scale", 0.5)])
    cfg, (line,) = resumed(tmp_path)
    assert cfg.optim_wrapper.optimizer.weight_decay == 0.3 and cfg.dataset.min_scale == 0.5
    assert "which are different in the config now: " in line and "optim_wrapper.optimizer.weight_decay = 0.3" in line
    # Another config is no edited one.
    with pytest.raises(UserError, match="was begun with semaim_vit_tiny_scenes.py, not with mae_vit_tiny_scenes.py"):
        resumed(tmp_path, "semaim/configs/pretrain/mae_vit_tiny_scenes.py")
    # A path is the same however it is written; another data root is an error that names the flag.
    made(tmp_path, **{"dataset.root": str(tmp_path / "data")})
    resumed(tmp_path, **{"dataset.root": f"{tmp_path}/./data"})
    with pytest.raises(UserError, match=r"dataset.root = .*data, given is elsewhere \(--data-root\)"):
        resumed(tmp_path, **{"dataset.root": "elsewhere"})
    with pytest.raises(UserError, match="started from random weights and continues from its own weights: leave it out"):
        resumed(tmp_path, override=True, pretrained="other.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("model.network.type", "MAE"), "model.network.type = MAE, the config SemAIM; what is built is taken from no"),
        (("custom_hooks", [{"type": "EMAHook"}]), "custom_hooks.0.type = EMAHook"),
        (("optim_wrapper.constructor", "os.system"), "optim_wrapper.constructor = os.system"),
        (("model.network._scope_", "mmdet"), "unknown config key model.network._scope_"),
        (("model.network.depth", torch.zeros(1)), "holds a Tensor in model.network.depth"),
        (("total_batch_size", 0), "total_batch_size is 0"),
    ],
)
def test_a_file_names_nothing_to_build(tmp_path, change, message):
    made(tmp_path, changes=[change])
    with pytest.raises(UserError, match=re.escape(message)):
        resumed(tmp_path)


def test_options_that_named_what_is_built_are_given_again(tmp_path):
    target = {"model.network.target": {"_delete_": True, "type": "FeatureTarget"}}
    made(tmp_path, **json.loads(json.dumps(target)), **{"total_batch_size": 32})
    with pytest.raises(UserError, match="target.type = FeatureTarget, the config PixelTarget.*give --cfg-options"):
        resumed(tmp_path)
    cfg, _ = resumed(tmp_path, given=json.loads(json.dumps(target)))
    assert cfg.model.network.target == {"type": "FeatureTarget"} and cfg.total_batch_size == 32
    # Writers and hooks beside the training are the config's.
    made(tmp_path, changes=[("visualizer.vis_backends", [{"type": "LocalVisBackend"}])])
    assert len(resumed(tmp_path)[0].visualizer.vis_backends) == 2


def test_detectors_and_segmentors_too(tmp_path):
    pytest.importorskip("mmdet", reason="mmdet is not installed: runs after tools/setup.sh --extras all")
    config = "mmdet_configs/semaim_mask_rcnn_scenes.py"
    made(tmp_path, config, **{"param_scheduler.warmup": 0.1, "train_cfg.max_iters": 50, "model.backbone.depth": 2})
    cfg, (line,) = resumed(tmp_path, config)
    assert (cfg.train_cfg.max_iters, cfg.param_scheduler.warmup, cfg.model.backbone.depth) == (50, 0.1, 2)
    assert "param_scheduler.warmup = 0.1" in line
    with pytest.raises(UserError, match="train_cfg.max_iters = 50, given is 60"):
        resumed(tmp_path, config, {"train_cfg.max_iters": 60})
    given = {"train_cfg.max_iters": 60, "param_scheduler.warmup": 0.2}
    cfg, lines = resumed(tmp_path, config, given, override=True)
    assert (cfg.train_cfg.max_iters, cfg.param_scheduler.warmup) == (60, 0.2)
    assert cfg.overrides == {"train_cfg.max_iters": [50, 60], "param_scheduler.warmup": [0.1, 0.2]}
    with pytest.raises(UserError, match=r"train_dataset.data_root = data/scenes/coco, given is other \(--data-root\)"):
        resumed(tmp_path, config, **{"train_dataset.data_root": "other"})
