"""bf16 on a CPU: asked for, refused where the processor has no instructions for it, recorded, and as good as fp32."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import flags, losses, one_line, results

from semaim.checkpoints.files import newest_checkpoint, read_checkpoint
from semaim.data.scenes import write_scenes
from semaim.engine import precision
from semaim.engine.config import load_config
from semaim.engine.saving import choose_checkpoint
from semaim.engine.training import train
from semaim.results.stages import plan

ROOT = Path(__file__).resolve().parent.parent
SCENES, KNN = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py", "semaim/configs/knn/vit_tiny_scenes.py"
BF16 = {"model.cpu_precision": "bf16"}
SMALL = {
    "model.network.img_size": 32, "model.network.embed_dim": 32, "model.network.num_heads": 2, "model.network.depth": 2,
    "num_workers": 0,
}  # fmt: skip


@pytest.fixture
def processor(monkeypatch):
    """Makes this processor one with, or without, instructions for bf16: PyTorch computes the same without, slowly."""
    return lambda has: monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has)


def test_what_the_processor_has_is_what_the_kernel_says():
    words = Path("/proc/cpuinfo")
    if not words.exists():
        pytest.skip("no /proc/cpuinfo to compare with: runs on Linux")
    assert precision.cpu_has_bf16() == ("avx512_bf16" in words.read_text().split())


def test_training_in_bf16_is_near_that_in_fp32_and_resumes_to_the_last_bit(tiny_config, processor):
    processor(True)
    whole, parts, full = tiny_config("whole", **BF16), tiny_config("parts", **BF16), tiny_config("full")
    runner = train(whole)
    assert runner.model.describe() and runner.model.computed_in("cpu") == "bf16"
    images, order = torch.randn(1, 3, 32, 32), torch.arange(16)[None]
    with runner.model.autocast(torch.device("cpu")):
        assert runner.model.network.predict(images, order).dtype == torch.bfloat16
    (Path(whole.work_dir) / "epoch_2.pth").rename(Path(whole.work_dir).parent / "whole.pth")
    (Path(whole.work_dir) / "latest.pth").unlink()
    train(parts, choose_checkpoint(parts, str(Path(whole.work_dir) / "epoch_1.pth")))
    train(full)
    low = losses(whole.work_dir)
    assert losses(parts.work_dir) == {step: loss for step, loss in low.items() if step > 5} and len(low) == 10
    assert low != losses(full.work_dir) and low == pytest.approx(losses(full.work_dir), rel=1e-2)
    state = read_checkpoint(newest_checkpoint(parts.work_dir))
    whole_state = read_checkpoint(Path(whole.work_dir).parent / "whole.pth")
    for name, tensor in state["model"].items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, whole_state["model"][name])


def test_it_is_refused_where_the_processor_has_no_instructions_for_it(here, scenes, tmp_path, processor):
    processor(True)
    arguments = [SCENES, "--data-root", scenes, "--work-dir", tmp_path / "run"]
    short = {"total_batch_size": 8, "train_cfg.max_epochs": 1, "param_scheduler.warmup": 0.5, **SMALL}
    done = here("train.py", *arguments, *flags(short | BF16))
    assert done.returncode == 0 and "computed in bf16" in done.stdout, done.stderr
    # Neither a bare --resume nor a longer run changes in silence what it computes in.
    again = [*arguments, "--resume", *flags({"train_cfg.max_epochs": 2}), "--override"]
    processor(False)
    for line in (arguments[:-1] + [tmp_path / "new", *flags(short | BF16)], again):
        one_line(here("train.py", *line), "model.cpu_precision is bf16, and this processor has no instructions for it")
    fp32 = {"train_cfg.max_epochs": 2, "model.cpu_precision": "fp32"}
    one_line(here("train.py", *arguments, "--resume", *flags(fp32)), "model.cpu_precision = bf16, given is fp32")
    done = here("train.py", *arguments, "--resume", "--override", *flags(fp32))
    assert done.returncode == 0 and "computed in fp32" in done.stdout, done.stderr
    overrides = read_checkpoint(tmp_path / "run/latest.pth")["config"]["overrides"]
    assert overrides == {"train_cfg.max_epochs": [1, 2], "model.cpu_precision": ["bf16", "fp32"]}
    wrong = flags(short | {"model.cpu_precision": "fp16"})
    one_line(here("train.py", *arguments[:-1], tmp_path / "new", *wrong), "cpu_precision 'fp16' is unknown")


def test_features_are_in_fp32_unless_asked_and_results_say_which(here, labelled, pretrained, tmp_path, processor):
    processor(True)
    arguments = [KNN, pretrained, "--data-root", labelled, "--work-dir", tmp_path]
    found = {}
    for name, more in (("fp32", {}), ("bf16", BF16)):
        done = here("test.py", *arguments, *flags({**SMALL, "evaluation.ks": "3,10", **more}))
        assert done.returncode == 0 and results(tmp_path)["precision"] == name, done.stderr
        found[name] = np.load(tmp_path / "features/train/features.npy").astype(np.float32)
    difference = np.abs(found["bf16"] - found["fp32"])
    assert 0 < difference.max() < 0.1  # of features of variance 1


def test_a_detectors_training_takes_the_same_setting(processor):
    dense = pytest.importorskip("semaim.engine.dense")
    layer = torch.nn.Linear(4, 4)

    def computed(**more):
        wrapper = dense.BFloat16OptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1), **more)
        with wrapper.optim_context(layer):
            return wrapper.precision, layer(torch.ones(1, 4)).dtype

    processor(True)
    assert computed() == ("fp32", torch.float32) and computed(cpu_precision="bf16") == ("bf16", torch.bfloat16)
    processor(False)
    with pytest.raises(precision.UserError, match="optim_wrapper.cpu_precision is bf16, and this processor"):
        computed(cpu_precision="bf16")


def test_the_quick_scale_pretrains_in_bf16_where_the_processor_has_it(processor, tmp_path):
    for has in (True, False):
        processor(has)
        pretraining, *others = [stage for stage in plan("quick", tmp_path, ["semaim"]) if stage.method]
        assert pretraining.name == "pretrain" and pretraining.options == (BF16 if has else {})
        assert not any(key.endswith("precision") for stage in others for key in stage.options)


@pytest.mark.slow
def test_the_benchmark_measures_bf16_where_the_processor_has_it(here, processor, tmp_path):
    arguments = ["pretrain", "--precision", "bf16", "--model", "tiny", "--depth", 1, "--img-size", 32, "--batch", 1]
    processor(False)
    one_line(here("benchmark.py", *arguments), "--precision bf16: this processor has no instructions for it")
    processor(True)
    done = here("benchmark.py", *arguments, "--repeats", 1, "--out", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["details"]["precision"] == "bf16"


@pytest.mark.slow
def test_pretraining_in_bf16_is_as_good_as_in_fp32(here, tmp_path, one_thread):
    """Three seeds: bf16 moves the means of loss and k-NN by less than two standard deviations of fp32's seeds.

    As three seeds may happen to agree: or by less than 1 % of the loss, and 4 points (the k-NN of 400 images, of which
    one in six is right, has a standard error of 1.9, a difference of two means of three seeds 1.5).
    """
    if not precision.cpu_has_bf16():
        pytest.skip("this processor has no instructions for bf16: runs on one with AVX-512 BF16, such as AMD Zen 4")
    write_scenes(tmp_path / "scenes", 800, 32, seed=0, level="easy", val_fraction=0.5, unlabelled=1000)
    found: dict[str, list[tuple[float, float]]] = {"fp32": [], "bf16": []}
    for seed in range(3):
        for name, runs in found.items():
            folder = tmp_path / f"{name}{seed}"
            cfg = load_config(ROOT / "semaim/configs/pretrain/semaim_vit_tiny_scenes_easy.py", {
                "dataset.root": str(tmp_path / "scenes/unlabelled"), "model.network.img_size": 32, "num_workers": 0,
                "train_cfg.max_epochs": 4, "seed": seed, "model.cpu_precision": name, "log_processor.window_size": 1,
                "default_hooks.logger.interval": 1, "default_hooks.pictures.interval": 0,
            })  # fmt: skip
            cfg.work_dir = str(folder)
            train(cfg)
            knn = here(
                "test.py", "semaim/configs/knn/vit_tiny_scenes_easy.py", folder / "latest.pth", "--data-root",
                tmp_path / "scenes/classes", "--work-dir", folder / "knn",
                *flags({"model.network.img_size": 32, "num_workers": 0, "evaluation.ks": "[20]"}),
            )  # fmt: skip
            assert knn.returncode == 0, knn.stderr
            last = list(losses(folder).values())[-30:]
            runs.append((float(np.mean(last)), results(folder / "knn")["metrics"]["knn20_top1"]))
    full, low = (np.array(found[name]) for name in ("fp32", "bf16"))
    spread, change = full.std(axis=0, ddof=1), low.mean(axis=0) - full.mean(axis=0)
    bound = np.maximum(2 * spread, [0.01 * full[:, 0].mean(), 4])
    assert full[:, 0].max() < 0.9 and (np.abs(change) < bound).all(), (full, low)  # it starts at 1.1
