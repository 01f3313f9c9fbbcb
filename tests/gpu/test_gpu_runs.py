"""Runs of the tools on each device: they resume, compile, join a process group and shard, and measure as a CPU does."""

import shutil

import pytest
from commands import ROOT, flags, losses, results
from devices import on, torchrun

SCENES = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"
STEPS = {
    "num_workers": 0, "total_batch_size": 8, "default_hooks.logger.interval": 1,
    "default_hooks.checkpoint.interval": 1, "log_processor.window_size": 1,
}  # fmt: skip
EPOCHS = {**STEPS, "train_cfg.max_epochs": 2, "param_scheduler.warmup": 0.5}
PRETRAIN = {**EPOCHS, "base_lr": 0.032}
#: Relative: a CPU repeats itself to the bit; on a GPU bf16 rounds to 8 bits, and sums are in no fixed order.
BOUND = {"cpu": 0, "cuda": 2e-2}


@pytest.fixture(scope="module")
def run(device, scenes, tmp_path_factory):
    """A pretraining of two epochs, of five steps each; on a GPU in bf16."""
    folder = tmp_path_factory.mktemp(device) / "run"
    on(device, "pretrain.sh", SCENES, 1, "--data-root", scenes, "--work-dir", folder, *flags(PRETRAIN))
    return folder


def cut(run, folder, checkpoint):
    """A work folder with one of a run's checkpoints, as if the run had ended there."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / checkpoint, folder)
    (folder / "latest.pth").symlink_to(checkpoint)


@pytest.mark.slow
def test_a_run_resumes(run, tmp_path, device):
    cut(run, tmp_path / "resumed", "epoch_1.pth")
    on(device, "train.py", SCENES, "--work-dir", tmp_path / "resumed", "--resume")
    whole = losses(run)
    assert len(whole) == 10 and whole[10] < whole[1]
    later = {step: loss for step, loss in whole.items() if step > 5}
    assert losses(tmp_path / "resumed") == pytest.approx(later, rel=BOUND[device])


@pytest.mark.slow
def test_a_compiled_run(run, scenes, tmp_path, device):
    if device == "cpu":
        pytest.skip("a C++ compiler takes minutes: runs on a GPU; test_gpu_stages.py compiles in seconds on a CPU")
    line = ["--data-root", scenes, "--work-dir", tmp_path, *flags(PRETRAIN | {"compile": True})]
    on(device, "pretrain.sh", SCENES, 1, *line)
    assert losses(tmp_path) == pytest.approx(losses(run), rel=2e-2)


#: Starts tools/train.py, and says what the model is wrapped in.
WRAPPED = """
import runpy, sys, torch
from semaim.engine.runner import SeededRunner
wrap = SeededRunner.wrap_model
def saying(self, *arguments):
    model = wrap(self, *arguments)
    print("wrapped in", type(model).__name__, "over", torch.distributed.get_backend(), flush=True)
    return model
SeededRunner.wrap_model = saying
runpy.run_path("tools/train.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("fsdp, kind", [(False, "DistributedModel"), (True, "FSDPPretraining")])
def test_a_process_group_of_one(fsdp, kind, run, scenes, tmp_path, device):
    script = tmp_path / "script.py"
    script.write_text(WRAPPED)
    options = flags(PRETRAIN | {"fsdp": fsdp})
    done = torchrun(device, script, SCENES, "--data-root", scenes, "--work-dir", tmp_path / "run", *options)
    assert f"wrapped in {kind} over {'nccl' if device == 'cuda' else 'gloo'}" in done.stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(run), rel=max(BOUND[device], 1e-5))
    cut(tmp_path / "run", tmp_path / "alone", "epoch_1.pth")  # it goes on without a group
    on(device, "train.py", SCENES, "--work-dir", tmp_path / "alone", "--resume", "--override", *flags({"fsdp": False}))
    later = {step: loss for step, loss in losses(run).items() if step > 5}
    assert losses(tmp_path / "alone") == pytest.approx(later, rel=max(BOUND[device], 1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["knn/vit_tiny_scenes.py", "linear/vit_tiny_scenes_fast.py"])
def test_frozen_features_measure_as_on_a_cpu(config, run, labelled, tmp_path, device):
    found = []
    for number, place in enumerate(("cpu", device)):
        folder = tmp_path / str(number)
        line = [ROOT / "semaim/configs" / config, run / "latest.pth", "--data-root", labelled, "--work-dir", folder]
        on(place, "test.py", *line)
        found.append(results(folder)["metrics"])
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, abs=0 if device == "cpu" else 10.01), key  # of ten images, one


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["finetune", "linear"])
def test_classifiers_train_as_on_a_cpu(kind, run, labelled, tmp_path, device):
    found = []
    for number, place in enumerate(("cpu", device)):
        folder = tmp_path / str(number)
        line = [ROOT / f"semaim/configs/{kind}/vit_tiny_scenes.py", "--pretrained", run / "latest.pth"]
        on(place, "train.py", *line, "--data-root", labelled, "--work-dir", folder, *flags(EPOCHS))
        found.append(losses(folder))
        assert 0 <= results(folder)["metrics"]["top1"] <= 100
    assert len(found[0]) == 10 and found[1] == pytest.approx(found[0], rel=BOUND[device])
    cut(tmp_path / "1", tmp_path / "resumed", "epoch_1.pth")
    on(device, "train.py", line[0], "--work-dir", tmp_path / "resumed", "--resume")
    later = {step: loss for step, loss in found[1].items() if step > 5}
    assert losses(tmp_path / "resumed") == pytest.approx(later, rel=BOUND[device])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_dense_tasks_train_resume_are_measured_and_predict(task, run, tmp_path, device):
    package = "mmdet" if task == "detection" else "mmseg"
    pytest.importorskip(package, reason=f"{package} is not installed: runs after tools/setup.sh --extras all")
    from semaim.data.scenes import write_scenes

    config, kind = {
        "detection": ("mmdet_configs/semaim_mask_rcnn_scenes.py", "coco"),
        "segmentation": ("mmseg_configs/semaim_upernet_scenes.py", "ade"),
    }[task]
    write_scenes(tmp_path / "scenes", 24, 96, seed=0)
    data, whole_run = tmp_path / "scenes" / kind, tmp_path / "whole"
    options = {**STEPS, "train_cfg.max_iters": 6, "train_cfg.val_interval": 3, "default_hooks.checkpoint.interval": 3}
    places = ["--data-root", data, "--work-dir", whole_run, "--pretrained", run / "latest.pth"]
    on(device, "dist_train.sh", config, 1, *places, *flags(options))
    whole = losses(whole_run)
    assert len(whole) == 6 and all(loss < 100 for loss in whole.values())
    cut(whole_run, tmp_path / "parts", "iter_3.pth")
    on(device, "train.py", config, "--work-dir", tmp_path / "parts", "--resume")
    later = {step: loss for step, loss in whole.items() if step > 3}
    # On a GPU the last bits of scores decide which boxes a detector samples.
    bound = 0 if device == "cpu" else {"detection": 0.3, "segmentation": 0.05}[task]
    assert losses(tmp_path / "parts") == pytest.approx(later, rel=bound)
    trained, measured = whole_run / "latest.pth", []
    for number, place in enumerate(("cpu", device)):
        folder = tmp_path / f"test{number}"
        on(place, "test.py", config, trained, "--data-root", data, "--work-dir", folder)
        measured.append(results(folder)["metrics"])
    assert measured[1] == pytest.approx(measured[0], abs=0 if device == "cpu" else 1.0)
    images = sorted((tmp_path / "scenes/coco/val2017").iterdir())[:2]
    on(device, "predict.py", config, trained, *images, "--out", tmp_path / "predicted")
    assert {path.stem for path in images} <= {path.stem for path in (tmp_path / "predicted").iterdir()}
